"""What a head learns from: the similarities that a frozen BERT's own token embeddings give, and positive pairs."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from transforms.encoder import BertLstmEncoder
from transforms.schema import EMBEDDING_DIM

TEMPERATURE = 0.05
"""Divides the cosines before the softmax of the contrastive loss."""

_GATE_BIASES = {"mean": (2.0, -2.0, 2.0), "last": (-3.0, 4.0, 2.0)}
"""Input, forget and output gates at the start: each token passed on for `mean`, a running average for `last`."""

_CELL_SCALE = 0.3
"""Root mean square of the cell gate's inputs at the start: where tanh still is nearly linear."""

_SHORTEST_SHARE = 0.6
"""Of the longest text in a padded batch: more padding costs more than another batch."""


def teacher_vector(token_embeddings: np.ndarray) -> np.ndarray:
    """Returns the mean of a text's token embeddings, each of unit length first, itself of unit length.

    Args:
      token_embeddings: (tokens, width) of any float type.

    Returns:
      (width,) float32.
    """
    tokens = token_embeddings.astype(np.float32)
    mean = (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).mean(axis=0)
    return mean / np.linalg.norm(mean)


def projecting_lstm(token_embeddings: Sequence[np.ndarray], pooling: str, seed: int) -> nn.LSTM:
    """Makes an LSTM that starts as the best projection of the teacher's vectors to 256 numbers.

    Its cell gates project the token embeddings onto the vectors' principal axes, its other gates stand nearly
    still and its recurrent weights are zero; so pooling starts close to the teacher, and training learns the context.

    Args:
      token_embeddings: of texts like those it will see, each (tokens, width).
      pooling: `mean` or `last`.
      seed: of the numbers that stand where BERT is narrower than 256.

    Returns:
      An LSTM from width to 256.
    """
    teacher_vectors = np.stack([teacher_vector(tokens) for tokens in token_embeddings])
    token_length = np.mean([np.linalg.norm(tokens.astype(np.float32), axis=1).mean() for tokens in token_embeddings])
    width = teacher_vectors.shape[1]
    _, axes = np.linalg.eigh(teacher_vectors.T.astype(np.float64) @ teacher_vectors)
    projection = torch.from_numpy(np.ascontiguousarray(axes[:, ::-1][:, :EMBEDDING_DIM].T)).float()
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randn(EMBEDDING_DIM - len(projection), width, generator=generator) * 0.1 / width**0.5
    lstm = nn.LSTM(width, EMBEDDING_DIM)
    size = EMBEDDING_DIM
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        # torch lays the gates out as input, forget, cell, output.
        lstm.weight_ih_l0[2 * size : 3 * size] = torch.cat((projection, rest)) * (
            _CELL_SCALE * len(projection) ** 0.5 / float(token_length)
        )
        for gate, bias in zip((0, 1, 3), _GATE_BIASES[pooling], strict=True):
            lstm.bias_ih_l0[gate * size : (gate + 1) * size] = bias
    return lstm


def encode_token_embeddings(encoder: BertLstmEncoder, token_embeddings: Sequence[np.ndarray]) -> Tensor:
    """Runs the head on texts whose token embeddings are known.

    The texts are padded, where the encoder packs them: the same vectors, but a packed LSTM's gradient takes memory
    traffic that grows with the square of the length.

    Args:
      encoder: its LSTM and pooling are used.
      token_embeddings: each (tokens, width).

    Returns:
      (texts, 256) float32 of unit length, differentiable.
    """
    lengths = np.array([len(tokens) for tokens in token_embeddings], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    pooled = [
        _pooled(encoder, [token_embeddings[text] for text in texts]) for texts in _similar_lengths(lengths, order)
    ]
    return nn.functional.normalize(torch.cat(pooled), dim=-1)[torch.from_numpy(np.argsort(order)).to(encoder.device)]


def _similar_lengths(lengths: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the parts of `order`, longest first, in which no text is shorter than a share of the longest."""
    start = 0
    while start < len(order):
        end = start + int(np.sum(lengths[order[start:]] >= _SHORTEST_SHARE * lengths[order[start]]))
        yield order[start:end]
        start = end


def _pooled(encoder: BertLstmEncoder, token_embeddings: Sequence[np.ndarray]) -> Tensor:
    """Returns the LSTM's pooled outputs, (texts, 256), of texts that are sorted by length, longest first."""
    lengths = torch.tensor([len(tokens) for tokens in token_embeddings], device=encoder.device)
    longest, width = token_embeddings[0].shape
    padded = np.zeros((longest, len(token_embeddings), width), dtype=np.float32)
    for text, tokens in enumerate(token_embeddings):
        padded[: len(tokens), text] = tokens
    # It reads from left to right, so what is padded on the right changes nothing before it.
    outputs, _ = encoder.lstm(torch.from_numpy(padded).to(encoder.device))
    if encoder.pooling == "last":
        return outputs[lengths - 1, torch.arange(len(lengths), device=encoder.device)]
    mask = torch.arange(longest, device=encoder.device)[:, None] < lengths
    return (outputs * mask[..., None]).sum(dim=0) / lengths[:, None]


def similarity_loss(vectors: Tensor, teacher_vectors: Tensor) -> Tensor:
    """Returns the mean squared difference between a batch's cosines and the teacher's.

    Args:
      vectors: (n, 256) of unit length.
      teacher_vectors: (n, width) of unit length.
    """
    others = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    return (vectors @ vectors.T - teacher_vectors @ teacher_vectors.T)[others].square().mean()


def contrastive_loss(first: Tensor, second: Tensor) -> Tensor:
    """Returns how badly each text finds its partner among the batch's others, in both directions, in nats.

    Args:
      first: (n, 256) of unit length.
      second: (n, 256), the partners in the same order.
    """
    cosines = first @ second.T / TEMPERATURE
    partners = torch.arange(len(first), device=first.device)
    return (nn.functional.cross_entropy(cosines, partners) + nn.functional.cross_entropy(cosines.T, partners)) / 2
