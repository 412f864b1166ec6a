"""Reads a whole snapshot and finds everything in it that is not as it must be."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from transforms import storage
from transforms.id_partitions import IdPartitions, partition_count
from transforms.schema import FIXED_COLUMNS
from transforms.shards import DamagedSnapshotError, embeddings_of, open_shard, read_shard
from transforms.snapshots import Snapshot
from transforms.storage import checksum, join

UNIT_LENGTH_TOLERANCE = 1e-3
"""How far a vector's length may be from 1."""

_ID_SCHEMA = pa.schema([("id", pa.string())])


def audit(snapshot: Snapshot) -> Iterator[str]:
    """Finds what is wrong with a snapshot.

    It reads everything twice, once as bytes and once as rows, and spreads the ids over temporary files to see that
    none is there twice; about 200,000 ids are in memory at once.

    Yields:
      One line for each fault, naming the file; none where the snapshot is whole.
    """
    sizes = storage.list_files(snapshot.folder)
    files = {shard["file"]: shard for shard in snapshot.manifest["shards"]}
    for file in sorted(sizes):
        if file.endswith(".parquet") and file not in files:
            yield f"{join(snapshot.folder, file)} is not in the manifest, but readers of *.parquet would read it"
    for described in (*files.values(), *snapshot.rejected_files):
        path = join(snapshot.folder, described["file"])
        if described["file"] not in sizes:
            yield f"{path} is missing"
        elif sizes[described["file"]] != described["bytes"]:
            yield f"{path} has {sizes[described['file']]} bytes, not {described['bytes']}"
        elif checksum(path) != described["checksum"]:
            yield f"{path} does not have the checksum {described['checksum']}"
    yield from _check_rows(snapshot, [join(snapshot.folder, file) for file in files if file in sizes])
    yield from _check_rejected(snapshot, sizes)


def _check_rows(snapshot: Snapshot, paths: list[str]) -> Iterator[str]:
    rows = {join(snapshot.folder, shard["file"]): shard["rows"] for shard in snapshot.manifest["shards"]}
    count = partition_count(snapshot.num_rows)
    first: pa.Schema | None = None
    with tempfile.TemporaryDirectory(prefix="audit-") as scratch:
        with IdPartitions(Path(scratch), _ID_SCHEMA, count) as ids:
            for path in paths:
                try:
                    with open_shard(path) as shard:
                        schema = shard.schema_arrow
                        if shard.metadata.num_rows != rows[path]:
                            yield f"{path} holds {shard.metadata.num_rows} rows, not {rows[path]}"
                except DamagedSnapshotError as error:
                    yield " ".join(error.args)
                    continue
                first = schema if first is None else first
                if not schema.equals(first, check_metadata=True):
                    yield f"{path} has another schema or other metadata than {paths[0]}"
                faults = _schema_faults(schema)
                if faults:
                    yield f"{path} has {faults}"
                    continue
                yield from _check_shard_rows(snapshot, path, ids)
        for partition in range(count):
            for row_id, times in Counter(ids.read(partition).column("id").to_pylist()).items():
                if times > 1:
                    yield f"{snapshot.folder} holds {times} rows of id {row_id!r}"


def _schema_faults(schema: pa.Schema) -> str:
    for field in FIXED_COLUMNS:
        if field.name not in schema.names:
            return f"no column {field.name}"
        if schema.field(field.name).type != field.type:
            return f"a column {field.name} of type {schema.field(field.name).type}, not {field.type}"
    return ""


def _check_shard_rows(snapshot: Snapshot, path: str, ids: IdPartitions) -> Iterator[str]:
    """Yields a line for each kind of fault among a shard's rows, with the number of rows and the first one's id."""
    faults: Counter[str] = Counter()
    first_ids: dict[str, str | None] = {}
    try:
        for batch in read_shard(path, FIXED_COLUMNS.names):
            for fault, wrong in _row_faults(snapshot, batch).items():
                if wrong.any():
                    faults[fault] += int(wrong.sum())
                    first_ids.setdefault(fault, batch.column("id")[int(wrong.argmax())].as_py())
            ids.add(batch.select(["id"]).filter(batch.column("id").is_valid()).cast(_ID_SCHEMA))
    except DamagedSnapshotError as error:
        yield " ".join(error.args)
    for fault, count in faults.items():
        yield f"{path}: {count} rows with {fault}, the first one of id {first_ids[fault]!r}"


def _row_faults(snapshot: Snapshot, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Returns which rows, (rows,) bool, have which fault."""
    nulls = np.zeros(batch.num_rows, dtype=bool)
    for column in batch.columns:
        nulls |= column.is_null().to_numpy(zero_copy_only=False)
    vectors = embeddings_of(batch)
    finite = np.isfinite(vectors).all(axis=1)
    lengths = np.linalg.norm(vectors, axis=1)
    return {
        "a null": nulls,
        "a number that is not finite": ~finite,
        "a vector that is not of length 1": finite & ~(np.abs(lengths - 1) <= UNIT_LENGTH_TOLERANCE),
        "an empty id": _mask(pc.equal(batch.column("id"), "")),
        "a content_hash that is no SHA-256": ~_mask(
            pc.match_substring_regex(batch.column("content_hash"), "^[0-9a-f]{64}$")
        ),
        "another encoder than the manifest's": ~_mask(pc.equal(batch.column("encoder"), snapshot.fingerprint)),
    }


def _mask(values: pa.BooleanArray) -> np.ndarray:
    return values.fill_null(False).to_numpy(zero_copy_only=False)


def _check_rejected(snapshot: Snapshot, sizes: dict[str, int]) -> Iterator[str]:
    reasons: Counter[str] = Counter()
    for file in sorted(sizes):
        if not (file.startswith("rejected-") and file.endswith(".jsonl")):
            continue
        path = join(snapshot.folder, file)
        with storage.open_for_reading(path) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    reasons[json.loads(line)["reason"]] += 1
                except (ValueError, KeyError, TypeError):
                    yield f"{path} line {number} is not a rejected record"
    expected = Counter(snapshot.manifest["rejected_by_reason"])
    for reason in sorted(reasons.keys() | expected.keys()):
        if reasons[reason] != expected[reason]:
            yield f"{snapshot.folder} holds {reasons[reason]} rejected records for {reason}, not {expected[reason]}"
