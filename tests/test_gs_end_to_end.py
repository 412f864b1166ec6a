"""The whole command with everything on gs://: input, checkpoint, output, the runs after, and the commands that read."""

import gzip
import io
import json
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embed_runs import NOT_PUBLISHED, PUBLISHED, contents_of, counts_of, embed, failure_of, latest, rows_of

from pipeline.__main__ import main
from transforms import known_vectors, reconcile, shard_files, storage, write
from transforms.shard_files import PARTS_FOLDER
from transforms.snapshots import check_shards, list_published, list_work

pytest_plugins = ["gcs_emulator"]

FILES = {
    "deep/b.jsonl.gz": gzip.compress(
        b'{"id": "b1", "text": "write a file", "year": 3}\n{"id": "b2", "text": "fast"}\n'
    ),
    "a.jsonl": b'{"id": "a1", "text": "read a zip archive", "year": 1}\n{"id": "a2", "text": "slow", "year": 2}\n',
}
IDS = {"a1", "a2", "b1", "b2", "c1", "c2"}


def parquet_file() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": ["c1", "c2"], "text": ["read " * 200, "slow"], "year": [5, 6]}), file)
    return file.getvalue()


def upload(folder: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        url = f"{folder}/{name}"
        current = storage.read_versioned(url)
        storage.replace_if_generation(url, data, storage.ABSENT if current is None else current.generation)


@pytest.fixture
def bucket(gcs_bucket, tiny_checkpoint, monkeypatch, tmp_path) -> str:
    """The gs:// URL of a bucket with a corpus in `in` and the tiny checkpoint in `checkpoint`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    upload(f"{gcs_bucket}/in", FILES | {"c.parquet": parquet_file()})
    upload(f"{gcs_bucket}/checkpoint", contents_of(tiny_checkpoint))
    return gcs_bucket


def options(bucket: str) -> list[str]:
    return [f"--input={bucket}/in/**", f"--checkpoint={bucket}/checkpoint", "--keep_fields=year"]


def names_of_snapshots(output: str) -> set[str]:
    """Returns the names of all objects that an output with only published snapshots holds."""
    names = {"LATEST"}
    for name in list_published(output):
        folder = f"snapshot={name}"
        manifest = json.loads(storage.open_for_reading(f"{output}/{folder}/manifest.json").read())
        files = [file["file"] for file in (*manifest["shards"], *manifest["rejected_files"])]
        names |= {f"{folder}/{file}" for file in (*files, "manifest.json")}
    return names


def test_run_after_run_on_gs(bucket, tiny_checkpoint, tmp_path, capfd):
    output = f"{bucket}/out"
    assert embed(*options(bucket), output=output) == PUBLISHED
    first = latest(output)
    assert counts_of(first) == {"read": 6, "embedded": 6, "texts_encoded": 5}
    assert storage.list_files(output).keys() == names_of_snapshots(output)

    # The same as on this machine.
    for name, data in (FILES | {"c.parquet": parquet_file()}).items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    local_options = [f"--input={tmp_path}/in/**", f"--checkpoint={tiny_checkpoint}", "--keep_fields=year"]
    assert embed(*local_options, output=tmp_path / "out") == PUBLISHED
    rows, local_rows = rows_of(first), rows_of(latest(tmp_path / "out"))
    assert rows.keys() == local_rows.keys() == IDS
    for row_id, row in rows.items():
        assert row[:4] == local_rows[row_id][:4]
        assert np.allclose(row.vector, local_rows[row_id].vector, atol=1e-6)

    # A record changed, one new, two gone, one unusable.
    upload(f"{bucket}/in", {"a.jsonl": b'{"id": "a1", "text": "red", "year": 1}\n{"id": "new", "text": "slow"}\n{'})
    storage.delete_files([f"{bucket}/in/deep/b.jsonl.gz"])
    assert embed(*options(bucket), output=output) == NOT_PUBLISHED
    assert latest(output).name == first.name
    assert embed(*options(bucket), "--max_rejected_fraction=0.5", output=output) == PUBLISHED
    second = latest(output)
    counts = counts_of(second)
    assert (counts["read"], counts["rejected"], counts["deleted"]) == (5, 1, 3)
    assert counts.get("embedded", 0) + counts.get("recovered", 0) == 1
    assert counts["reused"] - counts.get("recovered", 0) == 3
    assert second.manifest["previous"] == first.name
    second_rows = rows_of(second)
    assert second_rows.keys() == {"a1", "new", "c1", "c2"}
    for row_id, known in (("new", "a2"), ("c1", "c1"), ("c2", "c2")):
        assert second_rows[row_id].vector.tobytes() == rows[known].vector.tobytes()

    # Nothing else lies there, but for what tells a person why a run was not published.
    left = storage.list_files(output).keys() - names_of_snapshots(output)
    assert {name.rpartition("/")[2] for name in left} == {"report.json", "rejected-00000-of-00001.jsonl"}

    # What reads snapshots reads them there.
    capfd.readouterr()
    assert main(["inspect", output, "--check"]) == 0
    assert main(["inspect", output, "--diff", first.name, second.name, "--json"]) == 0
    assert main(["search", "red", f"--output={output}", f"--checkpoint={bucket}/checkpoint", "--top=1"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "a1" in out.splitlines()[-1]

    # Old snapshots go when that is asked for.
    assert embed(*options(bucket), "--max_rejected_fraction=0.5", "--keep_snapshots=1", output=output) == PUBLISHED
    assert list_published(output) == [second.name, latest(output).name]
    assert storage.list_files(output).keys() == names_of_snapshots(output)


def test_tries_of_shards_that_failed_leave_nothing_after_publishing(bucket, monkeypatch):
    output = f"{bucket}/out"
    process = write._WriteShard.process
    left = []

    def count_parts() -> int:
        return sum(f"/{PARTS_FOLDER}/" in name for name in storage.list_files(output))

    def process_at_the_third_try(step, group):
        with monkeypatch.context() as patch:
            patch.setattr(shard_files.ParquetFile, "close", lambda file: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                list(process(step, group))
        left.append(count_parts())
        list(process(step, group))  # It wrote all, and its worker died before anybody heard of it.
        left.append(count_parts())
        yield from process(step, group)

    with monkeypatch.context() as patch:
        patch.setattr(write._WriteShard, "process", process_at_the_third_try)
        assert embed(*options(bucket), output=output) == PUBLISHED
    assert left == [0, 1]
    assert counts_of(latest(output)) == {"read": 6, "embedded": 6, "texts_encoded": 5}
    assert storage.list_files(output).keys() == names_of_snapshots(output)


def test_a_checkpoint_comes_down_once_and_is_checked(bucket, capfd, tmp_path):
    output = f"{bucket}/out"
    url = f"{bucket}/checkpoint/lstm.safetensors"
    sound = storage.open_for_reading(url).read()
    damaged = bytearray(sound)
    damaged[-1] ^= 1
    upload(f"{bucket}/checkpoint", {"lstm.safetensors": bytes(damaged)})
    message = failure_of(capfd, *options(bucket), output=output)
    assert "lstm.safetensors has SHA-256 " in message
    assert "the file is damaged or of another version" in message
    assert storage.list_files(output) == {}

    upload(f"{bucket}/checkpoint", {"lstm.safetensors": sound})
    assert embed(*options(bucket), output=output) == PUBLISHED
    [folder] = [path.parent for path in (tmp_path / "cache").rglob("lstm.safetensors") if path.read_bytes() == sound]
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert embed(*options(bucket), output=output) == PUBLISHED
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    assert counts_of(latest(output)) == {"read": 6, "reused": 6}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("--input=BUCKET/nothing/*", "no file matches BUCKET/nothing/*"),
        ("--input=gs://no-such-bucket/*", "no-such-bucket"),
        ("--output=gs://no-such-bucket/out", "gs://no-such-bucket/out"),
        ("--checkpoint=BUCKET/nothing", "no checkpoint at BUCKET/nothing"),
    ],
)
def test_what_is_not_there_is_named(bucket, capfd, wrong, told):
    message = failure_of(capfd, *options(bucket), wrong.replace("BUCKET", bucket), output=f"{bucket}/out")
    assert told.replace("BUCKET", bucket) in message
    assert storage.list_files(f"{bucket}/out") == {}


def test_of_two_runs_at_once_one_publishes_and_the_other_leaves_nothing(bucket, monkeypatch, capfd):
    output = f"{bucket}/out"
    both_are_there = threading.Barrier(2)
    publish = reconcile.publish

    def publish_together(*arguments):
        both_are_there.wait(timeout=120)
        return publish(*arguments)

    monkeypatch.setattr(reconcile, "publish", publish_together)
    statuses = []
    threads = [
        threading.Thread(target=lambda: statuses.append(embed(*options(bucket), output=output))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [PUBLISHED, 1]
    assert f"error: another run published snapshot {latest(output).name} into {output}" in capfd.readouterr().err
    check_shards(latest(output))
    left = storage.list_files(output).keys() - names_of_snapshots(output)
    assert all(name.startswith(".work/run=") for name in left)  # What the loser saved, for the next run.


def test_work_of_a_failed_run_is_taken_up_from_gs_and_removed(bucket, monkeypatch, capfd):
    output = f"{bucket}/out"

    def fail(*_):
        raise RuntimeError("it was all for nothing")

    with monkeypatch.context() as patch:
        patch.setattr(known_vectors, "_MIN_INTERVAL_SECONDS", 0.0)
        patch.setattr(known_vectors, "_MAX_LOST_FRACTION", 0.0)
        patch.setattr(reconcile, "finish", fail)
        assert "it was all for nothing" in failure_of(capfd, *options(bucket), output=output)
    [name] = list_work(output)
    assert all(file.startswith(f".work/run={name}/vectors-") for file in storage.list_files(output))
    assert embed(*options(bucket), output=output) == PUBLISHED
    assert counts_of(latest(output)) == {"read": 6, "reused": 6, "recovered": 6}
    assert storage.list_files(output).keys() == names_of_snapshots(output)
