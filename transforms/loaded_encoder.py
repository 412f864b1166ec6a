"""Encodes tokenized documents with a loaded encoder, whatever one text or a full memory does to it."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch

from transforms import progress
from transforms.encoder import BertLstmEncoder, EncodedTexts
from transforms.hardware import describe
from transforms.schema import Document
from transforms.tokenization import SPECIAL_TOKENS_PER_WINDOW

_MIN_BATCH_TOKENS = 512
"""Below this a smaller batch no longer helps against a full GPU."""

_MIN_COSINE = 0.999
"""The least agreement with float32, text by text, that a run's settings must show before it starts."""

_UNIT_TOLERANCE = 1e-3

_OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA out of memory")

REFERENCE_TEXTS = (
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "Embeddings of whole corpora, again and again, on whatever engine a company already runs.",
    "naïve façade — 東京 2026 🙂",
    "Return the number of seconds since the epoch. " * 8,
    "def main(argv): return [int(value) for value in argv if value.isdigit()]\n" * 6,
    "It was the best of times, it was the worst of times, it was the age of wisdom. " * 26,
)
"""Texts of one token up to several windows, for the check at load."""

_logger = logging.getLogger(__name__)


class TokenizedDocument(NamedTuple):
    """A document on its way to the encoder.

    Attributes:
      document: the document; of its text only the preview is left.
      content_hash: of the whole text.
      token_ids: (num_tokens,) int32, without special tokens.
      truncated: true where the text had more than `max_tokens`.
      fields_bytes: about how many bytes the document's fields are.
    """

    document: Document
    content_hash: str
    token_ids: np.ndarray
    truncated: bool
    fields_bytes: int = 0


def size_tokens(tokenized: TokenizedDocument) -> int:
    """Returns how many tokens a document of one window is to BERT."""
    return len(tokenized.token_ids) + SPECIAL_TOKENS_PER_WINDOW


class Encoded(NamedTuple):
    """A document with its vector, and what the vector cost.

    Attributes:
      document: as in `TokenizedDocument`.
      content_hash: of the whole text.
      vector: (256,) float32, finite, unit length.
      encoder: the encoder's fingerprint.
      num_tokens: tokens of the text that were encoded, special tokens not counted.
      truncated: true where it had more.
      window_tokens: tokens given to BERT, special tokens counted.
      padded_tokens: area of the padded batches it took up.
      encode_seconds: its share of the time its group took in the model.
      device: what it was computed on, `cpu float32` say.
    """

    document: Document
    content_hash: str
    vector: np.ndarray
    encoder: str
    num_tokens: int
    truncated: bool
    window_tokens: int
    padded_tokens: int
    encode_seconds: float
    device: str


class Failed(NamedTuple):
    """A document without a vector, and why: `reason` is a key of `REJECT_REASONS`."""

    document: Document
    content_hash: str
    reason: str
    detail: str


class _Work(NamedTuple):
    """Documents that are being encoded.

    Attributes:
      documents: all of them.
      results: of each, once there is one.
      on_encoded: called with the results of each group.
      turn: held while the model computes.
      side_by_side: groups that are computed at a time.
    """

    documents: Sequence[TokenizedDocument]
    results: list[Encoded | Failed | None]
    on_encoded: Callable[[Sequence[Encoded]], None] | None
    turn: AbstractContextManager
    side_by_side: int


class LoadedEncoder:
    """An encoder ready to run, shared by the threads of a process.

    On a GPU one of them computes at a time; on a CPU the groups of their texts share its cores.

    Args:
      encoder: on its device, in its type.
      max_batch_tokens: padded area of a BERT batch; halved for good when the GPU's memory does not hold it.
    """

    def __init__(self, encoder: BertLstmEncoder, max_batch_tokens: int):
        self.encoder = encoder
        self.max_batch_tokens = max_batch_tokens
        self.fingerprint = encoder.fingerprint()
        self.device = f"{describe(encoder.device)} {str(encoder.dtype).removeprefix('torch.')}"
        self._lock = threading.Lock()

    def encode_documents(
        self,
        documents: Sequence[TokenizedDocument],
        on_encoded: Callable[[Sequence[Encoded]], None] | None = None,
    ) -> list[Encoded | Failed]:
        """Encodes documents; each gives one result, in the order given.

        Out of GPU memory: the rest is tried in batches half as large, and if that does it, they stay so for good; a
        text that fits at no size leaves them as they were. Any other error, and that one: the group is halved down to
        the text that causes it, which alone fails.

        Raises:
          RuntimeError: not even a reference text can be encoded any more: the fault is not the texts'.
        """
        results: list[Encoded | Failed | None] = [None] * len(documents)
        groups = self._groups(documents, np.arange(len(documents)))
        side_by_side = self.encoder.streams()
        if side_by_side is not None and len(groups) >= side_by_side.count:
            work = _Work(documents, results, on_encoded, nullcontext(), side_by_side.count)
            side_by_side.for_each(lambda group: self._encode_groups(work, [group]), groups)
        else:
            self._encode_groups(_Work(documents, results, on_encoded, self._lock, 1), groups)
        if any(result is None for result in results):
            raise AssertionError("a document was neither encoded nor failed")
        return [result for result in results if result is not None]

    def _encode_groups(self, work: _Work, pending: list[np.ndarray]) -> None:
        """Encodes groups of documents, one after the other, whatever becomes of them."""
        documents = work.documents
        smaller: int | None = None  # The batches that the next group is tried in, after it did not fit.
        while pending:
            group = pending.pop(0)
            tokens = [documents[place].token_ids for place in group]
            failure: Exception | None = None
            with work.turn:
                started = time.perf_counter()
                max_batch_tokens = smaller or self.max_batch_tokens
                try:
                    encoded = self.encoder.encode_tokens(tokens, max_batch_tokens)
                except Exception as error:  # noqa: BLE001 - whatever a text can provoke; the bisection says it.
                    failure = error.with_traceback(None)  # Its frames would keep what fills the memory.
                seconds = (time.perf_counter() - started) / work.side_by_side
            if failure is not None:
                smaller = None
                if _is_out_of_memory(failure):
                    torch.cuda.empty_cache()
                    smaller = max_batch_tokens // 2 if max_batch_tokens // 2 >= _MIN_BATCH_TOKENS else None
                pending[:0] = [group] if smaller else self._bisected(documents, group, failure, work.results)
                continue
            if smaller:
                self._keep_to(smaller)
                pending = self._groups(documents, np.concatenate(pending)) if pending else []
                smaller = None
            finished = list(self._results(documents, group, encoded, seconds))
            for place, result in zip(group, finished, strict=True):
                work.results[place] = result
            if work.on_encoded is not None:
                work.on_encoded([result for result in finished if isinstance(result, Encoded)])
            progress.add("texts_encoded", len(group))
            progress.add("tokens_encoded", sum(map(size_tokens, (documents[place] for place in group))))

    def _groups(self, documents: Sequence[TokenizedDocument], places: np.ndarray) -> list[np.ndarray]:
        lengths = np.array([size_tokens(documents[place]) for place in places], dtype=np.int64)
        groups = [places[group] for group in self.encoder.groups(lengths, self.max_batch_tokens)]
        # The longest texts come first, to meet a full memory early; the others mixed, so that a crash after most of the
        # work has cost few texts, be they long or short.
        others = groups[1:]
        random.Random(0).shuffle(others)
        return groups[:1] + others

    def _keep_to(self, max_batch_tokens: int) -> None:
        """Makes batches as small, from now on, as those that fitted."""
        with self._lock:
            self.max_batch_tokens = min(self.max_batch_tokens, max_batch_tokens)
        _logger.warning("out of memory on %s: batches of %d tokens from now on", self.device, self.max_batch_tokens)

    def _bisected(
        self,
        documents: Sequence[TokenizedDocument],
        group: np.ndarray,
        error: Exception,
        results: list[Encoded | Failed | None],
    ) -> list[np.ndarray]:
        """Returns the halves of a group that failed; a single text is noted as failed."""
        if len(group) > 1:
            return [half for half in np.array_split(group, 2) if len(half)]
        try:
            self.encoder.encode([REFERENCE_TEXTS[1]])
        except Exception as broken:  # noqa: BLE001
            raise RuntimeError(f"the encoder on {self.device} no longer encodes any text: {broken}") from error
        place = int(group[0])
        tokenized = documents[place]
        detail = f"{type(error).__name__}: {error}"
        results[place] = Failed(tokenized.document, tokenized.content_hash, "encode_error", detail)
        progress.add("texts_encoded")
        progress.add("tokens_encoded", size_tokens(tokenized))
        return []

    def _results(
        self, documents: Sequence[TokenizedDocument], group: np.ndarray, encoded: EncodedTexts, seconds: float
    ) -> Iterable[Encoded | Failed]:
        norms = np.linalg.norm(encoded.vectors, axis=1)
        usable = np.isfinite(norms) & (np.abs(norms - 1) < _UNIT_TOLERANCE)
        seconds_per_token = seconds / int(encoded.window_tokens.sum())
        for row, place in enumerate(group):
            document, text_hash, token_ids, truncated, _ = documents[place]
            if not usable[row]:
                detail = f"the vector's length is {norms[row]}, computed on {self.device}"
                yield Failed(document, text_hash, "non_finite", detail)
                continue
            window_tokens = int(encoded.window_tokens[row])
            yield Encoded(
                document,
                text_hash,
                encoded.vectors[row].copy(),  # A view would keep the whole group's vectors alive.
                self.fingerprint,
                len(token_ids),
                truncated,
                window_tokens,
                int(encoded.padded_tokens[row]),
                seconds_per_token * window_tokens,
                self.device,
            )


def _is_out_of_memory(error: Exception) -> bool:
    """Returns whether a GPU's memory was full; the libraries below PyTorch say so in words of their own."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def check_agreement(encoder: BertLstmEncoder, reference: np.ndarray, max_batch_tokens: int) -> None:
    """Raises RuntimeError unless an encoder, with a run's settings, agrees with float32 on the reference texts.

    Args:
      encoder: on the run's device, in the run's type.
      reference: (n, 256) the reference texts' vectors from float32, each computed alone.
      max_batch_tokens: the run's.
    """
    vectors = encoder.encode(REFERENCE_TEXTS, max_batch_tokens)
    cosines = np.sum(vectors * reference, axis=1)
    if not np.min(cosines) >= _MIN_COSINE:  # Also for NaN.
        raise RuntimeError(
            f"{encoder.dtype} on {encoder.device} does not give the vectors that float32 gives: the worst cosine over "
            f"{len(cosines)} reference texts is {np.min(cosines):.5f}, under {_MIN_COSINE}; use --dtype float32"
        )
