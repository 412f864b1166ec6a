"""Cuts bytes into lines: of bounded length, and by ranges that can be read apart from each other."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from transforms.files import RawFile
from transforms.schema import PREVIEW_CHARS

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""What some programs write before UTF-8; it is no part of the text."""

_START_BYTES = 4 * PREVIEW_CHARS
"""What is kept of a line over the limit: enough for a preview of characters of 4 bytes."""


class LongLine(NamedTuple):
    """What is known of a line over the limit.

    Attributes:
      num_bytes: its length, without its end.
      start: its first bytes.
      num_quotes: how many double quotes it holds; CSV needs to know whether it ends inside quotes.
    """

    num_bytes: int
    start: bytes
    num_quotes: int


Lines = Iterable[tuple[int, bytes | LongLine]]
"""Lines with their positions in the file."""


def read_lines(
    chunks: Iterable[bytes], max_bytes: int, offset: int = 0, keep_ends: bool = False
) -> Iterator[tuple[int, bytes | LongLine]]:
    r"""Yields each line with the offset of its first byte.

    A line ends with `\n` or `\r\n`, the last one also with the data. Time is linear and memory bounded, whatever the
    lines.

    Args:
      chunks: the bytes, cut anywhere. An error of theirs passes through, and the line it interrupts is dropped.
      max_bytes: the longest line, without its end; a longer one comes as a `LongLine`.
      offset: of the first byte. A byte order mark is dropped where this is 0.
      keep_ends: whether lines keep their ends; a last line without one gets one.
    """
    begun = _BegunLine(max_bytes, keep_ends)
    for chunk in chunks:
        piece, newline, rest = chunk.partition(b"\n")
        begun.add(piece)
        if not newline:
            continue
        yield offset, begun.line(offset == 0)
        offset += begun.num_bytes + 1
        lines = rest.split(b"\n")
        begun = _BegunLine(max_bytes, keep_ends)
        begun.add(lines.pop())
        for line in lines:
            yield offset, _finished(line, max_bytes, keep_ends)
            offset += len(line) + 1
    last = begun.line(offset == 0)
    if last not in (b"", b"\n"):
        yield offset, last


def read_range(
    file: RawFile, start: int, stop: int, size: int, max_bytes: int
) -> Iterator[tuple[int, bytes | LongLine]]:
    """Yields the lines whose first byte is in a range of a file, with the offset of that byte.

    Ranges that cover a file without overlap give each of its lines exactly once, wherever they are cut.

    Args:
      file: the file.
      start: the range's first byte.
      stop: the first byte after the range.
      size: the file's; nothing after it is read.
      max_bytes: the longest line, without its end; a longer one comes as a `LongLine`.

    Raises:
      OSError: the file is shorter than `size`.
    """
    first = _next_line_start(file, start, stop)
    if first is None:
        return
    file.seek(first)
    for offset, line in read_lines(file.chunks(size - first), max_bytes, first):
        if offset >= stop:
            return
        yield offset, line


def _next_line_start(file: RawFile, start: int, stop: int) -> int | None:
    """Returns the first offset from `start` on where a line begins, or None if that is not before `stop`."""
    if start == 0:
        return 0
    # The byte before the range tells whether a line begins right with it.
    offset = start - 1
    file.seek(offset)
    for chunk in file.chunks(stop - 1 - offset):
        newline = chunk.find(b"\n")
        if newline >= 0:
            return offset + newline + 1
        offset += len(chunk)
    return None


def _finished(line: bytes, max_bytes: int, keep_end: bool) -> bytes | LongLine:
    """Returns a line that came without its newline as `read_lines` gives it."""
    num_bytes = len(line) - line.endswith(b"\r")
    if num_bytes > max_bytes:
        return LongLine(num_bytes, line[: min(num_bytes, _START_BYTES)], line.count(b'"'))
    return line + b"\n" if keep_end else line[:num_bytes]


class _BegunLine:
    """A line whose pieces are still coming in. Once it is far over the limit, only its start is kept."""

    def __init__(self, max_bytes: int, keep_end: bool):
        self._max_bytes = max_bytes
        self._keep_end = keep_end
        self._pieces: list[bytes] = []
        self._last_byte = b""
        self._dropped_quotes = 0
        self._dropping = False
        self.num_bytes = 0

    def add(self, piece: bytes) -> None:
        if not piece:
            return
        self.num_bytes += len(piece)
        self._last_byte = piece[-1:]
        if self._dropping:
            self._dropped_quotes += piece.count(b'"')
            return
        self._pieces.append(piece)
        if self.num_bytes > max(self._max_bytes, _START_BYTES) + len(BYTE_ORDER_MARK + b"\r"):
            whole = b"".join(self._pieces)
            kept_bytes = _START_BYTES + len(BYTE_ORDER_MARK)
            self._pieces = [whole[:kept_bytes]]
            self._dropped_quotes = whole.count(b'"', kept_bytes)
            self._dropping = True

    def line(self, at_file_start: bool) -> bytes | LongLine:
        held = b"".join(self._pieces)
        mark_bytes = len(BYTE_ORDER_MARK) if at_file_start and held.startswith(BYTE_ORDER_MARK) else 0
        if self._dropping:
            num_bytes = self.num_bytes - mark_bytes - (self._last_byte == b"\r")
            start = held[mark_bytes : mark_bytes + _START_BYTES]
            return LongLine(num_bytes, start, held.count(b'"') + self._dropped_quotes)
        return _finished(held[mark_bytes:], self._max_bytes, self._keep_end)
