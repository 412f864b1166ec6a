"""Lays the tokens of texts of different lengths out as torch's packed sequences do."""

from typing import NamedTuple

import numpy as np


class PackedSlots(NamedTuple):
    """Where the tokens of texts, sorted longest first, are in a PackedSequence's data.

    Attributes:
      lengths: (texts,) int64, descending.
      texts_at_step: (longest,) int64, how many texts have a token at each step.
      first_slot: (longest,) int64, the slot of each step's first token.
      rank_of_slot: (tokens,) int64, the text that each slot belongs to.
    """

    lengths: np.ndarray
    texts_at_step: np.ndarray
    first_slot: np.ndarray
    rank_of_slot: np.ndarray

    def of_text(self, rank: int) -> np.ndarray:
        """Returns the slots of a text's tokens, in their order."""
        return self.first_slot[: self.lengths[rank]] + rank


def packed_slots(lengths: np.ndarray) -> PackedSlots:
    """Lays out the tokens of texts as torch's packed sequences do; `lengths` (texts,) must be descending."""
    steps = np.arange(lengths[0])
    texts_at_step = np.searchsorted(-lengths, -steps, side="left").astype(np.int64)
    first_slot = np.cumsum(texts_at_step) - texts_at_step
    rank_of_slot = np.arange(texts_at_step.sum()) - np.repeat(first_slot, texts_at_step)
    return PackedSlots(lengths, texts_at_step, first_slot, rank_of_slot)
