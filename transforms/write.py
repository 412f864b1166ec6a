"""WriteEmbeddings and WriteRejected: rows to sharded Parquet files, rejected records to sharded JSON Lines."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.coders import VarIntCoder
from apache_beam.io.filesystems import FileSystems
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec
from apache_beam.transforms.window import GlobalWindows

from transforms.schema import Embedding, Rejected, pack_row
from transforms.shard_files import (
    PARTS_FOLDER,
    HashedFile,
    JsonLinesFile,
    ParquetFile,
    RowFile,
    ShardFile,
    ShardWriter,
)
from transforms.shards import BrokenShardError, DamagedSnapshotError, open_shard

ROWS_PER_SHARD = 250_000
COMPRESSIONS = ("zstd", "snappy", "gzip", "lz4", "none")


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
    """(shard, rows) to files."""

    def __init__(self, writer_of: Callable[[int], ShardWriter], unpack: Callable[[Sequence[Any]], Any]):
        self._writer_of = writer_of
        self._unpack = unpack

    def process(self, group: tuple[int, Iterable[Any]]):
        shard, rows = group
        writer = self._writer_of(shard)
        try:
            yield from filter(None, map(writer.write, map(self._unpack, rows)))
            yield from filter(None, [writer.finish()])
        except BaseException:
            writer.discard()
            raise


class _WriteRows(beam.DoFn):
    """(shard, row) to files, of each shard at least one for each bundle that has rows of it.

    It keeps no state, and declares one all the same: this has an engine bring the rows of a shard together.
    """

    _STATE = beam.DoFn.StateParam(ReadModifyWriteStateSpec("unused", VarIntCoder()))

    def __init__(self, writer_of: Callable[[int], ShardWriter], unpack: Callable[[Sequence[Any]], Any]):
        self._writer_of = writer_of
        self._unpack = unpack
        self._writers: dict[int, ShardWriter] = {}

    def start_bundle(self):
        self._discard()  # What a bundle that failed has left.

    def process(self, keyed: tuple[int, Any], _=_STATE):
        shard, row = keyed
        if shard not in self._writers:
            self._writers[shard] = self._writer_of(shard)
        yield from filter(None, [self._writers[shard].write(self._unpack(row))])

    def finish_bundle(self):
        for shard in list(self._writers):
            if file := self._writers.pop(shard).finish():
                yield GlobalWindows.windowed_value(file)

    def teardown(self):
        self._discard()

    def _discard(self) -> None:
        while self._writers:
            self._writers.popitem()[1].discard()


class _NameShard(beam.DoFn):
    """Moves a file to its final name, which tells its place among all; safe to try again."""

    def __init__(self, folder: str, prefix: str, extension: str, count_rows: Callable[[str], int] | None):
        self._folder = folder
        self._prefix = prefix
        self._extension = extension
        self._count_rows = count_rows

    def process(self, shard: ShardFile, shards: Sequence[ShardFile]):
        # By the file's name too: of two bundles with rows of one shard, each has counted its parts from 0.
        place = shard.shard, shard.part, shard.file
        index = sum((other.shard, other.part, other.file) < place for other in shards)
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
    file_type: Callable[[HashedFile], RowFile]
    name_of: Callable[[Any], str]
    tallies_of: Callable[[Any], Mapping[str, int]]
    unpack: Callable[[Sequence[Any]], Any]
    row_by_row: bool
    count_rows: Callable[[str], int] | None = None

    def expand(self, inputs):
        """Wires the shuffle into shards, the writing, and the naming."""
        rows, num_rows = inputs
        keyed = rows | "KeyByShard" >> beam.ParDo(
            _KeyByShard(self.rows_per_shard, self.name_of), beam.pvalue.AsSingleton(num_rows)
        ).with_output_types(tuple[int, Any])
        if self.row_by_row:
            written = keyed | "WriteRows" >> beam.ParDo(_WriteRows(self._writer_of, self.unpack))
        else:
            groups = keyed | "GroupByShard" >> beam.GroupByKey()
            written = groups | "WriteShard" >> beam.ParDo(_WriteShard(self._writer_of, self.unpack))
        # A file exists once: what follows must not write it again when it is itself tried again.
        shards = written | "KeepWritten" >> beam.Reshuffle()
        return shards | "NameShard" >> beam.ParDo(
            _NameShard(self.folder, self.prefix, self.extension, self.count_rows), beam.pvalue.AsList(shards)
        )

    def _writer_of(self, shard: int) -> ShardWriter:
        return ShardWriter(self.folder, shard, self.rows_per_shard, self.file_type, self.tallies_of)


@dataclass
class WriteEmbeddings(beam.PTransform):
    """(PCollection of Embedding, PCollection of one int: about how many) to ShardFiles `embeddings-*.parquet`.

    Rows that `schema.pack_row` has packed already are taken as well.

    Attributes:
      folder: the snapshot's.
      schema: of the shards, as `output_schema` makes it.
      rows_per_shard: the most rows of a file.
      compression: one of `COMPRESSIONS`.
      row_by_row: rows reach the writer of their shard one by one, not as one group. For an engine that holds a group
        in memory, as Flink does, and in the global window. Another would keep many files open at a time, or write more
        and smaller ones.

    Raises:
      ValueError: an attribute is out of its range.
    """

    folder: str
    schema: pa.Schema
    rows_per_shard: int = ROWS_PER_SHARD
    compression: str = "zstd"
    row_by_row: bool = False

    def __post_init__(self):
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression {self.compression!r} is none of {', '.join(COMPRESSIONS)}")
        _check_rows_per_shard(self.rows_per_shard)

    def expand(self, inputs):
        """Wires the shards' writing for Parquet."""
        return inputs | "WriteShards" >> _WriteShards(
            self.folder,
            "embeddings",
            "parquet",
            self.rows_per_shard,
            functools.partial(ParquetFile, schema=self.schema, compression=self.compression),
            _embedding_name,
            _embedding_tallies,
            _unpacked_embedding,
            self.row_by_row,
            _count_rows,
        )


@dataclass
class WriteRejected(beam.PTransform):
    """(PCollection of Rejected, PCollection of one int: about how many) to ShardFiles `rejected-*.jsonl`.

    Attributes:
      folder: the snapshot's.
      rows_per_shard: the most records of a file.
      row_by_row: as of `WriteEmbeddings`.

    Raises:
      ValueError: an attribute is out of its range.
    """

    folder: str
    rows_per_shard: int = ROWS_PER_SHARD
    row_by_row: bool = False

    def __post_init__(self):
        _check_rows_per_shard(self.rows_per_shard)

    def expand(self, inputs):
        """Wires the shards' writing for JSON Lines."""
        return inputs | "WriteShards" >> _WriteShards(
            self.folder,
            "rejected",
            "jsonl",
            self.rows_per_shard,
            JsonLinesFile,
            _rejected_name,
            _rejected_tallies,
            Rejected._make,
            self.row_by_row,
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
