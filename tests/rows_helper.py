"""Rows with kept fields of every type, and what is to be found in the files they were written to."""

import hashlib
from collections.abc import Sequence
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from snapshot_helper import embedding

from transforms.schema import EMBEDDING_DIM, FIXED_COLUMNS, Embedding, output_schema
from transforms.shard_files import ShardFile

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


def check_footer(path: Path, compression: str) -> None:
    with pq.ParquetFile(path) as parquet:
        schema, group = parquet.schema_arrow, parquet.metadata.row_group(0)
    assert schema.names == [*FIXED_COLUMNS.names, *KEPT.names]
    assert schema.equals(SCHEMA)
    assert schema.field("embedding").type == pa.list_(pa.float32(), EMBEDDING_DIM)
    assert {key.decode(): value.decode() for key, value in schema.metadata.items()} == METADATA
    codecs = {group.column(place).compression for place in range(group.num_columns)}
    assert codecs == {{"none": "UNCOMPRESSED"}.get(compression, compression.upper())}
