"""What differs between two snapshots, id by id."""

import hashlib
import heapq
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from transforms.fields import storage_type
from transforms.id_partitions import IdPartitions, partition_count
from transforms.schema import FIXED_COLUMNS
from transforms.shards import DamagedSnapshotError
from transforms.snapshots import Snapshot

CATEGORIES: Mapping[str, str] = {
    "added": "ids that only the second snapshot has",
    "deleted": "ids that only the first snapshot has",
    "changed": "another text",
    "re_encoded": "the same text, by another encoder",
    "fields_changed": "the same text and encoder, other kept fields",
    "unchanged": "all the same",
}
"""What can have become of an id, each id in the first that fits."""

NUM_EXAMPLES = 10

_BATCH_ROWS = 65_536

_COMPARED = pa.schema(
    [("id", pa.string()), ("content_hash", pa.string()), ("encoder", pa.string()), ("fields", pa.binary())]
)


class _Row(NamedTuple):
    content_hash: str
    encoder: str
    fields: bytes


@dataclass(frozen=True)
class SnapshotDiff:
    """What became of every id from one snapshot to another.

    Attributes:
      counts: ids by category, a key of `CATEGORIES`.
      examples: the first `NUM_EXAMPLES` ids of every category but `unchanged`, sorted.
    """

    counts: Mapping[str, int]
    examples: Mapping[str, Sequence[str]]


def diff(before: Snapshot, after: Snapshot) -> SnapshotDiff:
    """Compares two snapshots.

    Vectors are not read. What is compared is spread over files of the temporary folder by the ids' hashes, about 150
    bytes a row, and read back a part at a time: 20 million rows take a few minutes, 3 GB there and 0.5 GB of memory.

    Args:
      before: the snapshot that counts as the older one.
      after: the other.

    Raises:
      DamagedSnapshotError: a shard is missing or cannot be decoded, or an id is there twice.
    """
    counts = Counter(dict.fromkeys(CATEGORIES, 0))
    examples: dict[str, list[str]] = {category: [] for category in CATEGORIES if category != "unchanged"}
    count = partition_count(before.num_rows + after.num_rows)
    with tempfile.TemporaryDirectory(prefix="diff-") as scratch:
        sides = [
            _partitioned(snapshot, Path(scratch) / side, count) for snapshot, side in ((before, "a"), (after, "b"))
        ]
        for partition in range(count):
            old = _rows(before, sides[0], partition)
            new = _rows(after, sides[1], partition)
            found: dict[str, list[str]] = {category: [] for category in CATEGORIES}
            for row_id in old.keys() | new.keys():
                found[_category(old.get(row_id), new.get(row_id))].append(row_id)
            for category, ids in found.items():
                counts[category] += len(ids)
                if category in examples:
                    examples[category] = heapq.nsmallest(NUM_EXAMPLES, [*examples[category], *ids])
    return SnapshotDiff(dict(counts), examples)


def _category(old: _Row | None, new: _Row | None) -> str:
    if old is None or new is None:
        return "added" if old is None else "deleted"
    if old.content_hash != new.content_hash:
        return "changed"
    if old.encoder != new.encoder:
        return "re_encoded"
    return "unchanged" if old.fields == new.fields else "fields_changed"


def _partitioned(snapshot: Snapshot, folder: Path, count: int) -> IdPartitions:
    folder.mkdir()
    with IdPartitions(folder, _COMPARED, count) as partitions:
        for batch in _compared_batches(snapshot):
            partitions.add(batch)
    return partitions


def _compared_batches(snapshot: Snapshot) -> Iterator[pa.RecordBatch]:
    schema = snapshot.schema()
    if schema is None:
        return
    kept = [name for name in schema.names if name not in FIXED_COLUMNS.names]
    for _, batch in snapshot.record_batches(["id", "content_hash", "encoder", *kept], _BATCH_ROWS):
        columns = [batch.column(name) for name in ("id", "content_hash", "encoder")]
        rows = _comparable(batch.select(kept)).to_pylist() if kept else [{}] * batch.num_rows
        yield pa.record_batch([*columns, pa.array(map(_digest, rows), pa.binary())], schema=_COMPARED)


def _comparable(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Returns dates and times as Arrow's integers, of which Python has all, in columns whose names tell their types."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        plain = storage_type(column.type)
        if plain == column.type:
            columns[name] = column
        else:
            columns[f"{name} {column.type}"] = column.cast(plain)
    return pa.record_batch(columns)


def _digest(fields: Mapping[str, object]) -> bytes:
    """Returns a digest of a row's kept fields by name, so that their order does not count."""
    return hashlib.blake2b(repr(sorted(fields.items())).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _rows(snapshot: Snapshot, partitions: IdPartitions, partition: int) -> dict[str, _Row]:
    table = partitions.read(partition)
    ids, *values = (column.to_pylist() for column in table.columns)
    rows = dict(zip(ids, map(_Row, *values), strict=True))
    if len(rows) < len(ids):
        repeated = next(row_id for row_id, times in Counter(ids).items() if times > 1)
        raise DamagedSnapshotError(snapshot.folder, f"holds two rows of id {repeated!r}")
    return rows
