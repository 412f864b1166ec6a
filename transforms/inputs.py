"""Looks at the input before a job starts: which files there are, and which fields of which types are in them."""

import itertools
import json
import posixpath
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from transforms.csv_rows import delimiter_of, read_rows
from transforms.decompress import CorruptStreamError, TruncatedStreamError, decompress, split_codec
from transforms.fields import (
    TYPE_EXAMPLES,
    KeptField,
    column_indices,
    column_type,
    infer_type,
    is_known,
    json_converter,
    merge_types,
    parse_kept_fields,
    text_converter,
)
from transforms.files import InputFile, absolute_pattern, match_files, open_file
from transforms.formats import file_format, parse_json_object
from transforms.lines import BYTE_ORDER_MARK, LongLine, read_lines
from transforms.parquet_rows import CorruptParquetError, ParquetInput, check_columns
from transforms.records import UnusableRecord
from transforms.schema import preview

DEFAULT_TEXT_FIELD = "text"
DEFAULT_ID_FIELD = "id"

_LISTED_FILES = 100_000
"""How many files of a glob are listed before a job starts; the job itself lists all."""

_PEEKED_FILES = 3
"""How many files of a format are looked into."""

_PEEKED_RECORDS = 1000
_PEEKED_BYTES = 4 << 20
"""How much of a file is looked at."""

_ARRAY_OF_OBJECTS = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*[{\]]")
"""How a file begins that is one JSON array, empty or of objects."""


@dataclass(frozen=True)
class InputPlan:
    """What a job reads, checked against the files as far as a look into the first ones tells.

    Attributes:
      patterns: globs, local ones absolute, or gs://.
      input_format: `auto` or a format.
      text_fields: fields of the text.
      id_field: field of the id; None where documents are named by the hash of their text.
      kept_fields: fields copied to the output, with their types.
      output: the folder whose snapshots are no input, if there is one.
    """

    patterns: tuple[str, ...]
    input_format: str
    text_fields: tuple[str, ...]
    id_field: str | None
    kept_fields: pa.Schema
    output: str | None = None


class _Peek(NamedTuple):
    """What the start of a file shows.

    Attributes:
      path: the file.
      format: `jsonl`, `csv` or `parquet`.
      names: the fields of the records seen, or the columns.
      records: of JSON Lines, the records seen.
      schema: of Parquet, the columns' types.
    """

    path: str
    format: str
    names: Sequence[str]
    records: Sequence[dict[str, Any]] = ()
    schema: pa.Schema | None = None


def plan_inputs(
    patterns: Sequence[str],
    input_format: str = "auto",
    text_fields: Sequence[str] | None = None,
    id_field: str | None = None,
    keep_fields: Sequence[str] = (),
    output: str | None = None,
) -> InputPlan:
    """Checks a job's inputs before it starts, and settles what was left open.

    Looks at the start of three files of each format: their first 1,000 records, or 4 MiB. Files that cannot be decoded
    or hold no record say nothing; the job will report them.

    Args:
      patterns: globs, local or gs://.
      input_format: `auto` or one of `formats.FORMATS`.
      text_fields: fields of the text; None for `text`.
      id_field: field of the id; None for `id` where records have it, else for the hash of the text; empty for the hash.
      keep_fields: fields to copy, each `name` or `name:type`; without a type, Parquet's schema and JSON's values tell
        it, and CSV has strings.
      output: an output folder, absolute or gs://; what runs wrote there is left out.

    Raises:
      ValueError: a file's format, a field or a type does not suit; the message names it, the file and the remedy.
      OSError: a glob matches nothing, or a file cannot be read.
    """
    kept = parse_kept_fields(keep_fields)
    files_of = _files_by_format(patterns, input_format, output)
    _check_no_fields_wanted(files_of, text_fields, id_field, kept)
    texts = tuple(text_fields or (DEFAULT_TEXT_FIELD,))
    peeks = [peek for format_, files in files_of.items() for peek in _peek_files(files, format_)]
    for name in texts:
        _check_present(peeks, name, "name the text's field with --text_field")
    id_ = _resolve_id_field(peeks, id_field)
    for field in kept:
        remedy = "--keep_fields takes fields that there are"
        if ":" in field.name:
            remedy += f", and types after a colon such as {TYPE_EXAMPLES}"
        _check_present(peeks, field.name, remedy)
    kept_fields = pa.schema([(field.name, field.type or _type_of(field.name, peeks)) for field in kept])
    for peek in peeks:
        _check_types(peek, texts, id_, kept_fields)
    return InputPlan(tuple(map(absolute_pattern, patterns)), input_format, texts, id_, kept_fields, output)


def _files_by_format(patterns: Sequence[str], input_format: str, output: str | None) -> dict[str, list[InputFile]]:
    files = {file.path: file for pattern in patterns for file in match_files(pattern, _LISTED_FILES, output)}
    files_of: dict[str, list[InputFile]] = {}
    for path in sorted(files):
        files_of.setdefault(file_format(path, input_format), []).append(files[path])
    return files_of


def _check_no_fields_wanted(
    files_of: dict[str, list[InputFile]],
    text_fields: Sequence[str] | None,
    id_field: str | None,
    kept: Sequence[KeptField],
) -> None:
    """Raises ValueError where fields are asked for of files that have none."""
    for format_ in ("text", "file"):
        if format_ not in files_of:
            continue
        path = files_of[format_][0].path
        for option, wanted in (("--keep_fields", kept), ("--id_field", id_field)):
            if wanted:
                raise ValueError(f"{option} needs fields, and {path} has none, read as {format_}: leave it out")
        if text_fields and not files_of.keys() - {"text", "file"}:
            raise ValueError(f"--text_field needs fields, and {path} has none, read as {format_}: leave it out")


def _peek_files(files: Sequence[InputFile], format_: str) -> Iterator[_Peek]:
    """Yields what the first, middle and last of some files show, less those that show nothing."""
    files = [file for file in files if file.size_bytes] or files
    for index in sorted({round(step * (len(files) - 1) / max(1, _PEEKED_FILES - 1)) for step in range(_PEEKED_FILES)}):
        peek = _peek_file(files[index], format_)
        if peek is not None and peek.names:
            yield peek


def _peek_file(file: InputFile, format_: str) -> _Peek | None:
    with closing(open_file(file.path)) as opened:
        if format_ == "parquet":
            try:
                schema = ParquetInput(opened).schema
            except CorruptParquetError:
                return None
            return _Peek(file.path, format_, schema.names, schema=schema)
        chunks = _first_bytes(opened.chunks(), split_codec(file.path)[1])
        if format_ == "jsonl":
            first = next(chunks, b"")
            records = list(itertools.islice(_json_objects(itertools.chain([first], chunks)), _PEEKED_RECORDS))
            # Where other lines are records, a first one that is JSON by itself is merely a bad record. In an array over
            # several lines, the last item alone may look like one.
            several = len(records) > 1 or (records and _begins_with_whole_json(first))
            if not several and _ARRAY_OF_OBJECTS.match(first):
                raise ValueError(_is_an_array(file.path))
            return _Peek(
                file.path, format_, list(dict.fromkeys(name for record in records for name in record)), records
            )
        if format_ == "csv":
            numbered = enumerate((line for _, line in read_lines(chunks, _PEEKED_BYTES, keep_ends=True)), 1)
            header = next(read_rows(numbered, delimiter_of(file.path), _PEEKED_BYTES), None)
            if header is not None and not isinstance(header.cells, UnusableRecord):
                return _Peek(file.path, format_, header.cells)
        # There are no fields, but a file that cannot be read should fail now.
        next(chunks, None)
        return None


def _begins_with_whole_json(start: bytes) -> bool:
    """Returns whether the first line of a file that is not blank is JSON by itself."""
    line = start.removeprefix(BYTE_ORDER_MARK).lstrip().partition(b"\n")[0]
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_an_array(path: str) -> str:
    inner_path, codec = split_codec(path)
    name = posixpath.basename(inner_path)
    stem = posixpath.splitext(name)[0]
    # The shell would empty a file that is written to itself, under another case too where the disk ignores that.
    new_name = f"{stem}.lines.jsonl" if name.lower() == f"{stem}.jsonl".lower() else f"{stem}.jsonl"
    return (
        f"{path} is one JSON array, not an object on each line: {'decompress it and ' if codec else ''}convert it with "
        f"`jq -c '.[]' {shlex.quote(name)} > {shlex.quote(new_name)}`"
    )


def _first_bytes(chunks: Iterator[bytes], codec: str | None) -> Iterator[bytes]:
    """Yields the start of a file, decompressed as far as it can be."""
    num_bytes = 0
    try:
        for chunk in decompress(chunks, codec) if codec else chunks:
            yield chunk
            num_bytes += len(chunk)
            if num_bytes >= _PEEKED_BYTES:
                return
    except (TruncatedStreamError, CorruptStreamError):
        return


def _json_objects(chunks: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    for _, line in read_lines(chunks, _PEEKED_BYTES):
        if not isinstance(line, LongLine):
            with suppress(UnusableRecord):
                yield parse_json_object(line)


def _check_present(peeks: Sequence[_Peek], name: str, remedy: str) -> None:
    """Raises ValueError where a field is in no JSON record seen, or is no column of a file seen."""
    in_json = any(name in peek.names for peek in peeks if peek.format == "jsonl")
    for peek in peeks:
        if name not in peek.names and not (peek.format == "jsonl" and in_json):
            names = ", ".join(map(repr, peek.names))
            what = f"no field {name!r} in the first records" if peek.format == "jsonl" else f"no column {name!r}"
            raise ValueError(f"{peek.path} has {what}; it has {names}: {remedy}")


def _resolve_id_field(peeks: Sequence[_Peek], id_field: str | None) -> str | None:
    if id_field == "":
        return None
    if id_field is not None:
        _check_present(peeks, id_field, "name the id's field with --id_field, or leave it out")
        return id_field
    having = [peek.path for peek in peeks if DEFAULT_ID_FIELD in peek.names]
    lacking = [peek.path for peek in peeks if DEFAULT_ID_FIELD not in peek.names]
    if having and lacking:
        raise ValueError(
            f"{having[0]} has a field {DEFAULT_ID_FIELD!r} and {lacking[0]} has none: read them in separate jobs, or "
            "give --id_field= to name all documents by the hash of their text"
        )
    return DEFAULT_ID_FIELD if having else None


def _type_of(name: str, peeks: Sequence[_Peek]) -> pa.DataType:
    """Returns the type that holds a kept field's values in all files seen."""
    remedy = f"give its type as in --keep_fields {name}:int64, or {name}:string for any values"
    type_ = pa.null()
    for peek in peeks:
        if name in peek.names:
            try:
                type_ = merge_types(type_, _type_in(peek, name))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"field {name!r} of {peek.path} has no one type, {error}: {remedy}") from error
    if not is_known(type_):
        raise ValueError(f"the first records do not tell the type of field {name!r} ({type_}): {remedy}")
    convert = json_converter(type_)
    for peek in peeks:
        for record in peek.records:
            try:
                convert(record.get(name))
            except UnicodeError:
                continue  # No type would help: this record will be rejected.
            except (ValueError, OverflowError, RecursionError, pa.ArrowException) as error:
                value = preview(repr(record.get(name)))
                raise ValueError(
                    f"field {name!r} of {peek.path} has no one type, {value} is not {type_}, as others are: {remedy}"
                ) from error
    return type_


def _type_in(peek: _Peek, name: str) -> pa.DataType:
    if peek.schema is not None:
        return column_type(peek.schema.field(name).type)
    if peek.format == "csv":
        return pa.string()
    return infer_type(record.get(name) for record in peek.records)


def _check_types(peek: _Peek, text_fields: Sequence[str], id_field: str | None, kept_fields: pa.Schema) -> None:
    """Raises ValueError where a column cannot be used as it is to be."""
    if peek.schema is not None:
        check_columns(peek.schema, peek.path, text_fields, id_field, kept_fields)
    elif peek.format == "csv":
        id_fields = [] if id_field is None else [id_field]
        column_indices(peek.names, [*text_fields, *id_fields, *kept_fields.names], peek.path)
        for field in kept_fields:
            try:
                text_converter(field.type)
            except ValueError as error:
                raise ValueError(f"column {field.name!r} of {peek.path}: {error}") from error
