"""Windows that go through a BERT in batches."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import make_tiny_encoder

from transforms.packed_bert import PackedBert
from transforms.window_embedder import WindowEmbedder

LENGTHS = [3, 40, 3, 17, 64, 2, 17]
PAD_ID = 0


@pytest.fixture(scope="module")
def bert():
    return make_tiny_encoder().bert


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def embedder(request, monkeypatch) -> WindowEmbedder:
    """One that takes windows through BERT without padding, as on a CPU, and one with, as on a GPU."""
    if not request.param:
        monkeypatch.setattr(PackedBert, "fits", lambda _: False)
    return WindowEmbedder(PAD_ID)


def random_windows() -> list[np.ndarray]:
    randomness = np.random.default_rng(0)
    return [randomness.integers(5, 25, length) for length in LENGTHS]


@pytest.mark.parametrize("max_batch_tokens", [1, 50, 10_000])
def test_each_window_gets_its_own_token_embeddings_once(bert, embedder, max_batch_tokens):
    windows, found = random_windows(), {}
    for embedded in embedder.embed(bert, windows, max_batch_tokens):
        lengths = [LENGTHS[index] for index in embedded.window_indices]
        assert (embedded.padded_tokens >= lengths).all()
        for index, tokens in zip(embedded.window_indices, embedded.token_embeddings.split(lengths), strict=True):
            assert index not in found
            found[index] = tokens
    assert sorted(found) == list(range(len(windows)))
    for index, tokens in found.items():
        with torch.no_grad():
            expected = bert(input_ids=torch.from_numpy(windows[index])[None]).last_hidden_state[0]
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)


def test_the_longest_windows_come_first_within_the_bound(bert, embedder):
    batches = list(embedder.embed(bert, random_windows(), 64))
    longest = [max(LENGTHS[index] for index in batch.window_indices) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    assert longest[0] == max(LENGTHS)
    assert max(batch.padded_tokens.sum() for batch in batches) <= 64


def test_on_a_cpu_nothing_is_padded(bert):
    batches = list(WindowEmbedder(PAD_ID).embed(bert, random_windows(), 10_000))
    assert sum(batch.padded_tokens.sum() for batch in batches) == sum(LENGTHS)


def test_weights_are_laid_out_once_and_anew_where_they_have_changed(monkeypatch):
    bert, embedder, laid_out = make_tiny_encoder().bert, WindowEmbedder(PAD_ID), []
    make = PackedBert.__init__

    def count(packed_bert: PackedBert, bert) -> None:
        laid_out.append(bert)
        time.sleep(0.05)
        make(packed_bert, bert)

    monkeypatch.setattr(PackedBert, "__init__", count)

    def embed() -> None:
        list(embedder.embed(bert, random_windows(), 64))

    all_started = threading.Barrier(4)

    def embed_with_others(_) -> None:
        all_started.wait(timeout=60)
        embed()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(embed_with_others, range(4)))
    assert len(laid_out) == 1
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight.mul_(2)
    embed()
    assert len(laid_out) == 2
    embedder.forget_weights()
    embed()
    assert len(laid_out) == 3


def test_a_copy_lays_weights_out_itself(bert):
    embedder = WindowEmbedder(PAD_ID)
    [batch] = embedder.embed(bert, random_windows(), 10_000)
    [copied] = pickle.loads(pickle.dumps(embedder)).embed(bert, random_windows(), 10_000)
    assert torch.equal(copied.token_embeddings, batch.token_embeddings)
