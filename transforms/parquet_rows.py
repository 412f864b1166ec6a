"""Parquet files to documents, by row groups; a damaged row group costs its own rows and no others."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from transforms.fields import Converter, column_indices, column_type, storage_type
from transforms.files import RawFile
from transforms.records import DocumentMaker, UnusableRecord, rejected
from transforms.schema import Document, Rejected, preview

T = TypeVar("T")

_BATCH_BYTES = 8 << 20
"""About how much is decoded at a time."""

_BATCH_ROWS = 256
"""The most rows decoded at a time: from a dictionary, each can be much larger than it is in the file."""


class CorruptParquetError(Exception):
    """A Parquet file, or a part of it, cannot be decoded."""


class RowGroups(NamedTuple):
    """Consecutive row groups of a file.

    Attributes:
      first: index of the first one.
      stop: index after the last one.
      first_row: how many rows of the file are before them.
    """

    first: int
    stop: int
    first_row: int


class ParquetInput:
    """An open Parquet file.

    Args:
      file: the file.

    Attributes:
      schema: the columns as Arrow types.

    Raises:
      CorruptParquetError: the footer cannot be decoded.
      OSError: the file cannot be read.
    """

    def __init__(self, file: RawFile):
        self._file = file
        # Pre-buffering would read from several threads at once, which Beam's files do not bear.
        self._parquet = self._decode(
            lambda: pq.ParquetFile(self._file, page_checksum_verification=True, pre_buffer=False)
        )
        self.schema: pa.Schema = self._decode(lambda: self._parquet.schema_arrow)

    def _decode(self, decode: Callable[[], T]) -> T:
        """Returns what `decode` returns, and tells data that cannot be decoded from a file that cannot be read."""
        try:
            return decode()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if self._file.error is not None:
                raise self._file.error from error
            raise CorruptParquetError(str(error)) from error

    def plan_row_groups(self, split_bytes: int) -> list[RowGroups]:
        """Returns the file's row groups, small neighbours together up to `split_bytes` of decoded pages."""
        metadata = self._parquet.metadata
        plan: list[RowGroups] = []
        planned_bytes = row = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            if plan and planned_bytes + group.total_byte_size <= split_bytes:
                plan[-1] = plan[-1]._replace(stop=index + 1)
            else:
                plan.append(RowGroups(index, index + 1, row))
                planned_bytes = 0
            planned_bytes += group.total_byte_size
            row += group.num_rows
        return plan

    def read(
        self, groups: RowGroups, make_document: DocumentMaker, kept_fields: pa.Schema, max_bytes: int
    ) -> Iterator[Document | Rejected]:
        """Yields a document per row. A row group that breaks off becomes one rejected record for the rows it loses.

        Args:
          groups: which rows.
          make_document: for one row; its converters are `parquet_converters`.
          kept_fields: what it copies.
          max_bytes: the longest text.
        """
        first_row = groups.first_row
        for index in range(groups.first, groups.stop):
            num_rows = self._parquet.metadata.row_group(index).num_rows
            row = first_row
            try:
                for batch in self._batches(index, make_document.field_names):
                    yield from self._read_batch(batch, row, make_document, kept_fields, max_bytes)
                    row += batch.num_rows
                if row - first_row != num_rows:
                    raise CorruptParquetError(f"it holds {row - first_row:,} rows where the footer says {num_rows:,}")
            except CorruptParquetError as error:
                lost = first_row + num_rows - row
                detail = f"row group {index}: {lost:,} rows are lost, from row {row} of the file on: {error}"
                yield Rejected(self._file.path, row, "", "corrupt_file", detail, "")
            first_row += num_rows

    def _batches(self, index: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        group = self._parquet.metadata.row_group(index)
        row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))
        batches = self._parquet.iter_batches(batch_rows, [index], list(columns), use_threads=False)
        while (batch := self._decode(lambda: next(batches, None))) is not None:
            yield batch

    def _read_batch(
        self,
        batch: pa.RecordBatch,
        first_row: int,
        make_document: DocumentMaker,
        kept_fields: pa.Schema,
        max_bytes: int,
    ) -> Iterator[Document | Rejected]:
        source = self._file.path
        columns = self._decode(
            lambda: {name: _string_values(batch.column(name)) for name in make_document.string_fields}
        )
        kept_columns = {kept.name: _kept_values(batch.column(kept.name), kept.type) for kept in kept_fields}
        for index in range(batch.num_rows):
            record = {name: column[index] for name, column in columns.items()}
            kept = {name: column[index] for name, column in kept_columns.items()}
            try:
                document = make_document(record, source, first_row + index, kept)
            except UnusableRecord as error:
                yield rejected(source, first_row + index, error, str(record))
            else:
                yield _bounded(document, max_bytes)


def check_columns(
    schema: pa.Schema, source: str, text_fields: Sequence[str], id_field: str | None, kept_fields: pa.Schema
) -> None:
    """Checks that a file has the columns needed, with types that can be used.

    Raises:
      ValueError: it has not; the message names the column, the file, and what is there.
    """
    id_fields = [] if id_field is None else [id_field]
    column_indices(schema.names, [*text_fields, *id_fields, *kept_fields.names], source)

    def check(name: str, fits: Callable[[pa.DataType], bool], needed: str) -> None:
        type_ = schema.field(name).type
        if not fits(column_type(type_)):
            raise ValueError(f"column {name!r} of {source} is {type_}: {needed}")

    for name in text_fields:
        check(name, _is_text, "text must be strings, or UTF-8 in binary")
    for name in id_fields:
        check(name, _is_id, "an id must be a string or an integer")
    for field in kept_fields:
        check(field.name, functools.partial(_can_cast, to=field.type), f"it cannot be kept as {field.type}")


def parquet_converters(kept_fields: pa.Schema) -> dict[str, Converter]:
    """Returns converters for values that are already of their column's type, or marked as not fitting it."""
    return dict.fromkeys(kept_fields.names, _fitted)


class _Unfit(NamedTuple):
    """A value that does not fit the type its field is kept with."""

    shown: str
    error: Exception

    def __repr__(self) -> str:
        return self.shown


def _fitted(value: Any) -> Any:
    if isinstance(value, _Unfit):
        raise value.error
    return value


def _bounded(document: Document, max_bytes: int) -> Document | Rejected:
    """Returns the document, or a reject where its text is over the limit."""
    if len(document.text) * 4 <= max_bytes:  # No character takes more bytes.
        return document
    num_bytes = len(document.text.encode("utf-8"))
    if num_bytes <= max_bytes:
        return document
    id_ = "" if document.id_is_hash else document.id
    detail = f"a text of {num_bytes:,} bytes"
    return Rejected(document.source, document.position, id_, "too_large", detail, preview(document.text))


def _plain(column: pa.Array) -> pa.Array:
    """Returns a column without its encoding, see `fields.column_type`."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.cast(column_type(column.type))


def _string_values(column: pa.Array) -> list[Any]:
    """Returns a column's values; where one is not UTF-8, all of them as bytes."""
    column = _plain(column)
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()).to_pylist()


def _kept_values(column: pa.Array, type_: pa.DataType) -> list[Any]:
    """Returns a column's values cast to a type, `_Unfit` where that would change them."""
    try:
        return _cast_values(column, type_)
    except (pa.ArrowException, UnicodeDecodeError):
        return [_kept_value(column.slice(index, 1), type_) for index in range(len(column))]


def _kept_value(single: pa.Array, type_: pa.DataType) -> Any:
    try:
        return _cast_values(single, type_)[0]
    except (pa.ArrowException, UnicodeDecodeError) as error:
        # Arrow prints values that Python has no object for, such as the year 300,000, and bytes that are not UTF-8.
        return _Unfit(" ".join(single.to_string()[1:-1].split()), error)


def _cast_values(column: pa.Array, type_: pa.DataType) -> list[Any]:
    plain = _plain(column)
    cast = plain.cast(type_)
    if pa.types.is_floating(type_) and pa.types.is_floating(plain.type) and type_.bit_width < plain.type.bit_width:
        overflowed = pc.and_(pc.is_finite(plain), pc.is_inf(cast.cast(pa.float64())))
        if pc.any(overflowed).as_py():
            raise pa.ArrowInvalid(f"a number is too large for {type_}")
    return cast.cast(storage_type(type_)).to_pylist()


def _is_text(type_: pa.DataType) -> bool:
    return type_ in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.null())


def _is_id(type_: pa.DataType) -> bool:
    return _is_text(type_) or pa.types.is_integer(type_)


def _can_cast(type_: pa.DataType, to: pa.DataType) -> bool:
    try:
        pa.array([], type_).cast(to)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return False
    return True
