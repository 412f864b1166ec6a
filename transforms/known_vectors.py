"""Vectors that earlier runs left: rows of the last snapshot, and the work that unfinished runs had saved."""

import functools
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.pvalue import TaggedOutput

from transforms import progress, storage
from transforms.incremental import PREVIOUS, KnownVector, pack
from transforms.schema import EMBEDDING_DIM, FIXED_COLUMNS
from transforms.shards import DamagedSnapshotError, Shard, check_checksum, open_shard, read_shard
from transforms.snapshots import NAME_FORMAT, list_work, work_folder

MAX_WORK_TEXTS = 16_384
"""Vectors that are saved at once at most; they take 17 MB."""

_MIN_INTERVAL_SECONDS = 2.0
_MAX_INTERVAL_SECONDS = 60.0
_MAX_LOST_FRACTION = 0.05
"""Of the time a worker has encoded, a crash costs at most this fraction, or a minute where that is less."""

_WORK_COLUMNS = ["content_hash", "embedding", "num_tokens", "truncated"]
_WORK_SCHEMA = pa.schema([FIXED_COLUMNS.field(name) for name in _WORK_COLUMNS])
_ENCODER_KEY = b"encoder"
_RATE_KEY = b"seconds_per_token"

WORK_OF_OTHERS_KEPT = timedelta(days=7)
"""Work of another encoder is kept this long after its run began, so that a run of that encoder can take it up."""


class _Encoded(Protocol):
    """What `inference.Encoded` has, of which this file must not know."""

    @property
    def content_hash(self) -> str: ...

    @property
    def vector(self) -> np.ndarray: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def truncated(self) -> bool: ...

    @property
    def window_tokens(self) -> int: ...

    @property
    def encode_seconds(self) -> float: ...


class _Work(NamedTuple):
    """A text's vector on its way into a file; an `_Encoded` itself."""

    content_hash: str
    vector: np.ndarray
    num_tokens: int
    truncated: bool
    window_tokens: int
    encode_seconds: float


class WorkSaver:
    """Saves vectors while a run goes on, each batch of them as one whole file; shared by a process's threads.

    It writes when `MAX_WORK_TEXTS` wait, or when more of the time since its start would be lost than a crash may
    cost. What waits when a run publishes needs no saving; what waits when it fails, `flush_work` saves.

    Args:
      folder: of this run's work.
      fingerprint: of the encoder.
    """

    def __init__(self, folder: str, fingerprint: str):
        self._folder = folder
        self._fingerprint = fingerprint
        self._lock = threading.Lock()  # Of what waits; texts are given while others are written.
        self._writing = threading.Lock()
        self._waiting: list[_Work] = []
        self._started = self._saved = time.monotonic()

    def __reduce__(self):
        return _saver_of_process, (self._folder, self._fingerprint)

    def __call__(self, encoded: Sequence[_Encoded]) -> None:
        """Takes vectors, and saves them with those that wait if it is time to."""
        with self._lock:
            # No more of a text than is saved: its references and their fields can be large.
            self._waiting.extend(_Work._make(getattr(one, name) for name in _Work._fields) for one in encoded)
            now = time.monotonic()
            allowed = min(_MAX_INTERVAL_SECONDS, max(_MIN_INTERVAL_SECONDS, _MAX_LOST_FRACTION * (now - self._started)))
            if len(self._waiting) < MAX_WORK_TEXTS and now - self._saved < allowed:
                return
            waiting = self._take()
        self._write(waiting)

    def flush(self) -> None:
        """Saves what waits, and waits for what other threads are saving; they may go on giving."""
        with self._lock:
            waiting = self._take()
        self._write(waiting)

    def _take(self) -> list[_Work]:
        """Returns what waits, with the right to write, which `_write` gives back; to be called under the lock."""
        self._writing.acquire()
        waiting, self._waiting, self._saved = self._waiting, [], time.monotonic()
        return waiting

    def _write(self, waiting: Sequence[_Work]) -> None:
        try:
            if waiting:
                started = time.monotonic()
                write_work(self._folder, self._fingerprint, waiting)
                progress.add("save_microseconds", round(1e6 * (time.monotonic() - started)))
        finally:
            self._writing.release()


@functools.lru_cache(maxsize=4)
def _saver_of_process(folder: str, fingerprint: str) -> WorkSaver:
    """Returns the one saver of this process, so that all its threads fill the same files."""
    return WorkSaver(folder, fingerprint)


def flush_work(folder: str, fingerprint: str) -> None:
    """Saves what waits in this process of a run's vectors; nothing where others encode for it."""
    _saver_of_process(folder, fingerprint).flush()


def write_work(folder: str, fingerprint: str, encoded: Sequence[_Encoded]) -> str:
    """Writes vectors as one file, whole or not at all, and returns its path."""
    flat = pa.array(np.concatenate([one.vector for one in encoded]))
    rate = sum(one.encode_seconds for one in encoded) / max(1, sum(one.window_tokens for one in encoded))
    metadata = {_ENCODER_KEY: fingerprint.encode(), _RATE_KEY: repr(rate).encode()}
    table = pa.Table.from_arrays(
        [
            pa.array([one.content_hash for one in encoded], pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, EMBEDDING_DIM),
            pa.array([one.num_tokens for one in encoded], pa.int32()),
            pa.array([one.truncated for one in encoded], pa.bool_()),
        ],
        schema=_WORK_SCHEMA.with_metadata(metadata),
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_page_checksum=True)
    path = f"{folder}/vectors-{uuid.uuid4().hex}.parquet"
    storage.create_exclusively(path, sink.getvalue().to_pybytes())
    return path


def read_work(path: str, fingerprint: str) -> pa.Table | None:
    """Reads a file of saved work; None where it is torn, gone, or of another encoder."""
    try:
        with storage.open_for_reading(path) as file:
            data = file.read()
    except FileNotFoundError:
        return None
    # From memory, so that other errors can only mean that the file is not whole.
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as parquet:
            schema = parquet.schema_arrow
            if not schema.equals(_WORK_SCHEMA) or (schema.metadata or {}).get(_ENCODER_KEY) != fingerprint.encode():
                return None
            return parquet.read()
    except pa.ArrowMemoryError:
        raise  # It says nothing about the file.
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return None


class FoundWork(NamedTuple):
    """What runs that have not published have left in an output folder, or are at.

    Attributes:
      usable: names of the runs whose work is of this encoder, or does not say of which.
      outdated: names of those whose work is of another one, and older than `WORK_OF_OTHERS_KEPT`.
      seconds_per_token: that encoding took the last usable one; None where none says it.
    """

    usable: list[str]
    outdated: list[str]
    seconds_per_token: float | None


def find_work(output: str, fingerprint: str, now: datetime) -> FoundWork:
    """Finds the work of unfinished runs; of each, one file's footer is read."""
    oldest = (now - WORK_OF_OTHERS_KEPT).strftime(NAME_FORMAT)
    found = FoundWork([], [], None)
    for run in list_work(output):
        metadata = _metadata_of_work(work_folder(output, run))
        if metadata.get(_ENCODER_KEY, fingerprint.encode()) == fingerprint.encode():
            found.usable.append(run)
            with suppress(KeyError, ValueError):  # It is of an earlier release, or damaged.
                found = found._replace(seconds_per_token=float(metadata[_RATE_KEY]))
        elif run < oldest:
            found.outdated.append(run)
    return found


def _metadata_of_work(folder: str) -> dict[bytes, bytes]:
    """Returns the metadata of a run's first file of work that is whole; nothing where there is none."""
    for path in _work_files(folder):
        with suppress(DamagedSnapshotError), open_shard(path) as file:
            return file.schema_arrow.metadata or {}
    return {}


def _work_files(folder: str) -> list[str]:
    names = sorted(storage.list_files(folder))
    return [f"{folder}/{name}" for name in names if name.startswith("vectors-") and name.endswith(".parquet")]


def _known(batch: Any, fingerprint: str, origin: str, seen: set[str]):
    """Yields (content hash, packed KnownVector) for the rows of a batch or table whose hash was not seen yet."""
    vectors = batch["embedding"]
    if isinstance(vectors, pa.ChunkedArray):
        vectors = vectors.combine_chunks()
    matrix = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, EMBEDDING_DIM)
    hashes, num_tokens, truncated = (batch[name].to_pylist() for name in ("content_hash", "num_tokens", "truncated"))
    for row, text_hash in enumerate(hashes):
        if text_hash not in seen:
            seen.add(text_hash)
            vector = matrix[row].tobytes()
            yield text_hash, pack(KnownVector(vector, fingerprint, num_tokens[row], truncated[row], origin))


class _ReadShard(beam.DoFn):
    """A Shard's values to (id, PREVIOUS), and, where the encoder is the same, (content hash, packed KnownVector).

    Of whatever is carried forward all bytes are checked, by the shard's checksum; where only ids are read, their number
    and the checksums of their pages. Where damaged shards are skipped, a shard gives everything or nothing.
    """

    VECTORS = "vectors"

    def __init__(self, fingerprint: str | None, skip_damaged: bool = False):
        self._fingerprint = fingerprint
        self._skip_damaged = skip_damaged

    def process(self, values: tuple[str, int, str]):
        shard = Shard(*values)
        if self._skip_damaged:
            with suppress(DamagedSnapshotError):
                yield from list(self._read(shard))
        else:
            yield from self._read(shard)

    def _read(self, shard: Shard):
        path = shard.path
        if self._fingerprint is not None:
            check_checksum(shard)
        seen: set[str] = set()  # At most as many as a shard has rows.
        columns = ["id"] if self._fingerprint is None else FIXED_COLUMNS.names
        for batch in read_shard(path, columns, rows=shard.rows):
            _check_columns(path, batch.schema, columns)
            for document_id in batch["id"].to_pylist():
                yield document_id, PREVIOUS
            if self._fingerprint is not None:
                encoders = batch["encoder"].unique().to_pylist()
                if encoders != [self._fingerprint]:
                    raise DamagedSnapshotError(path, f"holds vectors of another encoder ({encoders})")
                for known in _known(batch, self._fingerprint, "reused", seen):
                    yield TaggedOutput(self.VECTORS, known)


def _check_columns(path: str, schema: pa.Schema, names: Sequence[str]) -> None:
    """Raises DamagedSnapshotError unless columns of a shard are as this release writes them."""
    for name in names:
        expected = FIXED_COLUMNS.field(name)
        if not schema.field(name).equals(expected):
            raise DamagedSnapshotError(path, f"has another schema: {schema.field(name)} is not {expected}")


class _ReadWork(beam.DoFn):
    """Path of a file of saved work to (content hash, packed KnownVector)."""

    def __init__(self, fingerprint: str):
        self._fingerprint = fingerprint

    def process(self, path: str):
        table = read_work(path, self._fingerprint)
        if table is not None:
            yield from _known(table, self._fingerprint, "recovered", set())


class _ListWork(beam.DoFn):
    """Folder of a run's work to the paths of its files."""

    def process(self, folder: str):
        yield from _work_files(folder)


@dataclass
class ReadKnownVectors(beam.PTransform):
    """Reads what earlier runs left; takes a pipeline.

    Gives a tuple of (id, PREVIOUS) for each row of the last snapshot, and (content hash, packed KnownVector) for the
    vectors of this encoder.

    Attributes:
      shards: of the last snapshot; none where there is none.
      same_encoder: whether the last snapshot's vectors are of this encoder.
      work_folders: of unfinished runs.
      fingerprint: of this encoder.
      skip_damaged: whether shards that cannot be read are no error, as where only their ids are of interest.
    """

    shards: Sequence[Shard]
    same_encoder: bool
    work_folders: Sequence[str]
    fingerprint: str
    skip_damaged: bool = False

    def expand(self, pipeline):
        """Wires the reading of shards and of work, spread over the workers."""
        shards = (
            pipeline
            | "Shards" >> beam.Create([tuple(shard) for shard in self.shards], reshuffle=False)
            | "SpreadShards" >> beam.Reshuffle()
            | "ReadShard"
            >> beam.ParDo(_ReadShard(self.fingerprint if self.same_encoder else None, self.skip_damaged)).with_outputs(
                _ReadShard.VECTORS, main="ids"
            )
        )
        work = (
            pipeline
            | "WorkFolders" >> beam.Create(list(self.work_folders), reshuffle=False)
            | "ListWork" >> beam.ParDo(_ListWork())
            | "SpreadWork" >> beam.Reshuffle()
            | "ReadWork" >> beam.ParDo(_ReadWork(self.fingerprint))
        )
        return shards.ids, (shards.vectors, work) | "FlattenKnown" >> beam.Flatten()
