"""A run is published only when all it counted agrees, and what happens to its files otherwise."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline as Pipeline
from apache_beam.testing.util import assert_that

from transforms import reconcile, storage
from transforms.manifest import check_manifest
from transforms.publish import ConcurrentRunError, claim
from transforms.reconcile import PublishSnapshot, Run, build_manifest, finish
from transforms.shard_files import PARTS_FOLDER, ShardFile
from transforms.snapshots import latest_version, list_published, list_work, read_latest, snapshot_names, work_folder

ENCODER = {
    "fingerprint": "f" * 64,
    "checkpoint": "default",
    "bert": "a-bert",
    "bert_sha256": "b" * 64,
    "lstm_sha256": "c" * 64,
    "pooling": "mean",
    "window": 512,
    "max_tokens": 8192,
}
TALLIES = {
    "read": 10,
    "repeated": 1,
    "deleted": 3,
    "texts_encoded": 4,
    "tokens": 20_000,
    "padded_tokens": 21_000,
    "encode_seconds": 40.0,
    "known_tokens": 300,
    "device cpu float32": 4,
}


class Finished(NamedTuple):
    """The arguments of `finish`, for a run whose files are written: 5 rows embedded, 3 known, 2 rejected."""

    run: Run
    shards: list[ShardFile]
    rejected: list[ShardFile]
    tallies: Mapping[str, float]


def written_file(run: Run, number: int, file: str, rows: int, **tallies: int) -> ShardFile:
    data = f"{rows} rows of {run.name}".encode()
    storage.create_exclusively(f"{run.folder}/{file}", data)
    return ShardFile(number, 0, file, rows, len(data), "sha256:" + "0" * 64, tallies)


def make_run(output: Path, **arguments: Any) -> Run:
    token = latest_version(str(output))
    name = claim(str(output), datetime.now(timezone.utc), token)
    run = Run(
        output=str(output),
        name=name,
        token=token,
        started=0.0,
        created="2026-11-22T18:00:00+00:00",
        runner="local",
        encoder=ENCODER,
        versions={"python": "3.11"},
        options={"input": ["corpus.jsonl"]},
        max_rejected_fraction=0.5,
        finished_work=[name],
    )
    return replace(run, **arguments)


def make(output: Path, tallies: Mapping[str, float] | None = None, **arguments: Any) -> Finished:
    run = make_run(output, **arguments)
    shards = [  # In no order.
        written_file(run, 1, "embeddings-00001-of-00002.parquet", 3, reused=1, recovered=2),
        written_file(run, 0, "embeddings-00000-of-00002.parquet", 5, encoded=5, truncated=1),
    ]
    rejected = [written_file(run, 0, "rejected-00000-of-00001.jsonl", 2, empty_text=1, duplicate_id=1)]
    storage.create_exclusively(f"{run.folder}/{PARTS_FOLDER}/0-0-orphan", b"what a failed try left")
    storage.create_exclusively(f"{work_folder(run.output, run.name)}/vectors-1.parquet", b"work")
    return Finished(run, shards, rejected, TALLIES | dict(tallies or {}))


def files_of(run: Run) -> list[str]:
    return sorted(storage.list_files(run.folder))


PUBLISHED_FILES = [
    "embeddings-00000-of-00002.parquet",
    "embeddings-00001-of-00002.parquet",
    "manifest.json",
    "rejected-00000-of-00001.jsonl",
]
REFUSED_FILES = ["rejected-00000-of-00001.jsonl", "report.json"]


# The manifest.


def test_the_manifest_says_everything_and_is_valid(tmp_path):
    finished = make(tmp_path)
    manifest = build_manifest(*finished)
    check_manifest(manifest)
    assert manifest.pop("seconds") > 1e9  # Since the run started, in 1970.
    assert manifest == {
        "format": 1,
        "snapshot": finished.run.name,
        "previous": None,
        "created": "2026-11-22T18:00:00+00:00",
        "runner": "local",
        "encoder": ENCODER | {"dtype": "float32", "device": "cpu"},
        "counts": {
            "read": 10,
            "embedded": 5,
            "reused": 3,
            "recovered": 2,
            "rejected": 2,
            "deleted": 3,
            "truncated": 1,
            "texts_encoded": 4,
            "repeated": 1,
            "blank_lines": 0,
            "tokens": 20_000,
            "padded_tokens": 21_000,
        },
        "encode_seconds": 40.0,
        "seconds_per_token": 0.002,
        "seconds_saved": 0.6,
        "rejected_by_reason": {"duplicate_id": 1, "empty_text": 1},
        "shards": [
            {"file": shard.file, "rows": shard.rows, "bytes": shard.bytes, "checksum": shard.checksum}
            for shard in (finished.shards[1], finished.shards[0])
        ],
        "rejected_files": [
            {
                "file": "rejected-00000-of-00001.jsonl",
                "rows": 2,
                "bytes": finished.rejected[0].bytes,
                "checksum": "sha256:" + "0" * 64,
            }
        ],
        "versions": {"python": "3.11"},
        "options": {"input": ["corpus.jsonl"]},
        "input_digest": None,
    }
    json.dumps(manifest, allow_nan=False)


def test_the_devices_of_all_workers_are_named(tmp_path):
    run = make_run(tmp_path)
    tallies = {"device cuda (NVIDIA L4) bfloat16": 7, "device cpu float32": 1}
    encoder = build_manifest(run, [], [], tallies)["encoder"]
    assert (encoder["device"], encoder["dtype"]) == ("cpu, cuda (NVIDIA L4)", "float32, bfloat16")
    encoder = build_manifest(run, [], [], {})["encoder"]
    assert (encoder["device"], encoder["dtype"]) == ("none: nothing was encoded",) * 2


@pytest.mark.parametrize(
    ("tokens", "encode_seconds", "by_last_snapshot", "rate", "saved"),
    [
        (20_000, 40.0, None, 0.002, 0.6),
        (20_000, 40.0, 5.0, 0.002, 0.6),  # This run's own rate is better.
        (9_999, 99.99, 0.004, 0.004, 1.2),  # It encoded too little to say.
        (100, 1.0, None, 0.01, 3.0),  # Better than nothing.
        (0, 0.0, 0.004, 0.004, 1.2),
        (0, 0.0, None, None, 0.0),
    ],
)
def test_seconds_saved_are_the_known_texts_tokens_at_the_rate_of_encoding(
    tmp_path, tokens, encode_seconds, by_last_snapshot, rate, saved
):
    tallies = {"tokens": tokens, "encode_seconds": encode_seconds}
    manifest = build_manifest(*make(tmp_path, tallies, seconds_per_token=by_last_snapshot))
    assert (manifest["seconds_per_token"], manifest["seconds_saved"]) == (rate, saved)


# Publishing.


def test_a_run_whose_counts_agree_is_published_and_its_leftovers_are_removed(tmp_path):
    finished = make(tmp_path)
    manifest = finish(*finished)
    assert "not_published" not in manifest
    assert list_published(str(tmp_path)) == [finished.run.name]
    assert read_latest(str(tmp_path)).manifest == manifest
    assert files_of(finished.run) == PUBLISHED_FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", f"snapshot={finished.run.name}"]


def test_the_work_of_all_runs_it_took_up_is_removed_and_no_other(tmp_path):
    for name in ("20200101T000000Z", "20200102T000000Z"):
        storage.create_exclusively(f"{work_folder(str(tmp_path), name)}/vectors-1.parquet", b"work")
    finished = make(tmp_path)
    run = replace(finished.run, finished_work=["20200101T000000Z", finished.run.name])
    finish(*finished._replace(run=run))
    assert list_work(str(tmp_path)) == ["20200102T000000Z"]


def test_finishing_may_be_tried_again(tmp_path):
    finished = make(tmp_path)
    first = finish(*finished)
    files = storage.list_files(str(tmp_path))
    again = finish(*finished)
    assert again == first
    assert storage.list_files(str(tmp_path)) == files


@pytest.mark.parametrize("step", ["remove_work", "remove_leftovers", "remove_old"])
def test_finishing_may_be_tried_again_after_an_error_in_its_midst(tmp_path, monkeypatch, step):
    for _ in range(2):
        finish(*make(tmp_path))
    finished = make(tmp_path, keep_snapshots=2)
    with monkeypatch.context() as failing:
        failing.setattr(reconcile, step, lambda *_: (_ for _ in ()).throw(OSError("no network")))
        with pytest.raises(OSError, match="no network"):
            finish(*finished)
    manifest = finish(*finished)
    assert read_latest(str(tmp_path)).manifest == manifest
    assert snapshot_names(str(tmp_path)) == list_published(str(tmp_path)) == [manifest["previous"], finished.run.name]
    assert list_work(str(tmp_path)) == []


def test_older_snapshots_are_removed_where_asked(tmp_path):
    names = []
    for _ in range(4):
        names.append(finish(*make(tmp_path))["snapshot"])
    assert list_published(str(tmp_path)) == names
    names.append(finish(*make(tmp_path, keep_snapshots=3))["snapshot"])
    assert list_published(str(tmp_path)) == snapshot_names(str(tmp_path)) == names[-3:]
    names.append(finish(*make(tmp_path, keep_snapshots=1))["snapshot"])
    # The one that was read stays.
    assert list_published(str(tmp_path)) == snapshot_names(str(tmp_path)) == names[-2:]


def test_a_run_that_was_overtaken_leaves_nothing_to_read(tmp_path):
    slow = make(tmp_path)
    fast = make(tmp_path)
    winner = finish(*fast)
    with pytest.raises(ConcurrentRunError, match=f"another run published snapshot {winner['snapshot']}"):
        finish(*slow)
    assert files_of(slow.run) == []
    assert read_latest(str(tmp_path)).manifest == winner
    assert list_work(str(tmp_path)) == [slow.run.name]  # Its work is taken up by the next run.


# Not publishing.

DISAGREEMENTS = {
    "a row is lost": (
        {"read": 11},
        "the counts disagree: 11 records were read, but 5 embedded + 3 reused + 2 rejected are 10",
    ),
    "a row is there twice": (
        {"read": 9},
        "the counts disagree: 9 records were read, but 5 embedded + 3 reused + 2 rejected are 10",
    ),
    "too much is rejected": (
        {"repeated": 0},
        "2 of 10 records were rejected (20.00%), more than --max_rejected_fraction 0.15 allows",
    ),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_run_that_does_not_add_up_is_not_published_and_says_why(tmp_path, case):
    published = finish(*make(tmp_path))
    latest = (tmp_path / "LATEST").read_bytes()
    tallies, reason = DISAGREEMENTS[case]
    refused = make(tmp_path, tallies, max_rejected_fraction=0.15, keep_snapshots=1)
    manifest = finish(*refused)
    assert manifest["not_published"] == [reason]
    assert (tmp_path / "LATEST").read_bytes() == latest
    assert list_published(str(tmp_path)) == [published["snapshot"]]
    assert files_of(refused.run) == REFUSED_FILES
    assert json.loads(Path(refused.run.folder, "report.json").read_bytes()) == manifest
    # What it encoded is not lost.
    assert list_work(str(tmp_path)) == [refused.run.name]

    # Tried again: the same.
    again = finish(*refused)
    assert again | {"seconds": 0} == manifest | {"seconds": 0}
    assert files_of(refused.run) == REFUSED_FILES

    # The next run goes on from the last published one, and leaves the refused one's report to its reader.
    following = make(tmp_path)
    assert finish(*following)["previous"] == published["snapshot"]
    assert list_published(str(tmp_path)) == [published["snapshot"], following.run.name]
    assert files_of(following.run) == PUBLISHED_FILES
    assert files_of(refused.run) == REFUSED_FILES


def test_a_lost_shard_or_rejected_file_is_noticed(tmp_path):
    finished = make(tmp_path)
    lost = finished._replace(shards=finished.shards[1:])
    assert build_manifest(*lost)["counts"]["reused"] == 0
    assert reconcile.reasons_against(lost.run, build_manifest(*lost)) == [
        "the counts disagree: 10 records were read, but 5 embedded + 0 reused + 2 rejected are 7"
    ]
    lost = finished._replace(rejected=[])
    assert finish(*lost)["not_published"] == [
        "the counts disagree: 10 records were read, but 5 embedded + 3 reused + 0 rejected are 8"
    ]


def test_shards_with_other_rows_than_were_counted_are_noticed(tmp_path):
    """One row too many in a shard, which the counts of its rows by origin do not know."""
    finished = make(tmp_path)
    shards = [finished.shards[0]._replace(rows=4), finished.shards[1]]
    assert finish(*finished._replace(shards=shards))["not_published"] == [
        "the counts disagree: the shards hold 9 rows, but 5 were embedded and 3 reused"
    ]


def test_an_empty_input_is_not_published(tmp_path):
    run = make_run(tmp_path)
    manifest = finish(run, [], [], {})
    assert manifest["not_published"] == ["the input holds no record at all"]
    assert files_of(run) == ["report.json"]
    assert read_latest(str(tmp_path)) is None


def test_rejects_of_which_nothing_is_known_are_reported_and_no_error(tmp_path):
    run = make_run(tmp_path)
    rejected = [written_file(run, 0, "rejected-00000-of-00001.jsonl", 1, empty_text=1)]
    assert finish(run, [], rejected, {})["not_published"] == [
        "the counts disagree: 0 records were read, but 0 embedded + 0 reused + 1 rejected are 1",
        "the input holds no record at all",
    ]


@pytest.mark.parametrize(
    ("read", "rejected", "repeated", "blank_lines", "allowed", "published"),
    [
        (100, 29, 0, 0, 0.29, True),  # 0.29 * 100 is 28.999999999999996.
        (100, 30, 0, 0, 0.29, False),
        (100, 1, 0, 0, 0.01, True),
        (100, 7, 0, 0, 0.07, True),
        (3, 1, 0, 0, 1 / 3, True),
        (1_000_000_000, 1, 0, 0, 0.0, False),
        (100, 0, 0, 0, 0.0, True),
        (100, 100, 0, 0, 1.0, True),
        # Repeated texts without ids are the same document once more.
        (100, 60, 60, 0, 0.0, True),
        (100, 61, 60, 0, 0.0, False),
        (100, 61, 60, 0, 0.01, True),
        # Blank lines of text files are no records.
        (100, 60, 0, 60, 0.0, True),
        (100, 61, 0, 60, 0.024, False),
        (100, 61, 0, 60, 0.025, True),
        (100, 90, 40, 50, 0.0, True),
        (100, 100, 0, 100, 1.0, False),
    ],
)
def test_the_fraction_that_may_be_rejected(tmp_path, read, rejected, repeated, blank_lines, allowed, published):
    run = make_run(tmp_path, max_rejected_fraction=allowed)
    kept = read - rejected
    shards = [ShardFile(0, 0, "e", kept, 1, "sha256:0", {"encoded": kept})] if kept else []
    files = [ShardFile(0, 0, "r", rejected, 1, "sha256:0", {"wrong_type": rejected})] if rejected else []
    manifest = build_manifest(run, shards, files, {"read": read, "repeated": repeated, "blank_lines": blank_lines})
    check_manifest(manifest)
    assert (reconcile.reasons_against(run, manifest) == []) is published


# In a pipeline.


def test_tallies_are_added_up_and_one_manifest_comes_out(tmp_path):
    finished = make(tmp_path)
    tallies = [("read", 4), ("read", 6), *[(name, count) for name, count in TALLIES.items() if name != "read"]]
    with Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        inputs = (
            pipeline | "shards" >> beam.Create(finished.shards),
            pipeline | "rejected" >> beam.Create(finished.rejected),
            pipeline | "tallies" >> beam.Create(tallies),
        )
        manifests = inputs | PublishSnapshot(finished.run)

        def check(found):
            expected = build_manifest(*finished)
            assert [manifest | {"seconds": 0} for manifest in found] == [expected | {"seconds": 0}]

        assert_that(manifests, check)
    assert list_published(str(tmp_path)) == [finished.run.name]
