"""A checkpoint is described as the encoder that is loaded from it, and refused for the same faults."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import make_tiny_encoder

from transforms.checkpoint import CheckpointConfig, sha256_of
from transforms.encoder import BertLstmEncoder
from transforms.fingerprint import describe_checkpoint
from transforms.weights import load_tokenizer


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    make_tiny_encoder().save_pretrained(tmp_path)
    return tmp_path


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite_lstm(folder: Path, change, **metadata: str) -> None:
    """Writes the LSTM's weights anew, as another program might."""
    path = folder / "lstm.safetensors"
    weights = {name: change(tensor) for name, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(weights, path, metadata=metadata)
    change_json(folder / "config.json", lstm_sha256=sha256_of(path))


def rewrite_bert(folder: Path, change) -> None:
    path = folder / "bert" / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)
    change_json(folder / "config.json", bert_sha256=sha256_of(path))


def old_names(weights):
    return {f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma"): weight for name, weight in weights.items()}


SAME = {
    "as it was saved": lambda folder: None,
    "a window wider than BERT": lambda folder: change_json(folder / "config.json", window_tokens=100),
    "an LSTM file with a note": lambda folder: rewrite_lstm(folder, torch.clone, made_by="hand"),
    "an LSTM in half precision": lambda folder: rewrite_lstm(folder, torch.Tensor.half),
    "a BERT with the names of old": lambda folder: rewrite_bert(folder, old_names),
    "a layer left unused": lambda folder: change_json(folder / "bert" / "config.json", num_hidden_layers=1),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
@pytest.mark.parametrize("max_tokens", [None, 7])
def test_a_description_is_that_of_the_loaded_encoder(checkpoint, change, max_tokens):
    change(checkpoint)
    described = describe_checkpoint(str(checkpoint), max_tokens)
    encoder = BertLstmEncoder.from_pretrained(checkpoint, max_tokens)
    assert described._asdict() == {
        "fingerprint": encoder.fingerprint(),
        "bert": encoder.bert_name,
        "bert_sha256": encoder.bert_sha256,
        "lstm_sha256": encoder.lstm_sha256,
        "tokenizer_sha256": encoder.tokenizer.sha256(),
        "pooling": encoder.pooling,
        "window": encoder.tokenizer.window_tokens,
        "max_tokens": encoder.max_tokens,
    }
    tokenizer = load_tokenizer(str(checkpoint), max_tokens)
    assert (tokenizer.sha256(), tokenizer.window_tokens) == (described.tokenizer_sha256, described.window)


def test_the_same_weights_used_in_another_way_are_another_encoder(checkpoint):
    config = checkpoint / "bert" / "config.json"
    fingerprints = [describe_checkpoint(str(checkpoint)).fingerprint]
    for values in (
        {"num_hidden_layers": 1},
        {"num_attention_heads": 4},
        {"hidden_act": "relu"},
        {"layer_norm_eps": 1e-3},
    ):
        change_json(config, **values)
        fingerprints.append(describe_checkpoint(str(checkpoint)).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)


def add_a_token(folder: Path) -> None:
    path = folder / "bert" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["extra"] = len(tokenizer["model"]["vocab"])
    path.write_text(json.dumps(tokenizer))


def of_bert(**values):
    return lambda folder: change_json(folder / "bert" / "config.json", **values)


FAULTY = {
    "the tokenizer knows": add_a_token,
    "does not fit its config.json: embeddings.word_embeddings.weight": of_bert(vocab_size=1000),
    "does not fit its config.json: encoder.layer.0.intermediate.dense": of_bert(intermediate_size=65),
    "does not fit its config.json: embeddings.position_embeddings": of_bert(max_position_embeddings=128),
    "lacks 16 of the BERT's weights": of_bert(num_hidden_layers=3),
    "says is_decoder True: a BERT with False is needed": of_bert(is_decoder=True),
    "says position_embedding_type 'relative_key'": of_bert(position_embedding_type="relative_key"),
    "holds a 'roberta' model": of_bert(model_type="roberta"),
    "has SHA-256": lambda folder: change_json(folder / "config.json", bert_sha256="0" * 64),
    "lstm.safetensors has SHA-256": lambda folder: change_json(folder / "config.json", lstm_sha256="0" * 64),
}


@pytest.mark.parametrize("told", FAULTY)
@pytest.mark.parametrize("load", [describe_checkpoint, BertLstmEncoder.from_pretrained])
def test_what_cannot_be_loaded_is_refused_before_any_job_starts(checkpoint, told, load):
    FAULTY[told](checkpoint)
    with pytest.raises(ValueError, match=told):
        load(str(checkpoint))


def test_a_checkpoints_config_says_what_was_saved(checkpoint):
    config = CheckpointConfig.read(checkpoint)
    described = describe_checkpoint(str(checkpoint))
    assert (config.bert, config.bert_sha256, config.lstm_sha256) == described[1:4]
