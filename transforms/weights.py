"""Loads the parts of an encoder, BERT, tokenizer and LSTM, from safetensors files; knows no Beam."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import BertConfig, BertModel

from transforms.checkpoint import (
    BERT_FILE,
    LSTM_FILE,
    TOKENIZER_FILE,
    CheckpointConfig,
    bert_folder,
    check_sha256,
    published_sha256,
)
from transforms.schema import EMBEDDING_DIM


def load_bert(
    name: str, checkpoint: Path | None = None, expected_sha256: str | None = None
) -> tuple[BertModel, Tokenizer, Path]:
    """Loads a BERT and its tokenizer; gives also the file of its weights.

    Args:
      name: package, folder, gs:// folder, hub name, or `bert` for the checkpoint's own.
      checkpoint: the checkpoint's folder.
      expected_sha256: of the file of its weights; of a packaged BERT the published one where None.

    Raises:
      FileNotFoundError: there is no such BERT.
      ValueError: it is no BERT, weights are missing, or they are not those expected.
    """
    config, folder = load_config(name, checkpoint, expected_sha256)
    with _WithoutInitialization():
        bert = BertModel(config, add_pooling_layer=False)
    bert.load_state_dict(_weights(folder / BERT_FILE, bert.state_dict().keys()))
    return bert, load_bert_tokenizer(folder), folder / BERT_FILE


def load_config(
    name: str, checkpoint: Path | None = None, expected_sha256: str | None = None
) -> tuple[BertConfig, Path]:
    """Loads only a BERT's configuration, and checks that its weights are whole; gives also its folder.

    Args:
      name: as in `load_bert`.
      checkpoint: as in `load_bert`.
      expected_sha256: as in `load_bert`.

    Raises:
      FileNotFoundError: there is no such BERT.
      ValueError: it is no BERT, or its weights are not those expected.
    """
    folder = bert_folder(name, checkpoint)
    config = BertConfig.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa")
    # BertConfig reads any model's file; what it says it is decides.
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != "bert":
        raise ValueError(f"{folder} holds a {model_type!r} model: a 'bert' is needed")
    expected_sha256 = expected_sha256 or published_sha256(name)
    if expected_sha256 is not None:
        check_sha256(folder / BERT_FILE, expected_sha256)
    return config, folder


def check_weights(config: BertConfig, folder: Path) -> None:
    """Raises ValueError unless a folder has all weights of a BERT; reads their names only."""
    with torch.device("meta"):
        names = BertModel(config, add_pooling_layer=False).state_dict().keys()
    with safetensors.safe_open(folder / BERT_FILE, "pt") as file:
        _check_complete({_name(name) for name in file.keys()}, names, folder / BERT_FILE)  # noqa: SIM118 - no dict


def load_bert_tokenizer(folder: Path) -> Tokenizer:
    """Loads the tokenizer in a BERT's folder."""
    if (folder / TOKENIZER_FILE).is_file():
        return Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    # Older BERTs have only a list of words. Imported here, because it is slow and seldom needed.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_fast=True)
    return tokenizer.backend_tokenizer


def load_lstm(folder: Path, config: CheckpointConfig, width: int) -> nn.LSTM:
    """Loads a checkpoint's LSTM.

    Args:
      folder: the checkpoint's.
      config: what it says.
      width: of the BERT's token embeddings.

    Raises:
      ValueError: the file is not what the checkpoint was made with, or does not fit the BERT.
    """
    path = folder / LSTM_FILE
    check_sha256(path, config.lstm_sha256)
    lstm = nn.LSTM(width, EMBEDDING_DIM)
    try:
        lstm.load_state_dict(safetensors.torch.load_file(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit BERT {config.bert!r}: {error}") from error
    return lstm


def serialized(module: nn.Module) -> bytes:
    """Returns a module's weights as the content of a safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


class _WithoutInitialization(TorchFunctionMode):
    """Leaves weights as they were allocated: random numbers for all of them would take longer than reading them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _weights(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Reads the named weights from a file that may have others too and may write names as older BERTs do."""
    weights = {_name(name): tensor for name, tensor in safetensors.torch.load_file(path).items()}
    _check_complete(weights, names, path)
    return {name: weights[name] for name in names}


def _name(name: str) -> str:
    return name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")


def _check_complete(found: Collection[str], names: Collection[str], path: Path) -> None:
    if missing := sorted(set(names) - set(found)):
        raise ValueError(f"{path} lacks {len(missing)} of the BERT's weights: {', '.join(missing[:3])} ...")
