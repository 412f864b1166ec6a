"""What `inspect` says of a snapshot, whole, damaged or compared with another."""

import datetime
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from snapshot_helper import FINGERPRINT, embedding, parquet_bytes, publish_rows, table, unit_vector

from pipeline import inspect
from pipeline.__main__ import main
from transforms.schema import Rejected

pytest_plugins = ["gcs_emulator"]

FIELDS = pa.schema([("lang", pa.string()), ("seen", pa.timestamp("s"))])
SEEN = datetime.datetime(2026, 11, 22, 18)
ROWS = [embedding(f"d{i}", "word " * (i + 1), lang="en", seen=SEEN) for i in range(20)]
REJECTED = [
    Rejected("a.txt", i, "", reason, "", "") for i, reason in enumerate(["empty_text", "empty_text", "too_large"])
]


@pytest.fixture(params=["local", "gs"])
def output(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "output")
    return request.getfixturevalue("gcs_bucket") + "/output"


@pytest.fixture
def local(tmp_path) -> str:
    return str(tmp_path / "output")


def run(capsys, *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def error_of(capsys, *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 1
    return capsys.readouterr().err


def test_a_snapshot_is_described_for_people(output, capsys):
    snapshot = publish_rows(output, ROWS, FIELDS, rejected=REJECTED)
    lines = [line.split() for line in run(capsys, output).splitlines()]
    for expected in (
        ["snapshot", snapshot.name],
        ["made", "from", "nothing"],
        ["took", "1.5", "seconds", "on", "FnApiRunner"],
        ["published", "1", "in", "this", "folder,", snapshot.name, "last"],
        ["in", snapshot.folder],
        ["fingerprint", FINGERPRINT],
        ["max_tokens", "8192"],
        ["read", "23"],
        ["embedded", "20"],
        ["tokens", "210"],
        ["too_large", "1", "the", "record", "is", "longer", "than", "the", "limit"],
        ["shards:", "5"],
        ["embeddings-00004-of-00005.parquet", "4", f"{snapshot.manifest['shards'][4]['bytes']:,}"],
        ["embedding", "fixed_size_list<element:", "float>[256]"],
        ["seen", "timestamp[ms]"],
        ["measured", "on", "20", "of", "20", "rows"],
        ["norms", "1.0000", "1.0000", "1.0000"],
        ["num_tokens", "1.0000", "10.5000", "20.0000"],
        ["first", "3", "rows"],
        ["id", "d2"],
        ["seen", "2026-11-22", "18:00:00.000"],
    ):
        assert expected in lines, expected
    assert ["id", "d3"] not in lines


def test_a_snapshot_is_described_as_json(output, capsys):
    first = publish_rows(output, ROWS[:1], FIELDS)
    snapshot = publish_rows(output, ROWS, FIELDS, rejected=REJECTED)
    described = json.loads(run(capsys, output, "--json", "--rows=1"))
    assert described.items() >= snapshot.manifest.items()
    assert described["folder"] == snapshot.folder
    assert described["published"] == [first.name, snapshot.name]
    assert described["metadata"] == {"encoder.fingerprint": FINGERPRINT}
    assert list(described["schema"]) == [*snapshot.schema().names]
    assert described["sampled_rows"] == 20
    assert described["num_tokens"] == {"min": 1, "mean": 10.5, "max": 20}
    assert described["norms"] == pytest.approx({"min": 1, "mean": 1, "max": 1}, abs=1e-6)
    assert described["rows"] == [
        {
            "id": "d0",
            "embedding": pytest.approx(ROWS[0].embedding.tolist()),
            "content_hash": ROWS[0].content_hash,
            "encoder": FINGERPRINT,
            "num_tokens": 1,
            "truncated": False,
            "lang": "en",
            "seen": "2026-11-22 18:00:00.000",
        }
    ]


def test_years_that_python_has_not_are_shown(local, capsys):
    publish_rows(local, [embedding("a", day=9_000_000)], pa.schema([("day", pa.date32())]))
    assert ["day", "26611-03-02"] in [line.split() for line in run(capsys, local).splitlines()]


def test_norms_are_measured_on_a_bounded_sample(local, monkeypatch):
    monkeypatch.setattr(inspect, "SAMPLED_SHARDS", 3)
    monkeypatch.setattr(inspect, "SAMPLED_ROWS_PER_SHARD", 2)
    rows = [row._replace(embedding=unit_vector(i) * np.float32(i + 1)) for i, row in enumerate(ROWS)]
    described = inspect.describe(publish_rows(local, rows, FIELDS), 0)
    # The first two rows of the first, the middle and the last of five shards of four.
    assert described["sampled_rows"] == 6
    assert described["norms"] == pytest.approx({"min": 1, "mean": (1 + 2 + 9 + 10 + 17 + 18) / 6, "max": 18}, abs=1e-4)
    assert described["num_tokens"] == {"min": 1, "mean": (1 + 2 + 9 + 10 + 17 + 18) / 6, "max": 18}
    assert described["rows"] == []


def test_many_shards_are_summed_up(local, capsys):
    publish_rows(local, ROWS, FIELDS, rows_per_shard=2)
    lines = [line.split() for line in run(capsys, local).splitlines()]
    assert ["shards:", "10"] in lines
    assert [line[:3] for line in lines if line[1:2] == ["more"]] == [["2", "more", "4"]]


def test_a_snapshot_without_rows_is_described(local, capsys):
    publish_rows(local, [], rejected=REJECTED)
    text = run(capsys, local)
    assert "shards: 0" in text
    assert "first" not in text
    described = json.loads(run(capsys, local, "--json"))
    assert (described["norms"], described["rows"], described["schema"]) == (None, [], {})


def test_an_older_snapshot_is_described_by_name(local, capsys):
    old = publish_rows(local, ROWS[:1], FIELDS)
    new = publish_rows(local, ROWS, FIELDS)
    assert json.loads(run(capsys, local, "--json", f"--snapshot={old.name}"))["snapshot"] == old.name
    error = error_of(capsys, local, "--snapshot=20000101T000000Z")
    assert f"no published snapshot '20000101T000000Z', but these: {old.name}, {new.name}" in error


def test_the_output_is_by_default_the_folder_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "output holds no snapshot yet: run `./launch.sh local --output output` first" in error_of(capsys)
    snapshot = publish_rows("output", ROWS, FIELDS)
    assert snapshot.name in run(capsys)


def test_a_whole_snapshot_passes_the_check(output, capsys):
    snapshot = publish_rows(output, ROWS, FIELDS, rejected=REJECTED)
    assert run(capsys, output, "--check") == f"{snapshot.folder} is whole: 5 shards, 20 rows\n"
    assert json.loads(run(capsys, output, "--check", "--json")) == {"snapshot": snapshot.name, "faults": []}


def test_the_check_lists_faults_and_fails(local, capsys):
    snapshot = publish_rows(local, ROWS, FIELDS, rows_per_shard=1)
    for path in snapshot.shard_paths[1:]:
        Path(path).unlink()
    assert main(["inspect", local, "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{snapshot.folder} has 19 faults:"
    assert lines[1:] == [f"  {path} is missing" for path in snapshot.shard_paths[1:]]
    for i in range(3):
        Path(snapshot.folder, f"stray-{i}.parquet").touch()
    assert main(["inspect", local, "--check"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "  and 2 more"
    assert main(["inspect", local, "--check", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 22


def test_two_snapshots_are_compared(output, capsys):
    old = publish_rows(output, ROWS[:15], FIELDS)
    changed = [ROWS[0]._replace(content_hash="0" * 64), ROWS[1]._replace(encoder="1" * 64)]
    refielded = [ROWS[2]._replace(fields={"lang": "de", "seen": SEEN})]
    new = publish_rows(output, [*changed, *refielded, *ROWS[3:14], *ROWS[15:20]], FIELDS)
    lines = [line.split() for line in run(capsys, output, "--diff", old.name, new.name).splitlines()]
    assert ["from", old.name, "to", new.name] in lines
    counts = {"added": 5, "deleted": 1, "changed": 1, "re_encoded": 1, "fields_changed": 1, "unchanged": 11}
    assert {line[0]: int(line[1]) for line in lines if len(line) > 2 and line[0] in counts} == counts
    assert ["deleted"] in lines
    assert ["d14"] in lines
    found = json.loads(run(capsys, output, "--json", "--diff", old.name, new.name))
    assert (found["before"], found["after"], found["counts"]) == (old.name, new.name, counts)
    assert found["examples"]["added"] == ["d15", "d16", "d17", "d18", "d19"]


def test_a_comparison_shows_only_some_ids(local, capsys):
    old, new = publish_rows(local, [], FIELDS), publish_rows(local, ROWS, FIELDS)
    lines = run(capsys, local, "--diff", old.name, new.name).splitlines()
    assert lines[-1] == "  and 10 more"
    assert "no published snapshot '20000101T000000Z'" in error_of(capsys, local, "--diff", old.name, "20000101T000000Z")


def test_a_damaged_snapshot_is_named(local, capsys):
    snapshot = publish_rows(local, ROWS, FIELDS)
    Path(snapshot.shard_paths[0]).unlink()
    assert "embeddings-00000-of-00005.parquet is missing: the snapshot is damaged" in error_of(capsys, local)


def test_a_footer_whose_texts_do_not_decode_is_named(local, capsys):
    path = Path(publish_rows(local, ROWS, FIELDS).shard_paths[0])
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[:footer] + data[footer:].replace(b"content_hash", b"content_has\xe8"))
    assert f"{path} is not Parquet ('utf-8' codec can't decode" in error_of(capsys, local)
    assert main(["inspect", local, "--check"]) == 1
    assert f"  {path} is not Parquet ('utf-8' codec" in capsys.readouterr().out


def test_a_footers_metadata_that_does_not_decode_is_shown(local, capsys):
    path = Path(publish_rows(local, ROWS[:1], FIELDS).shard_paths[0])
    damaged = table(ROWS[:1], FIELDS).replace_schema_metadata({b"encoder.\xff": b"\xfe"})
    path.write_bytes(parquet_bytes(damaged))
    assert json.loads(run(capsys, local, "--json"))["metadata"] == {"encoder.\ufffd": "\ufffd"}


def test_contradicting_and_mistyped_options_are_refused(local, capsys):
    for arguments in (["--check", "--diff", "a", "b"], ["--chek"], ["--diff", "a"]):
        with pytest.raises(SystemExit) as caught:
            main(["inspect", local, *arguments])
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["inspect", local, "--rows=-1"])
    assert caught.value.code == 2
    assert "argument --rows: '-1' is not a whole number of at least 0" in capsys.readouterr().err
