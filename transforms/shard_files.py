"""ShardWriter: rows of one shard, one by one, to files that are counted and hashed as they are written."""

import hashlib
import io
import json
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from transforms import storage
from transforms.schema import EMBEDDING_DIM, FIXED_COLUMNS, Embedding, Rejected

PARTS_FOLDER = ".parts"
"""Where shards are written before they get their names; publishing removes it, and with it what failed tries left."""

_ROWS_PER_ROW_GROUP = 10_000


class ShardFile(NamedTuple):
    """A file of a snapshot.

    Attributes:
      shard: number of the shard it was written for; with `part` its place in the order of the files.
      part: number of the file within the shard.
      file: its name in the snapshot's folder.
      rows: rows in it.
      bytes: its size.
      checksum: `sha256:` and the SHA-256 of its bytes in hex.
      tallies: counts over its rows by name.
    """

    shard: int
    part: int
    file: str
    rows: int
    bytes: int
    checksum: str
    tallies: Mapping[str, int]


class HashedFile(io.RawIOBase):
    """A file for writing that counts and hashes what goes through it."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path
        self._is_discarded = False
        self._file = FileSystems.create(
            path, mime_type="application/octet-stream", compression_type=CompressionTypes.UNCOMPRESSED
        )
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def writable(self) -> bool:
        """Returns True."""
        return True

    def write(self, data) -> int:
        """Takes bytes; returns how many."""
        if self._is_discarded:
            return len(data)
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)
        return len(data)

    def close(self) -> None:
        """Ends the file, which is whole then."""
        if not self.closed and not self._is_discarded:
            self._file.close()
        super().close()

    def discard(self) -> None:
        """Removes the file, after an error: what a format's writer adds at its own end goes nowhere."""
        self._is_discarded = True
        # Closing an upload to gs:// would make an object of its first half, so it is called off.
        end = getattr(self._file, "terminate", self._file.close)
        for step in (end, lambda: storage.delete_files([self._path])):
            with suppress(Exception):  # The error that led here is the one to tell; publishing removes all parts.
                step()

    @property
    def checksum(self) -> str:
        """`sha256:` and the SHA-256 of the bytes in hex."""
        return f"sha256:{self._digest.hexdigest()}"


class RowFile(Protocol):
    """A file of one format that takes rows."""

    def write(self, rows: Sequence[Any]) -> None:
        """Adds rows."""

    def close(self) -> None:
        """Adds what the format has at its end."""


class ParquetFile:
    """Embeddings as Parquet."""

    def __init__(self, sink: HashedFile, schema: pa.Schema, compression: str):
        self._schema = schema
        self._writer = pq.ParquetWriter(
            pa.PythonFile(sink, mode="w"),
            schema,
            compression=compression,
            # Ids, hashes and vectors hardly repeat: a dictionary of them is built in vain.
            use_dictionary=[name for name in schema.names if name not in ("id", "content_hash", "embedding")],
            write_page_checksum=True,
        )

    def write(self, rows: Sequence[Embedding]) -> None:
        """Adds rows, as a row group."""
        self._writer.write_table(embeddings_table(rows, self._schema), row_group_size=len(rows))

    def close(self) -> None:
        """Adds the footer."""
        self._writer.close()


class JsonLinesFile:
    """Rejected records as JSON Lines."""

    def __init__(self, sink: HashedFile):
        self._sink = sink

    def write(self, rows: Sequence[Rejected]) -> None:
        """Adds a line for each record."""
        lines = (json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)
        self._sink.write("".join(lines).encode("utf-8"))

    def close(self) -> None:
        """Ends the file."""
        self._sink.close()


def embeddings_table(rows: Sequence[Embedding], schema: pa.Schema) -> pa.Table:
    """Returns rows as a table.

    Raises:
      ValueError: a vector is not 256 finite float32 numbers, or a kept field does not fit its column; names the id.
    """
    for row in rows:
        vector = row.embedding
        if vector.shape != (EMBEDDING_DIM,) or vector.dtype != np.float32 or not np.isfinite(vector).all():
            raise ValueError(f"the vector of {row.id!r} is not {EMBEDDING_DIM} finite float32 numbers: {vector!r}")
    flat = pa.array(np.concatenate([row.embedding for row in rows]))
    columns = [
        pa.array([row.id for row in rows], pa.string()),
        pa.FixedSizeListArray.from_arrays(flat, EMBEDDING_DIM),
        pa.array([row.content_hash for row in rows], pa.string()),
        pa.array([row.encoder for row in rows], pa.string()),
        pa.array([row.num_tokens for row in rows], pa.int32()),
        pa.array([row.truncated for row in rows], pa.bool_()),
    ]
    columns += [_kept_column(rows, field) for field in list(schema)[len(FIXED_COLUMNS) :]]
    return pa.Table.from_arrays(columns, schema=schema)


def _kept_column(rows: Sequence[Embedding], field: pa.Field) -> pa.Array:
    try:
        return pa.array([row.fields.get(field.name) for row in rows], field.type)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        if len(rows) > 1:
            for row in rows:
                _kept_column([row], field)  # Raises at the row that is to blame.
        raise ValueError(
            f"kept field {field.name!r} of {rows[0].id!r} does not fit its column's type {field.type}: {error}"
        ) from error


class _OpenFile:
    """A file that takes more rows."""

    def __init__(self, folder: str, name: str, file_type: Callable[[HashedFile], RowFile]):
        self._name = name
        self._sink = HashedFile(f"{folder}/{name}")
        self._tallies: Counter[str] = Counter()
        self.num_rows = 0
        try:
            self._file = file_type(self._sink)
        except BaseException:
            self.discard()
            raise

    def write(self, rows: Sequence[Any], tallies_of: Callable[[Any], Mapping[str, int]]) -> None:
        self._file.write(rows)
        self.num_rows += len(rows)
        for row in rows:
            self._tallies.update(tallies_of(row))

    def finish(self, shard: int, part: int) -> ShardFile:
        self._file.close()
        self._sink.close()
        return ShardFile(
            shard, part, self._name, self.num_rows, self._sink.size_bytes, self._sink.checksum, dict(self._tallies)
        )

    def discard(self) -> None:
        self._sink.discard()


class ShardWriter:
    """Writes the rows of one shard to files of at most `rows_per_shard` rows, under names that no other try uses.

    After an error the file it was writing is gone.

    Args:
      folder: the snapshot's.
      shard: the shard's number.
      rows_per_shard: the most rows of a file.
      file_type: makes a file of the format.
      tallies_of: what a row counts for, by name.
    """

    def __init__(
        self,
        folder: str,
        shard: int,
        rows_per_shard: int,
        file_type: Callable[[HashedFile], RowFile],
        tallies_of: Callable[[Any], Mapping[str, int]],
    ):
        self._parts_folder = f"{folder}/{PARTS_FOLDER}"
        self._shard = shard
        self._part = 0
        self._rows_per_shard = rows_per_shard
        self._file_type = file_type
        self._tallies_of = tallies_of
        self._waiting: list[Any] = []
        self._file: _OpenFile | None = None

    def write(self, row: Any) -> ShardFile | None:
        """Takes a row; returns the file that it fills, where it does.

        Raises:
          ValueError: a row does not fit the format.
          OSError: the file cannot be written.
        """
        self._waiting.append(row)
        written = self._file.num_rows if self._file else 0
        if written + len(self._waiting) == self._rows_per_shard:
            return self.finish()
        if len(self._waiting) == _ROWS_PER_ROW_GROUP:
            self._write_waiting()
        return None

    def finish(self) -> ShardFile | None:
        """Returns the file of the rows that are in none yet; None where there are none.

        Raises:
          ValueError: a row does not fit the format.
          OSError: the file cannot be written.
        """
        if self._waiting:
            self._write_waiting()
        file, self._file = self._file, None
        if file is None:
            return None
        try:
            finished = file.finish(self._shard, self._part)
        except BaseException:
            file.discard()
            raise
        self._part += 1
        return finished

    def discard(self) -> None:
        """Forgets the rows that are in no finished file, and removes the file that some are in."""
        self._waiting = []
        file, self._file = self._file, None
        if file is not None:
            file.discard()

    def _write_waiting(self) -> None:
        rows, self._waiting = self._waiting, []
        try:
            if self._file is None:
                name = f"{self._shard}-{self._part}-{uuid.uuid4().hex}"
                self._file = _OpenFile(self._parts_folder, name, self._file_type)
            self._file.write(rows, self._tallies_of)
        except BaseException:
            self.discard()
            raise
