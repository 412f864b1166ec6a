"""EmbedDocuments and its model handler: the encoder as a Beam RunInference; the only file that knows Beam and torch."""

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
import numpy as np
import torch
from apache_beam.ml.inference.base import ModelHandler, RunInference
from apache_beam.utils.windowed_value import WindowedValue

from transforms import progress
from transforms.devices import DEVICES, DTYPES
from transforms.encoder import BertLstmEncoder
from transforms.hardware import resolve_device, resolve_dtype
from transforms.loaded_encoder import (
    REFERENCE_TEXTS,
    Encoded,
    Failed,
    LoadedEncoder,
    TokenizedDocument,
    check_agreement,
    size_tokens,
)
from transforms.schema import Document, Embedding, Rejected, content_hash, preview
from transforms.tokenization import SPECIAL_TOKENS_PER_WINDOW
from transforms.weights import load_tokenizer
from transforms.window_embedder import MAX_BATCH_TOKENS

BATCH_TOKENS = 1 << 20
"""Tokens the handler sees at once: enough to sort the texts into batches with hardly any padding."""

_FIELDS_BYTES_PER_TOKEN = 256
"""Of a document's fields, this much counts as a token, so that a batch holds at most 256 MiB of fields."""

_TOKENIZED_TEXTS = 256
_TOKENIZED_BYTES = 1 << 20
"""Documents are tokenized once there are so many, or their texts and fields are about so large."""

_CHUNK_TEXTS = 64
_CHUNK_TOKENS = 8192
_CHUNK_BYTES = 1 << 18
"""The most that travels together to the workers that encode: documents, and of several the tokens and the fields."""

_logger = logging.getLogger(__name__)


class EncoderModelHandler(ModelHandler[TokenizedDocument, Encoded | Failed, LoadedEncoder]):
    """Runs a BertLstmEncoder behind Beam's RunInference.

    It takes `TokenizedDocument`s in large batches, sorts and cuts them itself, and gives one `Encoded` or `Failed`
    for each. One model per process, shared by its threads.

    Args:
      checkpoint: a shipped checkpoint's name, a folder, or a gs:// folder.
      max_tokens: in place of the checkpoint's own.
      device: auto, cpu or cuda; asked for cuda where there is none, loading fails.
      dtype: auto, float32, bfloat16 or float16.
      max_batch_tokens: padded area of one BERT batch; by device where None.
      batch_tokens: tokens of the texts sorted together; more means less padding and more memory.
      num_threads: CPU threads of PyTorch in this process; all cores where None.
      expected_fingerprint: loading fails where the worker's checkpoint has another one.
      expected_tokenizer: SHA-256 and `max_tokens` of the tokenizer; tokenizing fails where the worker's has others.
      on_encoded: called in the worker with the results of every few batches as soon as there are any, to save them.

    Raises:
      ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        checkpoint: str = "default",
        max_tokens: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_tokens: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        num_threads: int | None = None,
        expected_fingerprint: str | None = None,
        expected_tokenizer: tuple[str, int] | None = None,
        on_encoded: Callable[[Sequence[Encoded]], None] | None = None,
    ):
        super().__init__()
        if device not in DEVICES:
            raise ValueError(f"device {device!r} is none of {', '.join(DEVICES)}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
        for name, value in (
            ("max_tokens", max_tokens),
            ("max_batch_tokens", max_batch_tokens),
            ("batch_tokens", batch_tokens),
            ("num_threads", num_threads),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self._checkpoint = checkpoint
        self._max_tokens = max_tokens
        self._device = device
        self._dtype = dtype
        self._max_batch_tokens = max_batch_tokens
        self._batch_tokens = batch_tokens
        self._num_threads = num_threads
        self._expected_fingerprint = expected_fingerprint
        self.expected_tokenizer = expected_tokenizer
        self._on_encoded = on_encoded

    def load_model(self) -> LoadedEncoder:
        """Loads the encoder, and checks that it gives with this run's settings what it gives in float32.

        Raises:
          RuntimeError: cuda is missing, the fingerprint is another one, or the check failed.
        """
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        device = resolve_device(self._device)
        dtype = resolve_dtype(self._dtype, device)
        encoder = BertLstmEncoder.from_pretrained(self._checkpoint, self._max_tokens).on(device)
        max_batch_tokens = self._max_batch_tokens or MAX_BATCH_TOKENS[device.type]
        reference = np.concatenate([encoder.encode([text]) for text in REFERENCE_TEXTS])
        encoder.on(device, dtype)
        check_agreement(encoder, reference, max_batch_tokens)
        loaded = LoadedEncoder(encoder, max_batch_tokens)
        if self._expected_fingerprint not in (None, loaded.fingerprint):
            raise RuntimeError(
                f"checkpoint {self._checkpoint!r} on this worker has the fingerprint {loaded.fingerprint}, but the job "
                f"was started with {self._expected_fingerprint}: give all machines the same release and checkpoint"
            )
        _logger.info("process %d has loaded the encoder on %s", os.getpid(), loaded.device)
        return loaded

    def run_inference(
        self,
        batch: Sequence[TokenizedDocument],
        model: LoadedEncoder,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[Encoded | Failed]:
        """Encodes a batch; as many results as documents, in their order."""
        if inference_args:
            raise ValueError(f"EncoderModelHandler takes no inference_args: {sorted(inference_args)}")
        num_tokens = sum(map(size_tokens, batch))
        _logger.info("process %d encodes %d texts of %d tokens at once", os.getpid(), len(batch), num_tokens)
        return model.encode_documents(batch, self._on_encoded)

    def get_num_bytes(self, batch: Sequence[TokenizedDocument]) -> int:
        """Returns the bytes of the batch's token ids; Beam's own way would pickle the batch."""
        return sum(tokenized.token_ids.nbytes for tokenized in batch)

    def get_metrics_namespace(self) -> str:
        """Returns the namespace of RunInference's metrics."""
        return "EncoderModelHandler"

    def batch_elements_kwargs(self) -> dict[str, Any]:
        """Returns the batch size in tokens: always the same, since the handler cuts batches itself."""
        return {
            "min_batch_size": self._batch_tokens,
            "max_batch_size": self._batch_tokens,
            "element_size_fn": _batch_share,
        }


def _batch_share(tokenized: TokenizedDocument) -> int:
    """Returns what a document takes up of `batch_tokens`: its tokens, or more where its fields are large."""
    return size_tokens(tokenized) + tokenized.fields_bytes // _FIELDS_BYTES_PER_TOKEN


class _Tokenize(beam.DoFn):
    """Documents to chunks of packed TokenizedDocuments; Failed where no token is left."""

    FAILED = "failed"

    def __init__(self, checkpoint: str, max_tokens: int | None, expected: tuple[str, int] | None):
        self._checkpoint = checkpoint
        self._max_tokens = max_tokens
        self._expected = expected
        self._tokenizer: Any = None
        self._waiting: list[tuple[WindowedValue, int]] = []
        self._waiting_bytes = 0

    def setup(self):
        self._tokenizer = load_tokenizer(self._checkpoint, self._max_tokens)
        # The model takes any ids: those of another tokenizer would give vectors that mean nothing.
        if self._expected is not None:
            found = self._tokenizer.sha256(), self._tokenizer.max_tokens
            if found != self._expected:
                raise RuntimeError(
                    f"checkpoint {self._checkpoint!r} on this worker has the tokenizer {found[0]} for {found[1]} "
                    f"tokens, but the job was started with {self._expected[0]} for {self._expected[1]}: give all "
                    "machines the same release and checkpoint"
                )

    def start_bundle(self):
        self._waiting.clear()
        self._waiting_bytes = 0

    def process(self, document: Document, timestamp=beam.DoFn.TimestampParam, window=beam.DoFn.WindowParam):
        failure = _unusable(document)
        if failure is not None:
            yield _failed(document, "", *failure)
            return
        fields_bytes = len(pickle.dumps(document.fields, pickle.HIGHEST_PROTOCOL))
        self._waiting.append((WindowedValue(document, timestamp, (window,)), fields_bytes))
        self._waiting_bytes += len(document.text) + fields_bytes
        if len(self._waiting) >= _TOKENIZED_TEXTS or self._waiting_bytes >= _TOKENIZED_BYTES:
            yield from self._tokenize_waiting()

    def finish_bundle(self):
        return self._tokenize_waiting()

    def _tokenize_waiting(self) -> Iterator[WindowedValue | beam.pvalue.TaggedOutput]:
        """Yields what comes of the documents that wait: some hundreds take half the time that they take one by one."""
        waiting = self._waiting[:]
        self._waiting.clear()
        self._waiting_bytes = 0
        all_tokenized = self._tokenizer.tokenize([windowed.value.text for windowed, _ in waiting])
        chunk: _Chunk | None = None
        for (windowed, fields_bytes), tokenized in zip(waiting, all_tokenized, strict=True):
            document = windowed.value
            text_hash = content_hash(document.text)
            if not len(tokenized.token_ids):
                failed = _failed(document, text_hash, "empty_text", "the tokenizer keeps none of its characters")
                yield beam.pvalue.TaggedOutput(failed.tag, windowed.with_value(failed.value))
                continue
            num_tokens = len(tokenized.token_ids) + SPECIAL_TOKENS_PER_WINDOW
            progress.add("texts_to_encode")
            progress.add("tokens_to_encode", num_tokens)
            document = document._replace(text=preview(document.text))
            packed = _pack(
                TokenizedDocument(document, text_hash, tokenized.token_ids, tokenized.truncated, fields_bytes)
            )
            if chunk is not None and not chunk.takes(windowed, num_tokens, fields_bytes):
                yield chunk.windowed()
                chunk = None
            chunk = chunk or _Chunk(windowed)
            chunk.add(packed, num_tokens, fields_bytes)
        if chunk is not None:
            yield chunk.windowed()


class _Chunk:
    """Packed TokenizedDocuments of one time and window that are shuffled together: a shuffle costs by its elements."""

    def __init__(self, first: WindowedValue):
        self._first = first
        self._packed: list[tuple] = []
        self._num_tokens = 0
        self._fields_bytes = 0

    def takes(self, windowed: WindowedValue, num_tokens: int, fields_bytes: int) -> bool:
        """Returns whether a document may be added that came as this, of so many tokens, its fields of so many bytes."""
        return (
            len(self._packed) < _CHUNK_TEXTS
            and self._num_tokens + num_tokens <= _CHUNK_TOKENS
            and self._fields_bytes + fields_bytes <= _CHUNK_BYTES
            and (self._first.timestamp, self._first.windows) == (windowed.timestamp, windowed.windows)
        )

    def add(self, packed: tuple, num_tokens: int, fields_bytes: int) -> None:
        self._packed.append(packed)
        self._num_tokens += num_tokens
        self._fields_bytes += fields_bytes

    def windowed(self) -> WindowedValue:
        """Returns the chunk as an element of its time and window."""
        return self._first.with_value(self._packed)


def _failed(document: Document, text_hash: str, reason: str, detail: str) -> beam.pvalue.TaggedOutput:
    text = preview(document.text) if isinstance(document.text, str) else ""
    document = document._replace(text=text, id=_clean(document.id), source=_clean(document.source))
    return beam.pvalue.TaggedOutput(_Tokenize.FAILED, Failed(document, text_hash, reason, detail))


def _pack(tokenized: TokenizedDocument) -> tuple:
    """Returns plain values, which Beam encodes natively and far faster than it pickles other classes."""
    document, text_hash, token_ids, *others = tokenized
    return tuple(document), text_hash, token_ids.tobytes(), *others


def _unpack(chunk: Sequence[tuple]) -> Iterator[TokenizedDocument]:
    for document, text_hash, token_ids, *others in chunk:
        yield TokenizedDocument(Document._make(document), text_hash, np.frombuffer(token_ids, np.int32), *others)


def _unusable(document: Document) -> tuple[str, str] | None:
    """Returns reason and detail where a document, in somebody's own pipeline, cannot be embedded or written."""
    text: Any = document.text  # Whatever somebody put there.
    if text is None:
        return "missing_text", "the text is None"
    if not isinstance(text, str):
        return "wrong_type", f"the text is of type {type(text).__name__}, not str"
    for name, value in (("text", text), ("id", document.id), ("source", document.source), ("fields", document.fields)):
        try:
            _check_utf8(value)
        except UnicodeEncodeError as error:
            return "invalid_utf8", f"the document's {name} holds a lone surrogate: {error}"
    return None


def _check_utf8(value: Any) -> None:
    """Raises UnicodeEncodeError where a string in a value cannot be written as UTF-8."""
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, dict):
        for item in value.items():
            _check_utf8(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_utf8(item)


def _clean(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


class _Encode(beam.PTransform):
    """Chunks of packed TokenizedDocuments to Encoded or Failed: all that belongs on the machines with accelerators."""

    def __init__(self, handler: EncoderModelHandler):
        super().__init__()
        self._handler = handler

    def expand(self, packed):
        return packed | "Unpack" >> beam.FlatMap(_unpack) | "RunInference" >> RunInference(self._handler)


class _SeparateFailed(beam.DoFn):
    FAILED = "failed"

    def process(self, result: Encoded | Failed):
        yield beam.pvalue.TaggedOutput(self.FAILED, result) if isinstance(result, Failed) else result


@dataclass
class EncodeDocuments(beam.PTransform):
    """Documents to (PCollection of Encoded, PCollection of Failed): each document leaves exactly once.

    Attributes:
      handler: the model.
      checkpoint: the handler's checkpoint, whose tokenizer runs ahead of the model, on machines without one.
      max_tokens: the handler's.
      resource_hints: Beam's hints (`accelerator`, `min_ram`) for the step that runs the model, and for no other.
    """

    handler: EncoderModelHandler
    checkpoint: str = "default"
    max_tokens: int | None = None
    resource_hints: Mapping[str, str] = field(default_factory=dict)

    def expand(self, documents):
        """Wires tokenizing, a fusion break, and the model."""
        tokenized, unusable = documents | "Tokenize" >> beam.ParDo(
            _Tokenize(self.checkpoint, self.max_tokens, self.handler.expected_tokenizer)
        ).with_outputs(_Tokenize.FAILED, main="tokenized")
        encoded, failed = (
            tokenized
            # Keeps reading and tokenizing off the machines with accelerators, and spreads texts over these evenly.
            | "SpreadTexts" >> beam.Reshuffle()
            | "Encode" >> _Encode(self.handler).with_resource_hints(**self.resource_hints)
            | "SeparateFailed" >> beam.ParDo(_SeparateFailed()).with_outputs(_SeparateFailed.FAILED, main="encoded")
        )
        return encoded, (unusable, failed) | "FlattenFailed" >> beam.Flatten()


@dataclass
class EmbedDocuments(beam.PTransform):
    """Documents to (PCollection of Embedding, PCollection of Rejected), in any Beam pipeline.

    Example:
      embeddings, rejected = documents | EmbedDocuments(checkpoint="default")

    Attributes:
      checkpoint: a shipped checkpoint's name, a folder, or a gs:// folder.
      max_tokens: the most tokens of a text that are encoded; the checkpoint's own number where None.
      device: auto, cpu or cuda.
      dtype: auto, float32, bfloat16 or float16.
      max_batch_tokens: padded area of one BERT batch; by device where None.
    """

    checkpoint: str = "default"
    max_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_batch_tokens: int | None = None

    def expand(self, documents):
        """Wires EncodeDocuments to the records of the schema."""
        handler = EncoderModelHandler(self.checkpoint, self.max_tokens, self.device, self.dtype, self.max_batch_tokens)
        encoded, failed = documents | "EncodeDocuments" >> EncodeDocuments(handler, self.checkpoint, self.max_tokens)
        embeddings = encoded | "ToEmbedding" >> beam.Map(to_embedding).with_output_types(Embedding)
        rejected = failed | "ToRejected" >> beam.Map(to_rejected).with_output_types(Rejected)
        return embeddings, rejected


def to_embedding(encoded: Encoded) -> Embedding:
    """Returns the output row of an encoded document."""
    return Embedding(
        encoded.document.id,
        encoded.vector,
        encoded.content_hash,
        encoded.encoder,
        encoded.num_tokens,
        encoded.truncated,
        encoded.document.fields,
    )


def to_rejected(failed: Failed) -> Rejected:
    """Returns the rejected record of a failed document."""
    document = failed.document
    return Rejected(document.source, document.position, document.id, failed.reason, failed.detail, document.text)
