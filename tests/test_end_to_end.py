"""The whole command on files of every format, with the encoder that ships; what it writes is compared row by row."""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from apache_beam.io.aws.s3filesystem import S3FileSystem
from apache_beam.io.filesystem import BeamIOError
from apache_beam.options.pipeline_options import S3Options
from embed_runs import NOT_PUBLISHED, PUBLISHED, counts_of, embed, failure_of, kept_schema, latest, rows_of

from transforms.encoder import BertLstmEncoder
from transforms.schema import SNAPSHOT_FORMAT, content_hash

ROOT = Path(__file__).parent.parent

TEXTS = [
    "Read a zip archive member by member.",
    "The quick brown fox jumps over the lazy dog",
    "naïve façade — 東京 2026 🙂",
    "x",
    "Return the number of seconds since the epoch. " * 60 + "The end.",  # Several windows.
    "a list, of words; and: punctuation!",
]
TITLES = ["Zip", "Fox", "Tokyo", "", "Time", "List"]


@pytest.fixture(scope="module")
def encoder() -> BertLstmEncoder:
    return BertLstmEncoder.from_pretrained("default")


@pytest.fixture(scope="module")
def check(encoder):
    """Compares a snapshot with the texts and kept fields it must hold, by id."""

    def compare(output, texts, kept=None):
        snapshot = latest(output)
        rows = rows_of(snapshot)
        assert rows.keys() == texts.keys()
        tokenized = dict(zip(texts, encoder.tokenizer.tokenize(list(texts.values())), strict=True))
        for row_id, text in texts.items():
            row = rows[row_id]
            assert row.content_hash == content_hash(text)
            assert (row.num_tokens, row.truncated) == (len(tokenized[row_id].token_ids), False)
            assert row.kept == (kept or {}).get(row_id, {})
        expected = encoder.encode(list(texts.values()))
        vectors = np.stack([rows[row_id].vector for row_id in texts])
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
        assert np.sum(vectors * expected, axis=1).min() > 0.9999
        assert snapshot.fingerprint == encoder.fingerprint()
        return snapshot

    return compare


def test_text_a_document_per_line(tmp_path, check):
    (tmp_path / "one.txt").write_text(f"{TEXTS[0]}\r\n{TEXTS[1]}\n", encoding="utf-8")
    (tmp_path / "two.txt.gz").write_bytes(gzip.compress("\n".join(TEXTS[2:]).encode()))
    (tmp_path / "notes.md").write_text("not read")
    assert embed(f"--input={tmp_path}/*.txt*", output=tmp_path / "out") == PUBLISHED
    snapshot = check(tmp_path / "out", {content_hash(text): text for text in TEXTS})
    assert counts_of(snapshot) == {"read": 6, "embedded": 6, "texts_encoded": 6}


def test_json_lines_from_several_inputs_with_fields_joined_and_kept(tmp_path, check):
    fields = [
        {"year": 2000, "score": 0.5, "tags": ["a", "b"], "good": True},
        {"year": -1, "score": None, "tags": [], "good": False},
        {"year": 2**40, "score": 3, "tags": None},
        {"year": None, "score": 1e300, "tags": ["ü"], "good": None},
        {"year": 0, "score": -0.25, "tags": ["c"], "good": True},
        {},
    ]
    records = [
        {"key": f"k{row}", "title": TITLES[row], "body": text, "more": "left out", **fields[row]}
        for row, text in enumerate(TEXTS)
    ]
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "first.jsonl").write_bytes(b"".join(lines[:3]))
    (tmp_path / "second.ndjson.bz2").write_bytes(bz2.compress(b"\n".join(lines[3:])))
    status = embed(
        f"--input={tmp_path}/**/*.jsonl",
        f"--input={tmp_path}/second.*",
        "--text_field=title",
        "--text_field=body",
        "--id_field=key",
        "--keep_fields=year, score,tags,good",
        output=tmp_path / "out",
    )
    assert status == PUBLISHED
    texts = {f"k{row}": f"{TITLES[row]}\n{text}" if TITLES[row] else text for row, text in enumerate(TEXTS)}
    names = ("year", "score", "tags", "good")
    kept = {f"k{row}": {name: fields[row].get(name) for name in names} for row in range(6)}
    snapshot = check(tmp_path / "out", texts, kept)
    assert kept_schema(snapshot) == pa.schema(
        [("year", pa.int64()), ("score", pa.float64()), ("tags", pa.list_(pa.string())), ("good", pa.bool_())]
    )


def test_csv_with_line_breaks_in_cells_and_types_that_are_asked_for(tmp_path, check):
    texts = [*TEXTS[:5], 'He said "no",\r\nand left.']
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["id", "city", "text", "year"])
    for row, value in enumerate(texts):
        writer.writerow([f"ü{row}", "" if row == 3 else f"city, {row}", value, "" if row == 4 else 1990 + row])
    (tmp_path / "corpus.csv.xz").write_bytes(lzma.compress(text.getvalue().encode()))
    options = [f"--input={tmp_path}/corpus.csv.xz", "--keep_fields=year:int16,city"]
    assert embed(*options, output=tmp_path / "out") == PUBLISHED
    kept = {
        f"ü{row}": {"year": None if row == 4 else 1990 + row, "city": "" if row == 3 else f"city, {row}"}
        for row in range(6)
    }
    snapshot = check(tmp_path / "out", {f"ü{row}": value for row, value in enumerate(texts)}, kept)
    assert kept_schema(snapshot) == pa.schema([("year", pa.int16()), ("city", pa.string())])


def test_parquet_keeps_the_types_of_its_columns_and_every_reader_reads_the_output(tmp_path, check):
    day = datetime.date(2026, 11, 22)
    moment = datetime.datetime(2026, 11, 22, 18, 0, 0, 123456, tzinfo=datetime.timezone.utc)
    columns = {
        "id": pa.array([10**15 + row for row in range(6)], pa.int64()),
        "text": pa.array(TEXTS).dictionary_encode(),
        "day": pa.array([day, None, day, day, day, day], pa.date32()),
        "moment": pa.array([moment] * 5 + [None], pa.timestamp("us", tz="UTC")),
        "point": pa.array([{"x": row, "y": row / 2} for row in range(6)], pa.struct([("x", "int32"), ("y", "float")])),
        "raw": pa.array([b"\xff\x00", b"", None, b"a", b"b", b"c"], pa.binary()),
        "unused": pa.array(range(6)),
    }
    pq.write_table(pa.table(columns), tmp_path / "corpus.parquet", row_group_size=2)
    kept_names = ("day", "moment", "point", "raw")
    status = embed(
        f"--input={tmp_path}/corpus.parquet",
        f"--keep_fields={','.join(kept_names)}",
        "--rows_per_shard=2",
        output=tmp_path / "out",
    )
    assert status == PUBLISHED
    ids = [str(10**15 + row) for row in range(6)]
    kept = {row_id: {name: columns[name][row].as_py() for name in kept_names} for row, row_id in enumerate(ids)}
    snapshot = check(tmp_path / "out", dict(zip(ids, TEXTS, strict=True)), kept)
    assert kept_schema(snapshot) == pa.schema([(name, columns[name].type) for name in kept_names])

    # Its files are as designed.
    manifest, folder = snapshot.manifest, Path(snapshot.folder)
    number = len(manifest["shards"])
    names = [f"embeddings-{index:05d}-of-{number:05d}.parquet" for index in range(number)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "manifest.json"]
    assert [shard["file"] for shard in manifest["shards"]] == names
    assert all(1 <= shard["rows"] <= 2 for shard in manifest["shards"])
    for name in names:
        file = pq.ParquetFile(folder / name)
        assert file.metadata.num_rows > 0
        assert {file.metadata.row_group(0).column(0).compression} == {"ZSTD"}
        footer = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
        assert footer["encoder.fingerprint"] == snapshot.fingerprint
        assert footer["encoder.pooling"] == "mean"
    assert (tmp_path / "out" / "LATEST").read_text() == snapshot.name
    assert manifest["format"] == SNAPSHOT_FORMAT
    assert manifest["previous"] is None
    assert manifest["encoder"]["device"] == "cpu"
    assert manifest["encoder"]["dtype"] == "float32"
    assert manifest["counts"]["tokens"] <= manifest["counts"]["padded_tokens"] < 1.2 * manifest["counts"]["tokens"]

    # DuckDB and Polars read them as they are.
    rows = rows_of(snapshot)
    glob = f"{folder}/*.parquet"
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'")
        columns_read = "id, embedding::FLOAT[256], content_hash, num_tokens, day, point"
        found = database.sql(f"SELECT {columns_read} FROM '{glob}' ORDER BY id").fetchall()
    assert [row[0] for row in found] == ids
    for row_id, vector, text_hash, num_tokens, day_, point in found:
        assert np.array_equal(np.array(vector, np.float32), rows[row_id].vector)
        assert (text_hash, num_tokens, day_, point) == (
            rows[row_id].content_hash,
            rows[row_id].num_tokens,
            rows[row_id].kept["day"],
            rows[row_id].kept["point"],
        )
    frame = polars.read_parquet(glob).sort("id")
    assert frame["id"].to_list() == ids
    assert frame.schema["embedding"] == polars.Array(polars.Float32, 256)
    assert np.array_equal(frame["embedding"].to_numpy(), np.stack([rows[row_id].vector for row_id in ids]))


def test_a_document_per_file_whatever_the_names(tmp_path, check):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for row, text in enumerate(TEXTS[:4]):
        (tmp_path / "in" / f"{row}.md").write_bytes(f"{text}\nand a second line".encode())
    (tmp_path / "in" / "deep" / "[odd] name.rst.zst").write_bytes(zstandard.compress(TEXTS[4].encode()))
    (tmp_path / "in" / "same").write_bytes(TEXTS[4].encode())
    options = [f"--input={tmp_path}/in/**", "--input_format=file", "--max_rejected_fraction=0"]
    # A text that is there twice is one document.
    assert embed(*options, output=tmp_path / "out") == PUBLISHED
    texts = [*(f"{text}\nand a second line" for text in TEXTS[:4]), TEXTS[4]]
    snapshot = check(tmp_path / "out", {content_hash(text): text for text in texts})
    assert counts_of(snapshot) == {"read": 6, "embedded": 5, "rejected": 1, "repeated": 1, "texts_encoded": 5}


def test_long_documents_are_whole_up_to_max_tokens_and_marked_beyond(tmp_path, encoder):
    """Documents of many windows, alone and among others; what lies past `max_tokens` alone is not seen."""
    words = [f"word{number % 97}" for number in range(3000)]
    texts = {"cut": " ".join(words), "longer": " ".join([*words, "more"]), "whole": " ".join(words[:300]), "one": "x"}
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in texts.items()))
    (tmp_path / "alone.jsonl").write_text(json.dumps({"id": "alone", "text": texts["whole"]}) + "\n")
    for name in ("all", "alone"):
        assert embed(f"--input={tmp_path}/{name}.jsonl", "--max_tokens=1500", output=tmp_path / name) == PUBLISHED
    rows = rows_of(latest(tmp_path / "all"))
    token_ids = encoder.tokenizer.tokenize([texts["cut"]])[0].token_ids[:1500]
    assert {row_id: (row.num_tokens, row.truncated) for row_id, row in rows.items()} == {
        "cut": (1500, True),
        "longer": (1500, True),
        "whole": (len(encoder.tokenizer.tokenize([texts["whole"]])[0].token_ids), False),
        "one": (1, False),
    }
    assert latest(tmp_path / "all").manifest["counts"]["truncated"] == 2
    assert np.allclose(rows["cut"].vector, rows["longer"].vector, atol=1e-5)
    assert np.allclose(rows["cut"].vector, encoder.encode_tokens([token_ids]).vectors[0], atol=1e-4)
    alone = rows_of(latest(tmp_path / "alone"))["alone"]
    assert np.allclose(rows["whole"].vector, alone.vector, atol=1e-5)


def test_a_text_that_many_ids_share_is_encoded_once(tmp_path, tiny_checkpoint):
    lines = [{"id": f"id{row}", "text": "hot" if row % 10 else f"text {row}", "row": row} for row in range(3000)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [f"--input={tmp_path}/in.jsonl", f"--checkpoint={tiny_checkpoint}", "--keep_fields=row"]
    assert embed(*options, output=tmp_path / "out") == PUBLISHED
    snapshot = latest(tmp_path / "out")
    assert counts_of(snapshot) == {"read": 3000, "embedded": 3000, "texts_encoded": 301}
    rows = rows_of(snapshot)
    assert {row_id: row.kept["row"] for row_id, row in rows.items()} == {line["id"]: line["row"] for line in lines}
    hot = [row.vector.tobytes() for row in rows.values() if row.content_hash == content_hash("hot")]
    assert len(hot) == 2700
    assert len(set(hot)) == 1


def test_two_worker_processes_give_what_one_process_gives(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", python_path())
    for part in range(4):
        lines = [{"id": f"id{row}", "text": f"read file {row % 50}"} for row in range(part, 200, 4)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "bad.jsonl").write_text('{"id": "no text"}\n{"id": "id7", "text": "again"}\n')
    options = [f"--input={tmp_path}/*.jsonl", f"--checkpoint={tiny_checkpoint}", "--max_rejected_fraction=1"]
    assert embed(*options, output=tmp_path / "one") == PUBLISHED
    processes = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    assert embed(*options, *processes, output=tmp_path / "two") == PUBLISHED
    one, two = latest(tmp_path / "one"), latest(tmp_path / "two")
    assert counts_of(one) == counts_of(two)
    assert (
        one.manifest["rejected_by_reason"]
        == two.manifest["rejected_by_reason"]
        == {
            "duplicate_id": 1,
            "missing_text": 1,
        }
    )
    rows, other_rows = rows_of(one), rows_of(two)
    assert rows.keys() == other_rows.keys()
    for row_id, row in rows.items():
        assert row[:4] == other_rows[row_id][:4]
        assert np.allclose(row.vector, other_rows[row_id].vector, atol=1e-5)


def python_path() -> str:
    """Returns where other processes find this package, which need not be installed, first."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def run_command(*options: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
    )


def test_worker_processes_that_would_import_another_package_are_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    options = ["--direct_running_mode=multi_processing", "--direct_num_workers=2", "--checkpoint=nowhere"]
    (tmp_path / "transforms.py").touch()
    message = failure_of(capfd, *options, output="out")
    assert message.startswith(f"worker processes would import {tmp_path}/transforms.py in place of this program's")
    (tmp_path / "pipeline").mkdir()  # A namespace package, where this one is installed as editable.
    message = failure_of(capfd, *options, output="out")
    assert message.startswith(f"worker processes would import {tmp_path}/pipeline in place of this program's pipeline:")
    assert failure_of(capfd, *options[2:], output="out").startswith("no checkpoint 'nowhere'")
    if sys.version_info >= (3, 11):
        monkeypatch.setenv("PYTHONSAFEPATH", "1")
        assert failure_of(capfd, *options, output="out").startswith("no checkpoint 'nowhere'")


def test_other_storage_is_read_with_the_options_that_beam_has_for_it(tmp_path, tiny_checkpoint, monkeypatch, capfd):
    def tell_region(filesystem, patterns, limits=None):
        region = filesystem._options.view_as(S3Options).s3_region_name
        raise BeamIOError("Match operation failed", {patterns[0]: OSError(f"asked in {region}")})

    monkeypatch.setitem(sys.modules, "boto3", ModuleType("boto3"))
    monkeypatch.setattr(S3FileSystem, "match", tell_region)
    options = ["--input=s3://bucket/x.jsonl", f"--checkpoint={tiny_checkpoint}", "--s3_region_name=the-north"]
    message = failure_of(capfd, *options, output=tmp_path / "out")
    assert message == "cannot list s3://bucket/x.jsonl: asked in the-north"


def said_but_progress(result: subprocess.CompletedProcess) -> str:
    """Returns what a command wrote to stderr, less the lines that a run of some seconds says how far it is with."""
    return re.sub(r"^(read [\d,]+ documents|encoded [\d,]+ )[^\n]*\n", "", result.stderr, flags=re.MULTILINE)


def test_the_command_is_quiet_and_its_status_tells_what_became_of_the_run(tmp_path, tiny_checkpoint):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "b"}\n')
    options = ["local", "--input=in.jsonl", f"--checkpoint={tiny_checkpoint}"]
    result = run_command(*options, folder=tmp_path)
    assert (result.returncode, said_but_progress(result)) == (NOT_PUBLISHED, "")
    assert "1 of 2 records were rejected (50.00%), more than --max_rejected_fraction 0.01 allows" in result.stdout
    [rejected] = tmp_path.glob("output/snapshot=*/rejected-00000-of-00001.jsonl")
    assert f"the rejected records are in {rejected.parent.relative_to(tmp_path)}/rejected-*.jsonl" in result.stdout
    assert json.loads(rejected.read_text())["reason"] == "missing_text"

    result = run_command(*options, "--max_rejected_fraction=0.5", folder=tmp_path)
    assert (result.returncode, said_but_progress(result)) == (PUBLISHED, "")
    assert f"in output/snapshot={latest(tmp_path / 'output').name}" in result.stdout
