"""PackedBert: a BERT's forward pass on a CPU, over windows laid end to end without padding; knows no Beam."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertModel
from transformers.activations import ACT2FN

from transforms.weights import WeightsState

_FUSED_ACTIVATIONS = {"gelu", "relu"}
"""Activations that oneDNN computes while it writes a product; Hugging Face's names are its own too."""

_PLAIN_MODULES = {nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList}
"""What a BertModel's layers consist of, beside the classes of its own file and its activation."""

_MAX_SCORES_BYTES = 64 << 20
"""Of the attention's scores at once, where they are held: four windows of 512 tokens with 12 heads take up 24 MiB."""

_USUAL_ROWS = 2048
"""Tokens that oneDNN lays weights out for; any number of them is computed."""


class _Layer(NamedTuple):
    """One layer of the encoder, each part a function of (tokens, width)."""

    query_key_value: Callable[[Tensor], Tensor]
    attention_output: Callable[[Tensor], Tensor]
    attention_norm: nn.LayerNorm
    intermediate: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor]
    output_norm: nn.LayerNorm


class PackedBert:
    """Computes what a BertModel computes, up to rounding, on a CPU and without padding.

    Windows of any lengths share the matrix products; only attention goes by length. The weights are laid out once, as
    oneDNN's kernels read them, and the activation is computed as a product is written. On two cores of an AMD EPYC 9004
    that is 1.15 to 1.3 times as fast as the model itself in float32, and more in bfloat16.

    The copy of the weights takes as much memory as those of the layers.

    Args:
      bert: a model that `fits`, on a CPU.
    """

    def __init__(self, bert: BertModel):
        config, embeddings = bert.config, bert.embeddings
        self._weights = WeightsState(bert)
        self._heads = config.num_attention_heads
        self._word_embeddings = embeddings.word_embeddings.weight.detach()
        self._positions = (embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]).detach()
        self._norm = embeddings.LayerNorm
        self._layers = [_pack(layer, config.hidden_act) for layer in bert.encoder.layer]

    @staticmethod
    def fits(bert: BertModel) -> bool:
        """Returns whether a model is the plain encoder that is computed here, no part replaced or hooked, on a CPU."""
        return (
            type(bert) is BertModel
            and not bert.config.is_decoder
            and all(weight.device.type == "cpu" for weight in bert.parameters())
            and _are_plain(bert)
        )

    def is_of(self, bert: BertModel) -> bool:
        """Returns whether a model's weights are still those that were laid out here; see `WeightsState`."""
        return self._weights.is_of(bert)

    @torch.inference_mode()
    def __call__(self, windows: Sequence[np.ndarray]) -> Tensor:
        """Returns the windows' contextual token embeddings.

        Args:
          windows: each (length,) int64, from [CLS] to [SEP]; fastest where equal lengths follow each other.

        Returns:
          (tokens, width) in the model's type, end to end in the order of the windows.
        """
        runs = _runs_of_equal_length([len(window) for window in windows])
        input_ids = torch.from_numpy(np.concatenate(windows))
        positions = torch.cat([torch.arange(length).repeat(count) for count, length in runs])
        states = _normalized(self._norm, self._word_embeddings[input_ids] + self._positions[positions])
        for layer in self._layers:
            attended = self._attend(layer.query_key_value(states), runs)
            states = _normalized(layer.attention_norm, layer.attention_output(attended).add_(states))
            inner = layer.intermediate(states)
            states = _normalized(layer.output_norm, layer.output(inner).add_(states))
        return states

    def _attend(self, query_key_value: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
        """Lets each window's tokens attend to each other.

        Args:
          query_key_value: (tokens, 3 * width).
          runs: (count, length) of successive windows of equal length.

        Returns:
          (tokens, width).
        """
        width = query_key_value.shape[1] // 3
        is_bfloat16 = query_key_value.dtype == torch.bfloat16
        attended = query_key_value.new_empty(len(query_key_value), width)
        start = 0
        for count, length in runs:
            end = start + count * length
            # (3, count, heads, length, width of a head)
            parts = query_key_value[start:end].view(count, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            scores_bytes = count * self._heads * length**2 * query_key_value.element_size()
            attend = _attend_by_products if is_bfloat16 and scores_bytes <= _MAX_SCORES_BYTES else _attend_fused
            attended[start:end].view(count, length, self._heads, -1).copy_(attend(parts).transpose(1, 2))
            start = end
        return attended


def _attend_fused(parts: Tensor) -> Tensor:
    """(3, count, heads, length, head width) to (count, heads, length, head width): the fastest way in float32."""
    query, key, value = parts
    return nn.functional.scaled_dot_product_attention(query, key, value)


def _attend_by_products(parts: Tensor) -> Tensor:
    """The same in bfloat16, where a CPU's fused attention takes two to three times as long as two plain products."""
    _, count, heads, length, width = parts.shape
    query, key, value = parts.contiguous().view(3, count * heads, length, width)
    nothing = query.new_zeros(1, 1, 1)
    scores = torch.baddbmm(nothing, query, key.transpose(1, 2), beta=0, alpha=width**-0.5)
    return torch.bmm(scores.softmax(dim=-1), value).view(count, heads, length, width)


def _are_plain(bert: BertModel) -> bool:
    """Returns whether all that makes the embeddings is as Hugging Face builds it; its pooler does not matter here."""
    activation = bert.config.hidden_act
    kinds = _PLAIN_MODULES | ({type(ACT2FN[activation])} if isinstance(activation, str) else set())
    return all(
        (type(module) in kinds or type(module).__module__ == BertModel.__module__)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__  # As some libraries replace it.
        and not (type(module) is nn.Linear and module.bias is None)
        for module in (bert, *bert.embeddings.modules(), *bert.encoder.modules())
    )


def _runs_of_equal_length(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (count, length) of successive equal lengths."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = runs[-1][0] + 1, length
        else:
            runs.append((1, length))
    return runs


def _normalized(norm: nn.LayerNorm, states: Tensor) -> Tensor:
    return nn.functional.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _pack(layer: nn.Module, activation: Any) -> _Layer:
    attention, output = layer.attention, layer.output
    parts = attention.self.query, attention.self.key, attention.self.value
    weight = torch.cat([part.weight for part in parts])
    inner = layer.intermediate.dense
    fused = activation if activation in _FUSED_ACTIVATIONS and _is_packable(inner.weight) else "none"
    intermediate = _product(inner.weight, inner.bias, fused)
    if fused == "none":
        plain, activate = intermediate, layer.intermediate.intermediate_act_fn

        def intermediate(states: Tensor) -> Tensor:
            return activate(plain(states))

    return _Layer(
        _product(weight, torch.cat([part.bias for part in parts])),
        _product(attention.output.dense.weight, attention.output.dense.bias),
        attention.output.LayerNorm,
        intermediate,
        _product(output.dense.weight, output.dense.bias),
        output.LayerNorm,
    )


def _product(weight: Tensor, bias: Tensor, activation: str = "none") -> Callable[[Tensor], Tensor]:
    """Returns the function of (tokens, inputs) that `linear` is, with an activation that `_is_packable` allows."""
    weight, bias = weight.detach(), bias.detach()
    if not _is_packable(weight):
        return lambda states: nn.functional.linear(states, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_ROWS)
    algorithm = "none" if activation == "gelu" else ""  # GELU by the error function, as Hugging Face's.
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, packed, bias, activation, [], algorithm)


def _is_packable(weight: Tensor) -> bool:
    """Returns whether this PyTorch has, for weights of this type on this CPU, the products that its compiler uses."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
