"""What `benchmark` prints and refuses, with the tiny encoder."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.__main__ import main
from pipeline.benchmark import read_texts
from transforms.storage import create_exclusively

pytest_plugins = ["gcs_emulator"]


def test_a_second_run_is_measured_beside_the_first(tiny_checkpoint, capsys):
    given = ["--documents=400", f"--checkpoint={tiny_checkpoint}", "--device=cpu", "--dtype=float32"]
    assert main(["benchmark", "--incremental", *given]) == 0
    out = re.sub(r" of [0-9,]+ tokens$", "", capsys.readouterr().out, flags=re.MULTILINE)
    assert "400 documents; then 1.0% changed, 0.5% deleted, 0.5% new" in out
    assert "first: read 400, embedded 400, reused 0, deleted 0; the model saw 400 texts\n" in out
    assert "second: read 400, embedded 6, reused 394, deleted 2; the model saw 6 texts\n" in out
    assert "repeated: read 40, embedded 40, reused 0, deleted 0; the model saw 20 texts\n" in out
    assert re.search(r"^saving work in progress: \d+\.\d\d s of the first run, \d+\.\d\d%$", out, re.MULTILINE)
    phases = re.findall(r"^ +(\w+) +\d+\.\d+ +\d+\.\d+ +\d+\.\d\d%$", out, re.MULTILINE)
    assert phases == ["planning", "reading", "shuffling", "encoding", "writing", "all"]


def test_texts_are_spread_over_the_file_and_only_texts(tmp_path):
    values = [None, "", " ", 7, *(f"text {number}" for number in range(100))]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"body": value}) + "\n" for value in values))
    assert read_texts(str(path), "body", 4) == ["text 0", "text 25", "text 50", "text 75"]
    with pytest.raises(ValueError, match=r"corpus.jsonl has no text in 'text': .* --text_field"):
        read_texts(str(path), "text", 4)


def test_a_column_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"body": ["a", "b"]}), path)
    assert read_texts(str(path), "body", 9) == ["a", "b"]
    with pytest.raises(ValueError, match=r"corpus.parquet has no column 'text': .* --text_field"):
        read_texts(str(path), "text", 4)


def test_texts_come_from_gs_as_from_this_machine(gcs_bucket, tmp_path):
    pq.write_table(pa.table({"body": ["a", "b"]}), tmp_path / "corpus.parquet")
    (tmp_path / "corpus.jsonl").write_text('{"body": "c"}\n')
    for name, texts in {"corpus.parquet": ["a", "b"], "corpus.jsonl": ["c"]}.items():
        create_exclusively(f"{gcs_bucket}/{name}", (tmp_path / name).read_bytes())
        assert read_texts(f"{gcs_bucket}/{name}", "body", 9) == texts


@pytest.mark.parametrize("option", ["--limit=0", "--rounds=0", "--threads=-1", "--documents=10", "--documents=many"])
def test_numbers_of_nothing_are_refused(option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", option])
    assert ended.value.code == 2
    assert f"argument {option.partition('=')[0]}: " in capsys.readouterr().err
