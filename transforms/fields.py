"""The fields of the input: columns by name, the Arrow types of those kept, and values made to fit them."""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

_COMMA = re.compile(r",(?![^\[]*\])(?![^(]*\))")
"""A comma that is not inside the brackets or parentheses of a type."""

TYPE_EXAMPLES = "string, int64, double, bool, date32, timestamp[us], decimal128(10,2), list<string>"
"""Types that a field can be kept with, for messages."""

_INTEGER = re.compile(r"[+-]?[0-9]+")

_EXACT_DOUBLE = 1 << 53
"""Integers up to this size are doubles without loss."""

_INFINITE_FROM = {16: 65520.0, 32: float.fromhex("0x1.ffffffp+127"), 64: math.inf}
"""Finite doubles that are rounded to infinity, by the bits of the type: from this one on."""


Converter = Callable[[Any], Any]
"""Makes one value fit a type, as `pa.array(values, type)` takes it, or raises ValueError or an error of Arrow."""


class KeptField(NamedTuple):
    """A field to keep, as it was asked for.

    Attributes:
      name: of the field.
      type: the type it was asked for with, or None where the input decides.
    """

    name: str
    type: pa.DataType | None


def parse_kept_fields(specs: Sequence[str]) -> list[KeptField]:
    """Reads what `--keep_fields` names.

    Args:
      specs: each `name` or `name:type`; several in one string are parted by commas. A type is an Arrow name
        (`int64`, `timestamp[us]`, `decimal128(10,2)`) or `list<...>` of one.

    Raises:
      ValueError: a name is empty or there twice.
    """
    fields = [_parse_kept_field(spec.strip()) for spec in _COMMA.split(",".join(specs))] if specs else []
    for index, field in enumerate(fields):
        if not field.name:
            raise ValueError(f"--keep_fields has an empty name: {','.join(specs)!r}")
        if field.name in [earlier.name for earlier in fields[:index]]:
            raise ValueError(f"--keep_fields names {field.name!r} twice")
    return fields


def _parse_kept_field(spec: str) -> KeptField:
    name, colon, type_name = spec.rpartition(":")
    type_ = parse_type(type_name.strip()) if colon else None
    # Names may hold colons themselves ("dc:title"); a mistyped type then is a field that no record has.
    return KeptField(spec, None) if type_ is None else KeptField(name.strip(), type_)


def parse_type(name: str) -> pa.DataType | None:
    """Returns the Arrow type of a name, or None where there is none."""
    if match := re.fullmatch(r"list<(.+)>", name):
        item_type = parse_type(match[1])
        return None if item_type is None else pa.list_(item_type)
    if match := re.fullmatch(r"timestamp\[(s|ms|us|ns), *tz=(.+)\]", name):
        return pa.timestamp(match[1], tz=match[2])
    try:
        if match := re.fullmatch(r"decimal(128|256)\((\d+) *, *(\d+)\)", name):
            decimal = pa.decimal128 if match[1] == "128" else pa.decimal256
            return decimal(int(match[2]), int(match[3]))
        return pa.type_for_alias(name)
    except ValueError:
        return None


def storage_type(type_: pa.DataType) -> pa.DataType:
    """Returns the type in which values of a type travel through the pipeline.

    Dates and times travel as Arrow's integers, since Python's have neither nanoseconds nor all of Arrow's years.
    `pa.array(values, type)` takes them for what they are.
    """
    if pa.types.is_temporal(type_):
        return pa.int32() if type_.bit_width == 32 else pa.int64()
    return _with_items(type_, storage_type)


def column_type(type_: pa.DataType) -> pa.DataType:
    """Returns the type that an input column has in the output: the same, less its encoding.

    Dictionaries and views of strings become what they stand for, extension types their storage, float16 float32, so
    that every reader of Parquet and every value met later fits. Fixed-size lists become lists: beside a null, as of a
    record without the field, Arrow itself could not read them back. Views of lists stay, with their items as they are:
    Arrow's cast to lists makes invalid arrays of them, and other readers of Parquet see lists anyway.
    """
    if pa.types.is_dictionary(type_):
        return column_type(type_.value_type)
    if isinstance(type_, pa.BaseExtensionType):
        return column_type(type_.storage_type)
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(type_.value_field.with_type(column_type(type_.value_type)))
    plain = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary(), pa.float16(): pa.float32()}
    return plain.get(type_) or _with_items(type_, column_type)


def _with_items(type_: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Returns a nested type with its items' types changed, and others as they are."""
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(change(field.type)) for field in type_])
    if pa.types.is_map(type_):
        return pa.map_(change(type_.key_type), type_.item_field.with_type(change(type_.item_type)))
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(type_.value_field.with_type(change(type_.value_type)), type_.list_size)
    if pa.types.is_large_list(type_):
        return pa.large_list(type_.value_field.with_type(change(type_.value_type)))
    if pa.types.is_list(type_):
        return pa.list_(type_.value_field.with_type(change(type_.value_type)))
    return type_


def column_indices(columns: Sequence[str], names: Iterable[str], source: str) -> dict[str, int]:
    """Returns the places of named columns.

    Raises:
      ValueError: a name is no column of the file, or the name of several.
    """
    for name in names:
        if name not in columns:
            raise ValueError(f"{source} has no column {name!r}; its columns are {', '.join(map(repr, columns))}")
        if columns.count(name) > 1:
            raise ValueError(f"{source} has {columns.count(name)} columns {name!r}: rename all but one")
    return {name: columns.index(name) for name in names}


def infer_type(values: Iterable[Any]) -> pa.DataType:
    """Returns the one type that holds JSON values, as `json.loads` gives them.

    Integers are int64, uint64 where some are above it, or double where doubles are among them; objects are structs of
    all keys that occur. Null and what only nulls tell is null; see `is_known`.

    Raises:
      ValueError: there is no such type.
    """
    return functools.reduce(merge_types, map(_value_type, values), pa.null())


def _value_type(value: Any) -> pa.DataType:
    if isinstance(value, dict):
        return pa.struct([pa.field(name, _value_type(item)) for name, item in value.items()])
    if isinstance(value, list):
        return pa.list_(infer_type(value))
    if type(value) is int:
        return _integer_type(value)
    return _SCALAR_TYPES[type(value)]


def _integer_type(value: int) -> pa.DataType:
    for type_ in (pa.int64(), pa.uint64()):
        if value in _integers(type_):
            return type_
    raise ValueError("some integers do not fit 64 bits")


_SCALAR_TYPES = {
    type(None): pa.null(),
    bool: pa.bool_(),
    float: pa.float64(),
    str: pa.string(),
}


def merge_types(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Returns the smallest type that holds the values of both, such as double for int64 and double.

    Not all values of both may fit: of int64 and uint64 it is uint64, since there are no wider integers.

    Raises:
      ValueError: there is none.
    """
    if one == other:
        return one
    if {one, other} == {pa.int64(), pa.uint64()}:
        return pa.uint64()
    try:
        schemas = [pa.schema([("", type_)]) for type_ in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        raise ValueError(f"some values are {one}, some are {other}") from None


def is_known(type_: pa.DataType) -> bool:
    """Returns whether no part of a type is null, as of fields that are always null and of lists always empty."""
    if pa.types.is_struct(type_):
        return type_.num_fields > 0 and all(is_known(item.type) for item in type_)
    if pa.types.is_nested(type_):
        return all(is_known(type_.field(index).type) for index in range(type_.num_fields))
    return not pa.types.is_null(type_)


def json_converter(type_: pa.DataType) -> Converter:
    """Returns what makes a JSON value fit a type.

    Nothing is lost: 2.0 is an int64, 2.5 is not. Strings alone take values of other types, as their JSON text; dates,
    times and decimals are read from strings.
    """
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return _json_string
    if pa.types.is_boolean(type_):
        return _json_boolean
    if pa.types.is_integer(type_):
        integers = _integers(type_)
        return lambda value: _json_integer(value, integers)
    if pa.types.is_floating(type_):
        return functools.partial(_json_double, infinite_from=_INFINITE_FROM[type_.bit_width])
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return functools.partial(_json_list, convert_item=json_converter(type_.value_type))
    if pa.types.is_struct(type_):
        return functools.partial(_json_object, converters={item.name: json_converter(item.type) for item in type_})
    return functools.partial(_arrow_value, type_=type_)


def _json_string(value: Any) -> str | None:
    if value is None:
        return None
    text = value if type(value) is str else json.dumps(value, ensure_ascii=False)
    if not text.isascii():
        text.encode("utf-8")  # Raises on surrogates, which JSON's escapes can make and nothing can write.
    return text


def _json_boolean(value: Any) -> bool | None:
    if value is None or type(value) is bool:
        return value
    raise ValueError


def _json_integer(value: Any, integers: range) -> int | None:
    if value is None:
        return None
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is int and value in integers:
        return value
    raise ValueError


def _json_double(value: Any, infinite_from: float) -> float | None:
    if value is None:
        return None
    if type(value) is int and abs(value) <= _EXACT_DOUBLE:
        value = float(value)
    if type(value) is not float or infinite_from <= abs(value) < math.inf:
        raise ValueError
    return value


def _json_list(value: Any, convert_item: Converter) -> list[Any] | None:
    if value is None:
        return None
    if type(value) is list:
        return [convert_item(item) for item in value]
    raise ValueError


def _json_object(value: Any, converters: Mapping[str, Converter]) -> dict[str, Any] | None:
    if value is None:
        return None
    # A key the type lacks would be lost.
    if type(value) is dict and converters.keys() >= value.keys():
        return {name: convert(value.get(name)) for name, convert in converters.items()}
    raise ValueError


def text_converter(type_: pa.DataType) -> Converter:
    """Returns what makes a CSV cell fit a type. An empty cell is null, except in a string.

    Raises:
      ValueError: no cell can hold this type.
    """
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return lambda cell: cell
    if pa.types.is_integer(type_):
        integers = _integers(type_)
        return lambda cell: _text_integer(cell.strip(), integers)
    try:
        pa.array([], pa.string()).cast(type_)
    except pa.ArrowNotImplementedError:
        raise ValueError(f"a CSV cell cannot be {type_}") from None
    if pa.types.is_floating(type_):
        return lambda cell: _text_double(cell.strip(), type_)
    return lambda cell: _arrow_value(cell.strip() or None, type_)


def _text_double(cell: str, type_: pa.DataType) -> float | None:
    value = _arrow_value(cell or None, type_)
    # Arrow gives infinity for numbers that are too large, too; they are not spelled with letters of "inf".
    if value is not None and math.isinf(value) and "n" not in cell.lower():
        raise ValueError
    return value


def _text_integer(cell: str, integers: range) -> int | None:
    if not cell:
        return None
    if _INTEGER.fullmatch(cell) and (value := int(cell)) in integers:
        return value
    raise ValueError


def _integers(type_: pa.DataType) -> range:
    """Returns the integers that an integer type holds."""
    if pa.types.is_signed_integer(type_):
        return range(-(1 << type_.bit_width - 1), 1 << type_.bit_width - 1)
    return range(1 << type_.bit_width)


def _arrow_value(value: Any, type_: pa.DataType) -> Any:
    """Returns a value as Arrow casts it to a type."""
    return pa.array([value]).cast(type_).cast(storage_type(type_))[0].as_py()
