"""What an output folder says was published, and what is said of a damaged one."""

import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from snapshot_helper import embedding, parquet_bytes, prepare, publish_rows, table

from transforms import storage
from transforms.publish import publish, remove_old
from transforms.shards import DamagedSnapshotError, SnapshotError
from transforms.snapshots import (
    LatestVersion,
    Snapshot,
    check_shards,
    is_published,
    is_snapshot_name,
    latest_path,
    latest_version,
    list_published,
    list_work,
    read_latest,
    read_snapshot,
    remove_work,
    snapshot_names,
    work_folder,
)

pytest_plugins = ["gcs_emulator"]

ROWS = [embedding(f"d{i}") for i in range(10)]
FIELDS = pa.schema([("lang", pa.string()), ("stars", pa.int16())])


@pytest.fixture(params=["local", "gs"])
def output(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "output")
    return request.getfixturevalue("gcs_bucket") + "/some/output"


@pytest.fixture
def local(tmp_path) -> str:
    return str(tmp_path / "output")


def test_an_empty_output_has_no_snapshot(output):
    assert latest_version(output) == LatestVersion(None, storage.ABSENT)
    assert read_latest(output) is None
    assert list_published(output) == []
    assert list_work(output) == []
    with pytest.raises(SnapshotError, match="no published snapshot '20260101T000000Z', but these: none"):
        read_snapshot(output, "20260101T000000Z")


def test_what_was_published_is_read_back(output):
    rows = [row._replace(fields={"lang": "en", "stars": i}) for i, row in enumerate(ROWS)]
    written = publish_rows(output, rows, FIELDS)
    snapshot = read_latest(output)
    assert snapshot == written == read_snapshot(output, written.name)
    assert snapshot.fingerprint == rows[0].encoder
    assert snapshot.num_rows == 10
    assert snapshot.folder == f"{output}/snapshot={snapshot.name}"
    assert snapshot.shard_paths == [f"{snapshot.folder}/embeddings-0000{i}-of-00003.parquet" for i in range(3)]
    assert snapshot.schema() == table(rows, FIELDS).schema
    assert snapshot.schema().metadata == table(rows, FIELDS).schema.metadata
    batches = list(snapshot.record_batches(batch_rows=3))
    assert [(path, len(batch)) for path, batch in batches] == [
        (snapshot.shard_paths[0], 3),
        (snapshot.shard_paths[0], 1),
        (snapshot.shard_paths[1], 3),
        (snapshot.shard_paths[1], 1),
        (snapshot.shard_paths[2], 2),
    ]
    assert pa.Table.from_batches([batch for _, batch in batches]).equals(table(rows, FIELDS))
    check_shards(snapshot)


def test_a_snapshot_without_rows_has_no_shards(output):
    snapshot = publish_rows(output, [])
    assert (snapshot.shard_paths, snapshot.schema(), list(snapshot.record_batches())) == ([], None, [])
    check_shards(snapshot)


def test_snapshots_are_listed_oldest_first(output):
    names = [publish_rows(output, ROWS[:i]).name for i in (1, 2, 3)]
    assert list_published(output) == names == sorted(names)
    assert [read_snapshot(output, name).num_rows for name in names] == [1, 2, 3]
    assert [is_published(output, name) for name in names] == [True, True, True]
    assert read_latest(output).manifest["previous"] == names[1]


def test_a_snapshot_that_is_not_in_the_history_is_not_read(output):
    publish_rows(output, ROWS[:1])
    lost = prepare(output, ROWS[:2])
    storage.create_exclusively(f"{output}/snapshot={lost.name}/manifest.json", json.dumps(lost.manifest).encode())
    winner = publish_rows(output, ROWS[:3])
    assert read_latest(output) == winner
    assert lost.name not in list_published(output)
    assert lost.name in snapshot_names(output)
    assert not is_published(output, lost.name)
    with pytest.raises(SnapshotError, match=f"no published snapshot '{lost.name}'"):
        read_snapshot(output, lost.name)


def test_a_first_snapshot_that_is_published_while_latest_is_looked_for_is_read(output, monkeypatch):
    run = prepare(output, ROWS)
    read_versioned = storage.read_versioned
    published = []

    def read_then_publish(url):
        found = read_versioned(url)
        if url == latest_path(output) and not published:
            published.append(run.name)
            publish(*run)
        return found

    monkeypatch.setattr(storage, "read_versioned", read_then_publish)
    latest = read_latest(output)
    assert latest is not None
    assert [latest.name] == published


def test_the_history_ends_at_a_snapshot_that_was_removed(output):
    names = [publish_rows(output, ROWS[:i]).name for i in (1, 2, 3)]
    storage.delete_folder(f"{output}/snapshot={names[1]}")
    assert list_published(output) == names[2:]
    with pytest.raises(DamagedSnapshotError, match=f"does not say whether {names[0]} came before it"):
        read_snapshot(output, names[0])


def test_latest_with_a_line_break_is_understood(local):
    snapshot = publish_rows(local, ROWS)
    Path(local, "LATEST").write_text(snapshot.name + "\n")
    assert read_latest(local) == snapshot


def test_going_back_to_an_older_snapshot_by_hand_takes_the_newer_one_out_of_the_history(local):
    old, new = (publish_rows(local, ROWS[:i]) for i in (1, 2))
    Path(local, "LATEST").write_text(old.name)
    assert list_published(local) == [old.name]
    after = publish_rows(local, ROWS[:3])
    assert list_published(local) == [old.name, after.name]
    assert not is_published(local, new.name)


@pytest.mark.parametrize("name", ["20261122T180000Z", "19700101T000000Z"])
def test_names_of_snapshots(name):
    assert is_snapshot_name(name)


@pytest.mark.parametrize(
    "name", ["", "latest", "20261122T180000", "20261322T180000Z", " 20261122T180000Z", "2026112T18000Z"]
)
def test_what_is_no_name_of_a_snapshot(name):
    assert not is_snapshot_name(name)


# Damage.


def damage_latest(snapshot):
    Path(snapshot.output, "LATEST").write_bytes(b"\xff\xfe")
    return "LATEST does not hold the name of a snapshot"


def lose_manifest(snapshot):
    Path(snapshot.folder, "manifest.json").unlink()
    return "manifest.json is missing"


def lose_folder(snapshot):
    storage.delete_folder(snapshot.folder)
    return "manifest.json is missing"


def cut_manifest(snapshot):
    path = Path(snapshot.folder, "manifest.json")
    path.write_bytes(path.read_bytes()[:-40])
    return r"manifest.json is not a manifest \(.*line"


def garble_manifest(snapshot):
    Path(snapshot.folder, "manifest.json").write_bytes(b"\x80\x81")
    return r"manifest.json is not a manifest \('utf-8' codec"


def edit_manifest(edited, **changes):
    path = Path(edited.folder, "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_format(snapshot):
    edit_manifest(snapshot, format=99)
    return "manifest.json is not a manifest .its format is 99"


def other_counts(snapshot):
    edit_manifest(snapshot, shards=[])
    return "manifest.json is not a manifest .the shards' rows is 0"


def other_snapshot(snapshot):
    edit_manifest(snapshot, snapshot="20000101T000000Z")
    return "manifest.json is of snapshot 20000101T000000Z"


def circle(snapshot):
    edit_manifest(snapshot, previous=snapshot.name)
    return f"manifest.json is of snapshot {snapshot.name} after {snapshot.name}"


@pytest.mark.parametrize(
    "damage",
    [
        damage_latest,
        lose_manifest,
        lose_folder,
        cut_manifest,
        garble_manifest,
        other_format,
        other_counts,
        other_snapshot,
        circle,
    ],
)
def test_a_damaged_last_snapshot_is_an_error_that_names_the_file_and_a_full_run_goes_on(local, damage):
    snapshot = publish_rows(local, ROWS)
    message = damage(snapshot)
    with pytest.raises(DamagedSnapshotError, match=message) as caught:
        read_latest(local)
    assert "--full" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    after = publish_rows(local, ROWS[:2])
    assert read_latest(local) == after
    assert list_published(local) == [after.name]


def lose_shard(path):
    os.unlink(path)
    return "is missing"


def cut_shard(path):
    size = os.path.getsize(path)
    os.truncate(path, size - 1)
    return f"has {size - 1} bytes, not {size}"


@pytest.mark.parametrize("damage", [lose_shard, cut_shard])
def test_a_damaged_shard_is_named(local, damage):
    snapshot = publish_rows(local, ROWS)
    message = damage(snapshot.shard_paths[1])
    with pytest.raises(DamagedSnapshotError, match=f"embeddings-00001-of-00003.parquet {message}.*--full"):
        check_shards(snapshot)


def test_a_shard_on_gs_that_is_missing_is_named(gcs_bucket):
    snapshot = publish_rows(gcs_bucket, ROWS)
    storage.delete_files(snapshot.shard_paths[2:])
    with pytest.raises(DamagedSnapshotError, match=r"gs://.*embeddings-00002-of-00003.parquet is missing"):
        check_shards(snapshot)


def test_work_is_listed_and_removed_and_never_read_as_a_snapshot(output):
    snapshot = publish_rows(output, ROWS)
    for run in ("20260102T000000Z", "20260101T000000Z"):
        data = parquet_bytes(table(ROWS[:1]))
        storage.create_exclusively(f"{work_folder(output, run)}/part-0.parquet", data)
    assert list_work(output) == ["20260101T000000Z", "20260102T000000Z"]
    assert list_published(output) == snapshot_names(output) == [snapshot.name]
    remove_work(output, "20260101T000000Z")
    remove_work(output, "20260101T000000Z")
    assert list_work(output) == ["20260102T000000Z"]
    remove_work(output, "20260102T000000Z")
    assert list_work(output) == []
    assert storage.list_folders(output) == [f"snapshot={snapshot.name}"]


def test_a_snapshot_travels_to_workers(local):
    snapshot = publish_rows(local, ROWS)
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot
    assert isinstance(snapshot, Snapshot)
    assert publish(*prepare(local, ROWS)).manifest["previous"] == snapshot.name
    assert remove_old(local, 5) == []
