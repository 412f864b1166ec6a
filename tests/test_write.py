"""What lies in a snapshot's folder once rows and rejected records are written."""

import functools
import json
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
from rows_helper import PLAIN, SCHEMA, check_described, check_footer, expected_row, read_rows, rows_of

from transforms import shard_files, write
from transforms.schema import Embedding, Rejected, pack_row
from transforms.shard_files import PARTS_FOLDER, ParquetFile, ShardFile, ShardWriter
from transforms.shards import BrokenShardError
from transforms.write import WriteEmbeddings, WriteRejected, shard_count

# All cases go through one pipeline: starting one takes longer than writing.


@dataclass
class Case:
    num_rows: int
    rows_per_shard: int
    said_rows: int | None = None  # What the pipeline is told, which may be a little wrong.
    compression: str = "zstd"
    row_by_row: bool = False

    @property
    def name(self) -> str:
        said = "" if self.said_rows is None else f", said to be {self.said_rows}"
        return f"{self.num_rows} rows in shards of {self.rows_per_shard}{said}{', row by row' * self.row_by_row}"


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
CASES += [replace(case, row_by_row=True) for case in CASES]
ODD = ["plain", "naïve 東京 🙂", '\u2028 \x00 \t " \\ \r\n', "\ufeff\ufffd", "lone \ud800 surrogate", ""]
REJECTED = [Rejected(f"{text}.jsonl", place, text, "wrong_type", text, text) for place, text in enumerate(ODD)]

REJECTED_CASES = [
    ("rejected", REJECTED, 10, False),
    ("rejected in twos", REJECTED, 2, False),
    ("rejected in twos, row by row", REJECTED, 2, True),
    ("nothing rejected", [], 10, False),
    ("nothing rejected, row by row", [], 10, True),
]


@dataclass
class Written:
    folder: Path
    files: list[ShardFile]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Written]:
    """What was written for each case, by its name."""
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
            folder = str(root / case.name)
            transform = WriteEmbeddings(folder, SCHEMA, case.rows_per_shard, case.compression, case.row_by_row)
            run(pipeline, case.name, packed, case.num_rows if case.said_rows is None else case.said_rows, transform)
        for name, records, most, row_by_row in REJECTED_CASES:
            run(pipeline, name, records, len(records), WriteRejected(str(root / name), most, row_by_row))
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


@pytest.mark.parametrize(("name", "most"), [(name, most) for name, rows, most, _ in REJECTED_CASES if rows])
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


@pytest.mark.parametrize("name", [name for name, rows, _, _ in REJECTED_CASES if not rows])
def test_where_nothing_is_rejected_there_is_no_file(written, name):
    assert written[name].files == []
    assert not written[name].folder.exists()


# Step by step, as a runner may repeat the steps.


def writer_of(folder: Path, rows_per_shard: int, shard: int) -> ShardWriter:
    file_type = functools.partial(ParquetFile, schema=PLAIN, compression="zstd")
    return ShardWriter(str(folder), shard, rows_per_shard, file_type, write._embedding_tallies)


def write_shard(folder: Path, rows: Iterable[Embedding], rows_per_shard: int = 10, shard: int = 0) -> list[ShardFile]:
    step = write._WriteShard(functools.partial(writer_of, folder, rows_per_shard), write._unpacked_embedding)
    return list(step.process((shard, (pack_row(row) for row in rows))))


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


def test_rows_are_counted_by_where_their_vector_comes_from(tmp_path):
    origins = ["encoded", "encoded", "reused", "recovered", "reused"]
    rows = [row._replace(origin=origin, num_tokens=10) for row, origin in zip(rows_of(5), origins, strict=True)]
    (file,) = write_shard(tmp_path, rows)
    assert file.tallies == {"encoded": 2, "reused": 2, "recovered": 1, "truncated": 3}


def keyed_rows(*shards: int) -> list[tuple[int, tuple]]:
    """A packed row for each number, which is its shard's."""
    return [(shard, pack_row(row)) for shard, row in zip(shards, rows_of(len(shards)), strict=True)]


def write_bundle(step: Any, keyed: Iterable[tuple[int, tuple]]) -> list[ShardFile]:
    step.start_bundle()
    files = [file for one in keyed for file in step.process(one)]
    return files + [windowed.value for windowed in step.finish_bundle()]


def test_row_by_row_each_bundle_writes_files_of_its_own(tmp_path):
    """Wherever an engine ends its bundles, also within a shard, each row is named once."""
    step = write._WriteRows(functools.partial(writer_of, tmp_path, 2), write._unpacked_embedding)
    keyed = keyed_rows(7, 2, 7, 7, 2, 2, 7)
    files = write_bundle(step, keyed[:4]) + write_bundle(step, keyed[4:])
    assert [(file.shard, file.part, file.rows) for file in files] == [
        (7, 0, 2), (7, 1, 1), (2, 0, 1), (2, 0, 2), (7, 0, 1)
    ]  # fmt: skip
    named = [name_shard(tmp_path, file, files) for file in files]
    assert sorted(file.file for file in named) == [f"embeddings-0000{k}-of-00005.parquet" for k in range(5)]
    assert [file.shard for file in sorted(named, key=lambda file: file.file)] == [2, 2, 7, 7, 7]
    assert read_rows([tmp_path / file.file for file in named]).keys() == {row[0] for _, row in keyed}


@pytest.mark.parametrize("end", ["start_bundle", "teardown"])
def test_row_by_row_a_bundle_that_fails_leaves_nothing(tmp_path, monkeypatch, end):
    monkeypatch.setattr(shard_files, "_ROWS_PER_ROW_GROUP", 1)
    step = write._WriteRows(functools.partial(writer_of, tmp_path, 9), write._unpacked_embedding)
    keyed = keyed_rows(1, 2, 1, 2)
    with pytest.raises(TypeError, match="Expected 8 arguments, got 2"):
        write_bundle(step, [*keyed, (2, ("too", "short"))])
    assert len(list((tmp_path / PARTS_FOLDER).iterdir())) == 2
    getattr(step, end)()
    assert list((tmp_path / PARTS_FOLDER).iterdir()) == []
    assert [(file.shard, file.rows) for file in write_bundle(step, keyed)] == [(1, 2), (2, 2)]


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


def test_arguments_out_of_range_are_refused_at_once():
    with pytest.raises(ValueError, match="compression 'zip' is none of zstd, snappy, gzip, lz4, none"):
        WriteEmbeddings("folder", PLAIN, compression="zip")
    for transform in (functools.partial(WriteEmbeddings, "folder", PLAIN), functools.partial(WriteRejected, "folder")):
        with pytest.raises(ValueError, match="rows_per_shard must be at least 1, not 0"):
            transform(rows_per_shard=0)
