"""The job as a whole, run after run, on documents made in code; `test_end_to_end` goes through files and commands."""

from collections.abc import Sequence

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline as Pipeline
from apache_beam.testing.util import assert_that, equal_to
from job_runs import documents_of, make_job, published_rows, run_job
from test_inference import tokenized_documents

from transforms import incremental
from transforms.encoder import BertLstmEncoder
from transforms.incremental import (
    PREVIOUS,
    HandOutVectors,
    KnownVector,
    MatchTexts,
    Reference,
    ResolveIds,
    SplitOffTexts,
    TextToEncode,
    Unusable,
    pack,
    unpack,
    waiting_references,
)
from transforms.known_vectors import write_work
from transforms.loaded_encoder import LoadedEncoder
from transforms.publish import abandon
from transforms.schema import Document, content_hash
from transforms.snapshots import list_work, work_folder

VECTOR = KnownVector(np.full(256, 1 / 16, dtype=np.float32).tobytes(), "f" * 64, 2, False, "reused")


def reference(id_: str, text: str, source: str = "a.jsonl", position: int = 1, id_is_hash: bool = False) -> Reference:
    return Reference(id_, source, position, {}, id_is_hash, content_hash(text), text)


def pipeline() -> Pipeline:
    return Pipeline(options=PipelineOptions(["--runner=FnApiRunner"]))


# One per id.


def resolve(values: Sequence[tuple[str, Reference | None]], **expected):
    packed = [(id_, PREVIOUS if value is None else pack(value)) for id_, value in values]
    with pipeline() as p:
        winners, rejected, repeated, deleted = p | beam.Create(packed) | ResolveIds()
        assert_that(
            winners | "w" >> beam.Values() | beam.Map(unpack), equal_to(expected.get("winners", [])), label="winners"
        )
        summary = rejected | beam.Map(lambda one: (one.id, one.source, one.position, one.reason))
        assert_that(summary, equal_to(expected.get("rejected", [])), label="rejected")
        assert_that(repeated, equal_to(expected.get("repeated", [])), label="repeated")
        assert_that(deleted, equal_to(expected.get("deleted", [])), label="deleted")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_of_one_id_the_first_by_source_and_position_wins_in_any_order(order):
    candidates = [reference("x", "one", "a", 2), reference("x", "two", "a", 10), reference("x", "three", "b", 1)]
    resolve(
        [("x", candidates[place]) for place in order],
        winners=[candidates[0]],
        rejected=[("x", "a", 10, "duplicate_id"), ("x", "b", 1, "duplicate_id")],
    )


def test_an_id_without_a_document_is_deleted_and_one_with_both_is_not():
    kept = reference("kept", "text")
    resolve(
        [("gone", PREVIOUS), ("kept", PREVIOUS), ("kept", kept), ("new", reference("new", "text"))],
        winners=[kept, reference("new", "text")],
        deleted=["gone"],
    )


def test_a_repeated_text_without_an_id_is_told_apart():
    first, second = (reference("h", "text", "a", line, id_is_hash=True) for line in (1, 2))
    resolve([("h", second), ("h", first)], winners=[first], rejected=[("h", "a", 2, "duplicate_id")], repeated=["h"])


def test_a_bundle_sends_equal_texts_once():
    documents = [Document(str(number), f"text {number % 3}") for number in range(30)]
    with pipeline() as p:
        references, texts = p | beam.Create(documents, reshuffle=False) | SplitOffTexts()
        assert_that(references | beam.Keys(), equal_to([str(number) for number in range(30)]), label="references")
        assert_that(texts, equal_to([(content_hash(f"text {k}"), f"text {k}") for k in range(3)]), label="texts")


# One per text.


def match(values, rows, texts, waiting=(), known_tokens=0):
    with pipeline() as p:
        packed = [(text_hash, value if isinstance(value, str) else pack(value)) for text_hash, value in values]
        found_rows, found_texts, found_waiting, tallies = p | beam.Create(packed) | MatchTexts()
        described = found_rows | "d" >> beam.Map(lambda row: (row[0], row[-1], row[1]))
        assert_that(described, equal_to(rows), label="rows")
        counted = found_texts | beam.Map(lambda one: (one.text, len(one.references), one.has_more))
        assert_that(counted, equal_to(texts), label="texts")
        sums = tallies | beam.CombinePerKey(sum)
        assert_that(sums, equal_to([("known_tokens", known_tokens)]), label="known tokens")
        assert_that(found_waiting | beam.Map(lambda one: one[0]), equal_to(list(waiting)), label="waiting")


def test_known_texts_become_rows_and_unknown_ones_are_encoded_once():
    known, new = content_hash("known"), content_hash("new")
    match(
        [
            (known, "known"), (known, reference("a", "known")), (known, reference("b", "known")), (known, VECTOR),
            (new, "new"), (new, "new"), (new, reference("c", "new")), (new, reference("d", "new")),
        ],
        rows=[("a", "reused", VECTOR.vector), ("b", "reused", VECTOR.vector)],
        texts=[("new", 2, False)],
        known_tokens=4,  # With [CLS] and [SEP]; not 8, since the text of two ids would have been encoded once.
    )  # fmt: skip


def test_a_text_that_no_document_holds_any_more_is_not_encoded():
    lost = content_hash("lost")
    match([(lost, "lost"), (content_hash("old"), VECTOR)], rows=[], texts=[])


def test_the_last_snapshots_vector_comes_before_a_crashed_runs():
    recovered = VECTOR._replace(vector=bytes(1024), origin="recovered")
    text_hash = content_hash("t")
    match(
        [(text_hash, recovered), (text_hash, VECTOR), (text_hash, reference("a", "t")), (text_hash, "t")],
        rows=[("a", "reused", VECTOR.vector)],
        texts=[],
        known_tokens=4,
    )


def test_a_text_of_very_many_ids_streams_through(monkeypatch):
    """A hot key: only the first references travel with the text, the others wait for its vector."""
    monkeypatch.setattr(incremental, "_REFERENCES_WITH_TEXT", 10)
    text_hash = content_hash("hot")
    references = [(text_hash, reference(f"id{number}", "hot", position=number)) for number in range(25)]
    match([(text_hash, "hot"), *references], rows=[], texts=[("hot", 10, True)], waiting=[text_hash] * 15)
    match(
        [(text_hash, "hot"), (text_hash, VECTOR), *references],
        rows=[(f"id{number}", "reused", VECTOR.vector) for number in range(25)],
        texts=[],
        known_tokens=4,
    )


@pytest.mark.parametrize("outcome", [VECTOR, Unusable("encode_error", "why")])
def test_every_reference_gets_the_outcome_of_its_text(outcome):
    references = [reference(f"id{number}", "hot", position=number) for number in range(25)]
    text = TextToEncode("", references[:10], True)
    with pipeline() as p:
        outcomes = p | "o" >> beam.Create([(waiting_references(text), pack(outcome))])
        waiting = p | "w" >> beam.Create([(content_hash("hot"), pack(one)) for one in references[10:]])
        rows, rejected = (outcomes, waiting) | HandOutVectors()
        ids = [one.id for one in references]
        usable = isinstance(outcome, KnownVector)
        assert_that(rows | beam.Map(lambda row: row[0]), equal_to(ids if usable else []), label="rows")
        reasons = rejected | beam.Map(lambda one: (one.id, one.reason, one.detail))
        assert_that(reasons, equal_to([] if usable else [(id_, *outcome) for id_ in ids]), label="rejected")


# Run after run.


def counts(manifest) -> dict[str, int]:
    names = ("read", "embedded", "reused", "recovered", "rejected", "deleted", "texts_encoded")
    return {name: value for name in names if (value := manifest["counts"][name])}


def test_only_what_changed_is_encoded_and_the_rest_is_carried_forward_bit_for_bit(tmp_path, tiny_checkpoint):
    output = str(tmp_path)
    kept = pa.schema([("year", pa.int64())])
    texts = {f"id{number}": f"read file {number % 15}" for number in range(20)}  # Five texts are there twice.
    first = run_job(make_job(output, tiny_checkpoint, documents_of(texts, year=1), kept_fields=kept))
    assert counts(first) == {"read": 20, "embedded": 20, "texts_encoded": 15}
    before = published_rows(output)

    texts = {"renamed": texts.pop("id0"), **texts}  # The id is new, the text is known.
    texts["id1"] = "changed"
    del texts["id2"], texts["id17"]  # Their text goes with them.
    texts["new"] = "a new text"
    second = run_job(make_job(output, tiny_checkpoint, documents_of(texts, year=2), kept_fields=kept))
    assert counts(second) == {"read": 19, "embedded": 2, "reused": 17, "deleted": 3, "texts_encoded": 2}
    after = published_rows(output)
    assert set(after) == set(texts)
    assert {row["year"] for row in after.values()} == {2}
    assert after["renamed"]["embedding"] == before["id0"]["embedding"]
    for id_ in set(texts) - {"renamed", "id1", "new"}:
        assert after[id_] == before[id_] | {"year": 2}
    assert second["previous"] == first["snapshot"]
    assert second["seconds_saved"] > 0


def test_a_second_run_over_the_same_corpus_changes_nothing(tmp_path, tiny_checkpoint):
    documents = documents_of({"a": "read", "b": "write", "c": ""})
    run_job(make_job(str(tmp_path), tiny_checkpoint, documents))
    before = published_rows(str(tmp_path))
    manifest = run_job(make_job(str(tmp_path), tiny_checkpoint, documents))
    assert counts(manifest) == {"read": 3, "reused": 2, "rejected": 1}
    assert published_rows(str(tmp_path)) == before


def test_a_run_that_encodes_nothing_saves_the_tokens_that_the_run_before_it_encoded(tmp_path, tiny_checkpoint):
    documents = documents_of({f"id{number}": "read file " * number for number in range(1, 9)})
    first = run_job(make_job(str(tmp_path), tiny_checkpoint, documents))
    second = run_job(make_job(str(tmp_path), tiny_checkpoint, documents, seconds_per_token=1.0))
    assert second["seconds_saved"] == first["counts"]["tokens"] == sum(2 * number + 2 for number in range(1, 9))


def test_another_encoder_encodes_everything_anew(tmp_path, tiny_checkpoint):
    documents = documents_of({"a": "read a file " * 5, "b": "write"})
    run_job(make_job(str(tmp_path), tiny_checkpoint, documents))
    manifest = run_job(make_job(str(tmp_path), tiny_checkpoint, documents, max_tokens=3))
    assert counts(manifest) == {"read": 2, "embedded": 2, "texts_encoded": 2}
    assert {id_: row["truncated"] for id_, row in published_rows(str(tmp_path)).items()} == {"a": True, "b": False}


def test_full_ignores_the_past_but_knows_what_was_deleted(tmp_path, tiny_checkpoint):
    documents = documents_of({"a": "read", "b": "write"})
    run_job(make_job(str(tmp_path), tiny_checkpoint, documents))
    manifest = run_job(make_job(str(tmp_path), tiny_checkpoint, documents[:1], full=True))
    assert counts(manifest) == {"read": 1, "embedded": 1, "deleted": 1, "texts_encoded": 1}
    assert manifest["seconds_saved"] == 0


def test_a_text_that_cannot_be_encoded_is_rejected_for_each_of_its_ids(tmp_path, tiny_checkpoint):
    documents = documents_of({"a": "\u200b", "b": "read", "c": "\u200b"})
    manifest = run_job(make_job(str(tmp_path), tiny_checkpoint, documents))
    assert counts(manifest) == {"read": 3, "embedded": 1, "rejected": 2, "texts_encoded": 1}
    assert manifest["rejected_by_reason"] == {"empty_text": 2}


def test_work_of_a_run_that_died_is_taken_up_and_then_removed(tmp_path, tiny_checkpoint):
    """The first run saves its vectors and dies before writing; what a worker had not saved is encoded anew."""
    documents = documents_of({f"id{number}": f"read file {number}" for number in range(10)})
    dead = make_job(str(tmp_path), tiny_checkpoint, documents)
    encoder = BertLstmEncoder.from_pretrained(tiny_checkpoint)
    loaded = LoadedEncoder(encoder, 2048)
    texts = [document.text for document in documents]
    encoded = loaded.encode_documents(tokenized_documents(encoder, texts))
    folder = work_folder(str(tmp_path), dead.run.name)
    whole = write_work(folder, loaded.fingerprint, encoded[:6])
    torn = write_work(folder, loaded.fingerprint, encoded[6:8])
    with open(torn, "r+b") as file:
        file.truncate(1000)
    write_work(folder, "0" * 64, encoded[8:])  # Of another encoder.
    assert whole != torn
    abandon(str(tmp_path), dead.run.name)

    manifest = run_job(make_job(str(tmp_path), tiny_checkpoint, documents))
    assert counts(manifest) == {"read": 10, "embedded": 4, "reused": 6, "recovered": 6, "texts_encoded": 4}
    rows = published_rows(str(tmp_path))
    for one, id_ in zip(encoded[:6], rows, strict=False):
        assert rows[f"id{one.document.id}"]["embedding"] == one.vector.tobytes(), id_
    assert list_work(str(tmp_path)) == []
