import numpy as np
import pytest
import torch
from conftest import make_tiny_encoder
from tokenized_texts import TEXTS, tokenized_documents

from transforms.encoder import BertLstmEncoder
from transforms.inference import EncoderModelHandler
from transforms.loaded_encoder import REFERENCE_TEXTS, Encoded, Failed, LoadedEncoder, check_agreement


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
    reference = np.concatenate([tiny_encoder.encode([text]) for text in REFERENCE_TEXTS])
    check_agreement(tiny_encoder, reference, 64)
    check_agreement(tiny_encoder.on("cpu", torch.bfloat16), reference, 2048)
    with pytest.raises(RuntimeError, match="the worst cosine over 7 reference texts"):
        check_agreement(make_tiny_encoder(seed=5), reference, 2048)
    with torch.no_grad():
        tiny_encoder.lstm.bias_hh_l0[:] = float("nan")
    with pytest.raises(RuntimeError, match="the worst cosine over 7 reference texts is nan"):
        check_agreement(tiny_encoder, reference, 2048)


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
