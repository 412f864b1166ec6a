"""Reads the Parquet files of a snapshot, its shards, and tells which of a snapshot's files is damaged, and how."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transforms import storage
from transforms.gcs import GcsError
from transforms.schema import EMBEDDING_DIM

BATCH_ROWS = 8192
"""Rows that are read at once, 8 MiB of vectors."""

_UNREADABLE = (GcsError, PermissionError, MemoryError)
"""Errors that say nothing about a shard: it may be whole, and the network, the credentials or memory are short."""

_UNDECODABLE = (OSError, pa.ArrowException, UnicodeDecodeError)
"""Errors of a shard whose bytes are not what was written: pyarrow has as many kinds as a footer has places."""


class SnapshotError(ValueError):
    """An output folder does not hold what was asked of it."""


class _FileError(SnapshotError):
    """Says what is wrong with a file, and what follows from that."""

    consequence: ClassVar[str]

    def __init__(self, file: str, fault: str):
        super().__init__(file, fault)  # Both, so that it survives being pickled.

    def __str__(self) -> str:
        file, fault = self.args
        return f"{file} {fault}{self.consequence}"


class DamagedSnapshotError(_FileError):
    """A file of a published snapshot is missing, or is not what it was written as."""

    consequence = (
        ": the snapshot is damaged. Restore the file, or run embed with --full, which encodes everything anew without "
        "it"
    )


class BrokenShardError(_FileError):
    """A file that a run has written for its own snapshot is missing, or is not what was written."""

    consequence = (
        ", though this run has just written it: nothing was published, and the last snapshot is as it was. See what "
        "else changes files there, or whether the disk is full or failing, and run it again"
    )


class Shard(NamedTuple):
    """A Parquet file of a snapshot, as its manifest has it; `checksum` as `storage.checksum` returns it."""

    path: str
    rows: int
    checksum: str


@contextmanager
def open_shard(path: str) -> Iterator[pq.ParquetFile]:
    """Opens a shard for reading; a context that closes it.

    Raises:
      DamagedSnapshotError: it is missing, or its footer cannot be decoded.
      OSError: it cannot be reached.
    """
    try:
        file = storage.open_for_reading(path)
    except FileNotFoundError as error:
        raise DamagedSnapshotError(path, "is missing") from error
    with file:
        with _undecodable_is_damage(path, "is not Parquet"):
            shard = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
            _ = shard.schema_arrow.names  # Else decoded only by those who ask, who expect no error then.
        yield shard


@contextmanager
def _undecodable_is_damage(path: str, damage: str) -> Iterator[None]:
    """Tells errors of a shard's bytes as damage; those that say nothing about them pass."""
    try:
        yield
    except _UNREADABLE:
        raise
    except _UNDECODABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The disk's, which has a number; those that pyarrow makes of bad bytes have none.
        raise DamagedSnapshotError(path, f"{damage} ({error})") from error


def check_checksum(shard: Shard) -> None:
    """Compares the bytes of a shard on this machine with its checksum; it reads them all.

    On gs:// that would be a second download, so nothing is read: Google Cloud Storage keeps objects whole by checksums
    of its own.

    Raises:
      DamagedSnapshotError: it is missing, or its bytes are not those that were written.
    """
    if storage.is_remote(shard.path):
        return
    try:
        found = storage.checksum(shard.path)
    except FileNotFoundError as error:
        raise DamagedSnapshotError(shard.path, "is missing") from error
    if found != shard.checksum:
        raise DamagedSnapshotError(shard.path, f"does not have the checksum {shard.checksum}")


def read_shard(
    path: str, columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS, rows: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Reads a shard's rows in order, one batch in memory at a time.

    The pages' own checksums cover the values; a footer and pages' headers have none, and damaged ones can hide rows.

    Args:
      path: the shard.
      columns: the names of those to read; all where None.
      batch_rows: the most rows of a batch.
      rows: how many it must hold, by its manifest; not checked where None.

    Raises:
      DamagedSnapshotError: it is missing, cannot be decoded, lacks a column, or holds another number of rows.
      OSError: it cannot be reached.
    """
    with open_shard(path) as shard:
        for name in columns or ():
            if name not in shard.schema_arrow.names:
                raise DamagedSnapshotError(path, f"has another schema: there is no column {name}")
        batches = shard.iter_batches(batch_rows, columns=columns)
        rows_read = 0
        while True:
            with _undecodable_is_damage(path, "cannot be decoded"):
                batch = next(batches, None)
            if batch is None:
                break
            rows_read += len(batch)
            yield batch
        if rows is not None and rows_read != rows:
            raise DamagedSnapshotError(path, f"holds {rows_read} rows, not {rows}")


def embeddings_of(batch: pa.RecordBatch) -> np.ndarray:
    """Returns the vectors of a batch, (rows, 256) float32."""
    column = batch.column("embedding")
    numbers = column.values.slice(column.offset * EMBEDDING_DIM, len(column) * EMBEDDING_DIM)
    return numbers.to_numpy(zero_copy_only=False).reshape(-1, EMBEDDING_DIM)
