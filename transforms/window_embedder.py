"""WindowEmbedder: takes windows of token ids through a BERT, in batches, to contextual token embeddings."""

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import BertModel

from transforms.packed_bert import PackedBert
from transforms.tokenization import groups_by_length, padded_batches

MAX_BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Padded area of one BERT batch, by device: on a CPU what stays in its caches, on a GPU what fills it."""

_MAX_PADDING_TOKENS = {"cpu": 48, "cuda": 4096}
"""Padding of one BERT batch at most: what starting another batch costs, in the tokens encoded in that time."""

_packing = threading.Lock()


def _forget_packing() -> None:
    """Gives a forked process a lock that nobody holds."""
    global _packing
    _packing = threading.Lock()


os.register_at_fork(after_in_child=_forget_packing)


class EmbeddedWindows(NamedTuple):
    """Windows that went through BERT together.

    Attributes:
      window_indices: (n,) int64, the windows' places in the list that was embedded.
      token_embeddings: (tokens, width), those of each window end to end, in the order of the indices.
      padded_tokens: (n,) int64, what each window took up, padding counted.
    """

    window_indices: np.ndarray
    token_embeddings: Tensor
    padded_tokens: np.ndarray


class WindowEmbedder:
    """Sorts windows by length and takes them through a BERT, on a GPU in padded batches, on a CPU without padding.

    On a CPU it holds the BERT's weights as they were laid out for that; threads may share it.

    Args:
      pad_id: the id that fills a row of a padded batch up.
    """

    def __init__(self, pad_id: int):
        self._pad_id = pad_id
        self._packed_bert: PackedBert | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is made anew from the weights, and cannot be pickled."""
        return self.__dict__ | {"_packed_bert": None}

    def forget_weights(self) -> None:
        """Lets go of the weights that were laid out; to be called where the BERT's are about to move."""
        self._packed_bert = None

    @torch.inference_mode()
    def embed(self, bert: BertModel, windows: Sequence[np.ndarray], max_batch_tokens: int) -> Iterator[EmbeddedWindows]:
        """Takes windows through a BERT.

        Args:
          bert: on its device, in its type.
          windows: each (length,) int64, from [CLS] to [SEP].
          max_batch_tokens: the most tokens, padding counted, that go through BERT at once.

        Yields:
          The longest windows first, so that memory peaks at the start; together each window once.
        """
        if PackedBert.fits(bert):
            yield from self._embed_packed(bert, windows, max_batch_tokens)
        else:
            yield from self._embed_padded(bert, windows, max_batch_tokens)

    def _embed_packed(
        self, bert: BertModel, windows: Sequence[np.ndarray], max_batch_tokens: int
    ) -> Iterator[EmbeddedWindows]:
        lengths = np.array([len(window) for window in windows], dtype=np.int64)
        packed_bert = self._current_packed_bert(bert)
        for indices in groups_by_length(lengths, max_batch_tokens):
            yield EmbeddedWindows(indices, packed_bert([windows[index] for index in indices]), lengths[indices])

    def _embed_padded(
        self, bert: BertModel, windows: Sequence[np.ndarray], max_batch_tokens: int
    ) -> Iterator[EmbeddedWindows]:
        device = bert.embeddings.word_embeddings.weight.device
        for batch in padded_batches(windows, max_batch_tokens, _MAX_PADDING_TOKENS[device.type], self._pad_id):
            input_ids = torch.from_numpy(batch.input_ids).to(device)
            mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask).to(device)
            embedded = bert(input_ids=input_ids, attention_mask=mask).last_hidden_state
            tokens = embedded.flatten(0, 1) if mask is None else embedded[mask.bool()]
            areas = np.full(len(batch.window_indices), batch.input_ids.shape[1], dtype=np.int64)
            yield EmbeddedWindows(batch.window_indices, tokens, areas)

    def _current_packed_bert(self, bert: BertModel) -> PackedBert:
        with _packing:  # Else each thread might make one of its own.
            if self._packed_bert is None or not self._packed_bert.is_of(bert):
                self._packed_bert = None  # Else both would take up memory.
                self._packed_bert = PackedBert(bert)
            return self._packed_bert
