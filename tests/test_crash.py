"""What a run leaves behind that is killed, fails, is overtaken or finds the last snapshot damaged; and the next run."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from embed_runs import PUBLISHED, contents_of, counts_of, embed, failure_of, latest, rows_of

from pipeline import embed as embed_module
from transforms import known_vectors, reconcile, shard_files, storage
from transforms.encoder import BertLstmEncoder
from transforms.snapshots import check_shards, list_published, list_work

ROOT = Path(__file__).parent.parent

SLOW_RUN = """\
import sys, threading
from types import SimpleNamespace
from pipeline.__main__ import main
from transforms import known_vectors

save = known_vectors.WorkSaver.__call__
seconds = 1000.0
turn = threading.Lock()  # Groups are encoded side by side.

def slowly(saver, encoded):
    global seconds
    with turn:
        save(saver, encoded)
        seconds += 0.5
        print(len(encoded), flush=True)
        assert sys.stdin.readline()

known_vectors.WorkSaver.__call__ = slowly
known_vectors.time = SimpleNamespace(monotonic=lambda: seconds)
sys.exit(main(sys.argv[1:]))
"""
"""Runs a command with an encoder that takes half a second, by a clock of its own, for each group of texts.

It prints how many they were, and goes on when it is given a line.
"""


def write_corpus(path, numbers) -> str:
    """Writes numbered documents and returns the option that reads them."""
    lines = [{"id": f"id{number}", "text": f"read the file {number:04d} " * 5} for number in numbers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"--input={path}"


@pytest.fixture
def options(tmp_path, tiny_checkpoint):
    """Writes a corpus of numbered documents; returns the options that embed it."""

    def corpus(numbers, name="corpus.jsonl"):
        return [write_corpus(tmp_path / name, numbers), f"--checkpoint={tiny_checkpoint}"]

    return corpus


@pytest.fixture(scope="module")
def first_output(tmp_path_factory, tiny_checkpoint) -> Path:
    """An output in which the documents 0 to 4 are published; tests only copy it."""
    folder = tmp_path_factory.mktemp("first")
    corpus = write_corpus(folder / "corpus.jsonl", range(5))
    assert embed(corpus, f"--checkpoint={tiny_checkpoint}", output=folder / "out") == PUBLISHED
    return folder / "out"


@pytest.fixture
def output(tmp_path, first_output) -> Path:
    """An output of the test's own, in which the documents 0 to 4 are published."""
    shutil.copytree(first_output, tmp_path / "out")
    return tmp_path / "out"


def assert_same_rows(one, other):
    rows, other_rows = rows_of(one), rows_of(other)
    assert rows.keys() == other_rows.keys()
    for row_id, row in rows.items():
        assert row[:4] == other_rows[row_id][:4]
        assert np.allclose(row.vector, other_rows[row_id].vector, atol=1e-5)


def assert_nothing_but_snapshots(output):
    """Asserts that the output holds LATEST and the files of published snapshots alone."""
    snapshot, names = latest(output), list_published(str(output))
    check_shards(snapshot)
    files = {name.partition("/")[0] for name in contents_of(output)}
    assert files == {"LATEST", *(f"snapshot={name}" for name in names)}
    assert {path.name for path in output.iterdir()} == files


STEPS = ("create_exclusively", "replace_if_generation", "delete_files", "delete_folder", "make_durable")
"""Whatever publishing does to files."""


# Killed.


def test_killed_near_the_end_of_encoding_the_next_run_encodes_the_tail_alone(tmp_path, output, options):
    before = contents_of(output)
    corpus = [*options(range(560)), "--max_batch_tokens=32"]

    command = [sys.executable, "-c", SLOW_RUN, "local", *corpus, "--device=cpu", "--dtype=float32"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.Popen(
        [*command, f"--output={output}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert killed.stdin is not None
    assert killed.stdout is not None
    num_encoded = num_groups = 0
    while True:
        num_encoded += int(killed.stdout.readline())
        num_groups += 1
        if num_encoded >= 0.85 * 555:
            break
        killed.stdin.write("\n")
        killed.stdin.flush()
    killed.kill()
    killed.wait()
    killed.stdin.close()
    killed.stdout.close()
    assert num_groups > 20
    assert num_encoded < 555

    # No reader sees anything of it.
    after = contents_of(output)
    assert before.items() <= after.items()
    assert all(name.startswith(".work/") for name in after.keys() - before.keys())
    assert len(list_work(str(output))) == 1

    assert embed(*corpus, output=output) == PUBLISHED
    snapshot = latest(output)
    counts = counts_of(snapshot)
    assert counts["texts_encoded"] <= 0.3 * 560
    assert counts["recovered"] > 0
    assert (counts["read"], counts["reused"]) == (560, counts["recovered"] + 5)
    assert counts["embedded"] + counts["reused"] == 560
    assert snapshot.manifest["seconds_saved"] > 0
    assert_nothing_but_snapshots(output)

    assert embed(*corpus, output=tmp_path / "undisturbed") == PUBLISHED
    assert_same_rows(snapshot, latest(tmp_path / "undisturbed"))


# Failed.


def test_an_error_at_any_step_of_publishing_leaves_whole_snapshots_and_the_next_run_publishes(
    output, options, monkeypatch
):
    """Each run fails one step later than the one before, and is that one's next run."""
    corpus = options(range(2, 9))
    original_finish = reconcile.finish
    steps_left: Iterator[int] = iter(())  # Of publishing, down to 0, at which it fails.
    failed_at = None

    def counted(name):
        function = getattr(storage, name)

        def call(*arguments):
            nonlocal failed_at
            if next(steps_left, None) == 0:
                failed_at = name
                raise OSError(28, "No space left on device")
            return function(*arguments)

        return call

    for name in STEPS:
        monkeypatch.setattr(storage, name, counted(name))

    def finish_failing_at(step):
        def finish(*arguments):
            nonlocal steps_left
            steps_left = iter(range(step, -1, -1))
            return original_finish(*arguments)

        return finish

    failures = []
    while not failures or failed_at:
        monkeypatch.setattr(reconcile, "finish", finish_failing_at(len(failures)))
        steps_left, failed_at = iter(()), None
        names, before = list_published(str(output)), contents_of(output)
        status = embed(*corpus, output=output)
        old = tuple(f"snapshot={name}/" for name in names)
        assert {name: data for name, data in before.items() if name.startswith(old)}.items() <= contents_of(
            output
        ).items()
        published = list_published(str(output))
        assert status == (1 if published == names else PUBLISHED)
        check_shards(latest(output))
        assert rows_of(latest(output)).keys() == {f"id{n}" for n in (range(5) if len(published) == 1 else range(2, 9))}
        failures.append(failed_at)
    assert failures.pop() is None
    assert set(failures) == set(STEPS)
    # A run that could not let go of its name keeps it as long as its process, this one, lives.
    left = {name for name in contents_of(output) if name.startswith(".work/")}
    assert all(name.startswith(".work/claims/") for name in left)
    monkeypatch.undo()
    storage.delete_folder(f"{output}/.work")
    assert_nothing_but_snapshots(output)


@pytest.mark.parametrize("fault", ["disk full", "no encoder", "input gone", "bug"])
def test_an_error_in_a_worker_is_told_in_one_line_and_leaves_nothing_behind(
    tmp_path, output, options, monkeypatch, capfd, fault
):
    before = contents_of(output)
    corpus = options(range(50))

    def claim_and_lose_input(*arguments):
        (tmp_path / "corpus.jsonl").unlink()
        return claim(*arguments)

    def raising(error):
        def raise_error(*arguments):
            raise error

        return raise_error

    if fault == "disk full":
        monkeypatch.setattr(shard_files.ParquetFile, "write", raising(OSError(28, "No space left on device")))
        told = "OSError: [Errno 28] No space left on device (in step WriteEmbeddings/"
    elif fault == "bug":
        monkeypatch.setattr(shard_files.ParquetFile, "write", raising(KeyError("x")))
        told = "KeyError: "
    elif fault == "no encoder":
        monkeypatch.setattr(BertLstmEncoder, "encode_tokens", raising(RuntimeError("the GPU fell off")))
        told = "the GPU fell off (in step EncodeDocuments/"
    else:
        claim = embed_module.claim
        monkeypatch.setattr(embed_module, "claim", claim_and_lose_input)
        told = f"FileNotFoundError: no file matches {tmp_path}/corpus.jsonl (in step ReadDocuments/"
    assert failure_of(capfd, *corpus, output=output).startswith(told)
    # What was encoded is kept for the next run, and nothing else.
    assert {name: data for name, data in contents_of(output).items() if not name.startswith(".work/run=")} == before
    monkeypatch.undo()
    assert embed(*options(range(50)), output=output) == PUBLISHED
    assert counts_of(latest(output))["read"] == 50
    assert_nothing_but_snapshots(output)


@pytest.mark.parametrize("is_late", [False, True])
def test_whoever_interrupts_a_run_is_told_where_work_is_kept(output, options, monkeypatch, capfd, is_late):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if is_late:
            patch.setattr(reconcile, "finish", interrupt)
        else:
            patch.setattr(BertLstmEncoder, "encode_tokens", interrupt)
        capfd.readouterr()
        assert embed(*options(range(50)), output=output) == 130
    told = (
        "interrupted: what was encoded so far is kept, and the next run takes it up\n" if is_late else "interrupted\n"
    )
    assert capfd.readouterr() == ("", told)
    assert embed(*options(range(50)), output=output) == PUBLISHED
    assert (counts_of(latest(output)).get("recovered", 0) == 45) == is_late
    assert_nothing_but_snapshots(output)


def fail_after_encoding(monkeypatch, *corpus, output):
    """Runs `embed`, which fails when it is about to publish, and then saves all that it has encoded."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(reconcile, "finish", fail)
        assert embed(*corpus, output=output) == 1


def test_a_run_of_another_encoder_leaves_saved_work_to_the_next_run_of_that_encoder(output, options, monkeypatch):
    corpus = options(range(20))
    fail_after_encoding(monkeypatch, *corpus, "--max_tokens=3", output=output)
    work = {name: data for name, data in contents_of(output).items() if name.startswith(".work/run=")}
    assert work

    for more in ([], ["--full"]):
        assert embed(*corpus, *more, output=output) == PUBLISHED
        assert work.items() <= contents_of(output).items()

    assert embed(*corpus, "--max_tokens=3", output=output) == PUBLISHED
    assert counts_of(latest(output)) == {"read": 20, "reused": 20, "recovered": 20, "truncated": 20}
    assert_nothing_but_snapshots(output)


def test_old_work_of_another_encoder_is_removed(output, options, monkeypatch):
    corpus = options(range(20))
    fail_after_encoding(monkeypatch, *corpus, "--max_tokens=3", output=output)
    monkeypatch.setattr(known_vectors, "WORK_OF_OTHERS_KEPT", timedelta(days=-1))
    assert embed(*corpus, output=output) == PUBLISHED
    assert_nothing_but_snapshots(output)


def test_work_that_is_not_of_this_encoder_is_no_reason_to_publish_the_same_again(output, options, monkeypatch):
    corpus = [*options(range(20)), "--skip_unchanged"]
    os.utime(corpus[0].removeprefix("--input="), (0, 0))  # A file that has just been written counts as changed.
    assert embed(*corpus, output=output) == PUBLISHED
    fail_after_encoding(monkeypatch, *corpus, "--max_tokens=3", output=output)
    before = latest(output)
    assert embed(*corpus, output=output) == PUBLISHED
    assert latest(output) == before


def test_a_first_run_that_takes_up_all_its_work_says_what_that_saved(tmp_path, options, monkeypatch):
    corpus = options(range(20))
    fail_after_encoding(monkeypatch, *corpus, output=tmp_path / "new")
    assert embed(*corpus, output=tmp_path / "new") == PUBLISHED
    snapshot = latest(tmp_path / "new")
    assert counts_of(snapshot) == {"read": 20, "reused": 20, "recovered": 20}
    assert snapshot.manifest["seconds_saved"] > 0


# Overtaken.


def test_of_two_runs_at_once_one_publishes_and_the_other_says_so(output, options, monkeypatch, capfd):
    before = contents_of(output)
    both_are_there = threading.Barrier(2)
    publish = reconcile.publish

    def publish_together(*arguments):
        both_are_there.wait(timeout=120)
        return publish(*arguments)

    monkeypatch.setattr(reconcile, "publish", publish_together)
    capfd.readouterr()
    corpora = [options(range(20), "one.jsonl"), options(range(10, 30), "two.jsonl")]
    statuses = [-1, -1]

    def run(place):
        statuses[place] = embed(*corpora[place], output=output)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    assert sorted(statuses) == [PUBLISHED, 1]
    winner = statuses.index(PUBLISHED)
    snapshot = latest(output)
    assert rows_of(snapshot).keys() == {f"id{number}" for number in (range(20), range(10, 30))[winner]}
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"error: another run published snapshot {snapshot.name} into {output} while this one was at work, which had "
        f"started from {list_published(str(output))[0]}: this one publishes nothing. Run it again; it will encode only "
        "what that snapshot lacks"
    )
    old = {name: data for name, data in before.items() if name != "LATEST"}
    assert old.items() <= contents_of(output).items()

    assert embed(*corpora[1 - winner], output=output) == PUBLISHED
    counts = counts_of(latest(output))
    # Ten texts are in the snapshot that came first; of the others, the loser may have saved some.
    assert (counts["read"], counts.get("texts_encoded", 0) + counts.get("recovered", 0)) == (20, 10)
    assert_nothing_but_snapshots(output)


# Damaged.


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGES = {
    "missing shard": (lambda shard: shard.unlink(), "SHARD is missing"),
    "truncated shard": (lambda shard: os.truncate(shard, 1000), "SHARD has 1000 bytes, not "),
    "flipped bit": (flip_bit, "SHARD does not have the checksum sha256:"),
    "garbage in LATEST": (
        lambda shard: (shard.parent.parent / "LATEST").write_text("yesterday"),
        "LATEST does not hold the name of a snapshot",
    ),
    "missing manifest": (lambda shard: (shard.parent / "manifest.json").unlink(), "MANIFEST is missing"),
    "garbage in the manifest": (
        lambda shard: (shard.parent / "manifest.json").write_text('{"format": 1, "snap'),
        "MANIFEST is not a manifest (",
    ),
    "another format": (
        lambda shard: replace_in(shard.parent / "manifest.json", '"format": 1', '"format": 2'),
        "MANIFEST is not a manifest (",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_snapshot_is_named_and_a_full_run_goes_on_without_it(output, options, capfd, damage):
    do_damage, told = DAMAGES[damage]
    [shard] = output.glob("snapshot=*/embeddings-00000-of-00001.parquet")
    do_damage(shard)
    damaged = contents_of(output)
    paths = {"SHARD": shard, "MANIFEST": shard.parent / "manifest.json", "LATEST": output / "LATEST"}
    for name, path in paths.items():
        told = told.replace(name, str(path))

    corpus = options(range(3, 8))
    message = failure_of(capfd, *corpus, output=output)
    assert message.startswith(told)
    assert message.endswith("Restore the file, or run embed with --full, which encodes everything anew without it")
    assert contents_of(output) == damaged

    assert embed(*corpus, "--full", output=output) == PUBLISHED
    deleted = {"deleted": 3} if damage == "flipped bit" else {}  # It spares the ids, which alone are read here.
    assert counts_of(latest(output)) == {"read": 5, "embedded": 5, "texts_encoded": 5} | deleted
    check_shards(latest(output))
