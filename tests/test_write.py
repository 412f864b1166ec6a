"""What lies in a snapshot's folder once rows and rejected records are written."""

import functools
import gc
import hashlib
import itertools
import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import apache_beam as beam
import duckdb
import numpy as np
import pandas  # type: ignore[import-untyped]
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline as Pipeline
from snapshot_helper import embedding

from transforms import storage, write
from transforms.schema import EMBEDDING_DIM, FIXED_COLUMNS, Embedding, Rejected, output_schema, pack_row
from transforms.shards import BrokenShardError, open_shard
from transforms.write import (
    COMPRESSIONS,
    PARTS_FOLDER,
    ShardFile,
    WriteEmbeddings,
    WriteRejected,
    embeddings_table,
    shard_count,
)

pytest_plugins = ["gcs_emulator"]

KEPT = pa.schema(
    [
        ("year", pa.int16()),
        ("title", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("at", pa.timestamp("us", "UTC")),
        ("day", pa.date32()),
        ("price", pa.decimal128(10, 2)),
        ("score", pa.float64()),
        ("place", pa.struct([("lat", pa.float64()), ("names", pa.list_(pa.string()))])),
        ("blob", pa.binary()),
    ]
)
FULL = {
    "year": -5,
    "title": "naïve 東京 🙂 \u2028 \x00",
    "tags": ["a", None, ""],
    "at": datetime(2026, 11, 22, 18, 0, 0, 123456, timezone.utc),
    "day": date(1969, 12, 31),
    "price": Decimal("-12345678.90"),
    "score": float("inf"),
    "place": {"lat": 1.5, "names": ["x"]},
    "blob": b"\x00\xff",
}
METADATA = {"encoder.fingerprint": "f" * 64, "encoder.pooling": "mean"}
SCHEMA = output_schema(KEPT, METADATA)
PLAIN = output_schema(pa.schema([]), {})


def rows_of(number: int) -> list[Embedding]:
    """Rows with all kept fields, some and none of them."""
    variants: list[dict[str, Any]] = [FULL, {"year": 3}, {}]
    return [
        embedding(f"id {place}", **variants[place % 3])._replace(truncated=place % 2 == 0, num_tokens=place)
        for place in range(number)
    ]


def expected_row(row: Embedding) -> dict[str, Any]:
    columns = {name: getattr(row, name) for name in FIXED_COLUMNS.names} | dict.fromkeys(KEPT.names) | dict(row.fields)
    return columns | {"embedding": row.embedding.tobytes()}


def read_rows(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """All rows by id, each there once, vectors as bytes."""
    rows = [row for path in paths for row in pq.read_table(path, page_checksum_verification=True).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row | {"embedding": np.float32(row["embedding"]).tobytes()} for row in rows}


def check_described(folder: Path, file: ShardFile) -> None:
    data = (folder / file.file).read_bytes()
    assert (file.bytes, file.checksum) == (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")


# All cases go through one pipeline: starting one takes longer than writing.


@dataclass
class Case:
    num_rows: int
    rows_per_shard: int
    said_rows: int | None = None  # What the pipeline is told, which may be a little wrong.
    compression: str = "zstd"

    @property
    def name(self) -> str:
        name = f"{self.num_rows} rows in shards of {self.rows_per_shard}"
        return name if self.said_rows is None else f"{name}, said to be {self.said_rows}"


CASES = [
    Case(0, 5),
    Case(7, 1),
    Case(12, 4),
    Case(12, 12, compression="none"),
    Case(13, 12),
    Case(200, 10),
    Case(25, 10, said_rows=1),
    Case(25, 10, said_rows=1000),
]
ODD = ["plain", "naïve 東京 🙂", '\u2028 \x00 \t " \\ \r\n', "\ufeff\ufffd", "lone \ud800 surrogate", ""]
REJECTED = [Rejected(f"{text}.jsonl", place, text, "wrong_type", text, text) for place, text in enumerate(ODD)]


@dataclass
class Written:
    folder: Path
    files: list[ShardFile]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Written]:
    """What was written for each case, and for REJECTED as `rejected` and in files of 2 as `rejected in twos`."""
    root = tmp_path_factory.mktemp("written")
    folders = {}

    def run(pipeline, name, rows, said_rows, transform):
        folders[name] = Path(transform.folder)
        collections = (
            pipeline | f"{name} rows" >> beam.Create(rows),
            pipeline | f"{name} count" >> beam.Create([said_rows]),
        )
        shards = collections | f"Write {name}" >> transform
        _ = (
            shards
            | f"{name} list" >> beam.combiners.ToList()
            | f"{name} save" >> beam.Map(save, str(root / f"{name}.files"))
        )

    with Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        for place, case in enumerate(CASES):
            rows = rows_of(case.num_rows)
            packed = [pack_row(row) for row in rows] if place % 2 else rows
            transform = WriteEmbeddings(str(root / case.name), SCHEMA, case.rows_per_shard, case.compression)
            run(pipeline, case.name, packed, case.num_rows if case.said_rows is None else case.said_rows, transform)
        run(pipeline, "rejected", REJECTED, len(REJECTED), WriteRejected(str(root / "rejected")))
        run(pipeline, "rejected in twos", REJECTED, len(REJECTED), WriteRejected(str(root / "rejected in twos"), 2))
        run(pipeline, "nothing rejected", [], 0, WriteRejected(str(root / "nothing rejected")))
    return {
        name: Written(folder, sorted(pickle.loads((root / f"{name}.files").read_bytes()), key=lambda file: file.file))
        for name, folder in folders.items()
    }


def save(value: Any, path: str) -> None:
    Path(path).write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shards_hold_each_row_once_and_none_is_empty_or_too_full(written, case):
    folder, files = written[case.name].folder, written[case.name].files
    paths = sorted(folder.glob("*"))
    assert [file.file for file in files] == [path.name for path in paths if path.name != PARTS_FOLDER]
    assert [file.file for file in files] == [
        f"embeddings-{place:05d}-of-{len(files):05d}.parquet" for place in range(len(files))
    ]
    shards = [folder / file.file for file in files]
    counts = [pq.read_metadata(path).num_rows for path in shards]
    assert counts == [file.rows for file in files]
    assert all(1 <= count <= case.rows_per_shard for count in counts)
    for path in shards:
        check_footer(path, case.compression)
    assert read_rows(shards) == {row.id: expected_row(row) for row in rows_of(case.num_rows)}
    for file in files:
        check_described(folder, file)
    if folder.exists():
        assert list((folder / PARTS_FOLDER).iterdir()) == []


def check_footer(path: Path, compression: str) -> None:
    with pq.ParquetFile(path) as parquet:
        schema, group = parquet.schema_arrow, parquet.metadata.row_group(0)
    assert schema.names == [*FIXED_COLUMNS.names, *KEPT.names]
    assert schema.equals(SCHEMA)
    assert schema.field("embedding").type == pa.list_(pa.float32(), EMBEDDING_DIM)
    assert {key.decode(): value.decode() for key, value in schema.metadata.items()} == METADATA
    codecs = {group.column(place).compression for place in range(group.num_columns)}
    assert codecs == {{"none": "UNCOMPRESSED"}.get(compression, compression.upper())}


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_codec_is_written(tmp_path, compression):
    path = tmp_path / "shard"
    sink = write._HashedFile(str(path))
    file = write._ParquetFile(sink, SCHEMA, compression)
    file.write(rows_of(5))
    file.close()
    sink.close()
    check_footer(path, compression)
    assert read_rows([path]) == {row.id: expected_row(row) for row in rows_of(5)}


@pytest.mark.parametrize("reader", ["duckdb", "polars", "pandas", "pyarrow"])
def test_everybody_reads_the_same_rows(written, reader):
    """Columns of every type, values and nulls, and vectors bit for bit."""
    case = Case(12, 4)
    files = f"{written[case.name].folder}/*.parquet"
    if reader == "duckdb":
        with duckdb.connect() as connection:
            relation = connection.sql(f"SELECT * FROM '{files}'")
            rows = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
            # What README.md says of it: list functions take the column as it is, array functions need a cast.
            assert str(relation.types[relation.columns.index("embedding")]) == "FLOAT[]"
            vector = "embedding::FLOAT[256]"
            cosines = f"list_cosine_similarity(embedding, embedding), array_cosine_similarity({vector}, {vector})"
            assert connection.sql(f"SELECT DISTINCT {cosines} FROM '{files}'").fetchall() == [(1.0, 1.0)]
    elif reader == "polars":
        frame = polars.read_parquet(files)
        rows = frame.to_dicts()
        assert frame.schema["embedding"] == polars.Array(polars.Float32, 256)
    elif reader == "pandas":
        frame = pandas.read_parquet(written[case.name].folder, dtype_backend="pyarrow")
        rows = frame.to_dict("records")
        assert {len(vector) for vector in frame["embedding"]} == {256}
    else:
        rows = pa.dataset.dataset(written[case.name].folder, format="parquet").to_table().to_pylist()
    assert sorted(map(plain, rows), key=lambda row: row["id"]) == sorted(
        (plain(expected_row(row)) for row in rows_of(case.num_rows)), key=lambda row: row["id"]
    )


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as plain values, whatever classes a reader has for them."""

    def of(value: Any) -> Any:
        if value is None or value is pandas.NA or value is pandas.NaT:
            return None
        if isinstance(value, dict):
            return {name: of(one) for name, one in value.items()}
        if isinstance(value, pandas.Timestamp):
            return value.to_pydatetime()
        if isinstance(value, list | tuple | np.ndarray):
            return [of(one) for one in value]
        return value.item() if isinstance(value, np.generic) else value

    vector = row["embedding"]
    return {name: of(value) for name, value in row.items() if name != "embedding"} | {
        "embedding": vector if isinstance(vector, bytes) else np.float32(vector).tobytes()
    }


# Rejected records.


@pytest.mark.parametrize(("name", "most"), [("rejected", len(ODD)), ("rejected in twos", 2)])
def test_rejected_records_come_back_as_they_were(written, name, most):
    folder, files = written[name].folder, written[name].files
    assert [file.file for file in files] == [
        f"rejected-{place:05d}-of-{len(files):05d}.jsonl" for place in range(len(files))
    ]
    records = []
    for file in files:
        check_described(folder, file)
        lines = (folder / file.file).read_bytes().decode("utf-8").split("\n")
        assert lines.pop() == ""
        assert 1 <= len(lines) == file.rows <= most
        assert file.tallies == {"wrong_type": len(lines)}
        records += [json.loads(line) for line in lines]
    # A lone surrogate cannot be written as UTF-8.
    expected = [record._asdict() for record in REJECTED]
    writable = json.loads(json.dumps(expected, ensure_ascii=False).encode("utf-8", errors="replace"))
    assert sorted(records, key=lambda one: one["position"]) == writable


def test_where_nothing_is_rejected_there_is_no_file(written):
    assert written["nothing rejected"].files == []
    assert not written["nothing rejected"].folder.exists()


# Step by step, as a runner may repeat the steps.


@pytest.fixture(params=["local", "gs"])
def anywhere(request, tmp_path) -> str:
    """A folder on this machine, and one on gs://."""
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('gcs_bucket')}/folder"


def write_shard(
    folder: Path | str, rows: Sequence[Embedding], rows_per_shard: int = 10, shard: int = 0
) -> list[ShardFile]:
    file_type = functools.partial(write._ParquetFile, schema=PLAIN, compression="zstd")
    step = write._WriteShard(
        str(folder), rows_per_shard, file_type, write._embedding_tallies, write._unpacked_embedding
    )
    return list(step.process((shard, [pack_row(row) for row in rows])))


def name_shard(folder: Path, file: ShardFile, files: Sequence[ShardFile]) -> ShardFile:
    step = write._NameShard(str(folder), "embeddings", "parquet", write._count_rows)
    (named,) = step.process(file, files)
    return named


def files_in(folder: Path) -> dict[str, int]:
    """The rows of each named file of a folder."""
    return {path.name: pq.read_metadata(path).num_rows for path in folder.glob("*.parquet")}


def test_naming_a_shard_may_be_tried_again(tmp_path):
    files = write_shard(tmp_path, rows_of(10), 6)
    for _ in range(2):
        named = [name_shard(tmp_path, file, files) for file in reversed(files)]
        assert [file.file for file in named] == [f"embeddings-0000{k}-of-00002.parquet" for k in (1, 0)]
        assert files_in(tmp_path) == {file.file: file.rows for file in named}
        for file in named:
            check_described(tmp_path, file)


def test_naming_goes_by_shard_and_part(tmp_path):
    files = [file for shard in (11, 2, 7) for file in write_shard(tmp_path, rows_of(5), 2, shard)]
    named = [name_shard(tmp_path, file, files[::-1]) for file in files]
    in_order = sorted(named, key=lambda file: file.file)
    assert [(file.shard, file.part) for file in in_order] == [
        (shard, part) for shard in (2, 7, 11) for part in range(3)
    ]
    assert files_in(tmp_path) == {f"embeddings-0000{k}-of-00009.parquet": (2, 2, 1)[k % 3] for k in range(9)}


def test_what_a_failed_try_left_is_neither_named_nor_counted(tmp_path):
    write_shard(tmp_path, rows_of(4))
    files = write_shard(tmp_path, rows_of(4))
    assert [name_shard(tmp_path, file, files).rows for file in files] == [4]
    assert files_in(tmp_path) == {"embeddings-00000-of-00001.parquet": 4}
    assert len(list((tmp_path / PARTS_FOLDER).iterdir())) == 1
    assert duckdb.sql(f"SELECT count(*) FROM '{tmp_path}/**/*.parquet'").fetchall() == [(4,)]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("failing", ["a row", "closing"])
def test_a_try_that_fails_leaves_only_what_it_had_finished(anywhere, monkeypatch, failing):
    rows = rows_of(9)
    if failing == "a row":
        # The first half of the last file has reached its storage by then.
        monkeypatch.setattr(write, "_ROWS_PER_ROW_GROUP", 1)
        rows[6] = rows[6]._replace(embedding=rows[6].embedding * np.nan)
        with pytest.raises(ValueError, match="the vector of 'id 6' is not 256 finite"):
            write_shard(anywhere, rows, 4)
    else:
        closes = write._HashedFile.close
        number = itertools.count()
        full = OSError("the disk is full")

        def close(sink):
            if not sink.closed and next(number) == 1:
                raise full
            closes(sink)

        monkeypatch.setattr(write._HashedFile, "close", close)
        with pytest.raises(OSError, match="the disk is full"):
            write_shard(anywhere, rows, 4)
    gc.collect()  # What an unfinished upload or a Parquet writer does at its end, it does now.
    (part,) = storage.list_files(anywhere)
    assert part.startswith(f"{PARTS_FOLDER}/0-0-")
    with open_shard(f"{anywhere}/{part}") as shard:
        assert shard.metadata.num_rows == 4


def test_a_footer_that_disagrees_with_what_was_written_is_an_error(tmp_path):
    (file,) = write_shard(tmp_path, rows_of(3))
    wrong = file._replace(rows=4)
    with pytest.raises(
        BrokenShardError, match=r"/embeddings-00000-of-00001.parquet has 3 rows by its footer, not 4, t"
    ):
        name_shard(tmp_path, wrong, [wrong])


def test_a_shard_that_is_lost_before_it_is_named_is_an_error(tmp_path):
    (file,) = write_shard(tmp_path, rows_of(3))
    (tmp_path / PARTS_FOLDER / file.file).unlink()
    with pytest.raises(BrokenShardError, match=r"embeddings-00000-of-00001\.parquet is missing, .* nothing was publ"):
        name_shard(tmp_path, file, [file])


def test_a_shard_that_is_not_what_was_written_is_an_error(tmp_path):
    (file,) = write_shard(tmp_path, rows_of(3))
    (tmp_path / PARTS_FOLDER / file.file).write_bytes(b"PAR1 and no more")
    with pytest.raises(
        BrokenShardError, match=r"00001\.parquet is not Parquet \(.*\), though this run has just"
    ) as caught:
        name_shard(tmp_path, file, [file])
    assert "--full" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_large_shards_have_several_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_ROWS_PER_ROW_GROUP", 4)
    (file,) = write_shard(tmp_path, rows_of(10))
    metadata = pq.read_metadata(tmp_path / PARTS_FOLDER / file.file)
    assert [metadata.row_group(place).num_rows for place in range(metadata.num_row_groups)] == [4, 4, 2]
    assert file.rows == 10


def test_rows_are_counted_by_where_their_vector_comes_from(tmp_path):
    origins = ["encoded", "encoded", "reused", "recovered", "reused"]
    rows = [row._replace(origin=origin, num_tokens=10) for row, origin in zip(rows_of(5), origins, strict=True)]
    (file,) = write_shard(tmp_path, rows)
    assert file.tallies == {"encoded": 2, "reused": 2, "recovered": 1, "truncated": 3}


def test_rows_go_to_shards_by_their_id_alone():
    """So that a bundle which is tried again, in another order or with packed rows, gives the same shards."""
    step = write._KeyByShard(10, write._embedding_name)

    def shards(rows):
        return [next(step.process(row, 100)) for row in rows]

    rows = rows_of(100)
    keyed = shards(rows)
    assert keyed == shards(rows[::-1])[::-1] == shards(map(pack_row, rows))
    assert {shard for shard, _ in keyed} == set(range(shard_count(100, 10)))


@pytest.mark.parametrize("rows_per_shard", [1, 2, 10, 1000, 250_000])
def test_shards_have_room_for_the_chance_of_hashing(rows_per_shard):
    assert [shard_count(rows, rows_per_shard) for rows in (0, 1, rows_per_shard)] == [1, 1, 1]
    for rows in (rows_per_shard + 1, 7 * rows_per_shard, 1000 * rows_per_shard):
        mean = rows / shard_count(rows, rows_per_shard)
        assert mean < rows_per_shard
        assert rows_per_shard < 2000 or mean + 3.9 * mean**0.5 <= rows_per_shard
        assert rows / rows_per_shard <= shard_count(rows, rows_per_shard) <= 1.12 * rows / rows_per_shard + 1


# Types of kept fields.

SECOND = 1_795_370_400
NAMES = ["a", None]
SAME = None
KINDS: list[tuple[pa.DataType, Any, pa.DataType | None]] = [
    (pa.timestamp("s"), SECOND, pa.timestamp("ms")),
    (pa.timestamp("ms"), SECOND * 10**3 + 1, SAME),
    (pa.timestamp("us"), SECOND * 10**6 + 1, SAME),
    (pa.timestamp("ns"), SECOND * 10**9 + 1, SAME),
    (pa.timestamp("s", "UTC"), SECOND, pa.timestamp("ms", "UTC")),
    (pa.timestamp("ns", "Europe/Berlin"), SECOND * 10**9 + 1, SAME),
    (pa.time32("s"), 86_399, pa.time32("ms")),
    (pa.time32("ms"), 86_399_999, SAME),
    (pa.time64("us"), 86_399_999_999, SAME),
    (pa.time64("ns"), 86_399_999_999_999, SAME),
    (pa.date32(), -1, SAME),
    (pa.date64(), -86_400_000, pa.date32()),
    (pa.duration("s"), 5, SAME),
    (pa.duration("ns"), 5, SAME),
    (pa.decimal128(38, 10), Decimal("-1.0000000001"), SAME),
    (pa.decimal256(50, 3), Decimal("12345678901234567890123456789012345678901234567.891"), SAME),
    (pa.int8(), -128, SAME),
    (pa.uint64(), (1 << 64) - 1, SAME),
    (pa.float16(), 1.5, SAME),
    (pa.float32(), 0.1, SAME),
    (pa.bool_(), False, SAME),
    (pa.large_string(), "東京", SAME),
    (pa.large_binary(), b"\xff", SAME),
    (pa.binary(4), b"\xff\x00ab", SAME),
    (pa.list_(pa.string()), NAMES, SAME),
    (pa.large_list(pa.string()), NAMES, SAME),
    (pa.list_(pa.timestamp("s")), [SECOND, None], pa.list_(pa.timestamp("ms"))),
    (pa.map_(pa.string(), pa.duration("us")), [("k", 5), ("l", None)], SAME),
    (pa.struct([("at", pa.timestamp("s")), ("names", pa.list_(pa.string()))]), {"at": SECOND, "names": NAMES},
     pa.struct([("at", pa.timestamp("ms")), ("names", pa.list_(pa.string()))])),
]  # fmt: skip
"""Type, a value as it travels, and the type it is read with."""


def test_kept_values_come_back_and_types_but_for_those_that_parquet_lacks(tmp_path):
    schema = output_schema(pa.schema([(str(place), type_) for place, (type_, _, _) in enumerate(KINDS)]), {})
    fields = {str(place): value for place, (_, value, _) in enumerate(KINDS)}
    pq.write_table(embeddings_table([embedding("full", **fields), embedding("empty")], schema), tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    for place, (type_, value, read_type) in enumerate(KINDS):
        column = table.column(str(place)).combine_chunks()
        assert column.type == (read_type or type_)
        assert column.cast(type_).equals(pa.array([value, None], type_)), type_


# Rows that must not be written.


def bad_vectors() -> list[np.ndarray]:
    good = embedding("good").embedding
    nan, infinite = good.copy(), good.copy()
    nan[7], infinite[255] = np.nan, -np.inf
    return [
        nan,
        infinite,
        good[:255],
        np.append(good, good[:1]),
        good.astype(np.float64),
        good.reshape(1, -1),
        good[:0],
    ]


@pytest.mark.parametrize("vector", bad_vectors(), ids=["nan", "inf", "255", "257", "float64", "2d", "none"])
def test_a_vector_that_is_not_256_finite_numbers_is_refused_by_its_id(vector):
    rows = [embedding("good"), embedding("it's bad", vector=vector)]
    with pytest.raises(ValueError, match=r'the vector of "it\'s bad" is not 256 finite float32 numbers: array\('):
        embeddings_table(rows, PLAIN)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("year", 2**15),
        ("year", "2026"),
        ("year", 2**70),
        ("title", 5),
        ("title", "\ud800"),
        ("tags", 5),
        ("at", "2026-11-22"),
        ("price", Decimal("0.001")),
        ("place", 1),
    ],
)
def test_a_kept_value_that_does_not_fit_is_refused_by_its_id_and_column(name, value):
    rows = [embedding("first", **FULL), embedding("second", **{name: value}), embedding("third", **FULL)]
    message = f"kept field '{name}' of 'second' does not fit its column's type {KEPT.field(name).type}: "
    with pytest.raises(ValueError, match=re.escape(message)):
        embeddings_table(rows, SCHEMA)


def test_arguments_out_of_range_are_refused_at_once():
    with pytest.raises(ValueError, match="compression 'zip' is none of zstd, snappy, gzip, lz4, none"):
        WriteEmbeddings("folder", PLAIN, compression="zip")
    for transform in (functools.partial(WriteEmbeddings, "folder", PLAIN), functools.partial(WriteRejected, "folder")):
        with pytest.raises(ValueError, match="rows_per_shard must be at least 1, not 0"):
            transform(rows_per_shard=0)
