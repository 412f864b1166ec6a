"""Loads the parts of an encoder, BERT, tokenizer and LSTM, from safetensors files; knows no Beam."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import BertConfig, BertModel

from transforms.checkpoint import (
    BERT_FILE,
    LSTM_FILE,
    TOKENIZER_FILE,
    CheckpointConfig,
    bert_folder,
    check_sha256,
    checkpoint_folder,
    published_sha256,
)
from transforms.schema import EMBEDDING_DIM
from transforms.tokenization import WindowTokenizer

_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
"""As safetensors names them. Narrower ones are weights only together with scales, which are other tensors."""


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
      ValueError: it is no BERT, weights are missing or quantized, or they are not those expected.
    """
    config, folder = load_config(name, checkpoint, expected_sha256)
    with _WithoutInitialization():
        bert = BertModel(config, add_pooling_layer=False)
    weights = {_name(name): tensor for name, tensor in safetensors.torch.load_file(folder / BERT_FILE).items()}
    bert.load_state_dict({name: weights[name] for name in bert.state_dict()})
    return bert, load_bert_tokenizer(folder), folder / BERT_FILE


def load_config(
    name: str, checkpoint: Path | None = None, expected_sha256: str | None = None
) -> tuple[BertConfig, Path]:
    """Loads only a BERT's configuration, and checks that its weights are whole and fit it; gives also its folder.

    Args:
      name: as in `load_bert`.
      checkpoint: as in `load_bert`.
      expected_sha256: as in `load_bert`.

    Raises:
      FileNotFoundError: there is no such BERT.
      ValueError: it is no encoder, weights are missing, quantized or of another shape, or not those expected.
    """
    folder = bert_folder(name, checkpoint)
    config = BertConfig.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa")
    # BertConfig reads any model's file; what it says it is decides.
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type = values.get("model_type")
    if model_type != "bert":
        raise ValueError(f"{folder} holds a {model_type!r} model: a 'bert' is needed")
    for key, needed in (("is_decoder", False), ("position_embedding_type", "absolute")):
        if values.get(key, needed) != needed:
            raise ValueError(f"{folder / 'config.json'} says {key} {values[key]!r}: a BERT with {needed!r} is needed")
    if values.get("quantization_config") is not None:
        raise ValueError(
            f"{folder / 'config.json'} has a quantization_config: quantized weights are not read; get the BERT as "
            "it was before it was quantized"
        )
    expected_sha256 = expected_sha256 or published_sha256(name)
    if expected_sha256 is not None:
        check_sha256(folder / BERT_FILE, expected_sha256)
    _check_weights(config, folder / BERT_FILE)
    return config, folder


def _check_weights(config: BertConfig, path: Path) -> None:
    """Raises ValueError unless a file has all weights of a BERT, in their shapes and as floats; reads no weights."""
    with torch.device("meta"):
        wanted = {name: list(weight.shape) for name, weight in BertModel(config, False).state_dict().items()}
    with safetensors.safe_open(path, "pt") as file:
        found = {_name(name): file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
        if missing := sorted(set(wanted) - set(found)):
            raise ValueError(f"{path} lacks {len(missing)} of the BERT's weights: {', '.join(missing[:3])} ...")
        for name, shape in wanted.items():
            found_shape, dtype = found[name].get_shape(), found[name].get_dtype()
            if found_shape != shape:
                raise ValueError(
                    f"{path} does not fit its config.json: {name} has the shape {found_shape}, not {shape}; get the "
                    "two files of the same BERT"
                )
            if dtype not in _WEIGHT_DTYPES:
                raise ValueError(
                    f"{path} holds {name} as {dtype}, which is none of {', '.join(_WEIGHT_DTYPES)}: "
                    "quantized weights are not read; get the BERT as it was before it was quantized"
                )


def check_vocabulary(tokenizer: Tokenizer, config: BertConfig) -> None:
    """Raises ValueError where a tokenizer knows tokens that a BERT does not."""
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"the tokenizer knows {tokenizer.get_vocab_size()} tokens, the BERT only {config.vocab_size}: they do not "
            "belong together"
        )


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


def are_those_of_file(module: nn.Module, path: Path) -> bool:
    """Returns whether a module's weights are those of a safetensors file, in the type that the module has them in."""
    with safetensors.safe_open(path, "pt") as file:
        names = {_name(name): name for name in file.keys()}  # noqa: SIM118 - no dict
        return all(
            name in names and torch.equal(file.get_tensor(names[name]).to(torch.float32).to(weight.dtype), weight.cpu())
            for name, weight in module.state_dict().items()
        )


class WeightsState:
    """Where a module's weights are, and how often each was changed in place: tells cheaply that they are others now.

    Args:
      module: as it is now.
    """

    def __init__(self, module: nn.Module):
        self._state = _state(module)
        # Without these, other weights could come to lie where the old ones were, and seem to be the same.
        self._weights = [weight.detach() for weight in module.parameters()]

    def is_of(self, module: nn.Module) -> bool:
        """Returns whether a module's weights are still those.

        PyTorch keeps no count of changes through `weight.data`, nor of any to weights that were made in inference mode:
        those are not seen.
        """
        return self._state == _state(module)


def _state(module: nn.Module) -> list[tuple[int, int]]:
    return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in module.parameters()]


class _WithoutInitialization(TorchFunctionMode):
    """Leaves weights as they were allocated: random numbers for all of them would take longer than reading them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _name(name: str) -> str:
    """Returns a weight's name as BERTs have it now; older ones write it in other ways."""
    return name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")


def load_tokenizer(checkpoint: str, max_tokens: int | None = None) -> WindowTokenizer:
    """Loads only a checkpoint's tokenizer, for the machines that have no model.

    Args:
      checkpoint: as in `BertLstmEncoder.from_pretrained`.
      max_tokens: as there.

    Raises:
      FileNotFoundError: the checkpoint or its BERT is not there.
    """
    folder = checkpoint_folder(checkpoint)
    config = CheckpointConfig.read(folder)
    folder_of_bert = bert_folder(config.bert, folder)
    positions = BertConfig.from_pretrained(folder_of_bert, local_files_only=True).max_position_embeddings
    return WindowTokenizer(
        load_bert_tokenizer(folder_of_bert),
        min(config.window_tokens, positions),
        config.max_tokens if max_tokens is None else max_tokens,
    )
