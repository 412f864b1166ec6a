"""The names, types and limits that travel through everything else."""

import hashlib
import re

import pyarrow as pa
import pytest

from transforms.schema import EMBEDDING_DIM, FIXED_COLUMNS, PREVIEW_CHARS, content_hash, output_schema, preview


def test_the_fixed_columns_are_those_of_the_contract():
    assert [(field.name, str(field.type), field.nullable) for field in FIXED_COLUMNS] == [
        ("id", "string", False),
        ("embedding", "fixed_size_list<item: float>[256]", False),
        ("content_hash", "string", False),
        ("encoder", "string", False),
        ("num_tokens", "int32", False),
        ("truncated", "bool", False),
    ]
    assert EMBEDDING_DIM == 256


def test_kept_fields_follow_in_their_order_and_the_metadata_is_kept():
    kept = pa.schema([("year", pa.int16()), ("tags", pa.list_(pa.string())), ("at", pa.timestamp("us", "UTC"))])
    schema = output_schema(kept, {"encoder.pooling": "mean"})
    assert list(schema) == [*FIXED_COLUMNS, *kept]
    assert schema.metadata == {b"encoder.pooling": b"mean"}


def test_kept_fields_with_names_of_fixed_columns_are_refused_by_name():
    kept = pa.schema([("truncated", pa.string()), ("title", pa.string()), ("id", pa.int64())])
    with pytest.raises(ValueError, match=r"kept fields \['id', 'truncated'\] have the names of output columns"):
        output_schema(kept, {})


@pytest.mark.parametrize(
    "type_", [pa.month_day_nano_interval(), pa.decimal128(5, -2), pa.binary(0), pa.list_(pa.binary(0))], ids=str
)
def test_kept_fields_that_parquet_cannot_hold_are_refused_by_name(type_):
    kept = pa.schema([("good", pa.float16()), ("bad", type_)])
    told = f"kept field 'bad' is {re.escape(str(type_))}, .* --keep_fields bad:string"
    with pytest.raises(ValueError, match=told):
        output_schema(kept, {})


def test_the_content_hash_is_of_the_texts_utf8_bytes():
    assert content_hash("naïve 東京") == hashlib.sha256("naïve 東京".encode()).hexdigest()
    # Another normal form is another text.
    assert content_hash("e\u0301") != content_hash("\u00e9")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("short", "short"),
        ("x" * (PREVIEW_CHARS + 1), "x" * PREVIEW_CHARS),
        (b"\xffabc", "\ufffdabc"),
        ("é".encode() * 200, "é" * PREVIEW_CHARS),
        ("🙂".encode() * 200, "🙂" * PREVIEW_CHARS),
        ("lone \ud800", "lone ?"),
        ("", ""),
    ],
)
def test_a_preview_is_the_start_and_can_always_be_written(value, shown):
    assert preview(value) == shown
    assert preview(value).encode("utf-8").decode("utf-8") == shown
