import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from apache_beam.metrics import MetricsFilter
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transforms import progress
from transforms.files import match_files
from transforms.read import ReadDocuments, ReadSpec, plan_inputs, read_part, split_file
from transforms.schema import Document, Rejected, content_hash

pytest_plugins = ["gcs_emulator"]

COMPRESS = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
CODECS = sorted(set(COMPRESS) - {""})
YEAR = pa.schema([("year", pa.int64())])
RECORDS = [{"id": f"id{row}", "text": f"text {row}\nwith ü", "year": row} for row in range(50)]


def encode(format_: str, records: Sequence[dict]) -> bytes:
    if format_ == "jsonl":
        return "".join(json.dumps(record) + "\n" for record in records).encode()
    if format_ == "text":
        return "".join(f"{record['text']}\n" for record in records).encode()
    if format_ == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, records[0].keys())
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue().encode()
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(records)), file, row_group_size=20)
    return file.getvalue()


def read_plainly(*patterns: Path | str, **fields) -> list[Document | Rejected]:
    """Reads without Beam what `ReadDocuments` reads with it."""
    transform = ReadDocuments([str(pattern) for pattern in patterns], **fields)
    spec = ReadSpec(
        transform.input_format,
        tuple(transform.text_fields),
        transform.id_field,
        transform.kept_fields,
        transform.max_document_bytes,
        transform.split_bytes,
    )
    files = {file for pattern in transform.patterns for file in match_files(pattern)}
    parts = [part for file in sorted(files) for part in split_file(file, spec)]
    return [record for part in parts for record in read_part(part, spec)]


def check(transform: ReadDocuments, expected: Sequence[Document | Rejected]) -> Counter[str]:
    """Asserts what a pipeline reads, in any order; returns its counters."""
    progress.reset()
    pipeline = beam.Pipeline(runner="FnApiRunner")
    documents, rejected = pipeline | transform
    assert_that(documents, equal_to([record for record in expected if isinstance(record, Document)]), "Documents")
    assert_that(rejected, equal_to([record for record in expected if isinstance(record, Rejected)]), "Rejected")
    result = pipeline.run()
    result.wait_until_finish()
    assert progress.tallies()["documents_read"] == len(expected)
    counters = result.metrics().query(MetricsFilter().with_namespace("ReadDocuments"))["counters"]
    return Counter({counter.key.metric.name: counter.committed for counter in counters})


def documents_of(records: Sequence[dict], path: Path, positions: Sequence[int]) -> list[Document | Rejected]:
    return [
        Document(record["id"], record["text"], str(path), position, {"year": record["year"]}, False)
        for record, position in zip(records, positions, strict=True)
    ]


POSITIONS = {"jsonl": range(1, 51), "csv": range(2, 102, 2), "parquet": range(50)}


@pytest.mark.parametrize(
    ("format_", "codec"), [*itertools.product(["jsonl", "csv"], COMPRESS), ("parquet", "")], ids="".join
)
def test_records_come_out_as_they_went_in(tmp_path, format_, codec):
    path = tmp_path / f"a.{format_}{codec}"
    path.write_bytes(COMPRESS[codec](encode(format_, RECORDS)))
    expected = documents_of(RECORDS, path, POSITIONS[format_])
    assert check(ReadDocuments([str(path)], kept_fields=YEAR), expected) == {"documents": 50}
    assert read_plainly(path, kept_fields=YEAR) == expected


@pytest.mark.parametrize("codec", COMPRESS)
def test_text_is_a_document_per_line_or_per_file(tmp_path, codec):
    path = tmp_path / f"a.txt{codec}"
    path.write_bytes(COMPRESS[codec]("\ufeffone\r\ntwo ü".encode()))
    assert read_plainly(path) == [
        Document(content_hash(text), text, str(path), number, {}, True) for number, text in ((1, "one"), (2, "two ü"))
    ]
    text = "one\r\ntwo ü"
    assert read_plainly(path, input_format="file") == [Document(content_hash(text), text, str(path), 0, {}, True)]


def torture(folder: Path) -> list[Document | Rejected]:
    """Writes files with everything that is rejected, sound records around it; returns what they must be read as."""
    expected: list[Document | Rejected] = []

    def write(name: str, data: bytes) -> str:
        (folder / name).write_bytes(data)
        return str(folder / name)

    def sound(id_: str, path: str, position: int) -> None:
        expected.append(Document(id_, "t", path, position, {"year": None}, False))

    def unusable(path: str, position: int, id_: str, reason: str, detail: str, preview: str) -> None:
        expected.append(Rejected(path, position, id_, reason, detail, preview))

    long = "x" * 2000
    lines = [
        b'{"id": "a", "text": "t"}',
        b'{"id": "b", "text": "\xff"}',
        b'{"id": "c", "text": "t"',
        b'{"id": "d"}',
        b'{"id": "e", "text": " "}',
        b'{"id": "f", "text": 5}',
        b'{"text": "t"}',
        b'{"id": "h", "text": "t", "year": "x"}',
        json.dumps({"id": "i", "text": long}).encode(),
        b"",
        b'{"id": "k", "text": "t"}',
    ]
    path = write("a.jsonl", b"\n".join(lines))
    shown = [line.decode(errors="replace")[:120] for line in lines]
    sound("a", path, 1)
    unusable(path, 2, "", "invalid_utf8", "'utf-8' codec can't decode byte 0xff in position 21: invalid start byte",
             shown[1])  # fmt: skip
    unusable(path, 3, "", "malformed_record", "not JSON: Expecting ',' delimiter: line 1 column 24 (char 23)", shown[2])
    unusable(path, 4, "d", "missing_text", "field 'text' absent or null", shown[3])
    unusable(path, 5, "e", "empty_text", "there is nothing but white space", shown[4])
    unusable(path, 6, "f", "wrong_type", "field 'text': 5 is not a string", shown[5])
    unusable(path, 7, "", "missing_id", "field 'id' is absent or null", shown[6])
    unusable(path, 8, "h", "wrong_type", "field 'year': 'x' is not int64", shown[7])
    unusable(path, 9, "", "too_large", "a line of 2,023 bytes", shown[8])
    sound("k", path, 11)

    whole = b'{"id": "a", "text": "t"}\n' * 3
    path = write("b.jsonl.gz", gzip.compress(whole + b'{"id": "b"}\n')[:-9])
    for number in (1, 2, 3):
        sound("a", path, number)
    unusable(path, 4, "", "truncated_file", "the gz stream is cut short; what follows its 3 whole lines is lost", "")
    path = write("c.jsonl.gz", gzip.compress(whole) + b"garbage")
    for number in (1, 2, 3):
        sound("a", path, number)
    detail = "not a sound gz stream after 1 whole: Error -3 while decompressing data: incorrect header check"
    unusable(
        path,
        4,
        "",
        "corrupt_file",
        f"{detail}; what follows its 3 whole lines is lost, and these may be damaged too",
        "",
    )

    path = write("d.csv", b"id,text,year\na,t,\nb," + b"x" * 2000 + b',1\nc,t,\nd,t\ne,"t,\nf,t,')
    sound("a", path, 2)
    unusable(path, 3, "", "too_large", "a row of 2,004 bytes", ("b," + "x" * 2000)[:120])
    sound("c", path, 4)
    unusable(path, 5, "", "malformed_record", "2 cells where the header has 3", "d,t\n")
    unusable(path, 6, "", "malformed_record", "not CSV: unexpected end of data", 'e,"t,\n')
    sound("f", path, 7)

    path = str(folder / "e.parquet")
    table = pa.table({
        "id": ["a", "b", "", None, "e"],
        "text": ["t", None, "t", "t", long],
        "year": pa.array([None] * 5, pa.int64()),
    })  # fmt: skip
    pq.write_table(table, path)
    sound("a", path, 0)
    unusable(path, 1, "b", "missing_text", "field 'text' absent or null", "{'text': None, 'id': 'b'}")
    unusable(path, 2, "", "missing_id", "field 'id' is empty", "{'text': 't', 'id': ''}")
    unusable(path, 3, "", "missing_id", "field 'id' is absent or null", "{'text': 't', 'id': None}")
    unusable(path, 4, "e", "too_large", "a text of 2,000 bytes", long[:120])
    path = write("f.parquet", b"no Parquet at all")
    magic = "Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file."
    unusable(path, 0, "", "corrupt_file", f"the footer cannot be decoded, the whole file is lost: {magic}", "")
    return expected


def test_what_cannot_be_used_is_rejected_and_the_rest_is_read(tmp_path):
    expected = torture(tmp_path)
    counts = check(ReadDocuments([f"{tmp_path}/*"], kept_fields=YEAR, max_document_bytes=1500), expected)
    reasons = Counter(record.reason for record in expected if isinstance(record, Rejected))
    assert counts == {
        "documents": sum(isinstance(record, Document) for record in expected),
        **{f"rejected_{reason}": count for reason, count in reasons.items()},
    }
    assert reasons.keys() == {
        "invalid_utf8",
        "malformed_record",
        "missing_text",
        "empty_text",
        "wrong_type",
        "missing_id",
        "truncated_file",
        "corrupt_file",
        "too_large",
    }


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("format_", ["jsonl", "csv", "text"])
def test_a_truncated_file_gives_a_prefix_and_one_rejected_record(tmp_path, format_, codec):
    generator = random.Random(0)
    records = [{"id": str(row), "text": generator.random().hex()} for row in range(200)]
    path = tmp_path / f"a.{format_}{codec}"
    compressed = COMPRESS[codec](encode(format_, records))
    path.write_bytes(compressed)
    whole = read_plainly(path, input_format=format_)
    assert [record.text for record in whole if isinstance(record, Document)] == [record["text"] for record in records]
    for length in [*range(0, len(compressed), 61), len(compressed) - 1]:
        path.write_bytes(compressed[:length])
        *documents, rejected = read_plainly(path, input_format=format_)
        assert documents == whole[: len(documents)]
        assert isinstance(rejected, Rejected)
        assert (rejected.reason, rejected.position) == (
            "truncated_file",
            len(documents) + (2 if format_ == "csv" and (documents or rejected.position > 1) else 1),
        )


@pytest.mark.parametrize("codec", CODECS)
def test_a_truncated_document_is_rejected_whole(tmp_path, codec):
    path = tmp_path / f"a.txt{codec}"
    path.write_bytes(COMPRESS[codec](b"a document " * 100)[:-3])
    (rejected,) = read_plainly(path, input_format="file")
    assert isinstance(rejected, Rejected)
    assert (rejected.position, rejected.reason, rejected.detail) == (
        0,
        "truncated_file",
        f"the {codec[1:]} stream is cut short",
    )


@pytest.mark.parametrize(("format_", "extension"), [("text", "txt"), ("jsonl", "jsonl")])
def test_large_files_are_read_in_ranges_with_offsets_as_positions(tmp_path, format_, extension):
    data = encode(format_, [{"id": str(row), "text": "x" * (row % 7 + 1)} for row in range(40)])
    data += b'{"id": "bad"}\xff\n' + b"y" * 100
    path = tmp_path / f"a.{extension}"
    path.write_bytes(data)
    by_line = read_plainly(path, max_document_bytes=50)
    assert [record.position for record in by_line] == list(range(1, 43))
    offsets = [0, *(index + 1 for index, byte in enumerate(data) if byte == ord("\n"))]
    by_offset: list[Document | Rejected] = []
    for record, offset in zip(by_line, offsets, strict=True):
        moved = record._replace(position=offset)
        if isinstance(moved, Rejected):
            moved = moved._replace(detail=f"{moved.detail} (the position is a byte offset)")
        by_offset.append(moved)
    for split_bytes in [*range(1, 60), len(data) - 1]:
        assert read_plainly(path, split_bytes=split_bytes, max_document_bytes=50) == by_offset
    assert read_plainly(path, split_bytes=len(data), max_document_bytes=50) == by_line
    check(ReadDocuments([str(path)], split_bytes=13, max_document_bytes=50), by_offset)


BYTES = st.lists(
    st.sampled_from(
        [b"\n", b"\r\n", b'{"id": "a", "text": "t"}', b"a,t", b'"', b",", b"\xff", b"x", b"{}", b"\0", b" "]
    ),
    max_size=30,
).map(b"".join)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=BYTES, split_bytes=st.integers(1, 40), limit=st.sampled_from([3, 1000]), codec=st.sampled_from(["", ".gz"]))
def test_every_line_is_accounted_for_whatever_it_is(tmp_path, data, split_bytes, limit, codec):
    stored = COMPRESS[codec](data)
    fields = {"split_bytes": split_bytes, "max_document_bytes": limit}
    lines = data.split(b"\n")
    num_lines = len(lines) - (lines[-1] in (b"", b"\r"))

    def read(name: str) -> list[Document | Rejected]:
        (tmp_path / name).write_bytes(stored)
        return read_plainly(tmp_path / name, **fields)

    assert len(read(f"a.txt{codec}")) == num_lines
    blank = sum(not line.strip() and len(line) <= limit for line in lines)
    assert len(read(f"a.jsonl{codec}")) <= num_lines
    assert len(read(f"a.jsonl{codec}")) >= len(lines) - blank
    stored = COMPRESS[codec](b"id,text\n" + data)
    positions = [record.position for record in read(f"a.csv{codec}")]
    assert positions == sorted(set(positions))
    assert len(read_plainly(tmp_path / f"a.csv{codec}", input_format="file")) == 1


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=50))
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.bz2", "a.csv.xz", "a.txt.zst", "a.parquet"])
def test_files_of_another_format_than_their_name_says_are_rejected(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    (rejected,) = read_plainly(tmp_path / name)
    assert isinstance(rejected, Rejected)
    assert rejected.reason in ("truncated_file", "corrupt_file")


def test_a_file_that_several_globs_match_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").write_text("two\n")
    monkeypatch.chdir(tmp_path)
    expected: list[Document | Rejected] = [
        Document(content_hash(text), text, f"{tmp_path}/{name}.txt", 1, {}, True)
        for name, text in (("a", "one"), ("b", "two"))
    ]
    check(ReadDocuments(["*.txt", f"{tmp_path}/a.*", "./a.txt"]), expected)


def test_empty_files_have_no_documents_except_one_per_file(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.csv"):
        (tmp_path / name).write_bytes(b"")
    assert read_plainly(tmp_path / "*") == []
    assert [type(record) for record in read_plainly(tmp_path / "*", input_format="file")] == [Rejected] * 3


def test_what_was_planned_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    long = '{"body": "' + "x" * 100 + '"}'
    path.write_text('{"body": "t", "year": 1}\n' + long + "\n")
    plan = plan_inputs([str(path)], "auto", ["body"], keep_fields=["year"])
    expected: list[Document | Rejected] = [
        Document(content_hash("t"), "t", str(path), 1, {"year": 1}, True),
        Rejected(str(path), 2, "", "too_large", "a line of 112 bytes", long),
    ]
    check(ReadDocuments.from_plan(plan, max_document_bytes=99), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patterns": []}, "patterns must be one or more globs in a list, not "),
        ({"patterns": "*.txt"}, "patterns must be one or more globs in a list, not "),
        ({"input_format": "xml"}, "input_format must be one of auto, .*, not 'xml'"),
        ({"text_fields": "text"}, "text_fields must be one or more names in a list, not 'text'"),
        ({"text_fields": []}, "text_fields must be one or more names in a list, not "),
        ({"max_document_bytes": 0}, "max_document_bytes must be at least 1, not 0"),
        ({"split_bytes": 0}, "split_bytes must be at least 1, not 0"),
    ],
)
def test_arguments_that_make_no_sense_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        ReadDocuments(**{"patterns": ["*.txt"], **fields})


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("a.md", b"", ValueError, r"the name of .*/a\.md does not tell its format"),
        ("a.csv", b"id,body\n1,t\n", ValueError, r"a\.csv has no column 'text'; its columns are 'id', 'body'"),
        ("a.parquet", encode("parquet", [{"id": "1"}]), ValueError, r"a\.parquet has no column 'text'"),
    ],
)
def test_a_file_that_does_not_suit_fails_the_job_and_is_named(tmp_path, name, data, error, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        read_plainly(tmp_path / "*")
    with pytest.raises(Exception, match=message):  # Runners wrap errors in their own.
        check(ReadDocuments([f"{tmp_path}/*"]), [])


def test_a_file_that_vanishes_or_shrinks_fails_the_job_and_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(encode("jsonl", RECORDS))
    spec = ReadSpec("auto", ("text",), "id", YEAR, 1 << 20, 1000)
    parts = list(split_file(match_files(str(path))[0], spec))
    assert len(parts) > 2
    os.truncate(path, 1500)
    assert len(list(read_part(parts[0], spec))) > 10
    for part in parts[1:]:
        with pytest.raises(OSError, match=r"a\.jsonl became .* bytes shorter"):
            list(read_part(part, spec))
    path.unlink()
    with pytest.raises(OSError, match=r"cannot open .*a\.jsonl: .*No such file"):
        list(read_part(parts[0], spec))


def test_a_parquet_file_that_is_overwritten_fails_the_job_and_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(encode("parquet", RECORDS))
    spec = ReadSpec("auto", ("text",), "id", YEAR, 1 << 20, 1)
    parts = list(split_file(match_files(str(path))[0], spec))
    assert [(part.start, part.stop, part.first_row) for part in parts] == [(0, 1, 0), (1, 2, 20), (2, 3, 40)]
    path.write_bytes(b"half a Parquet file")
    with pytest.raises(OSError, match=r"a\.parquet was changed while it was being read"):
        list(read_part(parts[1], spec))


def test_inputs_on_gs_are_read(gcs_bucket, gcs_emulator):
    bucket = gcs_emulator.client().bucket(gcs_bucket.removeprefix("gs://"))
    for name, data in {
        "in/a.jsonl": encode("jsonl", RECORDS),
        "in/b.jsonl.gz": gzip.compress(encode("jsonl", RECORDS)),
        "in/c.csv": encode("csv", RECORDS),
        "in/d.parquet": encode("parquet", RECORDS),
        "in/": b"",
        "out/e.md": b"not matched",
    }.items():
        bucket.blob(name).upload_from_string(data)
    plan = plan_inputs([f"{gcs_bucket}/in/*"], keep_fields=["year:int64"])
    expected = [
        document
        for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.parquet")
        for document in documents_of(RECORDS, Path("x"), POSITIONS[name.split(".")[1]])
        for document in [document._replace(source=f"{gcs_bucket}/in/{name}")]
    ]
    check(ReadDocuments.from_plan(plan), expected)
    with pytest.raises(FileNotFoundError, match="no file matches gs://"):
        plan_inputs([f"{gcs_bucket}/none/*"])


def test_pipelines_read_lists_of_documents_into_anything(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        documents, _ = pipeline | ReadDocuments([f"{tmp_path}/*.txt"])
        lengths = documents | beam.Map(lambda document: len(document.text))
        assert_that(lengths, equal_to([3, 3]))
