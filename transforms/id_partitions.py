"""Rows spread by their id over temporary files, so that rows of one id meet without all rows being in memory."""

import zlib
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

MAX_PARTITIONS = 64
"""As many files are open at once."""

ROWS_PER_PARTITION = 200_000
"""About as many rows are in memory at once, up to 64 times as many in all; beyond, a 64th of all."""


def partition_count(num_rows: int) -> int:
    """Returns into how many partitions so many rows are spread."""
    return min(MAX_PARTITIONS, 1 + num_rows // ROWS_PER_PARTITION)


class IdPartitions:
    """Rows in one temporary file for each partition of the ids; a context, at whose end all rows must be added.

    Args:
      folder: where the files are; they are the caller's to delete.
      schema: of the rows; `id` is one of its columns.
      count: how many partitions; the same id is in the same partition of all that have the same count.
    """

    def __init__(self, folder: Path, schema: pa.Schema, count: int):
        self._paths = [folder / f"{partition}.arrow" for partition in range(count)]
        self._schema = schema

    def __enter__(self) -> "IdPartitions":
        self._writers = [pa.ipc.new_stream(str(path), self._schema) for path in self._paths]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds rows."""
        count = len(self._writers)
        partitions = np.array([zlib.crc32(row_id.encode()) % count for row_id in batch.column("id").to_pylist()])
        for partition in np.unique(partitions):
            self._writers[partition].write_batch(batch.filter(pa.array(partitions == partition)))

    def read(self, partition: int) -> pa.Table:
        """Returns the rows of a partition, in the order in which they were added."""
        with pa.ipc.open_stream(str(self._paths[partition])) as reader:
            return reader.read_all()
