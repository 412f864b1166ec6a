"""Says which encoder a checkpoint holds, without building its BERT; knows no Beam."""

import hashlib
import json
from typing import NamedTuple

from transformers import BertConfig

from transforms.checkpoint import CheckpointConfig, checkpoint_folder
from transforms.tokenization import WindowTokenizer
from transforms.weights import check_vocabulary, load_bert_tokenizer, load_config, load_lstm, serialized


def fingerprint(
    bert_config: BertConfig, bert_sha256: str, lstm_sha256: str, tokenizer: WindowTokenizer, pooling: str
) -> str:
    """Returns the SHA-256 over everything a vector's meaning depends on.

    That is BERT's and the LSTM's weights, tokenizer, pooling, window and `max_tokens`: vectors with the same
    fingerprint can be compared, others not. Device, batch size and type of the numbers change nothing but rounding.

    Args:
      bert_config: how the weights are used; the file may hold more than are.
      bert_sha256: of the file of its weights.
      lstm_sha256: of the LSTM's weights as they would be saved.
      tokenizer: with window and `max_tokens`.
      pooling: of the LSTM's outputs.
    """
    parts = {
        "bert": bert_sha256,
        "bert_config": [
            bert_config.num_hidden_layers,
            bert_config.num_attention_heads,
            bert_config.hidden_act,
            bert_config.layer_norm_eps,
        ],
        "lstm": lstm_sha256,
        "tokenizer": tokenizer.sha256(),
        "pooling": pooling,
        "window_tokens": tokenizer.window_tokens,
        "max_tokens": tokenizer.max_tokens,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class EncoderDescription(NamedTuple):
    """What a run says about its encoder, before any model is loaded.

    Attributes:
      fingerprint: the encoder's.
      bert: name of the BERT.
      bert_sha256: of its weights' file.
      lstm_sha256: of the LSTM's weights.
      tokenizer_sha256: of all that decides which ids a text becomes.
      pooling: of the LSTM's outputs.
      window: the longest window, special tokens counted.
      max_tokens: the most tokens of a text that are encoded.
    """

    fingerprint: str
    bert: str
    bert_sha256: str
    lstm_sha256: str
    tokenizer_sha256: str
    pooling: str
    window: int
    max_tokens: int


def describe_checkpoint(checkpoint: str, max_tokens: int | None = None) -> EncoderDescription:
    """Describes the encoder that `BertLstmEncoder.from_pretrained` would load, and checks its files as that does.

    It reads them once, but builds no BERT: on the machine that only starts a job that would be time and memory.

    Args:
      checkpoint: as in `BertLstmEncoder.from_pretrained`.
      max_tokens: as there.

    Raises:
      FileNotFoundError: the checkpoint or its BERT is not there.
      ValueError: a file is not what the checkpoint was made with.
    """
    folder = checkpoint_folder(checkpoint)
    config = CheckpointConfig.read(folder)
    bert_config, folder_of_bert = load_config(config.bert, folder, config.bert_sha256)
    lstm_sha256 = hashlib.sha256(serialized(load_lstm(folder, config, bert_config.hidden_size))).hexdigest()
    bert_tokenizer = load_bert_tokenizer(folder_of_bert)
    check_vocabulary(bert_tokenizer, bert_config)
    tokenizer = WindowTokenizer(
        bert_tokenizer,
        min(config.window_tokens, bert_config.max_position_embeddings),
        config.max_tokens if max_tokens is None else max_tokens,
    )
    return EncoderDescription(
        fingerprint(bert_config, config.bert_sha256, lstm_sha256, tokenizer, config.pooling),
        config.bert,
        config.bert_sha256,
        lstm_sha256,
        tokenizer.sha256(),
        config.pooling,
        tokenizer.window_tokens,
        tokenizer.max_tokens,
    )
