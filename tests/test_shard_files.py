"""What is in the files of a shard once rows are written, and what a try that fails leaves."""

import functools
import gc
import itertools
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows_helper import FULL, KEPT, PLAIN, SCHEMA, check_described, check_footer, expected_row, read_rows, rows_of
from snapshot_helper import embedding

from transforms import shard_files, storage
from transforms.schema import Embedding, output_schema
from transforms.shard_files import (
    PARTS_FOLDER,
    HashedFile,
    ParquetFile,
    ShardFile,
    ShardWriter,
    embeddings_table,
)
from transforms.shards import open_shard
from transforms.write import COMPRESSIONS

pytest_plugins = ["gcs_emulator"]


@pytest.fixture(params=["local", "gs"])
def anywhere(request, tmp_path) -> str:
    """A folder on this machine, and one on gs://."""
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('gcs_bucket')}/folder"


def new_writer(folder: Path | str, rows_per_shard: int = 10) -> ShardWriter:
    """A writer of shard 3 that tallies how many rows have an even number of tokens."""
    file_type = functools.partial(ParquetFile, schema=PLAIN, compression="zstd")
    return ShardWriter(str(folder), 3, rows_per_shard, file_type, even_tokens)


def even_tokens(row: Embedding) -> Mapping[str, int]:
    return {"even": int(row.num_tokens % 2 == 0), "all": 1}


def write_all(writer: ShardWriter, rows: Sequence[Embedding]) -> list[ShardFile]:
    return [file for file in [*map(writer.write, rows), writer.finish()] if file is not None]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_codec_is_written(tmp_path, compression):
    path = tmp_path / "shard"
    sink = HashedFile(str(path))
    file = ParquetFile(sink, SCHEMA, compression)
    file.write(rows_of(5))
    file.close()
    sink.close()
    check_footer(path, compression)
    assert read_rows([path]) == {row.id: expected_row(row) for row in rows_of(5)}


def test_large_shards_have_several_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "_ROWS_PER_ROW_GROUP", 4)
    (file,) = write_all(new_writer(tmp_path), rows_of(10))
    metadata = pq.read_metadata(tmp_path / PARTS_FOLDER / file.file)
    assert [metadata.row_group(place).num_rows for place in range(metadata.num_row_groups)] == [4, 4, 2]
    assert file.rows == 10


@pytest.mark.parametrize("number", [0, 1, 5, 6, 7, 12])
def test_a_file_is_there_as_soon_as_it_is_full_and_the_rest_at_the_end(tmp_path, monkeypatch, number):
    monkeypatch.setattr(shard_files, "_ROWS_PER_ROW_GROUP", 4)
    rows = rows_of(number)
    writer = new_writer(tmp_path, rows_per_shard=6)
    files = [writer.write(row) for row in rows]
    assert [place for place, file in enumerate(files) if file] == list(range(5, number, 6))
    rest = writer.finish()
    assert (rest is None) == (number % 6 == 0)
    assert writer.finish() is None
    found = [file for file in [*files, rest] if file]
    assert [(file.shard, file.part, file.rows) for file in found] == [
        (3, part, min(6, number - 6 * part)) for part in range(len(found))
    ]
    assert [file.tallies for file in found] == [{"even": (file.rows + 1) // 2, "all": file.rows} for file in found]
    paths = [tmp_path / PARTS_FOLDER / file.file for file in found]
    assert [row["id"] for path in paths for row in pq.read_table(path).to_pylist()] == [row.id for row in rows]
    for file in found:
        check_described(tmp_path / PARTS_FOLDER, file)


def test_what_is_discarded_is_gone_and_what_was_finished_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "_ROWS_PER_ROW_GROUP", 1)
    writer = new_writer(tmp_path, rows_per_shard=3)
    (file,) = [file for file in map(writer.write, rows_of(4)) if file]
    assert len(list((tmp_path / PARTS_FOLDER).iterdir())) == 2
    writer.discard()
    assert writer.finish() is None
    assert [path.name for path in (tmp_path / PARTS_FOLDER).iterdir()] == [file.file]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("failing", ["a row", "closing"])
def test_a_try_that_fails_leaves_only_what_it_had_finished(anywhere, monkeypatch, failing):
    rows = rows_of(9)
    if failing == "a row":
        # The first half of the last file has reached its storage by then.
        monkeypatch.setattr(shard_files, "_ROWS_PER_ROW_GROUP", 1)
        rows[6] = rows[6]._replace(embedding=rows[6].embedding * np.nan)
        with pytest.raises(ValueError, match="the vector of 'id 6' is not 256 finite"):
            write_all(new_writer(anywhere, rows_per_shard=4), rows)
    else:
        closes = HashedFile.close
        number = itertools.count()
        full = OSError("the disk is full")

        def close(sink):
            if not sink.closed and next(number) == 1:
                raise full
            closes(sink)

        monkeypatch.setattr(HashedFile, "close", close)
        with pytest.raises(OSError, match="the disk is full"):
            write_all(new_writer(anywhere, rows_per_shard=4), rows)
    gc.collect()  # What an unfinished upload or a Parquet writer does at its end, it does now.
    (part,) = storage.list_files(anywhere)
    assert part.startswith(f"{PARTS_FOLDER}/3-0-")
    with open_shard(f"{anywhere}/{part}") as shard:
        assert shard.metadata.num_rows == 4


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
