import json
import time

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.fields import json_converter
from transforms.formats import file_format, read_jsonl, read_text, read_whole
from transforms.lines import LongLine, read_lines
from transforms.records import DocumentMaker
from transforms.schema import Document, Rejected, content_hash

KEPT = pa.schema([("year", pa.int64())])
MAKE = DocumentMaker(["text"], "id", KEPT, {"year": json_converter(pa.int64())})


def numbered(*lines: bytes | LongLine) -> list[tuple[int, bytes | LongLine]]:
    return list(enumerate(lines, 1))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b.txt", "text"),
        ("a/b.TXT.gz", "text"),
        ("b.jsonl", "jsonl"),
        ("b.ndjson.zst", "jsonl"),
        ("b.json.xz", "jsonl"),
        ("gs://a/b.csv.bz2", "csv"),
        ("b.tsv", "csv"),
        ("b.parquet", "parquet"),
        ("b.c.pq", "parquet"),
    ],
)
def test_the_extension_decides_the_format(path, expected):
    assert file_format(path, "auto") == expected
    assert file_format("b.parquet", expected) == expected


@pytest.mark.parametrize("path", ["a.txt/b", "b.md", "b.gz", "_SUCCESS", ".txt", "b.txt.lz4"])
def test_an_unknown_extension_is_an_error_that_names_the_file(path):
    with pytest.raises(ValueError, match=f"the name of {path} does not tell its format: give --input_format"):
        file_format(path, "auto")
    assert file_format(path, "file") == "file"


def test_formats_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match=r"b\.parquet\.gz is compressed as a whole"):
        file_format("b.parquet.gz", "auto")
    with pytest.raises(ValueError, match="must be one of auto, text, jsonl, csv, parquet, file, not 'xml'"):
        file_format("b.xml", "xml")


def test_text_is_a_document_per_line():
    records = list(read_text(numbered(b" one ", b"", b"z\xc3\xbc\r", b"\xff", LongLine(99, b"lo", 0)), "f"))
    assert records == [
        Document(content_hash(" one "), " one ", "f", 1, {}, True),
        Rejected("f", 2, "", "empty_text", "a blank line of a text file", ""),
        Document(content_hash("zü\r"), "zü\r", "f", 3, {}, True),
        Rejected("f", 4, "", "invalid_utf8", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
                 "\ufffd"),
        Rejected("f", 5, "", "too_large", "a line of 99 bytes", "lo"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b"[1]", "malformed_record", "a list and not an object"),
        (b"null", "malformed_record", "a NoneType and not an object"),
        (b"{", "malformed_record", "not JSON"),
        (b"{} {}", "malformed_record", "not JSON: Extra data"),
        (b"{'id': 1}", "malformed_record", "not JSON"),
        (b"\xef\xbb\xbf{}", "malformed_record", "not JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", "malformed_record", "not JSON: Exceeds the limit"),
        (b"[" * 200_000, "malformed_record", "nested too deeply"),
        (b'{"id": "\xed\xa0\x80"}', "invalid_utf8", "can't decode byte 0xed"),
        (b'{"id": "a", "text": "t\\ud800"}', "invalid_utf8", "field 'text'"),
        (b'{"id": "a"}', "missing_text", "field 'text'"),
        (b'{"text": "t"}', "missing_id", "field 'id'"),
        (b'{"id": "a", "text": "t", "year": "z"}', "wrong_type", "field 'year': 'z' is not int64"),
        (LongLine(99, b'{"id": 1', 4), "too_large", "a line of 99 bytes"),
    ],
)
def test_unusable_lines_of_json_are_rejected_and_the_next_ones_read(line, reason, detail):
    rejected, document = read_jsonl(numbered(line, b'{"id": "b", "text": "t"}'), "f", MAKE)
    assert isinstance(rejected, Rejected)
    assert (rejected.source, rejected.position, rejected.reason) == ("f", 1, reason)
    assert detail in rejected.detail
    start = line.start if isinstance(line, LongLine) else line
    assert rejected.preview == start.decode("utf-8", errors="replace")[:120]
    assert document == Document("b", "t", "f", 2, {"year": None}, False)


def test_json_is_what_python_reads():
    lines = numbered(
        b' {"id": "a", "text": "first", "text": "last", "year": 2000, "other": NaN} ',
        b" \t",
        b"",
        b'{"id": 2, "text": "\\u00fc\\ud83d\\ude00 \xc3\xbc"}',
    )
    assert list(read_jsonl(lines, "f", MAKE)) == [
        Document("a", "last", "f", 1, {"year": 2000}, False),
        Document("2", "ü😀 ü", "f", 4, {"year": None}, False),
    ]


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"id": st.text(min_size=1), "text": st.text()})))
def test_every_line_of_json_comes_out_once(records):
    lines = numbered(*(json.dumps(record).encode() for record in records))
    read = list(read_jsonl(lines, "f", MAKE))
    assert [record.position for record in read] == list(range(1, len(records) + 1))
    for before, after in zip(records, read, strict=True):
        if isinstance(after, Document):
            assert (after.id, after.text) == (before["id"], before["text"])
        else:
            assert after.reason in ("empty_text", "invalid_utf8")


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_file_is_one_document(size):
    def read(data: bytes) -> list[Document | Rejected]:
        return list(read_whole([data[i : i + size] for i in range(0, len(data), size)], "f", 12))

    assert read(b"\xef\xbb\xbfa\r\nb\n") == [Document(content_hash("a\r\nb\n"), "a\r\nb\n", "f", 0, {}, True)]
    assert read(b"x" * 12) == [Document(content_hash("x" * 12), "x" * 12, "f", 0, {}, True)]
    (rejected,) = read(b"x" * 13)
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.detail, rejected.preview) == ("too_large", "more than 12 bytes", "x" * 13)
    for data, reason in ((b"", "empty_text"), (b"\xef\xbb\xbf", "empty_text"), (b"\n", "empty_text")):
        assert read(data) == [Rejected("f", 0, "", reason, "there is nothing but white space", "")]
    (rejected,) = read(b"a\xff")
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.preview) == ("invalid_utf8", "a\ufffd")


def test_short_documents_are_read_fast():
    line = json.dumps({"id": "document-123456", "text": "forty characters of text, more or less..", "year": 2000})
    data = (line + "\n").encode() * 50_000
    started = time.thread_time()
    count = sum(1 for _ in read_jsonl(((0, line) for _, line in read_lines([data], 1 << 20)), "f", MAKE))
    assert count == 50_000
    # A tenth of what one core does; a guard against the quadratic and the absurd.
    assert time.thread_time() - started < 5
