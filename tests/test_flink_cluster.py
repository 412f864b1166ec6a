"""The whole job on a real Flink: embedded, and on a cluster of two TaskManagers whose processes are killed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from apache_beam.version import __version__ as beam_version
from embed_runs import PUBLISHED, contents_of, latest
from flink_cluster import ROOT, Cluster, answers, free_ports, job_server_jar, submit, wait_for_work, wait_until, why_not

from pipeline.__main__ import main
from pipeline.sample import write_sample
from transforms.schema import content_hash
from transforms.snapshots import Snapshot, check_shards, list_work, read_latest
from transforms.storage import create_exclusively, list_files
from transforms.write import shard_count

pytest_plugins = ["gcs_emulator"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # The first time, what makes up the cluster is fetched and built.
    pytest.mark.skipif(why_not() is not None, reason=f"no Flink: {why_not()}"),
]

NUM_DOCUMENTS = 50_000
NUM_TEXTS = 12_000
MANY = 10_000
"""Rows of a shard, so that there are several."""

MANIFEST = ROOT / "deploy" / "kubernetes" / "flink-cluster.yaml"

WORDS = "the a of to and in is it read write file zip archive text lines words red green blue fast slow".split()
TEXTS = [
    " ".join(random.Random(number).choices(WORDS, k=number % 9 + 3)) + f" {number}" for number in range(NUM_TEXTS + 500)
]

# One text is shared by a tenth of all documents; ten records have none, and twenty have the id of another.
DOCUMENTS = [
    {"id": f"id{number}", "text": TEXTS[0 if number % 10 == 0 else number % NUM_TEXTS], "n": number}
    for number in range(NUM_DOCUMENTS - 30)
]
FAULTY = [{"id": f"none{number}", "n": number} for number in range(10)]
REPEATED = [document | {"n": -1} for document in DOCUMENTS[:20]]

# Long texts, each in a batch of its own, take their time.
LONG = [{"id": f"id{n}", "text": f"{TEXTS[n % NUM_TEXTS]} " * 10 + str(n), "n": n} for n in range(24_000)]
SLOW = ["--max_batch_tokens=24", "--device=cpu", "--dtype=float32"]


def write_corpus(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def run(runner: str, options: list[str], output: Path | str, corpus: Path | str, *more: str) -> Snapshot:
    """Embeds a corpus in this process, and returns the snapshot."""
    given = [f"--input={corpus}", "--device=cpu", "--dtype=float32", f"--output={output}", *options, *more]
    assert main([runner, *given]) == PUBLISHED
    return latest(output)


@pytest.fixture(scope="module")
def coming(tmp_path_factory) -> Iterator[tuple[Cluster, Future[None]]]:
    """A cluster that comes up while the local runner works, and what waits for it."""
    cluster = Cluster(tmp_path_factory.mktemp("flink") / "cluster")
    try:
        with ThreadPoolExecutor() as pool:
            yield cluster, pool.submit(cluster.up)
    finally:
        end(cluster)


def end(cluster: Cluster) -> None:
    """Takes a cluster down, and asserts that nothing of it runs any more."""
    cluster.script("down")
    assert cluster.processes() == {}
    assert {path.name for path in cluster.folder.iterdir()} == {"conf", "lib", "log", "start-worker.sh"}


@pytest.fixture(scope="module")
def cluster(coming) -> Cluster:
    cluster, is_up = coming
    is_up.result()
    return cluster


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", [*DOCUMENTS, *FAULTY, *REPEATED])


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint) -> list[str]:
    """Options of all runs with the tiny encoder."""
    return [f"--checkpoint={tiny_checkpoint}", "--keep_fields=n"]


@pytest.fixture(scope="module")
def local(coming, tmp_path_factory, corpus, tiny) -> Snapshot:
    """What the local runner makes of the corpus."""
    return run("local", [], tmp_path_factory.mktemp("local") / "out", corpus, *tiny)


@pytest.fixture(scope="module")
def remote(cluster, tmp_path_factory, corpus, tiny_checkpoint) -> Snapshot:
    """What the cluster makes of the corpus, with workers that get our package from the job, and stand elsewhere."""
    folder = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        checkpoint = f"--checkpoint={os.path.relpath(tiny_checkpoint)}"
        options = [*cluster.staged, f"--artifacts_dir={folder / 'artifacts'}"]
        run("flink", options, Path("out"), corpus, checkpoint, "--keep_fields=n", f"--rows_per_shard={MANY}")
    return latest(folder / "out")


def sorted_table(snapshot: Snapshot) -> pa.Table:
    return pa.Table.from_batches([batch for _, batch in snapshot.record_batches()]).sort_by("id")


def vectors_of(table: pa.Table) -> np.ndarray:
    return np.concatenate([chunk.flatten().to_numpy() for chunk in table["embedding"].chunks]).reshape(len(table), -1)


def vectors_by_hash(snapshot: Snapshot) -> dict[str, bytes]:
    table = sorted_table(snapshot)
    return {text: one.tobytes() for text, one in zip(table["content_hash"].to_pylist(), vectors_of(table), strict=True)}


def counts_of(snapshot: Snapshot, *but: str) -> dict[str, int]:
    """Returns the counts; padding is left out, for it depends on which texts meet in a batch."""
    counts = snapshot.manifest["counts"]
    return {name: count for name, count in counts.items() if name not in ("padded_tokens", *but)}


def assert_equal(one: Snapshot, other: Snapshot, *but: str) -> None:
    """Asserts that two snapshots hold the same rows and counts, vectors but for their last digits."""
    check_shards(one)
    check_shards(other)
    assert counts_of(one, *but) == counts_of(other, *but)
    assert one.manifest["rejected_by_reason"] == other.manifest["rejected_by_reason"]
    assert one.fingerprint == other.fingerprint
    table, other_table = sorted_table(one), sorted_table(other)
    assert table.drop_columns("embedding").equals(other_table.drop_columns("embedding"))
    assert np.sum(vectors_of(table) * vectors_of(other_table), axis=1).min() > 0.99999


def assert_nothing_but_snapshots(output: Path | str) -> None:
    assert {name.partition("/")[0].partition("=")[0] for name in list_files(str(output))} == {"LATEST", "snapshot"}


def test_a_cluster_gives_what_the_local_runner_gives(local, remote):
    assert_equal(local, remote)
    counts = counts_of(remote)
    assert (counts["read"], counts["embedded"], counts["rejected"]) == (NUM_DOCUMENTS, NUM_DOCUMENTS - 30, 30)
    assert counts["texts_encoded"] == len({document["text"] for document in DOCUMENTS})
    assert remote.manifest["runner"] == "FlinkRunner"
    # Row by row as they come, all rows of a shard come to one writer.
    assert len(local.shards) == 1
    assert len(remote.shards) == shard_count(NUM_DOCUMENTS - 30, MANY)
    assert_nothing_but_snapshots(Path(remote.output))


def test_the_workers_have_our_package_from_their_job_alone(remote, tmp_path):
    python = ROOT / ".cache" / "flink" / "worker-python" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", "import torch, transforms"], cwd=tmp_path, env=environment, capture_output=True
    )
    assert b"No module named 'transforms'" in done.stderr
    # Through this folder, which the job server has emptied again.
    assert list((Path(remote.output).parent / "artifacts").iterdir()) == []


def test_each_task_managers_one_process_loads_the_model_once_and_never_waits_for_flink(cluster, remote):
    assert len(cluster.encoders()) == 2
    assert len(set(cluster.encoders())) == 2
    assert len(cluster.log_lines("outputs wait on disk")) == 2


def test_each_slot_encodes_its_whole_share_at_once(cluster, remote):
    """Else the encoder would see small and badly filled batches: a bundle of Flink's own holds a thousand elements."""
    calls = [re.search(r"encodes (\d+) texts of \d+ tokens at once", line) for line in cluster.log_lines(" encodes ")]
    num_texts = [int(found[1]) for found in calls if found]
    assert len(num_texts) == 4
    assert sum(num_texts) == counts_of(remote)["texts_encoded"]


@pytest.mark.timeout(1800)  # Four hundred thousand tokens, twice.
def test_the_sample_corpus_gives_what_the_local_runner_gives_run_after_run(cluster, tmp_path):
    """All of it, with the default encoder, and then what changed alone."""
    first = [json.loads(line) for line in write_sample(tmp_path).read_text().splitlines()]
    changed = [document | {"text": f"See also {document['module']}.\n\n{document['text']}"} for document in first[:100]]
    new = [{"id": f"new{number}", "text": TEXTS[number % 25], "module": "", "kind": ""} for number in range(50)]
    corpus, vectors = tmp_path / "corpus.jsonl", []
    torch.set_num_threads(os.cpu_count() or 1)  # This model is no tiny one.
    try:
        for documents in first, [*changed, *first[300:], *new]:
            write_corpus(corpus, documents)
            local, remote = (
                run(runner, options, tmp_path / runner, corpus, "--keep_fields=module,kind")
                for runner, options in {"local": [], "flink": cluster.staged}.items()
            )
            assert_equal(local, remote)
            vectors.append(vectors_by_hash(remote))
    finally:
        torch.set_num_threads(1)
    counts = counts_of(remote)
    assert (counts["embedded"], counts["deleted"]) == (150, 200)
    assert counts["texts_encoded"] == len({document["text"] for document in (*changed, *new)})
    assert counts["reused"] == len(first) - 300
    before, after = vectors
    assert len(before.keys() & after.keys()) > 6000
    assert all(before[text_hash] == after[text_hash] for text_hash in before.keys() & after.keys())
    assert_nothing_but_snapshots(tmp_path / "flink")


@pytest.fixture(scope="module")
def small(tmp_path_factory, corpus, tiny) -> tuple[Path, Snapshot]:
    """A part of the corpus, and what the local runner makes of it."""
    folder = tmp_path_factory.mktemp("small")
    part = folder / "corpus.jsonl"
    part.write_text("".join(corpus.read_text().splitlines(keepends=True)[:2000]))
    return part, run("local", [], folder / "out", part, *tiny)


def test_an_embedded_flink_needs_no_cluster(tmp_path, tiny, small):
    part, local = small
    assert_equal(local, run("flink", [f"--flink_job_server_jar={job_server_jar()}"], tmp_path / "out", part, *tiny))


def test_ctrl_c_ends_an_embedded_flink_and_keeps_the_work(tmp_path, tiny):
    output, corpus = tmp_path / "out", write_corpus(tmp_path / "corpus.jsonl", LONG[:4000])
    jar = f"--flink_job_server_jar={job_server_jar()}"
    submitter = submit([jar, f"--input={corpus}", f"--output={output}", *SLOW, *tiny])
    wait_for_work(submitter, output)
    submitter.send_signal(signal.SIGINT)
    _, said = submitter.communicate(timeout=240)
    assert submitter.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted: what was encoded so far is kept, and the next run takes it up"
    assert "job server was asked" not in said
    assert read_latest(str(output)) is None
    wait_until("its job server has ended", lambda: not _job_servers(submitter.pid), 30)


def test_beams_own_pool_by_the_script_of_the_manifest_starts_workers_that_read_and_write_gs(
    cluster, tmp_path, gcs_bucket, tiny_checkpoint, small, monkeypatch
):
    """As in a pod, whose image holds our package, so that no job brings it; unread, a megabyte would stop a worker."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    part, local = small
    files = {f"checkpoint/{name}": data for name, data in contents_of(tiny_checkpoint).items()}
    for name, data in (files | {"in/corpus.jsonl": part.read_bytes()}).items():
        create_exclusively(f"{gcs_bucket}/{name}", data)
    (starter,) = re.findall(r"^    #!/bin/sh\n    (exec .*)\n", MANIFEST.read_text(), re.MULTILINE)
    boot = ROOT / ".cache" / "flink" / f"boot-{beam_version}" / "container"
    log, (port,) = tmp_path / "log", free_ports(1)
    scripts = {
        "boot": f"head -c 1000000 /dev/zero | tr '\\0' x\nexec {boot} --semi_persist_dir={tmp_path} \"$@\"",
        "start-worker.sh": starter.replace("/opt/apache/beam/boot", f"{tmp_path}/boot").replace(
            "/proc/1/fd/1", f"{log}"
        ),
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    command = [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT": "1",
    }
    monkeypatch.setattr("pipeline.dataflow.setup_file", lambda: None)
    with subprocess.Popen(
        [*command, f"--container_executable={tmp_path}/start-worker.sh"], env=environment, cwd=tmp_path
    ) as pool:
        try:
            wait_until("the pool listens", lambda: answers(port))
            options = [f"--flink_job_server_jar={job_server_jar()}", "--environment_type=EXTERNAL"]
            options += [f"--environment_config=localhost:{port}", f"--checkpoint={gcs_bucket}/checkpoint"]
            remote = run("flink", options, f"{gcs_bucket}/out", f"{gcs_bucket}/in/*.jsonl", "--keep_fields=n")
            assert_equal(local, remote)
        finally:
            pool.terminate()
    assert log.stat().st_size > 1_000_000
    assert_nothing_but_snapshots(f"{gcs_bucket}/out")


def test_a_job_server_that_runs_takes_one_job_after_another(cluster, tmp_path, tiny, small):
    """With the cluster named too, Ctrl-C cancels the job there."""
    part, local = small
    folder = tmp_path / "job-server"
    folder.mkdir()
    with cluster.job_server(folder) as options:
        assert_equal(local, run("flink", [*options, "--parallelism=4"], tmp_path / "out", part, *tiny))
        long = [f"--input={write_corpus(tmp_path / 'long.jsonl', LONG)}", f"--output={tmp_path / 'cancelled'}"]
        cancelled = cluster.jobs().count("CANCELED")
        submitter = submit([*options, f"--flink_master=localhost:{cluster.rest_port}", *long, *SLOW, *tiny])
        wait_until("the job runs, or fails", lambda: "RUNNING" in cluster.jobs() or submitter.poll() is not None, 240)
        submitter.send_signal(signal.SIGINT)
        _, said = submitter.communicate(timeout=240)
        assert (submitter.returncode, said.splitlines()[-1].partition(":")[0]) == (130, "interrupted"), said
        assert cluster.jobs().count("CANCELED") == cancelled + 1


def test_whatever_is_killed_the_next_run_takes_up_the_work(cluster, tmp_path, tiny):
    """The submitter, the job by it and by Flink, a worker, a TaskManager, and the submitter of a job that goes on."""
    output = tmp_path / "out"
    parts = iter(range(0, len(LONG), 4000))  # Every run has documents of its own, so that it has a middle.
    corpus = tmp_path / "corpus.jsonl"
    common = [f"--input={corpus}", f"--output={output}", *SLOW, *tiny]

    def saved() -> set[str]:
        # Names alone: a worker whose job has failed may go on for a moment, and its files come and go.
        return {name for name in list_files(str(output)) if "/vectors-" in name and name.endswith(".parquet")}

    def start_and_save(*options):
        """Starts a run, and returns it when it has saved work of its own."""
        # What a worker whose job has failed still writes is an earlier run's.
        earlier = {name.rpartition("/")[0] for name in saved()}

        def has_saved() -> bool:
            return any(name.rpartition("/")[0] not in earlier for name in saved())

        part = next(parts)
        write_corpus(corpus, LONG[max(0, part - 500) : part + 4000])
        submitter = submit([*options, *common])
        wait_until("work is saved, or the run ends", lambda: has_saved() or submitter.poll() is not None, 240)
        assert submitter.poll() is None, submitter.communicate()
        return submitter

    def end_of(submitter) -> tuple[int, str]:
        _, said = submitter.communicate(timeout=240)
        wait_until("no job runs", lambda: not _ALIVE & set(cluster.jobs()))
        assert read_latest(str(output)) is None
        assert len(saved()) >= len(list_work(str(output)))
        return submitter.returncode, said.splitlines()[-1] if said else ""

    submitter = start_and_save(*cluster.loopback)
    submitter.kill()
    assert end_of(submitter)[0] == -signal.SIGKILL
    wait_until("its job server has ended", lambda: not _job_servers(submitter.pid), 30)

    submitter, cancelled = start_and_save(*cluster.loopback), cluster.jobs().count("CANCELED")
    submitter.send_signal(signal.SIGINT)
    status, said = end_of(submitter)
    assert (status, said.partition(":")[0]) == (130, "interrupted")
    assert cluster.jobs().count("CANCELED") == cancelled + 1

    submitter, cancelled = start_and_save(*cluster.staged), cluster.jobs().count("CANCELED")
    cluster.cancel_jobs()
    status, said = end_of(submitter)
    assert (status, "Job was cancelled. (on Flink's page," in said) == (1, True), said
    assert cluster.jobs().count("CANCELED") == cancelled + 1

    # Workers of the job that was cancelled may be started anew, and then end.
    earlier = set(cluster.encoders())
    submitter = start_and_save(*cluster.staged)
    os.kill(
        wait_until("a worker tells of its encoder", lambda: set(cluster.encoders()) - earlier).pop(), signal.SIGKILL
    )
    status, said = end_of(submitter)
    assert (status, "a worker process has died" in said) == (1, True), said

    submitter = start_and_save(*cluster.staged)
    cluster.kill_task_manager()
    status, said = end_of(submitter)
    assert (status, "TaskManager" in said) == (1, True), said
    cluster.up()

    assert len(list_work(str(output))) == 5
    # All that the five have saved, be it one text, and what none of them has seen.
    tables = [pq.read_table(output / name, columns=["content_hash"]) for name in saved()]
    text_hashes = {text_hash for table in tables for text_hash in table["content_hash"].to_pylist()}
    known = [document for document in LONG if content_hash(document["text"]) in text_hashes]
    documents = [*known, *LONG[next(parts) :]]
    write_corpus(corpus, documents)
    submitter = submit([*cluster.staged, *common])
    wait_until("the job runs", lambda: "RUNNING" in cluster.jobs())
    submitter.kill()
    submitter.communicate()
    wait_until("the job ends", lambda: not _ALIVE & set(cluster.jobs()), 240)
    snapshot = latest(output)
    assert snapshot.manifest["counts"]["read"] == len(documents)
    undisturbed = run("local", [], tmp_path / "undisturbed", corpus, *tiny)
    assert_equal(snapshot, undisturbed, "embedded", "reused", "recovered", "texts_encoded", "tokens")
    assert snapshot.manifest["counts"]["recovered"] == len(known)
    assert_nothing_but_snapshots(output)


def test_with_the_restart_strategy_of_the_manifest_a_job_outlives_a_task_manager(tmp_path, tiny):
    properties = re.findall(r"^    (restart-strategy\..+: .+)\n", MANIFEST.read_text(), re.MULTILINE)
    assert [line.partition(": ")[2] for line in properties] == ["fixed-delay", '"3"', "30s"]
    properties[-1] = properties[-1].replace("30s", "5s")  # Here no machine has to be found first.
    cluster = Cluster(tmp_path / "cluster", "\n".join(properties))
    output, corpus = tmp_path / "out", write_corpus(tmp_path / "corpus.jsonl", LONG[:3000])
    try:
        cluster.up()
        submitter = submit([*cluster.staged, f"--input={corpus}", f"--output={output}", *SLOW, *tiny])
        wait_for_work(submitter, output)
        cluster.kill_task_manager()
        cluster.up()
        _, said = submitter.communicate(timeout=400)
        assert submitter.returncode == PUBLISHED, said
        assert "switched from state RUNNING to RESTARTING" in (cluster.folder / "log" / "jobmanager.out").read_text()
    finally:
        end(cluster)
    assert_equal(latest(output), run("local", [], tmp_path / "undisturbed", corpus, *tiny))
    assert_nothing_but_snapshots(output)


_ALIVE = {"INITIALIZING", "CREATED", "RUNNING", "FAILING", "CANCELLING", "RESTARTING"}


def _job_servers(submitter_id: int) -> list[bytes]:
    """Returns the command lines of the job servers that a submitter has started."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_bytes())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [command for command in commands if f"flink_job_server.py\0{submitter_id}\0".encode() in command]
