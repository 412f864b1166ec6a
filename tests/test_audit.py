"""Everything that can be wrong with a snapshot is found, and named."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from snapshot_helper import FINGERPRINT, embedding, parquet_bytes, publish_rows, table, unit_vector

from transforms.audit import audit, checksum
from transforms.schema import FIXED_COLUMNS, Rejected
from transforms.snapshots import read_latest

pytest_plugins = ["gcs_emulator"]

ROWS = [embedding(f"d{i}") for i in range(10)]
REJECTED = [
    Rejected("a.txt", i, "", reason, "", "") for i, reason in enumerate(["empty_text", "empty_text", "too_large"])
]


@pytest.fixture
def output(tmp_path) -> str:
    return str(tmp_path / "output")


def test_a_whole_snapshot_has_no_faults(output, gcs_bucket):
    for where in (output, gcs_bucket):
        assert list(audit(publish_rows(where, ROWS, rejected=REJECTED))) == []
        assert list(audit(publish_rows(where, []))) == []


def test_a_checksum_is_the_sha_256_of_the_bytes(tmp_path):
    (tmp_path / "hello").write_bytes(b"hello")
    expected = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert checksum(str(tmp_path / "hello")) == expected


def replace_shard(snapshot, index, data):
    """Writes other bytes in place of a shard, and the manifest to match, so that only the contents are wrong."""
    path = Path(snapshot.shard_paths[index])
    path.write_bytes(data)
    manifest_path = Path(snapshot.folder, "manifest.json")
    manifest = json.loads(manifest_path.read_text())
    manifest["shards"][index] |= {"bytes": len(data), "checksum": checksum(str(path))}
    manifest_path.write_text(json.dumps(manifest))
    return read_latest(snapshot.output)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (ROWS[4]._replace(embedding=ROWS[4].embedding * np.float32(1.01)), "a vector that is not of length 1"),
        (ROWS[4]._replace(embedding=np.zeros(256, np.float32)), "a vector that is not of length 1"),
        (ROWS[4]._replace(embedding=np.full(256, np.nan, np.float32)), "a number that is not finite"),
        (ROWS[4]._replace(embedding=np.array([np.inf] + [0] * 255, np.float32)), "a number that is not finite"),
        (ROWS[4]._replace(encoder="e" * 64), "another encoder than the manifest's"),
        (ROWS[4]._replace(content_hash="E" * 64), "a content_hash that is no SHA-256"),
        (ROWS[4]._replace(content_hash="e" * 64 + "\n"), "a content_hash that is no SHA-256"),
    ],
)
def test_a_wrong_row_is_found(output, row, fault):
    snapshot = publish_rows(output, ROWS)
    damaged = replace_shard(snapshot, 1, parquet_bytes(table([ROWS[5], row, ROWS[6], ROWS[7]])))
    assert list(audit(damaged)) == [f"{snapshot.shard_paths[1]}: 1 rows with {fault}, the first one of id 'd4'"]


def test_empty_ids_are_found(output):
    snapshot = publish_rows(output, [*ROWS[:2], embedding("")])
    assert list(audit(snapshot)) == [f"{snapshot.shard_paths[0]}: 1 rows with an empty id, the first one of id ''"]


def test_nulls_are_found(output):
    snapshot = publish_rows(output, ROWS)
    nullable = pa.schema([field.with_nullable(True) for field in FIXED_COLUMNS], {"encoder.fingerprint": FINGERPRINT})
    part = table(ROWS[:4]).cast(nullable)
    null_of_d0 = ": 1 rows with a null, the first one of id 'd0'"
    for name, faults in (
        ("id", (": 1 rows with a null, the first one of id None",)),
        ("num_tokens", (null_of_d0,)),
        ("embedding", (" cannot be decoded", null_of_d0)),  # Before pyarrow 26, a null was a list of the wrong size.
    ):
        place = part.schema.get_field_index(name)
        column = pa.array([None, *part.column(name).to_pylist()[1:]], nullable.field(name).type)
        damaged = replace_shard(snapshot, 0, parquet_bytes(part.set_column(place, nullable.field(name), column)))
        assert next(audit(damaged)).removeprefix(snapshot.shard_paths[0]).startswith(faults)


def test_an_id_that_is_there_twice_is_found_across_shards(output):
    snapshot = publish_rows(output, [*ROWS, embedding("d3", "another text"), embedding("d3", "a third one")])
    assert list(audit(snapshot)) == [f"{snapshot.folder} holds 3 rows of id 'd3'"]


def test_files_that_are_missing_cut_altered_or_too_many_are_found(output):
    snapshot = publish_rows(output, [embedding(f"d{i}") for i in range(16)])
    missing, cut, altered, garbled = snapshot.shard_paths
    size = os.path.getsize(cut)
    os.unlink(missing)
    os.truncate(cut, size - 9)
    data = bytearray(Path(altered).read_bytes())
    data[len(data) // 4] ^= 1
    Path(altered).write_bytes(data)
    Path(garbled).write_bytes(b"x" * os.path.getsize(garbled))
    Path(snapshot.folder, "of-another-run.parquet").write_bytes(b"")
    faults = list(audit(snapshot))
    expected = [
        f"{snapshot.folder}/of-another-run.parquet is not in the manifest",
        f"{missing} is missing",
        f"{cut} has {size - 9} bytes, not {size}",
        f"{altered} does not have the checksum sha256:",
        f"{garbled} does not have the checksum sha256:",
        f"{cut} is not Parquet",
        f"{altered} cannot be decoded",
        f"{garbled} is not Parquet",
    ]
    assert len(faults) == len(expected), faults
    for fault, start in zip(faults, expected, strict=True):
        assert fault.startswith(start)


def test_other_numbers_of_rows_schemas_and_columns_are_found(output):
    snapshot = publish_rows(output, ROWS)
    damaged = replace_shard(snapshot, 2, parquet_bytes(table(ROWS[8:9])))
    assert list(audit(damaged)) == [f"{snapshot.shard_paths[2]} holds 1 rows, not 2"]
    renamed = table(ROWS[8:]).replace_schema_metadata({"encoder.fingerprint": "another"})
    damaged = replace_shard(snapshot, 2, parquet_bytes(renamed))
    assert list(audit(damaged)) == [
        f"{snapshot.shard_paths[2]} has another schema or other metadata than {snapshot.shard_paths[0]}"
    ]
    damaged = replace_shard(snapshot, 2, parquet_bytes(table(ROWS[8:]).drop_columns(["truncated"])))
    assert list(audit(damaged))[1] == f"{snapshot.shard_paths[2]} has no column truncated"
    doubles = table(ROWS[8:]).cast(table(ROWS).schema.set(1, pa.field("embedding", pa.list_(pa.float64(), 256))))
    damaged = replace_shard(snapshot, 2, parquet_bytes(doubles))
    assert "has a column embedding of type fixed_size_list<element: double>[256], not" in list(audit(damaged))[1]


def test_rejected_records_are_counted(output):
    snapshot = publish_rows(output, ROWS, rejected=REJECTED)
    path = Path(snapshot.folder, "rejected-00000-of-00001.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{not JSON", lines[2], lines[2], '"a text"']) + "\n")
    [described] = snapshot.manifest["rejected_files"]
    size = os.path.getsize(path)
    assert list(audit(snapshot)) == [
        f"{path} has {size} bytes, not {described['bytes']}",
        f"{path} line 2 is not a rejected record",
        f"{path} line 5 is not a rejected record",
        f"{snapshot.folder} holds 1 rejected records for empty_text, not 2",
        f"{snapshot.folder} holds 2 rejected records for too_large, not 1",
    ]


def test_files_of_rejected_records_that_are_missing_or_altered_are_found(output):
    snapshot = publish_rows(output, ROWS, rejected=REJECTED)
    path = Path(snapshot.folder, "rejected-00000-of-00001.jsonl")
    text = path.read_text()
    path.write_text(text.replace("a.txt", "b.txt"))
    [described] = snapshot.manifest["rejected_files"]
    assert list(audit(snapshot)) == [f"{path} does not have the checksum {described['checksum']}"]
    path.unlink()
    assert next(audit(snapshot)) == f"{path} is missing"


def test_unit_vectors_of_the_helper_are_of_unit_length():
    assert abs(np.linalg.norm(unit_vector(3)) - 1) < 1e-6
