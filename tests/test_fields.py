import json
import math

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.fields import (
    KeptField,
    column_type,
    infer_type,
    is_known,
    json_converter,
    merge_types,
    parse_kept_fields,
    parse_type,
    storage_type,
    text_converter,
)

INT64_MAX = (1 << 63) - 1


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([], []),
        (["label"], [("label", None)]),
        (["year:int64,label"], [("year", pa.int64()), ("label", None)]),
        (["year:int64", " label "], [("year", pa.int64()), ("label", None)]),
        (["tags:list<string>"], [("tags", pa.list_(pa.string()))]),
        (["at:timestamp[us, tz=UTC],label"], [("at", pa.timestamp("us", "UTC")), ("label", None)]),
        (["at:timestamp[us", " tz=UTC]"], [("at", pa.timestamp("us", "UTC"))]),
        (["price:decimal128(5,2),label"], [("price", pa.decimal128(5, 2)), ("label", None)]),
        (["a(b),price:decimal256(50, 2)"], [("a(b)", None), ("price", pa.decimal256(50, 2))]),
        (["all:list<decimal128(5,2)>"], [("all", pa.list_(pa.decimal128(5, 2)))]),
        (["dc:title"], [("dc:title", None)]),
        (["dc:date:date32"], [("dc:date", pa.date32())]),
    ],
)
def test_kept_fields_are_parsed(specs, expected):
    assert parse_kept_fields(specs) == [KeptField(name, type_) for name, type_ in expected]


@pytest.mark.parametrize(
    ("specs", "message"), [(["a,,b"], "empty name"), ([":int64"], "empty name"), (["a,b", "a:int64"], "'a' twice")]
)
def test_kept_fields_that_make_no_sense_are_errors(specs, message):
    with pytest.raises(ValueError, match=message):
        parse_kept_fields(specs)


@pytest.mark.parametrize(
    "name", ["int46", "", "list<>", "list<int46>", "timestamp[us, zone=UTC]", "decimal128(99,2)", "decimal128"]
)
def test_unknown_types_are_none(name):
    assert parse_type(name) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None, 2], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([2.5, 1], pa.float64()),
        ([INT64_MAX, -INT64_MAX - 1], pa.int64()),
        ([INT64_MAX + 1, None], pa.uint64()),
        ([1, (1 << 64) - 1, 2], pa.uint64()),
        ([True, None], pa.bool_()),
        ([None, "a"], pa.string()),
        ([[1], [], [2.5, None]], pa.list_(pa.float64())),
        ([{"a": 1}, {"b": "x", "a": None}, None], pa.struct([("a", pa.int64()), ("b", pa.string())])),
        ([[{"a": []}], [{"a": [True]}]], pa.list_(pa.struct([("a", pa.list_(pa.bool_()))]))),
    ],
)
def test_types_of_json_values_are_inferred(values, expected):
    assert infer_type(values) == expected
    assert is_known(expected)


@pytest.mark.parametrize("values", [[1, "a"], [True, 1], [True, 2.5], [[1], 1], [[1, "a"]], [{"a": 1}, {"a": "x"}]])
def test_mixtures_have_no_type(values):
    with pytest.raises(ValueError, match="some values are"):
        infer_type(values)


@pytest.mark.parametrize("values", [[1 << 64], [-INT64_MAX - 2], [[1 << 64]], [{"a": 1 << 64}]])
def test_integers_beyond_64_bits_have_no_type(values):
    with pytest.raises(ValueError, match="some integers do not fit 64 bits"):
        infer_type(values)


@pytest.mark.parametrize("values", [[], [None], [[]], [{}], [{"a": None, "b": 1}], [[[], None]]])
def test_types_that_no_value_tells_are_not_known(values):
    assert not is_known(infer_type(values))


def test_types_of_files_are_merged():
    assert merge_types(pa.int32(), pa.int64()) == pa.int64()
    assert merge_types(pa.null(), pa.date32()) == pa.date32()
    with pytest.raises(ValueError, match="some values are int64, some are string"):
        merge_types(pa.int64(), pa.string())


@pytest.mark.parametrize(
    ("type_", "value", "expected"),
    [
        (pa.int64(), 5, 5),
        (pa.int64(), 5.0, 5),
        (pa.int64(), INT64_MAX, INT64_MAX),
        (pa.int8(), -128, -128),
        (pa.uint8(), 255, 255),
        (pa.float64(), 2.5, 2.5),
        (pa.float64(), 2, 2.0),
        (pa.float64(), 1 << 53, float(1 << 53)),
        (pa.float64(), 1e300, 1e300),
        (pa.float32(), math.inf, math.inf),
        (pa.float16(), 65504, 65504.0),
        (pa.bool_(), True, True),
        (pa.string(), "ü", "ü"),
        (pa.string(), 5, "5"),
        (pa.string(), True, "true"),
        (pa.string(), {"ä": [1.5, None]}, '{"ä": [1.5, null]}'),
        (pa.large_string(), "a", "a"),
        (pa.list_(pa.int64()), [1, None, 2.0], [1, None, 2]),
        (pa.struct([("a", pa.int64()), ("b", pa.string())]), {"b": "x"}, {"a": None, "b": "x"}),
        (pa.date32(), "1970-01-03", 2),
        (pa.timestamp("us"), "1970-01-01T00:00:01", 1_000_000),
        (pa.timestamp("ns", "UTC"), "1970-01-01T00:00:00.000000001Z", 1),
        (pa.timestamp("s"), 7, 7),
        (pa.binary(), "ab", b"ab"),
    ],
)
def test_json_values_are_made_to_fit(type_, value, expected):
    converted = json_converter(type_)(value)
    assert converted == expected
    assert type(converted) is type(expected)
    assert json_converter(type_)(None) is None
    assert pa.array([converted, None], type_).cast(storage_type(type_)).to_pylist() == [expected, None]


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (pa.int64(), 2.5),
        (pa.int64(), "5"),
        (pa.int64(), True),
        (pa.int64(), 1 << 63),
        (pa.int64(), math.nan),
        (pa.int64(), math.inf),
        (pa.int8(), 128),
        (pa.uint8(), -1),
        (pa.float64(), "2.5"),
        (pa.float64(), False),
        (pa.float64(), (1 << 53) + 1),
        (pa.float64(), 10**400),
        (pa.float32(), 1e300),
        (pa.float32(), -3.4028236e38),
        (pa.float16(), 70_000),
        (pa.list_(pa.float32()), [1.0, 1e300]),
        (pa.bool_(), 1),
        (pa.bool_(), "true"),
        (pa.string(), "\ud800"),
        (pa.string(), ["\ud800"]),
        (pa.list_(pa.int64()), 1),
        (pa.list_(pa.int64()), {"a": 1}),
        (pa.list_(pa.int64()), [1, "a"]),
        (pa.struct([("a", pa.int64())]), {"a": 1, "b": 2}),
        (pa.struct([("a", pa.int64())]), [1]),
        (pa.date32(), "yesterday"),
        (pa.timestamp("us"), 1 << 80),
        (pa.timestamp("us"), True),
    ],
)
def test_json_values_that_do_not_fit_are_errors(type_, value):
    with pytest.raises((ValueError, OverflowError, pa.ArrowException)):
        json_converter(type_)(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.floats(allow_nan=False) | st.text(max_size=3),
        lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text(max_size=2), items, max_size=3),
        max_leaves=6,
    )
)
def test_a_value_always_fits_the_type_inferred_from_it(value):
    value = json.loads(json.dumps(value))
    try:
        type_ = infer_type([value])
    except ValueError:
        return
    if is_known(type_):
        assert pa.array([json_converter(type_)(value)], type_).type == type_


@pytest.mark.parametrize(
    ("type_", "cell", "expected"),
    [
        (pa.string(), " a ", " a "),
        (pa.string(), "", ""),
        (pa.int64(), " 12 ", 12),
        (pa.int64(), "-12", -12),
        (pa.int64(), "+12", 12),
        (pa.int64(), "007", 7),
        (pa.int64(), " ", None),
        (pa.int64(), str(INT64_MAX), INT64_MAX),
        (pa.float64(), "2.5e3", 2500.0),
        (pa.float64(), "", None),
        (pa.float32(), "-inf", -math.inf),
        (pa.float64(), "Infinity", math.inf),
        (pa.bool_(), "true", True),
        (pa.bool_(), "False", False),
        (pa.date32(), "1970-01-03", 2),
        (pa.timestamp("ms"), "1970-01-01 00:00:01", 1000),
    ],
)
def test_cells_are_made_to_fit(type_, cell, expected):
    assert text_converter(type_)(cell) == expected


@pytest.mark.parametrize(
    ("type_", "cell"),
    [
        (pa.int64(), "2.5"),
        (pa.int64(), "1_000"),
        (pa.int64(), "٣"),
        (pa.int64(), "0x10"),
        (pa.int64(), str(INT64_MAX + 1)),
        (pa.int64(), "9" * 5000),
        (pa.uint8(), "-1"),
        (pa.float64(), "1,5"),
        (pa.float64(), "1e400"),
        (pa.float32(), "-1e300"),
        (pa.bool_(), "yes"),
        (pa.date32(), "03.01.1970"),
    ],
)
def test_cells_that_do_not_fit_are_errors(type_, cell):
    with pytest.raises((ValueError, pa.ArrowException)):
        text_converter(type_)(cell)


@given(st.floats(allow_nan=False) | st.floats(3.4028e38, 3.4029e38))
def test_a_double_fits_a_float_unless_it_becomes_infinite(value):
    becomes_infinite = math.isinf(pa.array([value]).cast(pa.float32())[0].as_py())
    if becomes_infinite and math.isfinite(value):
        with pytest.raises((ValueError, OverflowError)):
            json_converter(pa.float32())(value)
    else:
        assert json_converter(pa.float32())(value) == value


def test_cells_cannot_be_lists():
    with pytest.raises(ValueError, match="a CSV cell cannot be list<item: int64>"):
        text_converter(pa.list_(pa.int64()))


@pytest.mark.parametrize(
    ("type_", "output", "storage"),
    [
        (pa.dictionary(pa.int8(), pa.string()), pa.string(), pa.string()),
        (pa.string_view(), pa.string(), pa.string()),
        (pa.binary_view(), pa.binary(), pa.binary()),
        (pa.float16(), pa.float32(), pa.float32()),
        (pa.uuid(), pa.binary(16), pa.binary(16)),
        (pa.timestamp("ns", "UTC"), pa.timestamp("ns", "UTC"), pa.int64()),
        (pa.time32("s"), pa.time32("s"), pa.int32()),
        (pa.duration("ms"), pa.duration("ms"), pa.int64()),
        (pa.list_(pa.float16()), pa.list_(pa.float32()), pa.list_(pa.float32())),
        (pa.list_(pa.date32(), 2), pa.list_(pa.date32()), pa.list_(pa.int32())),
        (pa.list_(pa.list_(pa.float16(), 2)), pa.list_(pa.list_(pa.float32())), pa.list_(pa.list_(pa.float32()))),
        (pa.large_list(pa.date64()), pa.large_list(pa.date64()), pa.large_list(pa.int64())),
        (
            pa.map_(pa.string(), pa.timestamp("us")),
            pa.map_(pa.string(), pa.timestamp("us")),
            pa.map_(pa.string(), pa.int64()),
        ),
        (
            pa.struct([("a", pa.date32()), ("b", pa.int8())]),
            pa.struct([("a", pa.date32()), ("b", pa.int8())]),
            pa.struct([("a", pa.int32()), ("b", pa.int8())]),
        ),
        (pa.decimal128(5, 2), pa.decimal128(5, 2), pa.decimal128(5, 2)),
        (pa.list_view(pa.int8()), pa.list_view(pa.int8()), pa.list_view(pa.int8())),
        (pa.large_list_view(pa.int8()), pa.large_list_view(pa.int8()), pa.large_list_view(pa.int8())),
    ],
)
def test_columns_lose_their_encoding_and_times_travel_as_integers(type_, output, storage):
    assert column_type(type_) == output
    assert storage_type(output) == storage
