"""Threads that compute side by side."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_encoder
from tokenized_texts import tokenized_documents

from transforms.loaded_encoder import Encoded, LoadedEncoder
from transforms.streams import Streams, streams

ROOT = Path(__file__).parent.parent


@pytest.fixture
def three_threads():
    """As on a machine with three cores; tests run with one elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_each_item_is_taken_once_by_threads_of_one_core(three_threads):
    taken, threads = [], set()

    def take(item: int) -> None:
        torch.ones(1000, 1000).sum()  # Computes, so that a thread's setting counts.
        taken.append((item, torch.get_num_threads()))
        threads.add(threading.current_thread().name)

    Streams(3).for_each(take, range(50))
    assert sorted(taken) == [(item, 1) for item in range(50)]
    assert threading.current_thread().name not in threads


def test_as_many_items_at_a_time_as_there_are_streams(three_threads):
    together = threading.Barrier(3)
    Streams(3).for_each(lambda _: together.wait(timeout=60) and None, range(6))


def test_no_items_are_no_work():
    Streams(2).for_each(lambda _: pytest.fail("called"), [])


def test_an_error_ends_the_work_and_is_raised(three_threads):
    taken = []

    def take(item: int) -> None:
        taken.append(item)
        if item == 1:
            raise ValueError("item 1")

    some = Streams(2)
    with pytest.raises(ValueError, match="item 1"):
        some.for_each(take, range(10_000))
    assert len(taken) < 10_000
    some.for_each(taken.append, ["more"])
    assert taken[-1] == "more"


@pytest.fixture
def ctrl_c_interrupts():
    """As in a program of its own: Beam's job servers, of earlier tests, would be stopped first, for seconds."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_work_and_nothing_goes_on(three_threads, ctrl_c_interrupts):
    taken, main = [], threading.get_ident()

    def take(item: int) -> None:
        taken.append(item)
        if item == 3:
            signal.pthread_kill(main, signal.SIGINT)  # As a terminal's, it wakes the main thread.
        time.sleep(0.02)

    with pytest.raises(KeyboardInterrupt):
        Streams(2).for_each(take, range(10_000))
    count = len(taken)
    assert count < 1000
    time.sleep(0.1)
    assert len(taken) == count


def test_no_call_goes_on_when_an_error_is_raised(three_threads):
    going_on = []

    def take(item: int) -> None:
        if item == 0:
            raise ValueError("item 0")
        going_on.append(item)
        time.sleep(0.2)
        going_on.remove(item)

    with pytest.raises(ValueError, match="item 0"):
        Streams(3).for_each(take, range(3))
    assert going_on == []


def test_threads_that_cannot_be_started_are_told_and_the_others_end(three_threads, monkeypatch):
    start, before = threading.Thread.start, set(threading.enumerate())  # Some of those may end meanwhile.

    def start_one(thread: threading.Thread) -> None:
        if thread.name == "stream_1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match=r"can't start new thread: of 2 threads .*, 1 could be started; let this"):
        Streams(2)
    assert torch.get_num_threads() == 3
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) - before == set()


def run_script(script: str) -> str:
    """Returns what a program prints that begins with an encoder and two threads."""
    start = """
import os, signal, sys, threading, time
import torch
from conftest import make_tiny_encoder
torch.set_num_threads(2)
encoder = make_tiny_encoder()
texts = ["read the zip"] * 200
vectors = encoder.encode(texts, max_batch_tokens=64)
"""
    done = subprocess.run(
        [sys.executable, "-c", start + script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    return done.stdout.strip()


def test_a_forked_process_makes_its_own():
    script = """
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    os._exit(0 if (encoder.encode(texts, max_batch_tokens=64) == vectors).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_script(script) == "0"


def test_a_forked_process_computes_where_its_parent_did_with_all_cores():
    script = """
encoder.encode(["zip"])  # Too few for streams.
child = os.fork()
if child == 0:
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)
    os._exit(0 if abs(encoder.encode(["read the zip"])[0] - vectors[0]).max() < 1e-5 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_script(script) == "0"


def test_a_process_ends_without_waiting_for_streams():
    script = """
from transforms.streams import streams
threading.Thread(target=lambda: streams().for_each(lambda _: time.sleep(600), [1, 2]), daemon=True).start()
time.sleep(0.5)
print("ends")
"""
    assert run_script(script) == "ends"


def ends_soon(threads: set[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(10)
    return not any(thread.is_alive() for thread in threads)


def test_streams_end_once_another_number_of_them_is_needed(three_threads):
    before = set(threading.enumerate())
    first = streams()
    assert first is not None
    first.for_each(lambda _: None, range(10))
    of_first = set(threading.enumerate()) - before
    torch.set_num_threads(2)
    second = streams()
    assert second is not None
    first.for_each(lambda _: None, range(10))  # Those who hold it can go on.
    del first
    assert ends_soon(of_first)
    second.for_each(lambda _: None, range(10))


def test_what_was_computed_with_is_not_kept(three_threads):
    class Item:
        pass

    some = Streams(2)
    items = [Item() for _ in range(5)]
    left = [weakref.ref(item) for item in items]

    def fail(item: Item) -> None:
        raise ValueError("told")

    gc.disable()  # It would find what only holds itself.
    try:
        some.for_each(lambda _: None, items)
        with pytest.raises(ValueError, match="told"):
            some.for_each(fail, items)
        del items
        deadline = time.monotonic() + 10
        while any(item() for item in left) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(item() for item in left)
    finally:
        gc.enable()


def test_other_threads_keep_their_cores(three_threads):
    found = []
    Streams(2)
    assert torch.get_num_threads() == 3
    later = threading.Thread(target=lambda: found.append((torch.ones(10).sum(), torch.get_num_threads())[1]))
    later.start()
    later.join()
    assert found == [3]


def test_a_process_has_them_once_and_a_stream_has_none(three_threads):
    found = []
    some = streams()
    assert some is not None
    assert (some, some.count) == (streams(), 3)
    some.for_each(lambda _: found.append(streams()), range(3))
    assert found == [None] * 3


def test_one_thread_needs_no_streams():
    assert torch.get_num_threads() == 1
    assert streams() is None


@pytest.mark.parametrize("num_texts", [1, 2, 60])
def test_texts_encoded_side_by_side_are_those_encoded_one_after_the_other(num_texts, three_threads):
    encoder = make_tiny_encoder()
    texts = [f"{'read ' * (number % 40)}zip {number}" for number in range(num_texts)]
    side_by_side = encoder.encode(texts, max_batch_tokens=64)
    torch.set_num_threads(1)
    np.testing.assert_allclose(side_by_side, encoder.encode(texts, max_batch_tokens=64), atol=1e-6)


def test_documents_encoded_side_by_side_keep_their_order_and_their_faults(three_threads):
    encoder = make_tiny_encoder()
    zip_id = encoder.tokenizer.tokenize(["zip"])[0].token_ids[0]
    with torch.no_grad():
        encoder.bert.embeddings.word_embeddings.weight[zip_id] = float("nan")
    texts = ["zip" if number in (7, 50) else "read " * (number % 30 + 1) for number in range(90)]
    documents = tokenized_documents(encoder, texts)
    saved: list[Encoded] = []
    lock = threading.Lock()

    def save(encoded) -> None:
        with lock:
            saved.extend(encoded)

    results = LoadedEncoder(encoder, max_batch_tokens=64).encode_documents(documents, save)
    assert [result.document for result in results] == [document.document for document in documents]
    assert [place for place, result in enumerate(results) if not isinstance(result, Encoded)] == [7, 50]
    assert len(saved) == 88
    alone = np.concatenate([encoder.encode([text]) for text in texts if text != "zip"])
    np.testing.assert_allclose([result.vector for result in results if isinstance(result, Encoded)], alone, atol=1e-5)


def test_the_time_of_groups_side_by_side_adds_up_to_the_time_they_took(three_threads, monkeypatch):
    encoder = make_tiny_encoder()
    loaded = LoadedEncoder(encoder, max_batch_tokens=64)
    together = threading.Barrier(3)
    encode = encoder.encode_tokens
    seconds = [0.0]
    monkeypatch.setattr("transforms.loaded_encoder.time.perf_counter", lambda: seconds[0])

    def slowly(tokens, max_batch_tokens):
        encoded = encode(tokens, max_batch_tokens)
        if together.wait(timeout=60) == 0:
            seconds[0] += 6.0
        together.wait(timeout=60)
        return encoded

    monkeypatch.setattr(encoder, "encode_tokens", slowly)
    documents = tokenized_documents(encoder, ["read " * 254] * 6)  # Six groups of 256 tokens, three at a time.
    results = loaded.encode_documents(documents)
    assert sum(result.encode_seconds for result in results if isinstance(result, Encoded)) == pytest.approx(
        12.0, rel=0.02
    )
