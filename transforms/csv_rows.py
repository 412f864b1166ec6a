"""CSV as RFC 4180 has it, read strictly; a broken quote costs its own line and not those after it."""

import csv
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from transforms.decompress import split_codec
from transforms.fields import column_indices
from transforms.lines import Lines, LongLine
from transforms.records import DocumentMaker, UnusableRecord, rejected
from transforms.schema import Document, Rejected


class Row(NamedTuple):
    """One row of a CSV file.

    Attributes:
      line_number: of the row's first line.
      cells: its cells, or what is wrong with it.
      first_line: how it begins, for a person.
    """

    line_number: int
    cells: list[str] | UnusableRecord
    first_line: bytes


def delimiter_of(path: str) -> str:
    """Returns what parts cells: a tab in files named `.tsv`, else a comma."""
    return "\t" if split_codec(path)[0].lower().endswith(".tsv") else ","


def read_csv(
    lines: Lines, source: str, make_document: DocumentMaker, delimiter: str, max_bytes: int
) -> Iterator[Document | Rejected]:
    """Yields a document per row after the header row; blank lines are no rows.

    Args:
      lines: with their numbers and ends.
      source: the file they are from.
      make_document: for one row, as a dict of strings.
      delimiter: what parts cells.
      max_bytes: the longest row.

    Raises:
      ValueError: a field is no column, or more than one.
    """
    rows = read_rows(lines, delimiter, max_bytes)
    header = next(rows, None)
    if header is None:
        return
    if isinstance(header.cells, UnusableRecord):
        error = UnusableRecord("corrupt_file", f"the header row cannot be read: {header.cells.detail}")
        yield rejected(source, header.line_number, error, header.first_line)
        return
    num_cells = len(header.cells)
    cell_of_field = column_indices(header.cells, make_document.field_names, source)
    for number, cells, first_line in rows:
        try:
            if isinstance(cells, UnusableRecord):
                raise cells
            if len(cells) != num_cells:
                raise UnusableRecord("malformed_record", f"{len(cells)} cells where the header has {num_cells}")
            record = {name: cells[index] for name, index in cell_of_field.items()}
            yield make_document(record, source, number)
        except UnusableRecord as error:
            yield rejected(source, number, error, first_line)


def read_rows(lines: Lines, delimiter: str, max_bytes: int) -> Iterator[Row]:
    """Yields the rows of a CSV file, the header too; blank lines are no rows.

    A quote that is not closed, or is closed in the middle of a cell, makes its row unusable. Such a row may seem to
    reach over many sound lines, or to the end of the file; so only its first line is given up, and reading goes on
    with the second. A row over the limit is given up as far as its quotes reach.

    Args:
      lines: with their numbers and ends.
      delimiter: what parts cells.
      max_bytes: the longest row.
    """
    # The limit is the process's own: 128 KiB a cell unless somebody raises it.
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))
    feed = _LineFeed(lines, max_bytes)
    parser = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        feed.begin_row()
        try:
            cells = next(parser)
        except StopIteration:
            return
        except csv.Error as error:
            yield feed.row(UnusableRecord("malformed_record", f"not CSV: {error}"))
            feed.return_all_but_first()
        except _RowTooLongError:
            yield feed.row(UnusableRecord("too_large", feed.skip_long_row()))
        else:
            if feed.decode_error:
                yield feed.row(UnusableRecord("invalid_utf8", str(feed.decode_error)))
            elif cells:
                yield feed.row(cells)


class _RowTooLongError(Exception):
    """The row that is being read is over the limit."""


class _LineFeed:
    """Gives the CSV parser its lines, and remembers those of the current row."""

    def __init__(self, lines: Lines, max_bytes: int):
        self._lines = iter(lines)
        self._max_bytes = max_bytes
        self._returned: deque[tuple[int, bytes | LongLine]] = deque()
        self._row: list[tuple[int, bytes | LongLine]] = []
        self._row_bytes = 0
        self.decode_error: UnicodeDecodeError | None = None

    def begin_row(self) -> None:
        self._row = []
        self._row_bytes = 0
        self.decode_error = None

    def __iter__(self) -> "_LineFeed":
        return self

    def __next__(self) -> str:
        line = self._take()
        if isinstance(line, LongLine) or (self._row_bytes > self._max_bytes and len(self._row) > 1):
            raise _RowTooLongError
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.decode_error = self.decode_error or error
            return line.decode("utf-8", errors="surrogateescape")

    def _take(self) -> bytes | LongLine:
        numbered_line = self._returned.popleft() if self._returned else next(self._lines)
        self._row.append(numbered_line)
        line = numbered_line[1]
        self._row_bytes += line.num_bytes if isinstance(line, LongLine) else len(line)
        return line

    def row(self, cells: list[str] | UnusableRecord) -> Row:
        number, line = self._row[0]
        return Row(number, cells, line.start if isinstance(line, LongLine) else line)

    def return_all_but_first(self) -> None:
        self._returned.extendleft(reversed(self._row[1:]))

    def skip_long_row(self) -> str:
        """Takes the lines up to where the current row's quotes are closed, and returns what they were."""
        # In a sound row quotes come in pairs; an odd number of them leaves it open.
        is_open = sum(_num_quotes(line) for _, line in self._row) % 2 == 1
        while is_open:
            del self._row[1:-1]
            try:
                is_open = _num_quotes(self._take()) % 2 == 0
            except StopIteration:
                break
        first, last = self._row[0][0], self._row[-1][0]
        reach = "" if first == last else f", lines {first} to {last}"
        return f"a row of {self._row_bytes:,} bytes{reach}{', whose quotes are never closed' if is_open else ''}"


def _num_quotes(line: bytes | LongLine) -> int:
    return line.num_quotes if isinstance(line, LongLine) else line.count(b'"')
