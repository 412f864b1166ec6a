"""Text to windows of token ids, and windows to padded batches; knows neither Beam nor the model."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

SPECIAL_TOKENS_PER_WINDOW = 2
"""[CLS] before each window and [SEP] after it."""

MAX_GROUP_TEXTS = 32_768
"""Texts of a group, however short: an LSTM step over more gains nothing, and GPUs' kernels have limits."""

_WORD_END = re.compile("[ \t\n\r\u00a0\u2000-\u200a\u3000!-/:-@\\[-`{-~]")
_WORD_END_OR_IDEOGRAPH = re.compile(_WORD_END.pattern[:-1] + "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Characters before which BERT's tokenizers always part words: white space, ASCII punctuation, ideographs."""

_FIRST_CHARS_PER_TOKEN = 12
"""Characters a token is first given when a long text is tokenized from its start; English has about 4.5."""


class TokenizedText(NamedTuple):
    """A text's WordPiece ids, without special tokens.

    Attributes:
      token_ids: (num_tokens,) int32, at most `max_tokens` of them.
      truncated: true where the text had more.
    """

    token_ids: np.ndarray
    truncated: bool


class WindowBatch(NamedTuple):
    """Windows of similar length, padded to the longest.

    Attributes:
      window_indices: (n,) int64, the windows' places in the list that was batched.
      input_ids: (n, length) int64.
      attention_mask: (n, length) int64, 1 for tokens; None where no window is padded.
    """

    window_indices: np.ndarray
    input_ids: np.ndarray
    attention_mask: np.ndarray | None


class WindowTokenizer:
    """Turns texts into token ids and token ids into windows that fit a BERT.

    A text is tokenized whole and laid into the fewest windows that hold it, all of nearly the same length, so
    that no window is a short tail without context.

    Args:
      tokenizer: a WordPiece tokenizer with [CLS], [SEP] and [PAD]; it is copied, and the copy neither cuts nor pads.
      window_tokens: the longest window, special tokens counted; at most the BERT's positions.
      max_tokens: the most tokens of one text that are encoded, special tokens not counted.

    Raises:
      ValueError: the tokenizer lacks a special token, or a limit is too small.
    """

    def __init__(self, tokenizer: Tokenizer, window_tokens: int, max_tokens: int):
        if window_tokens <= SPECIAL_TOKENS_PER_WINDOW:
            raise ValueError(f"window_tokens must be above {SPECIAL_TOKENS_PER_WINDOW}, not {window_tokens}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Special tokens written in a text, "[SEP]" say, are text like any other.
        self._tokenizer.encode_special_tokens = True
        normalizer = json.loads(self._tokenizer.to_str())["normalizer"] or {}
        self._word_end = _WORD_END_OR_IDEOGRAPH if normalizer.get("handle_chinese_chars") else _WORD_END
        self.window_tokens = window_tokens
        self.max_tokens = max_tokens
        self.cls_id, self.sep_id, self.pad_id = (self._special_id(name) for name in ("[CLS]", "[SEP]", "[PAD]"))

    def _special_id(self, name: str) -> int:
        token_id = self._tokenizer.token_to_id(name)
        if token_id is None:
            raise ValueError(f"the tokenizer has no {name} token: a BERT WordPiece tokenizer is needed")
        return token_id

    def to_json(self) -> str:
        """Returns the tokenizer as the text of a `tokenizer.json`."""
        return self._tokenizer.to_str()

    def sha256(self) -> str:
        """Returns the SHA-256 over all that decides which ids a text becomes: vocabulary, normalizer, pre-tokenizer."""
        return _sha256_of_decisive_parts(self._tokenizer.to_str())

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        """Tokenizes texts, each cut at `max_tokens`.

        A text much longer than `max_tokens` is tokenized only as far as needed: its prefix up to the end of a word has
        the very tokens that the whole text begins with, since WordPiece never looks across words.
        """
        prefix_chars = self.max_tokens * _FIRST_CHARS_PER_TOKEN
        prefixes = [self._prefix(text, prefix_chars) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(prefixes, add_special_tokens=False)
        tokenized = []
        for text, prefix, encoding in zip(texts, prefixes, encodings, strict=True):
            ids = encoding.ids
            chars = prefix_chars
            while len(ids) <= self.max_tokens and len(prefix) < len(text):
                chars *= 4
                prefix = self._prefix(text, chars)
                ids = self._tokenizer.encode(prefix, add_special_tokens=False).ids
            token_ids = np.array(ids[: self.max_tokens], dtype=np.int32)
            tokenized.append(TokenizedText(token_ids, len(ids) > self.max_tokens))
        return tokenized

    def _prefix(self, text: str, chars: int) -> str:
        """Returns the text's start: `chars` characters and the rest of the word they end in."""
        end = self._word_end.search(text, chars)
        return text if end is None else text[: end.start()]

    def windows(self, token_ids: np.ndarray) -> list[np.ndarray]:
        """Lays a text's tokens into windows.

        Args:
          token_ids: (num_tokens,) without special tokens; may be empty.

        Returns:
          At least one window, each (length,) int64 with length at most `window_tokens`, from [CLS] to [SEP].
        """
        content = self.window_tokens - SPECIAL_TOKENS_PER_WINDOW
        if len(token_ids) <= content:  # Most texts: ten times faster than splitting them.
            return [self._window(token_ids)]
        return [self._window(part) for part in np.array_split(token_ids, -(-len(token_ids) // content))]

    def _window(self, token_ids: np.ndarray) -> np.ndarray:
        window = np.empty(len(token_ids) + SPECIAL_TOKENS_PER_WINDOW, dtype=np.int64)
        window[0], window[1:-1], window[-1] = self.cls_id, token_ids, self.sep_id
        return window


@lru_cache(maxsize=4)  # A run asks for the same one several times, and a vocabulary takes a while.
def _sha256_of_decisive_parts(tokenizer_json: str) -> str:
    parts = json.loads(tokenizer_json)
    decisive = {name: parts[name] for name in ("added_tokens", "model", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def padded_batches(
    windows: Sequence[np.ndarray], max_batch_tokens: int, max_padding_tokens: int, pad_id: int
) -> Iterator[WindowBatch]:
    """Sorts windows by length and cuts them into batches by their padded area.

    A batch ends where one row more would exceed the area, or where its padding would cost more than a batch costs.

    Args:
      windows: each (length,) int64.
      max_batch_tokens: the largest padded area (rows times longest row) of a batch; a window longer than that is
        a batch of its own.
      max_padding_tokens: the most padding in a batch, in tokens; what one more batch costs in overhead.
      pad_id: the id that fills a row up.

    Yields:
      Batches, longest windows first, so that memory peaks at the start; together they hold each window once.
    """
    if max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens must be at least 1, not {max_batch_tokens}")
    lengths = np.array([len(window) for window in windows], dtype=np.int64)
    # Stable, so that the same windows always make the same batches.
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        rows = order[start : start + max(1, max_batch_tokens // longest)]
        padding = np.cumsum(longest - lengths[rows])
        rows = rows[: max(1, int(np.searchsorted(padding, max_padding_tokens, side="right")))]
        start += len(rows)
        yield _padded([windows[row] for row in rows], rows, longest, pad_id)


def _padded(windows: Sequence[np.ndarray], indices: np.ndarray, length: int, pad_id: int) -> WindowBatch:
    input_ids = np.full((len(windows), length), pad_id, dtype=np.int64)
    for row, window in enumerate(windows):
        input_ids[row, : len(window)] = window
    if len(windows[-1]) == length:  # Sorted: the last is the shortest.
        return WindowBatch(indices, input_ids, None)
    lengths = np.array([len(window) for window in windows])
    return WindowBatch(indices, input_ids, (np.arange(length) < lengths[:, None]).astype(np.int64))


def groups_by_length(lengths: np.ndarray, max_tokens: int, max_texts: int = MAX_GROUP_TEXTS) -> Iterator[np.ndarray]:
    """Sorts texts by length and cuts them into groups by their sum.

    Args:
      lengths: (n,) int64, tokens of each text.
      max_tokens: the most tokens of a group; a longer text is a group of its own.
      max_texts: the most texts of a group.

    Yields:
      (k,) int64 places of texts, longest first; together each place once.
    """
    order = np.argsort(-lengths, kind="stable")
    totals = np.cumsum(lengths[order])
    start = 0
    while start < len(order):
        before = totals[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(totals, before + max_tokens, side="right")))
        end = min(end, start + max_texts)
        yield order[start:end]
        start = end
