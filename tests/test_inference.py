import pickle
import re
import shutil

import apache_beam as beam
import numpy as np
import pytest
import torch
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that
from conftest import make_tiny_encoder

from transforms import inference
from transforms.encoder import BertLstmEncoder, load_tokenizer
from transforms.inference import (
    EmbedDocuments,
    Encoded,
    EncodeDocuments,
    EncoderModelHandler,
    Failed,
    LoadedEncoder,
    TokenizedDocument,
    check_agreement,
)
from transforms.schema import Document, content_hash

TEXTS = ["read the zip archive", "a", "the lines of a file. " * 60, "fast", "slow blue", "", "green " * 30]


def tokenized_documents(encoder: BertLstmEncoder, texts: list[str]) -> list[TokenizedDocument]:
    return [
        TokenizedDocument(Document(str(place), text), content_hash(text), tokenized.token_ids, tokenized.truncated)
        for place, (text, tokenized) in enumerate(zip(texts, encoder.tokenizer.tokenize(texts), strict=True))
    ]


@pytest.fixture
def loaded(tiny_encoder) -> LoadedEncoder:
    return LoadedEncoder(tiny_encoder, max_batch_tokens=2048)


def fail_on(encoder: BertLstmEncoder, monkeypatch, is_culprit, error: Exception) -> list[int]:
    """Has encoding raise an error where a group has a text that `is_culprit` picks by its number of tokens."""
    group_sizes = []
    encode_tokens = encoder.encode_tokens

    def failing(token_ids, max_batch_tokens=None):
        group_sizes.append(len(token_ids))
        if any(is_culprit(len(ids), max_batch_tokens) for ids in token_ids):
            raise error
        return encode_tokens(token_ids, max_batch_tokens)

    monkeypatch.setattr(encoder, "encode_tokens", failing)
    return group_sizes


# The loaded encoder.


def test_results_come_in_the_order_of_the_documents_with_the_encoders_vectors(loaded):
    documents = tokenized_documents(loaded.encoder, TEXTS)
    results = loaded.encode_documents(documents)
    assert [result.document for result in results] == [document.document for document in documents]
    np.testing.assert_allclose([result.vector for result in results], loaded.encoder.encode(TEXTS), atol=1e-5)
    assert {result.encoder for result in results} == {loaded.encoder.fingerprint()}
    assert [result.num_tokens for result in results] == [len(document.token_ids) for document in documents]
    assert {result.device for result in results} == {"cpu float32"}
    assert all(result.encode_seconds > 0 for result in results)


def test_no_documents_give_no_results(loaded):
    assert loaded.encode_documents([]) == []


def test_the_one_text_that_raises_an_error_alone_fails(loaded, monkeypatch):
    documents = tokenized_documents(loaded.encoder, TEXTS)
    culprit = len(documents[4].token_ids)
    fail_on(loaded.encoder, monkeypatch, lambda length, _: length == culprit, ValueError("no such thing"))
    results = loaded.encode_documents(documents)
    assert [isinstance(result, Failed) for result in results] == [place == 4 for place in range(len(TEXTS))]
    assert results[4] == Failed(
        documents[4].document, documents[4].content_hash, "encode_error", "ValueError: no such thing"
    )


def test_an_encoder_that_encodes_nothing_any_more_is_an_error_of_the_job(loaded, monkeypatch):
    fail_on(loaded.encoder, monkeypatch, lambda *_: True, RuntimeError("device lost"))
    with pytest.raises(RuntimeError, match="no longer encodes any text: device lost"):
        loaded.encode_documents(tokenized_documents(loaded.encoder, TEXTS))


def test_out_of_memory_halves_the_batch_for_good_and_loses_nothing(loaded, monkeypatch):
    group_sizes = fail_on(
        loaded.encoder, monkeypatch, lambda _, max_batch_tokens: max_batch_tokens > 600, torch.OutOfMemoryError("full")
    )
    results = loaded.encode_documents(tokenized_documents(loaded.encoder, TEXTS))
    assert all(isinstance(result, Encoded) for result in results)
    assert loaded.max_batch_tokens == 512
    assert len(group_sizes) == 3  # 2048 and 1024 failed.
    loaded.encode_documents(tokenized_documents(loaded.encoder, TEXTS))
    assert len(group_sizes) == 4


def test_a_text_that_never_fits_the_memory_alone_fails(loaded, monkeypatch):
    documents = tokenized_documents(loaded.encoder, TEXTS)
    longest = max(len(document.token_ids) for document in documents)
    fail_on(
        loaded.encoder, monkeypatch, lambda length, _: length == longest, torch.OutOfMemoryError("CUDA out of memory")
    )
    results = loaded.encode_documents(documents)
    assert [result.reason for result in results if isinstance(result, Failed)] == ["encode_error"]
    assert isinstance(results[2], Failed)
    assert "CUDA out of memory" in results[2].detail
    assert loaded.max_batch_tokens == 2048  # Smaller batches did not help it, and would slow all others down.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_vectors_that_are_not_finite_and_of_unit_length_fail(loaded, monkeypatch, value):
    encode_tokens = loaded.encoder.encode_tokens

    def poisoned(token_ids, max_batch_tokens=None):
        encoded = encode_tokens(token_ids, max_batch_tokens)
        for row, ids in enumerate(token_ids):
            if len(ids) == 30:
                encoded.vectors[row] = value
        return encoded

    monkeypatch.setattr(loaded.encoder, "encode_tokens", poisoned)
    results = loaded.encode_documents(tokenized_documents(loaded.encoder, TEXTS))
    assert [place for place, result in enumerate(results) if isinstance(result, Failed)] == [6]
    assert results[6].reason == "non_finite"


def test_nan_weights_poison_only_their_own_texts(loaded):
    """A NaN in the embedding of one word: the texts without it are as they were, in the same batch."""
    before = loaded.encode_documents(tokenized_documents(loaded.encoder, TEXTS))
    zip_id = loaded.encoder.tokenizer.tokenize(["zip"])[0].token_ids[0]
    with torch.no_grad():
        loaded.encoder.bert.embeddings.word_embeddings.weight[zip_id] = float("nan")
    after = loaded.encode_documents(tokenized_documents(loaded.encoder, TEXTS))
    assert [isinstance(result, Failed) for result in after] == [True] + [False] * 6
    np.testing.assert_array_equal([one.vector for one in before[1:]], [one.vector for one in after[1:]])


def test_results_are_handed_to_the_saver_group_by_group(loaded):
    saved: list[Encoded] = []
    documents = tokenized_documents(loaded.encoder, TEXTS)
    results = loaded.encode_documents(documents, saved.extend)
    assert sorted(one.document.id for one in saved) == sorted(one.document.id for one in results)


# Loading.


def test_the_check_at_load_accepts_bfloat16_and_refuses_a_broken_encoder(tiny_encoder):
    reference = np.concatenate([tiny_encoder.encode([text]) for text in inference._REFERENCE_TEXTS])
    check_agreement(tiny_encoder, reference, 64)
    check_agreement(tiny_encoder.on("cpu", torch.bfloat16), reference, 2048)
    with pytest.raises(RuntimeError, match="the worst cosine over 7 reference texts"):
        check_agreement(make_tiny_encoder(seed=5), reference, 2048)
    with torch.no_grad():
        tiny_encoder.lstm.bias_hh_l0[:] = float("nan")
    with pytest.raises(RuntimeError, match="the worst cosine over 7 reference texts is nan"):
        check_agreement(tiny_encoder, reference, 2048)


def test_the_handler_loads_and_survives_pickling(tiny_checkpoint):
    handler = pickle.loads(pickle.dumps(EncoderModelHandler(tiny_checkpoint, device="cpu", dtype="float32")))
    loaded = handler.load_model()
    assert loaded.fingerprint == BertLstmEncoder.from_pretrained(tiny_checkpoint).fingerprint()
    documents = tokenized_documents(loaded.encoder, TEXTS)
    assert [type(result) for result in handler.run_inference(documents, loaded)] == [Encoded] * len(TEXTS)
    assert handler.get_num_bytes(documents) == 4 * sum(len(document.token_ids) for document in documents)


def test_another_checkpoint_on_a_worker_is_refused(tiny_checkpoint):
    handler = EncoderModelHandler(tiny_checkpoint, dtype="float32", expected_fingerprint="0" * 64)
    with pytest.raises(RuntimeError, match="the job was started with 0000"):
        handler.load_model()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_is_refused_where_there_is_none(tiny_checkpoint):
    with pytest.raises(RuntimeError, match=r"cuda was asked for, but .* has no usable GPU"):
        EncoderModelHandler(tiny_checkpoint, device="cuda").load_model()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device 'tpu' is none of auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype 'int8' is none of auto, float32, bfloat16, float16"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1, not 0"),
        ({"max_tokens": -1}, "max_tokens must be at least 1, not -1"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        EncoderModelHandler(**arguments)


def test_inference_arguments_are_refused(loaded):
    with pytest.raises(ValueError, match="takes no inference_args"):
        EncoderModelHandler().run_inference([], loaded, {"temperature": 1})


# In a pipeline.


def run_pipeline() -> TestPipeline:
    return TestPipeline(options=PipelineOptions(["--runner=FnApiRunner"]))


def test_run_inference_gives_one_result_for_each_document(tiny_checkpoint, loaded):
    documents = tokenized_documents(loaded.encoder, TEXTS * 20)
    handler = EncoderModelHandler(tiny_checkpoint, device="cpu", dtype="float32", batch_tokens=200)
    with run_pipeline() as pipeline:
        encoded = pipeline | beam.Create(documents) | RunInference(handler) | beam.Map(lambda one: one.content_hash)

        def check(hashes):
            assert sorted(hashes) == sorted(document.content_hash for document in documents)

        assert_that(encoded, check)


def test_embed_documents_embeds_or_rejects_each_document_once(tiny_checkpoint):
    expected = BertLstmEncoder.from_pretrained(tiny_checkpoint).encode(TEXTS)
    documents = [Document(str(place), text, "made", place, {"year": 2000 + place}) for place, text in enumerate(TEXTS)]
    unusable = [
        Document("none", None, "made", 90),
        Document("number", 5, "made", 91),
        Document("surrogate", "a \ud800", "made", 92),
        Document("id \ud800", "zip", "made", 93),
        Document("field", "zip", "made", 94, {"tags": ["a", {"b": "\ud800"}]}),
    ]
    with run_pipeline() as pipeline:
        embeddings, rejected = (
            pipeline
            | beam.Create([*documents, *unusable])
            | EmbedDocuments(checkpoint=tiny_checkpoint, device="cpu", dtype="float32")
        )

        def check_embeddings(rows):
            rows = sorted(rows, key=lambda row: int(row.id))
            kept = [place for place, text in enumerate(TEXTS) if text]
            assert [(row.id, row.fields) for row in rows] == [(str(k), {"year": 2000 + k}) for k in kept]
            assert [row.content_hash for row in rows] == [content_hash(TEXTS[k]) for k in kept]
            np.testing.assert_allclose([row.embedding for row in rows], expected[kept], atol=1e-5)

        def check_rejected(rows):
            assert sorted((row.id, row.reason, row.source, row.position) for row in rows) == [
                ("5", "empty_text", "made", 5),
                ("field", "invalid_utf8", "made", 94),
                ("id ?", "invalid_utf8", "made", 93),
                ("none", "missing_text", "made", 90),
                ("number", "wrong_type", "made", 91),
                ("surrogate", "invalid_utf8", "made", 92),
            ]

        assert_that(embeddings, check_embeddings, label="embeddings")
        assert_that(rejected, check_rejected, label="rejected")


@pytest.mark.parametrize("other", ["vocabulary", "max_tokens"])
def test_another_tokenizer_on_a_worker_is_refused(tiny_checkpoint, tmp_path, other):
    expected = load_tokenizer(tiny_checkpoint)
    checkpoint = tmp_path / "on the worker"
    shutil.copytree(tiny_checkpoint, checkpoint)
    path = checkpoint / ("config.json" if other == "max_tokens" else "bert/tokenizer.json")
    text = path.read_text()
    swapped = re.sub(r'("max_tokens": )\d+', r"\g<1>9", text) if other == "max_tokens" else text.replace("zip", "zap")
    assert swapped != text
    path.write_text(swapped)
    handler = EncoderModelHandler(str(checkpoint), expected_tokenizer=(expected.sha256(), expected.max_tokens))
    with (
        pytest.raises(RuntimeError, match=r"on the worker' on this worker has the tokenizer .*the same release"),
        run_pipeline() as pipeline,
    ):
        pipeline | beam.Create([Document("1", "zip")]) | EncodeDocuments(handler, str(checkpoint))


@pytest.mark.gpu
def test_a_full_gpu_halves_the_batch_and_loses_nothing():
    loaded = EncoderModelHandler("default", device="cuda", max_batch_tokens=2**24).load_model()
    free_bytes, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(int(free_bytes * 0.9), dtype=torch.uint8, device="cuda")
    documents = tokenized_documents(loaded.encoder, [f"text {number} " * 200 for number in range(20_000)])
    results = loaded.encode_documents(documents)
    assert all(isinstance(result, Encoded) for result in results)
    assert loaded.max_batch_tokens < 2**24
    del ballast
