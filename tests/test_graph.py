"""The job's steps wired together: whatever happens to a record, it leaves exactly once."""

import json
from dataclasses import replace
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from job_runs import documents_of, make_job, published_rows, run_job

from pipeline import graph
from transforms import incremental, known_vectors, reconcile
from transforms.encoder import BertLstmEncoder
from transforms.known_vectors import read_work
from transforms.manifest import check_manifest
from transforms.schema import Document, Rejected, content_hash
from transforms.snapshots import list_work, read_latest, work_folder
from transforms.weights import load_tokenizer

RAISES, NAN, EMPTY = "write the red file", "blue blue blue", "\u200b"


@pytest.fixture
def culprits(monkeypatch, tiny_checkpoint):
    """Has the encoder raise an error at one text, and give NaN for another."""
    encode_tokens = BertLstmEncoder.encode_tokens
    tokenizer = BertLstmEncoder.from_pretrained(tiny_checkpoint).tokenizer
    raises, nan = (tokenized.token_ids.tolist() for tokenized in tokenizer.tokenize([RAISES, NAN]))

    def encode(self, token_ids, max_batch_tokens=None):
        texts = [ids.tolist() for ids in token_ids]
        if raises in texts:
            raise ValueError("cannot encode this")
        encoded = encode_tokens(self, token_ids, max_batch_tokens)
        encoded.vectors[[text == nan for text in texts]] = np.nan
        return encoded

    monkeypatch.setattr(BertLstmEncoder, "encode_tokens", encode)


def test_whatever_happens_to_a_record_it_leaves_exactly_once(tmp_path, monkeypatch, tiny_checkpoint, culprits):
    """Also where so many ids share a text that they wait for its vector in a shuffle."""
    monkeypatch.setattr(incremental, "_REFERENCES_WITH_TEXT", 3)
    texts = {f"good {number}": f"read file {number}" for number in range(10)}
    texts |= {f"shared {number}": "one text of many ids" for number in range(8)}
    texts |= {f"raises {number}": RAISES for number in range(7)}
    texts |= {f"nan {number}": NAN for number in range(2)} | {"empty": EMPTY}
    documents = documents_of(texts)
    documents += [document._replace(source="other.jsonl", text="loses") for document in documents[:3]]
    nameless = content_hash("no name")
    documents += [Document(nameless, "no name", "made.jsonl", 100 + number, {}, True) for number in range(4)]
    unreadable = [Rejected("broken.jsonl", line, "", "malformed_record", "no JSON", "{") for line in (1, 2)]

    manifest = run_job(make_job(str(tmp_path), tiny_checkpoint, documents, unreadable, rows_per_shard=4))

    check_manifest(manifest)
    reasons = {
        "malformed_record": 2,
        "duplicate_id": 3 + 3,
        "encode_error": 7,
        "non_finite": 2,
        "empty_text": 1,
    }
    assert manifest["rejected_by_reason"] == reasons
    expected = {"read": 37, "embedded": 19, "reused": 0, "rejected": 18, "repeated": 3, "texts_encoded": 12}
    assert {name: manifest["counts"][name] for name in expected} == expected
    assert expected["read"] == len(documents) + len(unreadable)

    rows = published_rows(str(tmp_path))
    assert set(rows) == {id_ for id_ in texts if id_.startswith(("good", "shared"))} | {nameless}
    assert len({row["embedding"] for id_, row in rows.items() if id_.startswith("shared")}) == 1
    assert all(shard["rows"] <= 4 for shard in manifest["shards"])

    files = sorted(Path(read_latest(str(tmp_path)).folder).glob("rejected-*.jsonl"))
    records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert sorted(record["id"] for record in records if record["reason"] == "encode_error") == [
        f"raises {number}" for number in range(7)
    ]
    (empty,) = [record for record in records if record["reason"] == "empty_text"]
    assert empty | {"detail": ""} == {
        "source": "made.jsonl",
        "position": 28,
        "id": "empty",
        "reason": "empty_text",
        "detail": "",
        "preview": EMPTY,
    }
    assert {record["detail"] for record in records if record["reason"] == "encode_error"} == {
        "ValueError: cannot encode this"
    }

    # Once more: what was rejected is tried again, what was embedded is not.
    again = run_job(make_job(str(tmp_path), tiny_checkpoint, documents, unreadable, rows_per_shard=4))
    assert again["rejected_by_reason"] == reasons
    expected |= {"embedded": 0, "reused": 19, "texts_encoded": 0}
    assert {name: again["counts"][name] for name in expected} == expected
    assert published_rows(str(tmp_path)) == rows


def test_too_much_that_cannot_be_encoded_is_not_published(tmp_path, tiny_checkpoint, culprits):
    documents = documents_of({"a": "read", "b": RAISES, "c": NAN})
    report = run_job(make_job(str(tmp_path), tiny_checkpoint, documents, max_rejected_fraction=0.5))
    assert report["not_published"] == [
        "2 of 3 records were rejected (66.67%), more than --max_rejected_fraction 0.5 allows"
    ]
    assert read_latest(str(tmp_path)) is None


def test_an_input_without_records_is_not_published_and_one_of_rejects_alone_is(tmp_path, tiny_checkpoint):
    report = run_job(make_job(str(tmp_path), tiny_checkpoint, []))
    assert report["not_published"] == ["the input holds no record at all"]
    manifest = run_job(make_job(str(tmp_path), tiny_checkpoint, documents_of({"a": EMPTY})))
    check_manifest(manifest)
    assert (manifest["shards"], manifest["rejected_by_reason"]) == ([], {"empty_text": 1})
    assert published_rows(str(tmp_path)) == {}


def test_a_run_that_dies_before_it_publishes_leaves_its_vectors_to_the_next(tmp_path, monkeypatch, tiny_checkpoint):
    documents = documents_of({f"id {number}": f"read file {number}" for number in range(12)})
    dying = make_job(str(tmp_path), tiny_checkpoint, documents)
    with monkeypatch.context() as dies:
        for name in ("_MIN_INTERVAL_SECONDS", "_MAX_INTERVAL_SECONDS"):
            dies.setattr(known_vectors, name, 0.0)
        dies.setattr(reconcile, "finish", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(Exception, match="no space left"):
            run_job(dying)
    assert read_latest(str(tmp_path)) is None
    assert list_work(str(tmp_path)) == [dying.run.name]
    tables = [
        read_work(str(path), dying.fingerprint)
        for path in Path(work_folder(str(tmp_path), dying.run.name)).glob("vectors-*")
    ]
    saved = pa.concat_tables([table for table in tables if table is not None])

    manifest = run_job(make_job(str(tmp_path), tiny_checkpoint, documents[:10]))

    expected = {"read": 10, "embedded": 0, "reused": 10, "recovered": 10, "texts_encoded": 0, "tokens": 0}
    assert {name: manifest["counts"][name] for name in expected} == expected
    rows = published_rows(str(tmp_path))
    vectors = dict(zip(saved["content_hash"].to_pylist(), saved["embedding"].to_pylist(), strict=True))
    assert len(vectors) == 12
    for row in rows.values():
        assert row["embedding"] == np.float32(vectors[row["content_hash"]]).tobytes()
    assert list_work(str(tmp_path)) == []


def test_the_handler_is_of_the_jobs_encoder_and_saves_into_the_runs_own_folder(tmp_path, tiny_checkpoint):
    job = make_job(str(tmp_path), tiny_checkpoint, [], max_tokens=7)
    handler = graph._handler(job)
    assert handler.load_model().fingerprint == job.fingerprint
    assert handler.load_model().encoder.max_tokens == 7
    assert handler.expected_tokenizer == (load_tokenizer(tiny_checkpoint).sha256(), 7)
    assert vars(handler._on_encoded)["_folder"] == work_folder(str(tmp_path), job.run.name)


@pytest.mark.parametrize(("runner", "step"), [("FlinkRunner", "WriteRows"), ("FnApiRunner", "WriteShard")])
def test_only_on_flink_rows_come_to_their_writers_one_by_one(tmp_path, tiny_checkpoint, runner, step):
    """For their shard's sake, by which an engine brings those together that go to a step with state."""
    job = make_job(str(tmp_path), tiny_checkpoint, documents_of({"a": "read"}))
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"]))
    graph.build(pipeline, replace(job, run=replace(job.run, runner=runner)))
    components = pipeline.to_runner_api().components
    for write in ("WriteEmbeddings", "WriteRejected"):
        names = {t.unique_name for t in components.transforms.values() if t.unique_name.startswith(f"{write}/")}
        assert (f"{write}/WriteShards/GroupByShard" in names) == (step == "WriteShard")
        [found] = [t for t in components.transforms.values() if t.unique_name == f"{write}/WriteShards/{step}"]
        payload = beam_runner_api_pb2.ParDoPayload.FromString(found.spec.payload)
        assert bool(payload.state_specs) == (step == "WriteRows")
        rows = components.pcollections[next(iter(found.inputs.values()))]
        assert components.coders[rows.coder_id].spec.urn == common_urns.coders.KV.urn
