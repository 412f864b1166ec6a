"""The closest rows are found, however the rows are laid out, and only by the encoder that made them."""

import json

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_tiny_encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_helper import embedding, publish_rows, unit_vector

from pipeline.__main__ import main
from pipeline.search import nearest, read_snapshot_of, shown_rows
from transforms import snapshots
from transforms.encoder import BertLstmEncoder

pytest_plugins = ["gcs_emulator"]

TEXTS = ["read a zip archive", "write lines to a file", "red green and blue", "fast and slow words", "the file is read"]
FIELDS = pa.schema([("kind", pa.string()), ("line", pa.int32())])


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint) -> BertLstmEncoder:
    return BertLstmEncoder.from_pretrained(tiny_checkpoint, max_tokens=100)


def publish_texts(output, encoder, texts=TEXTS):
    rows = [
        embedding(f"module.{i}", text, encoder.fingerprint(), vector, kind="function", line=10 * i)
        for i, (text, vector) in enumerate(zip(texts, encoder.encode(texts), strict=True))
    ]
    return publish_rows(
        output, rows, FIELDS, rows_per_shard=2, encoder=encoder.fingerprint(), max_tokens=encoder.max_tokens
    )


@pytest.mark.parametrize("where", ["local", "gs"])
def test_the_text_itself_is_found_first(request, tmp_path, encoder, tiny_checkpoint, capsys, where):
    output = str(tmp_path / "output") if where == "local" else request.getfixturevalue("gcs_bucket")
    publish_texts(output, encoder)
    assert main(["search", TEXTS[2], "--top=3", f"--output={output}", f"--checkpoint={tiny_checkpoint}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "score", "id", "kind", "line"]
    assert lines[1].split() == ["1", "1.0000", "module.2", "function", "20"]
    assert [line.split()[0] for line in lines[2:]] == ["2", "3"]


def test_json_holds_the_same_hits(tmp_path, encoder, tiny_checkpoint, capsys):
    snapshot = publish_texts(str(tmp_path), encoder)
    query = encoder.encode(["words of a file"])[0]
    arguments = ["search", "words of a file", "--json", f"--output={tmp_path}", f"--checkpoint={tiny_checkpoint}"]
    assert main(arguments) == 0
    hits = json.loads(capsys.readouterr().out)
    scores = encoder.encode(TEXTS) @ query
    order = np.argsort(-scores)
    assert [hit["id"] for hit in hits] == [f"module.{i}" for i in order]
    np.testing.assert_allclose([hit["score"] for hit in hits], scores[order], atol=1e-5)
    assert hits[0]["fields"] == {"kind": "function", "line": 10 * int(order[0])}
    assert [hit._asdict() for hit in nearest(snapshot, query, 2)] == [
        {**hit, "score": pytest.approx(hit["score"], abs=1e-6)} for hit in hits[:2]
    ]


def test_an_older_snapshot_can_be_searched(tmp_path, encoder, tiny_checkpoint, capsys):
    old = publish_texts(str(tmp_path), encoder)
    publish_texts(str(tmp_path), encoder, TEXTS[:1])
    arguments = ["search", TEXTS[4], "--top=1", f"--output={tmp_path}", f"--checkpoint={tiny_checkpoint}"]
    assert main([*arguments, f"--snapshot={old.name}"]) == 0
    assert "module.4" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "module.0" in capsys.readouterr().out


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seeds=st.lists(st.integers(0, 12), max_size=40),
    top=st.integers(1, 12),
    rows_per_shard=st.integers(1, 9),
    batch_rows=st.integers(1, 9),
)
def test_hits_are_those_of_a_full_sort(tmp_path_factory, monkeypatch, seeds, top, rows_per_shard, batch_rows):
    read_shard = snapshots.read_shard
    monkeypatch.setattr(
        snapshots, "read_shard", lambda path, columns, _, rows: read_shard(path, columns, batch_rows, rows)
    )
    rows = [embedding(f"{i:02}", vector=unit_vector(seed)) for i, seed in enumerate(seeds)]  # Many are the same.
    snapshot = publish_rows(str(tmp_path_factory.mktemp("search")), rows, rows_per_shard=rows_per_shard)
    query = unit_vector(99)
    hits = nearest(snapshot, query, top)
    # Equal vectors can differ in the last bit, by the size of the product they are part of.
    scores = {row.id: round(float(row.embedding.astype(float) @ query), 5) for row in rows}
    assert [round(hit.score, 5) for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True)[:top], abs=2e-5)
    assert len({hit.id for hit in hits}) == len(hits)
    assert all(hit.score == pytest.approx(scores[hit.id], abs=2e-5) for hit in hits)


def test_equally_close_rows_are_ordered_by_id(tmp_path):
    rows = [embedding(row_id, vector=unit_vector(1)) for row_id in "hgfedcba"]
    snapshot = publish_rows(str(tmp_path), rows, rows_per_shard=8)
    assert [hit.id for hit in nearest(snapshot, unit_vector(1), 3)] == ["a", "b", "c"]


DATES = {
    pa.date32(): (9_000_000, "26611-03-02"),
    pa.timestamp("us"): (253_402_300_800_000_001, "10000-01-01 00:00:00.000001"),
    pa.timestamp("ns"): (1, "1970-01-01 00:00:00.000000001"),
    pa.timestamp("ms", tz="UTC"): (1500, "1970-01-01 00:00:01.500Z"),
    pa.timestamp("ms", tz="Nowhere/Land"): (1500, 1500),
    pa.time64("ns"): (1, "00:00:00.000000001"),
    pa.duration("ns"): (1500, 1500),
    pa.list_(pa.timestamp("ns")): ([1, None], ["1970-01-01 00:00:00.000000001", None]),
    pa.struct([("day", pa.date32())]): ({"day": 9_000_000}, {"day": "26611-03-02"}),
    pa.large_list(pa.date32()): ([9_000_000], [9_000_000]),
    pa.string(): ("as it is", "as it is"),
}


@pytest.mark.parametrize(("type_", "value", "shown"), [(type_, *values) for type_, values in DATES.items()])
def test_dates_and_times_that_python_has_not_are_shown(tmp_path, type_, value, shown):
    kept = pa.schema([("kept", type_)])
    rows = [embedding("a", kept=value), embedding("b", kept=None)]
    snapshot = publish_rows(str(tmp_path), rows, kept)
    hits = nearest(snapshot, unit_vector(1), 2)
    assert {hit.id: hit.fields for hit in hits} == {"a": {"kept": shown}, "b": {"kept": None}}
    [(_, batch)] = snapshot.record_batches(["id", "kept"])
    assert shown_rows(batch) == [{"id": "a", "kept": shown}, {"id": "b", "kept": None}]


def test_an_empty_snapshot_has_no_hits(tmp_path, encoder, tiny_checkpoint, capsys):
    publish_texts(str(tmp_path), encoder, [])
    assert main(["search", "words", f"--output={tmp_path}", f"--checkpoint={tiny_checkpoint}"]) == 0
    assert capsys.readouterr().out.split() == ["rank", "score", "id"]


def error_of(capsys, *arguments: str) -> str:
    assert main(["search", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_another_encoder_is_refused_and_both_are_named(tmp_path, encoder, tiny_checkpoint, capsys):
    publish_texts(str(tmp_path / "output"), encoder)
    other = make_tiny_encoder(seed=1)
    other.save_pretrained(tmp_path / "other")
    arguments = ["words", f"--output={tmp_path / 'output'}", f"--checkpoint={tmp_path / 'other'}"]
    error = error_of(capsys, *arguments)
    fingerprint = BertLstmEncoder.from_pretrained(tmp_path / "other", max_tokens=100).fingerprint()
    assert f"made by encoder {encoder.fingerprint()} (checkpoint default)" in error
    assert f"checkpoint {tmp_path / 'other'} is encoder {fingerprint}" in error


def test_an_output_without_snapshots_says_what_to_run(tmp_path, capsys):
    error = error_of(capsys, "words", f"--output={tmp_path / 'nothing'}")
    assert f"holds no snapshot yet: run `./launch.sh local --output {tmp_path / 'nothing'}` first" in error


def test_a_damaged_snapshot_is_named(tmp_path, capsys):
    snapshot = publish_rows(str(tmp_path), [embedding("a")])
    (tmp_path / f"snapshot={snapshot.name}" / "manifest.json").unlink()
    assert "manifest.json is missing: the snapshot is damaged" in error_of(capsys, "words", f"--output={tmp_path}")


def test_empty_queries_and_numbers_of_hits_that_cannot_be_are_refused(tmp_path, encoder, tiny_checkpoint, capsys):
    publish_texts(str(tmp_path), encoder)
    assert "the query is empty" in error_of(capsys, "  ", f"--output={tmp_path}")
    with pytest.raises(SystemExit) as caught:
        main(["search", "words", "--top=0", f"--output={tmp_path}"])
    assert caught.value.code == 2
    assert "argument --top: '0' is not a whole number of at least 1" in capsys.readouterr().err


def test_a_snapshot_can_be_named_as_its_folder_is(tmp_path, encoder, monkeypatch):
    name = publish_texts(str(tmp_path), encoder).name
    other = publish_texts(str(tmp_path), encoder).name
    monkeypatch.chdir(tmp_path)
    for output, named in (
        (str(tmp_path), name),
        (str(tmp_path), f"snapshot={name}"),
        (f"{tmp_path}/snapshot={name}", None),
        (f"{tmp_path}/snapshot={name}/", None),
        (f"snapshot={name}", None),
        (f"{tmp_path}/snapshot={other}", name),
    ):
        assert read_snapshot_of(output, named).name == name


def test_mistyped_options_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["search", "words", "--topp=3"])
    assert caught.value.code == 2
    assert "--topp" in capsys.readouterr().err
