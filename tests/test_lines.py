import io
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transforms.files import RawFile
from transforms.lines import BYTE_ORDER_MARK, LongLine, read_lines, read_range

LINES = st.lists(st.sampled_from([b"", b"a", b"bc", b"\r", b"d\r", b'"', b"long line", b"\xff\xfe"]), max_size=8)
LONG = 1000


def raw_file(data: bytes) -> RawFile:
    return RawFile(io.BytesIO(data), "some/file")


def split(data: bytes) -> list[tuple[int, bytes]]:
    """Returns lines with their offsets, the plain way."""
    lines = []
    offset = 0
    for line in data.split(b"\n"):
        lines.append((offset, line.removesuffix(b"\r")))
        offset += len(line) + 1
    return lines if lines[-1][1] else lines[:-1]


def chunks_of(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60) | LINES.map(b"\n".join), size=st.integers(1, 70))
@example(data=b"a\r\nb\r\n", size=2)
@example(data=b"a\n\r", size=1)
def test_lines_are_the_same_however_the_bytes_come(data, size):
    if not data.startswith(BYTE_ORDER_MARK):
        assert list(read_lines(chunks_of(data, size), LONG)) == split(data)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_byte_order_mark_is_dropped_at_the_start_of_the_file_only(size):
    data = BYTE_ORDER_MARK + b"a\n" + BYTE_ORDER_MARK + b"b\n"
    assert list(read_lines(chunks_of(data, size), LONG)) == [(0, b"a"), (5, BYTE_ORDER_MARK + b"b")]
    assert next(read_lines(chunks_of(data, size), LONG, offset=7)) == (7, BYTE_ORDER_MARK + b"a")


@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_file_of_only_a_byte_order_mark_has_no_line(size):
    assert list(read_lines(chunks_of(BYTE_ORDER_MARK, size), LONG)) == []


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_ends_are_kept_when_asked(size):
    lines = list(read_lines(chunks_of(b"a\r\n\nb\nc", size), LONG, keep_ends=True))
    assert lines == [(0, b"a\r\n"), (3, b"\n"), (4, b"b\n"), (6, b"c\n")]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 30), max_size=8), size=st.integers(1, 50), end=st.sampled_from([b"\n", b"\r\n"]))
def test_long_lines_are_named_and_the_others_kept(lengths, size, end):
    data = b"".join(b"x" * length + end for length in lengths)
    expected = [b"x" * length if length <= 10 else LongLine(length, b"x" * length, 0) for length in lengths]
    assert [line for _, line in read_lines(chunks_of(data, size), 10)] == expected


@pytest.mark.parametrize("size", [1, 3, 1000, 5000])
def test_a_long_line_keeps_its_start_and_counts_its_quotes(size):
    line = b'"' + b"x" * 3000 + b'""'
    ((_, long),) = read_lines(chunks_of(line + b"\r\n", size), 10)
    assert long == LongLine(3003, line[:480], 3)
    ((_, long),) = read_lines(chunks_of(BYTE_ORDER_MARK + line, size), 10)
    assert long == LongLine(3003, line[:480], 3)


def test_a_very_long_line_takes_linear_time_and_bounded_memory():
    megabyte = b"x" * (1 << 20)
    lines = read_lines(itertools.chain(itertools.repeat(megabyte, 500), [b"\nnext\n"]), 1 << 20)
    assert list(lines) == [(0, LongLine(500 << 20, b"x" * 480, 0)), ((500 << 20) + 1, b"next")]


def test_an_error_of_the_chunks_drops_the_line_it_interrupts():
    def chunks():
        yield b"a\nb\nhal"
        raise OSError("gone")

    lines = read_lines(chunks(), LONG)
    assert [next(lines), next(lines)] == [(0, b"a"), (2, b"b")]
    with pytest.raises(OSError, match="gone"):
        next(lines)


def test_every_split_into_ranges_gives_every_line_once():
    for pieces in itertools.product([b"", b"a", b"bc\r"], repeat=3):
        for end in (b"", b"\n"):
            data = b"\n".join(pieces) + end
            for cuts in itertools.chain.from_iterable(
                itertools.combinations(range(1, len(data)), count) for count in range(3)
            ):
                bounds = [0, *cuts, len(data)]
                lines = []
                for start, stop in itertools.pairwise(bounds):
                    part = list(read_range(raw_file(data), start, stop, len(data), LONG))
                    assert all(start <= offset < stop for offset, _ in part)
                    lines += part
                assert lines == split(data), (data, bounds)


@settings(max_examples=300, deadline=None)
@given(data=LINES.map(b"\n".join), size=st.integers(1, 40), end=st.sampled_from([b"", b"\n", b"\r\n"]))
def test_ranges_of_any_size_give_every_line_once(data, size, end):
    data += end
    ranges = [(start, min(start + size, len(data))) for start in range(0, len(data), size)]
    lines = [line for start, stop in ranges for line in read_range(raw_file(data), start, stop, len(data), LONG)]
    assert lines == split(data)


def test_a_range_inside_a_long_line_reads_no_further_than_its_end():
    class CountingFile(io.BytesIO):
        num_read = 0

        def read(self, num_bytes: int | None = -1, /) -> bytes:
            data = super().read(num_bytes)
            self.num_read += len(data)
            return data

    file = CountingFile(b"x" * 100_000)
    assert list(read_range(RawFile(file, "x"), 50_000, 50_100, 100_000, LONG)) == []
    assert file.num_read == 100


def test_what_is_appended_later_is_not_read():
    assert list(read_range(raw_file(b"a\nb\nc\n"), 0, 3, 3, LONG)) == [(0, b"a"), (2, b"b")]


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (8, 10)])
def test_a_file_that_became_shorter_is_an_error_that_names_it(start, stop):
    with pytest.raises(OSError, match=r"some/file became . bytes shorter"):
        list(read_range(raw_file(b"a\nb\n"), start, stop, 10, LONG))
