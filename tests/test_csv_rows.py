import csv
import io
import itertools
import time

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transforms.csv_rows import Row, delimiter_of, read_csv, read_rows
from transforms.fields import text_converter
from transforms.lines import read_lines
from transforms.records import DocumentMaker, UnusableRecord
from transforms.schema import Document, Rejected

LIMIT = 1 << 20
KEPT = pa.schema([("year", pa.int64())])
MAKE = DocumentMaker(["text"], "id", KEPT, {"year": text_converter(pa.int64())})


def lines_of(data: bytes, max_bytes: int = LIMIT):
    return ((number, line) for number, (_, line) in enumerate(read_lines([data], max_bytes, keep_ends=True), 1))


def rows_of(data: bytes, max_bytes: int = LIMIT) -> list[Row]:
    return list(read_rows(lines_of(data, max_bytes), ",", max_bytes))


def documents_of(data: bytes, max_bytes: int = LIMIT) -> list[Document | Rejected]:
    return list(read_csv(lines_of(data, max_bytes), "f", MAKE, ",", max_bytes))


def outcomes(data: bytes, max_bytes: int = LIMIT) -> list[tuple[int, list[str] | str]]:
    """Returns by row its first line and its cells, or why it has none."""
    rows = rows_of(data, max_bytes)
    return [(row.line_number, row.cells.reason if isinstance(row.cells, UnusableRecord) else row.cells) for row in rows]


@pytest.mark.parametrize(
    ("path", "expected"), [("a.csv", ","), ("a.txt", ","), ("a.tsv", "\t"), ("a.TSV.gz", "\t"), ("tsv/a", ",")]
)
def test_tabs_part_the_cells_of_tsv(path, expected):
    assert delimiter_of(path) == expected


def test_rows_are_those_of_rfc_4180():
    data = (
        b'a,"b ""quoted"" b",c\r\n'
        b"\r\n"
        b'"two\r\nlines\n and more",,"x,y"\n'
        b' spaced , 5" wide,\xc3\xbc\n'
        b'"the last row",has,"no end"'
    )
    assert rows_of(data) == [
        Row(1, ["a", 'b "quoted" b', "c"], b'a,"b ""quoted"" b",c\r\n'),
        Row(3, ["two\r\nlines\n and more", "", "x,y"], b'"two\r\n'),
        Row(6, [" spaced ", ' 5" wide', "ü"], b' spaced , 5" wide,\xc3\xbc\n'),
        Row(7, ["the last row", "has", "no end"], b'"the last row",has,"no end"\n'),
    ]


CELL = st.text(st.sampled_from('ab",\n\rü '), max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.lists(CELL, min_size=2, max_size=3), max_size=6),
    # Python leaves a carriage return unquoted where it is no line end.
    style=st.sampled_from([("\r\n", csv.QUOTE_MINIMAL), ("\n", csv.QUOTE_ALL)]),
)
def test_what_python_writes_is_read_back(rows, style):
    end, quoting = style
    file = io.StringIO()
    csv.writer(file, lineterminator=end, quoting=quoting).writerows(rows)
    assert [row.cells for row in rows_of(file.getvalue().encode())] == rows


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # A quote that is not closed costs its line, also where a later quote seems to close it.
        (b'a,b\n1,"open\n2,x\n3,y\n', [(1, ["a", "b"]), (2, "malformed_record"), (3, ["2", "x"]), (4, ["3", "y"])]),
        (b'1,"open\n2,"x"\n3,y\n', [(1, "malformed_record"), (2, ["2", "x"]), (3, ["3", "y"])]),
        (b'1,"open\n2,x\n3,"y', [(1, "malformed_record"), (2, ["2", "x"]), (3, "malformed_record")]),
        (b'1,"two\nlines"\n2,"open', [(1, ["1", "two\nlines"]), (3, "malformed_record")]),
        # So does one that is closed in the middle of a cell.
        (b'1,"x"y\n2,z\n', [(1, "malformed_record"), (2, ["2", "z"])]),
        (b'1,"x\ny"z\n2,z\n', [(1, "malformed_record"), (2, ['y"z']), (3, ["2", "z"])]),
        (b"1,x\ry\n2,z\n", [(1, "malformed_record"), (2, ["2", "z"])]),
        # Bytes that are not UTF-8 cost their row.
        (b'1,\xff\n2,"x\n\xfe"\n3,y\n', [(1, "invalid_utf8"), (2, "invalid_utf8"), (4, ["3", "y"])]),
        (b"", []),
        (b"\n\n", []),
    ],
)
def test_a_broken_row_costs_itself_only(data, expected):
    assert outcomes(data) == expected


def test_rows_over_the_limit_are_given_up_and_the_next_ones_read():
    short = b"1,x\n"
    line = b"2," + b"y" * 30 + b"\n"
    quoted_line = b'3,"' + b"y" * 30 + b'"\n'
    quoted_lines = b'4,"' + b"yyyyyyyyy\n" * 3 + b'y"\n'
    long_lines = b'5,"' + (b"y" * 30 + b"\n") * 3 + b'y"\n'
    data = short + line + short + quoted_line + short + quoted_lines + short + long_lines + short
    expected = [
        (1, ["1", "x"]),
        (2, "too_large"),
        (3, ["1", "x"]),
        (4, "too_large"),
        (5, ["1", "x"]),
        (6, "too_large"),
        (10, ["1", "x"]),
        (11, "too_large"),
        (15, ["1", "x"]),
    ]
    assert outcomes(data, 20) == expected


def test_a_row_over_the_limit_says_what_it_takes_along():
    data = b'1,x\n2,"' + b"yyyyyyyyy\n" * 5
    (_, row) = rows_of(data, 20)
    assert isinstance(row.cells, UnusableRecord)
    assert row.cells.detail == "a row of 53 bytes, lines 2 to 6, whose quotes are never closed"
    (_, row) = rows_of(data + b'"\n', 20)
    assert isinstance(row.cells, UnusableRecord)
    assert row.cells.detail == "a row of 55 bytes, lines 2 to 7"


def test_cells_may_be_larger_than_pythons_own_limit():
    text = "x" * 500_000
    assert outcomes(f'1,"{text}\n{text}"\n'.encode(), 2_000_000) == [(1, ["1", f"{text}\n{text}"])]


PIECES = st.sampled_from(["a", "b", '"', '""', ",", "\n", "\r\n", "xyz"])


def plain_outcomes(lines: list[str]) -> list[tuple[int, list[str] | str]]:
    """Returns what `outcomes` must, the plain way: a row that fails costs one line."""
    found: list[tuple[int, list[str] | str]] = []
    index = 0
    while index < len(lines):
        reader = csv.reader(lines[index:], strict=True)
        try:
            cells = next(reader)
        except csv.Error:
            found.append((index + 1, "malformed_record"))
            index += 1
        else:
            if cells:
                found.append((index + 1, cells))
            index += reader.line_num
    return found


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(PIECES, max_size=25))
@example(pieces=['"', "a", "\n", '"', ",", '"', "\n", "b"])
def test_every_line_is_in_one_row_whatever_the_quotes(pieces):
    data = "".join(pieces).encode()
    lines = [line.decode() for _, line in lines_of(data) if isinstance(line, bytes)]
    assert outcomes(data) == plain_outcomes(lines)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(PIECES, max_size=25))
def test_no_line_is_in_two_rows_whatever_the_limit(pieces):
    data = "".join(pieces).encode()
    numbers = [row.line_number for row in rows_of(data, 5)]
    assert numbers == sorted(set(numbers))
    assert set(numbers) <= {number for number, _ in lines_of(data)}


@settings(deadline=None)
@given(pieces=st.lists(PIECES.filter(lambda piece: piece != "\n"), max_size=10), count=st.integers(1, 5))
def test_sound_rows_after_a_broken_line_are_read(pieces, count):
    broken = "".join(pieces).replace("\n", "").replace("\r", "").encode()
    sound = [f'{number},"a ""b"" c"' for number in range(count)]
    rows = rows_of(b"\n".join([broken, *map(str.encode, sound)]))
    read = [row.cells for row in rows if not isinstance(row.cells, UnusableRecord)]
    assert read[-count:] == [[str(number), 'a "b" c'] for number in range(count)]


@pytest.mark.parametrize(
    "line", [b'"\n', b'",\n', b'x,"\n', b'""\n', b'"""\n', b'a"b\n', b'"a"b\n', b"a\n", b'"",""""\n', b'a,"b\n']
)
def test_time_is_linear_whatever_the_quotes(line):
    started = time.thread_time()
    rows = rows_of(line * 50_000)
    assert len(rows) >= 25_000
    assert time.thread_time() - started < 10


def test_documents_are_made_of_rows():
    data = (
        b'\xef\xbb\xbfid,extra,text,year\r\na,,"one\r\ntwo",2000\r\nb,x,t,\nc,x,t,z\nd,x\n,x,t,1\ne,x, ,1\n\xff,x,t,1\n'
    )
    assert documents_of(data) == [
        Document("a", "one\r\ntwo", "f", 2, {"year": 2000}, False),
        Document("b", "t", "f", 4, {"year": None}, False),
        Rejected("f", 5, "c", "wrong_type", "field 'year': 'z' is not int64", "c,x,t,z\n"),
        Rejected("f", 6, "", "malformed_record", "2 cells where the header has 4", "d,x\n"),
        Rejected("f", 7, "", "missing_id", "field 'id' is empty", ",x,t,1\n"),
        Rejected("f", 8, "e", "empty_text", "there is nothing but white space", "e,x, ,1\n"),
        Rejected(
            "f",
            9,
            "",
            "invalid_utf8",
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
            "\ufffd,x,t,1\n",
        ),
    ]


def test_a_header_alone_or_nothing_has_no_documents():
    assert documents_of(b"id,text,year\n") == []
    assert documents_of(b"") == []


def test_a_header_that_cannot_be_read_is_a_corrupt_file():
    (rejected,) = documents_of(b"\xff\x00\n1,t,1\n")
    assert isinstance(rejected, Rejected)
    assert (rejected.position, rejected.reason) == (1, "corrupt_file")
    assert rejected.detail.startswith("the header row cannot be read: 'utf-8' codec can't decode")


def test_missing_and_repeated_columns_are_errors_that_name_them():
    with pytest.raises(ValueError, match="f has no column 'text'; its columns are 'id', 'body', 'year'"):
        documents_of(b"id,body,year\n1,t,1\n")
    with pytest.raises(ValueError, match="f has 2 columns 'text': rename all but one"):
        documents_of(b"id,text,year,text\n1,t,1,t\n")
    assert len(documents_of(b"id,text,year,x,x\n1,t,1,,\n")) == 1


def test_an_error_of_the_lines_passes_through():
    def lines():
        yield from itertools.islice(lines_of(b'id,text,year\n1,t,1\n2,"open\n'), 3)
        raise OSError("gone")

    documents = read_csv(lines(), "f", MAKE, ",", LIMIT)
    assert next(documents) == Document("1", "t", "f", 2, {"year": 1}, False)
    with pytest.raises(OSError, match="gone"):
        next(documents)
