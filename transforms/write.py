"""WriteEmbeddings and WriteRejected: rows to sharded Parquet files, rejected records to sharded JSON Lines."""

import functools
import hashlib
import io
import itertools
import json
import math
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from transforms import storage
from transforms.schema import EMBEDDING_DIM, FIXED_COLUMNS, Embedding, Rejected, pack_row
from transforms.shards import BrokenShardError, DamagedSnapshotError, open_shard

ROWS_PER_SHARD = 250_000
COMPRESSIONS = ("zstd", "snappy", "gzip", "lz4", "none")

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


class _HashedFile(io.RawIOBase):
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
        return True

    def write(self, data) -> int:
        if self._is_discarded:
            return len(data)
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)
        return len(data)

    def close(self) -> None:
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
        return f"sha256:{self._digest.hexdigest()}"


class _RowFile(Protocol):
    """A file of one format that takes rows."""

    def write(self, rows: Sequence[Any]) -> None: ...

    def close(self) -> None: ...


class _ParquetFile:
    """Embeddings as Parquet."""

    def __init__(self, sink: _HashedFile, schema: pa.Schema, compression: str):
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
        self._writer.write_table(embeddings_table(rows, self._schema), row_group_size=len(rows))

    def close(self) -> None:
        self._writer.close()


class _JsonLinesFile:
    """Rejected records as JSON Lines."""

    def __init__(self, sink: _HashedFile):
        self._sink = sink

    def write(self, rows: Sequence[Rejected]) -> None:
        lines = (json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)
        self._sink.write("".join(lines).encode("utf-8"))

    def close(self) -> None:
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


def shard_count(rows: int, rows_per_shard: int) -> int:
    """Returns into how many shards rows are spread by hash, so that hardly one gets more than `rows_per_shard`.

    Hashing gives each shard about the same number, with a standard deviation of its square root: four of these are
    kept free, of small shards a tenth. A shard that is fuller all the same becomes two files.
    """
    target = rows_per_shard - min(4 * math.sqrt(rows_per_shard), rows_per_shard / 10)
    return 1 if rows <= rows_per_shard else math.ceil(rows / target)


class _KeyByShard(beam.DoFn):
    """Row to (shard, row), by the hash of its name, so that a try again gives the same."""

    def __init__(self, rows_per_shard: int, name_of: Callable[[Any], str]):
        self._rows_per_shard = rows_per_shard
        self._name_of = name_of

    def process(self, row, num_rows: int):
        digest = hashlib.blake2b(self._name_of(row).encode("utf-8", errors="replace"), digest_size=8).digest()
        yield int.from_bytes(digest, "big") % shard_count(num_rows, self._rows_per_shard), _packed(row)


class _WriteShard(beam.DoFn):
    """(shard, rows) to files of at most `rows_per_shard` rows, under names that no other try uses."""

    def __init__(
        self,
        folder: str,
        rows_per_shard: int,
        file_type: Callable[[_HashedFile], _RowFile],
        tallies_of: Callable[[Any], Mapping[str, int]],
        unpack: Callable[[Sequence[Any]], Any],
    ):
        self._unpack = unpack
        self._parts_folder = f"{folder}/{PARTS_FOLDER}"
        self._rows_per_shard = rows_per_shard
        self._file_type = file_type
        self._tallies_of = tallies_of

    def process(self, group: tuple[int, Iterable[Any]]):
        shard, values = group
        rows = map(self._unpack, values)
        part = 0
        while first := list(itertools.islice(rows, 1)):
            yield self._write(shard, part, itertools.chain(first, itertools.islice(rows, self._rows_per_shard - 1)))
            part += 1

    def _write(self, shard: int, part: int, rows: Iterator[Any]) -> ShardFile:
        name = f"{shard}-{part}-{uuid.uuid4().hex}"
        sink = _HashedFile(f"{self._parts_folder}/{name}")
        num_rows = 0
        tallies: Counter[str] = Counter()
        try:
            file = self._file_type(sink)
            while chunk := list(itertools.islice(rows, _ROWS_PER_ROW_GROUP)):
                file.write(chunk)
                num_rows += len(chunk)
                for row in chunk:
                    tallies.update(self._tallies_of(row))
            file.close()
            sink.close()
        except BaseException:
            sink.discard()
            raise
        return ShardFile(shard, part, name, num_rows, sink.size_bytes, sink.checksum, dict(tallies))


class _NameShard(beam.DoFn):
    """Moves a file to its final name, which tells its place among all; safe to try again."""

    def __init__(self, folder: str, prefix: str, extension: str, count_rows: Callable[[str], int] | None):
        self._folder = folder
        self._prefix = prefix
        self._extension = extension
        self._count_rows = count_rows

    def process(self, shard: ShardFile, shards: Sequence[ShardFile]):
        index = sum((other.shard, other.part) < (shard.shard, shard.part) for other in shards)
        name = f"{self._prefix}-{index:05d}-of-{len(shards):05d}.{self._extension}"
        source, target = f"{self._folder}/{PARTS_FOLDER}/{shard.file}", f"{self._folder}/{name}"
        # Where an earlier try got as far as moving it, only the target is there.
        if FileSystems.exists(source):
            FileSystems.rename([source], [target])
        if self._count_rows is not None and (rows := self._count_rows(target)) != shard.rows:
            raise BrokenShardError(target, f"has {rows} rows by its footer, not {shard.rows}")
        yield shard._replace(file=name)


@dataclass
class _WriteShards(beam.PTransform):
    """(rows, their number as a singleton) to the ShardFiles they were written to; no file is empty."""

    folder: str
    prefix: str
    extension: str
    rows_per_shard: int
    file_type: Callable[[_HashedFile], _RowFile]
    name_of: Callable[[Any], str]
    tallies_of: Callable[[Any], Mapping[str, int]]
    unpack: Callable[[Sequence[Any]], Any]
    count_rows: Callable[[str], int] | None = None

    def expand(self, inputs):
        """Wires the shuffle into shards, the writing, and the naming."""
        rows, num_rows = inputs
        shards = (
            rows
            | "KeyByShard"
            >> beam.ParDo(_KeyByShard(self.rows_per_shard, self.name_of), beam.pvalue.AsSingleton(num_rows))
            | "GroupByShard" >> beam.GroupByKey()
            | "WriteShard"
            >> beam.ParDo(_WriteShard(self.folder, self.rows_per_shard, self.file_type, self.tallies_of, self.unpack))
            # A file exists once: what follows must not write it again when it is itself tried again.
            | "KeepWritten" >> beam.Reshuffle()
        )
        return shards | "NameShard" >> beam.ParDo(
            _NameShard(self.folder, self.prefix, self.extension, self.count_rows), beam.pvalue.AsList(shards)
        )


@dataclass
class WriteEmbeddings(beam.PTransform):
    """(PCollection of Embedding, PCollection of one int: about how many) to ShardFiles `embeddings-*.parquet`.

    Rows that `schema.pack_row` has packed already are taken as well.

    Attributes:
      folder: the snapshot's.
      schema: of the shards, as `output_schema` makes it.
      rows_per_shard: the most rows of a file.
      compression: one of `COMPRESSIONS`.

    Raises:
      ValueError: an attribute is out of its range.
    """

    folder: str
    schema: pa.Schema
    rows_per_shard: int = ROWS_PER_SHARD
    compression: str = "zstd"

    def __post_init__(self):
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression {self.compression!r} is none of {', '.join(COMPRESSIONS)}")
        _check_rows_per_shard(self.rows_per_shard)

    def expand(self, inputs):
        """Wires the shards' writing for Parquet."""
        file_type = functools.partial(_ParquetFile, schema=self.schema, compression=self.compression)
        return inputs | "WriteShards" >> _WriteShards(
            self.folder,
            "embeddings",
            "parquet",
            self.rows_per_shard,
            file_type,
            _embedding_name,
            _embedding_tallies,
            _unpacked_embedding,
            _count_rows,
        )


@dataclass
class WriteRejected(beam.PTransform):
    """(PCollection of Rejected, PCollection of one int: about how many) to ShardFiles `rejected-*.jsonl`.

    Attributes:
      folder: the snapshot's.
      rows_per_shard: the most records of a file.

    Raises:
      ValueError: an attribute is out of its range.
    """

    folder: str
    rows_per_shard: int = ROWS_PER_SHARD

    def __post_init__(self):
        _check_rows_per_shard(self.rows_per_shard)

    def expand(self, inputs):
        """Wires the shards' writing for JSON Lines."""
        return inputs | "WriteShards" >> _WriteShards(
            self.folder,
            "rejected",
            "jsonl",
            self.rows_per_shard,
            _JsonLinesFile,
            _rejected_name,
            _rejected_tallies,
            Rejected._make,
        )


def _packed(row: Embedding | Rejected | tuple) -> tuple:
    if isinstance(row, Embedding):
        return pack_row(row)
    return tuple(map(_writable, row)) if isinstance(row, Rejected) else row


def _writable(value: Any) -> Any:
    """Returns a text without lone surrogates, which neither Beam nor UTF-8 can write; what is no text, as it is."""
    return value.encode("utf-8", errors="replace").decode("utf-8") if isinstance(value, str) else value


def _unpacked_embedding(values: Sequence[Any]) -> Embedding:
    row = Embedding._make(values)
    return row._replace(embedding=np.frombuffer(row.embedding, np.float32))


def _check_rows_per_shard(rows_per_shard: int) -> None:
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, not {rows_per_shard}")


def _count_rows(path: str) -> int:
    try:
        with open_shard(path) as shard:
            return shard.metadata.num_rows
    except DamagedSnapshotError as error:  # Which tells how to do without a published snapshot, and this is none yet.
        raise BrokenShardError(*error.args) from error


def _embedding_name(row: Embedding | tuple) -> str:
    return row[0]


def _embedding_tallies(row: Embedding) -> dict[str, int]:
    return {row.origin: 1, "truncated": int(row.truncated)}


def _rejected_name(row: Rejected) -> str:
    return f"{row.source}:{row.position}:{row.id}"


def _rejected_tallies(row: Rejected) -> dict[str, int]:
    return {row.reason: 1}
