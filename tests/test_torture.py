"""A corpus with every fault that a record or a file can have: what is wrong is rejected, one by one, and all else read.

Each rejected record is checked by its file, position, id and reason; the modules' own tests check details.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from embed_runs import NOT_PUBLISHED, PUBLISHED, contents_of, counts_of, embed, latest, rows_of

from transforms import storage
from transforms.encoder import BertLstmEncoder
from transforms.schema import REJECT_REASONS, Rejected, content_hash
from transforms.snapshots import list_published

FATAL = "a fatal text"
WITHOUT_VECTOR = "a text without a vector"

Faults = list[tuple[str, int, str, str]]
"""File, position, id and reason of each record that is rejected."""


def line(row_id, text, **fields) -> bytes:
    return json.dumps({"id": row_id, "text": text, "year": 1, **fields}).encode()


@pytest.fixture
def poisoned(monkeypatch, tiny_checkpoint):
    """Has the encoder fail on one text, and give NaN for another one."""
    tokenizer = BertLstmEncoder.from_pretrained(tiny_checkpoint).tokenizer
    fatal, without_vector = (text.token_ids for text in tokenizer.tokenize([FATAL, WITHOUT_VECTOR]))
    encode_tokens = BertLstmEncoder.encode_tokens

    def poisoned_encode_tokens(encoder, token_ids, max_batch_tokens=None):
        if any(np.array_equal(ids, fatal) for ids in token_ids):
            raise RuntimeError("the encoder chokes on it")
        encoded = encode_tokens(encoder, token_ids, max_batch_tokens)
        for place, ids in enumerate(token_ids):
            if np.array_equal(ids, without_vector):
                encoded.vectors[place, 3] = np.nan
        return encoded

    monkeypatch.setattr(BertLstmEncoder, "encode_tokens", poisoned_encode_tokens)


def write_json_lines(folder: Path) -> Faults:
    name = "a.jsonl"
    records: list[tuple[bytes, str, str]] = [
        (line("good1", "read a file"), "", ""),
        (b'{"id": "u", "text": "\xff"}', "", "invalid_utf8"),
        (line("s", "\ud800"), "s", "invalid_utf8"),
        (b"not json", "", "malformed_record"),
        (b'{"id": "half", "text": "cut', "", "malformed_record"),
        (b'["an", "array"]', "", "malformed_record"),
        (b'{"id": "m"}', "m", "missing_text"),
        (line("n", None), "n", "missing_text"),
        (line("e", " \t\n"), "e", "empty_text"),
        (line("z", "\u200b"), "z", "empty_text"),
        (line("w", 5), "w", "wrong_type"),
        (line("y", "fine", year="soon"), "y", "wrong_type"),
        (line(True, "fine"), "", "wrong_type"),
        (b'{"text": "without an id"}', "", "missing_id"),
        (line(None, "without an id"), "", "missing_id"),
        (line("", "without an id"), "", "missing_id"),
        (line("big", "x" * 2000), "", "too_large"),
        (b"", "", ""),
        (line("good1", "another text, but the same id"), "good1", "duplicate_id"),
        (line("fatal", FATAL), "fatal", "encode_error"),
        (line("fatal2", FATAL), "fatal2", "encode_error"),
        (line("nan", WITHOUT_VECTOR), "nan", "non_finite"),
        (line("good2", "write a file"), "", ""),
    ]
    (folder / name).write_bytes(b"\r\n".join(record for record, _, _ in records))
    return [(name, number, row_id, reason) for number, (_, row_id, reason) in enumerate(records, 1) if reason]


def write_csv(folder: Path) -> Faults:
    (folder / "b.csv").write_bytes(
        b"id,text,year\n"
        b"csv1,read it,1\n"
        b"csv2,too few\n"
        b"csv3,one,two,three\n"
        b'csv4,"never closed,1\n'
        b"csv5,write it,soon\n"
        b"csv6,,1\n"
        b",text,1\n"
        b"csv7,\xff,1\n"
        b"good2,the same id as in a file before,1\n"
        b'csv8,"two\nlines",\n'
    )
    faults = [
        (3, "", "malformed_record"),
        (4, "", "malformed_record"),
        (5, "", "malformed_record"),
        (6, "csv5", "wrong_type"),
        (7, "csv6", "empty_text"),
        (8, "", "missing_id"),
        (9, "", "invalid_utf8"),
        (10, "good2", "duplicate_id"),
    ]
    return [("b.csv", *fault) for fault in faults]


def write_compressed(folder: Path) -> tuple[Faults, set[str]]:
    """Compressed files that are cut short or damaged; also returns the ids that can be read from them."""
    randoms = np.random.default_rng(0).integers(0, 10**9, size=(200, 4))
    lines = [line(f"gz{row}", " ".join(map(str, numbers))) for row, numbers in enumerate(randoms)]
    data = b"\n".join(lines)
    cut = gzip.compress(data, mtime=0)[: len(data) // 4]
    (folder / "c.jsonl.gz").write_bytes(cut)
    num_whole = zlib.decompressobj(wbits=31).decompress(cut).count(b"\n")
    assert 10 < num_whole < 190
    flipped = bytearray(bz2.compress(data))
    flipped[len(flipped) // 2] ^= 1
    (folder / "d.jsonl.bz2").write_bytes(flipped)
    (folder / "e.jsonl.xz").write_bytes(lzma.compress(data)[:-20])
    (folder / "f.jsonl.zst").write_bytes(data)
    (folder / "g.jsonl.gz").write_bytes(b"")
    faults = [
        ("c.jsonl.gz", num_whole + 1, "", "truncated_file"),
        ("d.jsonl.bz2", 1, "", "corrupt_file"),
        # All of its lines can be read, but they are those of the first file, and its last one ends nowhere.
        *(("e.jsonl.xz", row + 1, f"gz{row}", "duplicate_id") for row in range(num_whole)),
        ("e.jsonl.xz", 200, "", "truncated_file"),
        ("f.jsonl.zst", 1, "", "corrupt_file"),
        ("g.jsonl.gz", 1, "", "truncated_file"),
    ]
    return faults, {f"gz{row}" for row in range(199)}


def write_parquet(folder: Path) -> tuple[Faults, set[str]]:
    """Parquet files, one of them damaged in its second row group; also returns the ids that can be read."""
    (folder / "h.parquet").write_bytes(b"PAR1 this is no Parquet PAR1")
    rows = {
        "id": ["p0", None, "p2", "p3", "p4", *(f"p{row}" for row in range(5, 20))],
        "text": ["read", "it", None, "", "x" * 2000, *("words " * (row % 7 + 1) for row in range(5, 20))],
        "year": [2**31] * 20,
    }
    path = folder / "i.parquet"
    pq.write_table(
        pa.table(rows), path, row_group_size=10, write_page_checksum=True, compression="none", use_dictionary=False
    )
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 2] ^= 1
    path.write_bytes(data)
    faults = [
        ("h.parquet", 0, "", "corrupt_file"),
        ("i.parquet", 1, "", "missing_id"),
        ("i.parquet", 2, "p2", "missing_text"),
        ("i.parquet", 3, "p3", "empty_text"),
        ("i.parquet", 4, "p4", "too_large"),
        ("i.parquet", 10, "", "corrupt_file"),
    ]
    return faults, {"p0", *(f"p{row}" for row in range(5, 10))}


def rejected_in(folder: str, corpus: Path) -> Faults:
    """Returns the rejected records of a snapshot's folder as faults; all have a detail."""
    records = []
    for name in storage.list_files(folder):
        if name.startswith("rejected-") and name.endswith(".jsonl"):
            with storage.open_for_reading(f"{folder}/{name}") as file:
                records += [Rejected(**json.loads(record)) for record in file]
    assert all(record.detail for record in records)
    return sorted(
        (str(Path(record.source).relative_to(corpus)), record.position, record.id, record.reason) for record in records
    )


def test_every_fault_is_rejected_for_its_reason_and_nothing_else_is_lost(tmp_path, tiny_checkpoint, poisoned, capfd):
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    options = [f"--checkpoint={tiny_checkpoint}", "--keep_fields=year:int64", "--max_document_bytes=1500"]

    # A sound run before, of which LATEST and the snapshot must stay.
    (tmp_path / "before.jsonl").write_bytes(line("good1", "read a file") + b"\n" + line("gone", "fast"))
    assert embed(f"--input={tmp_path}/before.jsonl", *options, output=output) == PUBLISHED
    first, before = latest(output), contents_of(output)

    compressed_faults, compressed_ids = write_compressed(corpus)
    parquet_faults, parquet_ids = write_parquet(corpus)
    faults = sorted([*write_json_lines(corpus), *write_csv(corpus), *compressed_faults, *parquet_faults])
    ids = {"good1", "good2", "csv1", "csv8"} | compressed_ids | parquet_ids
    assert {reason for *_, reason in faults} == set(REJECT_REASONS)
    expected = {"read": len(ids) + len(faults), "rejected": len(faults), "deleted": 1}

    # With the default limit nothing is published, and it is said why and where the rejected records are.
    options.append(f"--input={corpus}/*")
    capfd.readouterr()
    assert embed(*options, output=output) == NOT_PUBLISHED
    told = capfd.readouterr().out
    after = contents_of(output)
    assert before.items() <= after.items()
    # What was encoded may have been saved: the next run need not encode it again.
    added = {name for name in after.keys() - before.keys() if not name.startswith(".work/")}
    folder = {name.partition("/")[0] for name in added}.pop()
    assert added == {f"{folder}/report.json", f"{folder}/rejected-00000-of-00001.jsonl"}
    assert rejected_in(f"{output}/{folder}", corpus) == faults
    report = json.loads(after[f"{folder}/report.json"])
    assert (expected | {"embedded": len(ids) - 1, "reused": 1}).items() <= report["counts"].items()
    fraction = f"{len(faults) / (len(ids) + len(faults)):.2%}"
    [reason] = report["not_published"]
    assert reason.endswith(f"records were rejected ({fraction}), more than --max_rejected_fraction 0.01 allows")
    assert f"because {reason}\n" in told
    assert f"the rejected records are in {output}/{folder}/rejected-*.jsonl\n" in told
    assert list_published(str(output)) == [first.name]

    # Where all may be rejected, the rest is published.
    assert embed(*options, "--max_rejected_fraction=1", output=output) == PUBLISHED
    snapshot = latest(output)
    counts = counts_of(snapshot)
    assert expected.items() <= counts.items()
    assert counts.get("embedded", 0) + counts["reused"] == len(ids)
    assert snapshot.manifest["rejected_by_reason"] == Counter(reason for *_, reason in faults)
    assert snapshot.manifest["previous"] == first.name
    assert rejected_in(snapshot.folder, corpus) == faults
    rows = rows_of(snapshot)
    assert rows.keys() == ids
    assert rows["good1"].content_hash == content_hash("read a file")
    assert rows["csv8"].content_hash == content_hash("two\nlines")
    assert {row.kept["year"] for row in rows.values()} == {1, None, 2**31}


def test_lines_of_text_are_rejected_one_by_one(tmp_path, tiny_checkpoint):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_bytes(b"\xef\xbb\xbfread\n\n \xff\n \t \nwrite\n" + b"x" * 200 + b"\nread\nfast")
    (corpus / "b.txt.zst").write_bytes(zstandard.compress(b"slow\nred\n" + bytes(1000))[:-3])
    options = [f"--input={corpus}/*", f"--checkpoint={tiny_checkpoint}", "--max_document_bytes=100"]
    assert embed(*options, "--max_rejected_fraction=1", output=tmp_path / "out") == PUBLISHED
    snapshot = latest(tmp_path / "out")
    assert rejected_in(snapshot.folder, corpus) == [
        ("a.txt", 2, "", "empty_text"),
        ("a.txt", 3, "", "invalid_utf8"),
        ("a.txt", 4, "", "empty_text"),
        ("a.txt", 6, "", "too_large"),
        ("a.txt", 7, content_hash("read"), "duplicate_id"),
        ("b.txt.zst", 1, "", "truncated_file"),
    ]
    assert rows_of(snapshot).keys() == {content_hash(text) for text in ("read", "write", "fast")}
    assert counts_of(snapshot)["read"] == 9
    assert counts_of(snapshot)["blank_lines"] == 2


def test_blank_lines_between_paragraphs_bar_no_publishing(tmp_path, tiny_checkpoint):
    (tmp_path / "a.txt").write_text("\nread\n\n\u3000\n\nwrite\n\n")
    options = [f"--input={tmp_path}/a.txt", f"--checkpoint={tiny_checkpoint}", "--max_rejected_fraction=0"]
    assert embed(*options, output=tmp_path / "out") == PUBLISHED
    assert counts_of(latest(tmp_path / "out")) == {
        "read": 7, "embedded": 2, "rejected": 5, "blank_lines": 5, "texts_encoded": 2
    }  # fmt: skip
    (tmp_path / "a.txt").write_text("\n\n")
    assert embed(*options, output=tmp_path / "out") == NOT_PUBLISHED


def test_whole_files_are_rejected_one_by_one(tmp_path, tiny_checkpoint):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    files = {
        "big": b"x" * 101,
        "blank": b" \n",
        "cut.gz": gzip.compress(b"read a file")[:-4],
        "empty": b"",
        "good": b"read\nwrite",
        "good.gz": gzip.compress(b"fast"),
        "latin1": "é".encode("latin-1"),
        "no.xz": b"read this as xz",
        "repeated": b"read\nwrite",
    }
    for name, data in files.items():
        (corpus / name).write_bytes(data)
    options = [f"--input={corpus}/*", f"--checkpoint={tiny_checkpoint}", "--max_document_bytes=100"]
    status = embed(*options, "--input_format=file", "--max_rejected_fraction=1", output=tmp_path / "out")
    assert status == PUBLISHED
    snapshot = latest(tmp_path / "out")
    assert rejected_in(snapshot.folder, corpus) == [
        ("big", 0, "", "too_large"),
        ("blank", 0, "", "empty_text"),
        ("cut.gz", 0, "", "truncated_file"),
        ("empty", 0, "", "empty_text"),
        ("latin1", 0, "", "invalid_utf8"),
        ("no.xz", 0, "", "corrupt_file"),
        ("repeated", 0, content_hash("read\nwrite"), "duplicate_id"),
    ]
    assert rows_of(snapshot).keys() == {content_hash("read\nwrite"), content_hash("fast")}


def test_a_corpus_without_any_record_is_not_published(tmp_path, tiny_checkpoint, capfd):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    options = [f"--input={tmp_path}/empty.jsonl", f"--checkpoint={tiny_checkpoint}"]
    assert embed(*options, output=tmp_path / "out") == NOT_PUBLISHED
    assert "because the input holds no record at all" in capfd.readouterr().out
    assert list_published(str(tmp_path / "out")) == []
