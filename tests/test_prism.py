"""The whole job on Prism, Beam's own portable engine, which plain DirectRunner becomes where Beam finds it."""

import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from embed_runs import PUBLISHED, contents_of, counts_of, embed, latest, rows_of
from flink_cluster import ROOT, wait_for_work, wait_until

from pipeline.__main__ import main
from pipeline.runners import PRISM, PRISM_PACKAGE
from transforms import shard_files
from transforms.snapshots import check_shards, list_published

# The first run builds Prism, which takes some minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def prism():
    """Builds Prism where `./launch.sh prism` looks for it, once; it is there whole or not at all."""
    if PRISM.is_file():
        return
    if shutil.which("go") is None:
        pytest.skip("Go is not installed, which builds Prism")
    PRISM.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PRISM.parent) as folder:
        subprocess.run(["go", "install", PRISM_PACKAGE], env=os.environ | {"GOBIN": folder}, check=True, timeout=1500)
        os.replace(os.path.join(folder, PRISM.name), PRISM)


def records(changed: bool) -> list[dict]:
    """Documents of one to several windows, many with one text; later 20 are changed, 10 gone, 10 new, 50 renamed."""
    randomness = random.Random(1)
    words = "read write file zip archive text lines words red green blue fast slow".split()
    texts = [" ".join(randomness.choices(words, k=randomness.randint(1, 150))) for _ in range(300)]
    found = [{"id": f"id{n}", "text": texts[n % 300], "row": n} for n in range(400)]
    if not changed:
        return found
    for record in found[:20]:
        record["text"] = f"a new text: {record['text']}"
    for record in found[20:70]:
        record["id"] = f"renamed {record['id']}"
    return [*found[:-10], *({"id": f"new{n}", "text": f"new text {n}", "row": n} for n in range(10))]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, tiny_checkpoint) -> dict[bool, list[str]]:
    """The options that embed the corpus as it was, and as it is after it changed."""
    folder = tmp_path_factory.mktemp("corpora")
    options = {}
    for changed in (False, True):
        lines = [json.dumps(record) for record in records(changed)]
        # Two lines are rejected, and a third for its id.
        lines[100:100] = ["{broken", '{"id": "empty", "text": " "}', '{"id": "id90", "text": "too late"}']
        for part in range(3):
            (folder / f"{changed}-{part}.jsonl").write_text("\n".join(lines[part::3]))
        options[changed] = [
            f"--input={folder}/{changed}-*.jsonl",
            f"--checkpoint={tiny_checkpoint}",
            "--keep_fields=row",
            "--rows_per_shard=150",
        ]
    return options


@pytest.fixture(scope="module")
def local(tmp_path_factory, corpora):
    """Two runs of the local runner, before and after the corpus changed: the folder and both snapshots."""
    folder = tmp_path_factory.mktemp("local") / "out"
    snapshots = []
    for changed in (False, True):
        assert embed(*corpora[changed], output=folder) == PUBLISHED
        snapshots.append(latest(folder))
    return folder, snapshots


def run(*options, output) -> int:
    return main(["embed", "--device=cpu", "--dtype=float32", f"--output={output}", *options])


def assert_same(snapshot, other):
    """Compares two snapshots but for the order of their rows and the last bits of their vectors."""
    check_shards(snapshot)
    rows, other_rows = rows_of(snapshot), rows_of(other)
    assert {row_id: row[:4] for row_id, row in rows.items()} == {row_id: row[:4] for row_id, row in other_rows.items()}
    assert min(float(row.vector @ other_rows[row_id].vector) for row_id, row in rows.items()) > 0.99999
    assert np.allclose([np.linalg.norm(row.vector) for row in rows.values()], 1, atol=1e-5)
    assert snapshot.fingerprint == other.fingerprint
    assert snapshot.schema() == other.schema()
    assert counts_of(snapshot) == counts_of(other)
    assert snapshot.manifest["rejected_by_reason"] == other.manifest["rejected_by_reason"]


def test_prism_gives_the_same_snapshots_as_the_local_runner(prism, tmp_path, corpora, local):
    _, (before, after) = local
    assert run("--runner=prism", *corpora[False], output=tmp_path) == PUBLISHED
    assert_same(latest(tmp_path), before)
    assert latest(tmp_path).manifest["runner"] == "PrismRunner"

    assert run("--runner=prism", *corpora[True], output=tmp_path) == PUBLISHED
    assert_same(latest(tmp_path), after)
    counts = counts_of(latest(tmp_path))
    assert (counts["texts_encoded"], counts["reused"], counts["deleted"]) == (30, 370, 60)
    assert {name.partition("/")[0] for name in contents_of(tmp_path)} == {
        "LATEST",
        *(f"snapshot={name}" for name in list_published(str(tmp_path))),
    }


@pytest.mark.parametrize("becomes_prism", [True, False])
def test_direct_runner_is_right_on_whichever_engine_it_takes(request, tmp_path, corpora, local, caplog, becomes_prism):
    """It goes on from what the local runner published."""
    folder, (before, after) = local
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "LATEST").write_text((folder / "LATEST").read_text().replace(after.name, before.name))
    shutil.rmtree(tmp_path / f"snapshot={after.name}")
    if becomes_prism:
        request.getfixturevalue("prism")
    location = PRISM if becomes_prism else "/nonexistent"
    with caplog.at_level(logging.INFO, "apache_beam.runners.direct.direct_runner"):
        # Without the experiment, it would take the Prism that an earlier test has started.
        engine = [f"--prism_location={location}", "--experiments=disable_prism_server_singleton"]
        assert run("--runner=DirectRunner", *engine, *corpora[True], output=tmp_path) == PUBLISHED
    assert "Running pipeline with PrismRunner." in caplog.messages
    assert ("Falling back to DirectRunner" in caplog.messages) == (not becomes_prism)
    assert_same(latest(tmp_path), after)


def test_a_step_that_fails_on_prism_is_told_and_the_next_run_publishes(
    prism, tmp_path, corpora, local, monkeypatch, capfd
):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_files.ParquetFile, "write", fail)
    assert run("--runner=prism", *corpora[False], output=tmp_path) == 1
    [told] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told.startswith("error: OSError: [Errno 28] No space left on device (in step WriteEmbeddings/")
    assert not list_published(str(tmp_path))
    monkeypatch.undo()

    assert run("--runner=prism", *corpora[False], output=tmp_path) == PUBLISHED
    assert rows_of(latest(tmp_path)).keys() == rows_of(local[1][0]).keys()


def child_that_runs(program: Path, process_id: int) -> int | None:
    """Returns the id of a process's child that runs a program; None where none is seen to."""
    for thread in Path(f"/proc/{process_id}/task").iterdir():
        # Threads and children may end at any moment.
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for child in (thread / "children").read_text().split():
                if os.readlink(f"/proc/{child}/exe") == str(program.resolve()):
                    return int(child)
    return None


@pytest.mark.skipif(not Path("/proc/thread-self/children").exists(), reason="looks for a child in /proc")
def test_a_prism_that_is_killed_is_told_and_the_next_run_takes_up_the_work(prism, tmp_path, tiny_checkpoint):
    output, corpus = tmp_path / "out", tmp_path / "corpus.jsonl"
    texts = [f"read the file of number {number} " * 30 for number in range(5000)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = [f"--input={corpus}", f"--checkpoint={tiny_checkpoint}", "--device=cpu", "--dtype=float32"]
    # Each text in a batch of its own takes its time.
    slow = [sys.executable, "-m", "pipeline", "prism", *options, f"--output={output}", "--max_batch_tokens=24"]
    with subprocess.Popen(slow, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as submitter:
        try:
            wait_for_work(submitter, output)
            engine = wait_until("Prism is found", lambda: child_that_runs(PRISM, submitter.pid), 10)
            os.kill(engine, signal.SIGKILL)
            _, said = submitter.communicate(timeout=240)
        finally:
            if submitter.poll() is None and (engine := child_that_runs(PRISM, submitter.pid)):
                os.kill(engine, signal.SIGKILL)
            submitter.kill()
    assert submitter.returncode == 1, said
    # Threads of Beam's may write their tracebacks at the same moment.
    told = r"error: the runner's own process no longer answers \(Stream removed .*\): it was killed"
    assert re.search(told, said), said
    assert not list_published(str(output))

    assert run("--runner=prism", *options, output=output) == PUBLISHED
    counts = counts_of(latest(output))
    assert (counts["read"], counts["embedded"] + counts["recovered"]) == (5000, 5000)
    assert counts["recovered"] > 0
