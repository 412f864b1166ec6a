"""Wires the job's transforms into one Beam pipeline: read, one per id, one per text, encode, write, publish."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
import pyarrow as pa

from pipeline.flink import is_flink
from transforms.formats import BLANK_LINE
from transforms.incremental import (
    HandOutVectors,
    KnownVector,
    MatchTexts,
    ResolveIds,
    SplitOffTexts,
    TextToEncode,
    Unusable,
    pack,
    waiting_references,
)
from transforms.inference import EncodeDocuments, EncoderModelHandler
from transforms.known_vectors import ReadKnownVectors, WorkSaver
from transforms.loaded_encoder import Encoded, Failed
from transforms.reconcile import PublishSnapshot, Run
from transforms.schema import Document, Rejected
from transforms.shards import Shard
from transforms.snapshots import work_folder
from transforms.tally import CountElements, Tally
from transforms.write import WriteEmbeddings, WriteRejected


@dataclass(frozen=True)
class Job:
    """Everything the pipeline is built from.

    Attributes:
      run: the run.
      read: the transform that reads the corpus, `ReadDocuments` or one with its outputs.
      schema: of the shards.
      rows_per_shard: the most rows of a file.
      compression: Parquet codec.
      checkpoint: the encoder's.
      max_tokens: the most tokens of a text; the checkpoint's own where None.
      device: where BERT runs.
      dtype: its number type.
      max_batch_tokens: padded area of a batch; by device where None.
      num_threads: CPU threads of the encoder in each process; all cores where None.
      previous_shards: of the last snapshot; none where there is none.
      previous_encoder: fingerprint of the last snapshot; None where its vectors are ignored: then only its ids are
        read, to count the deleted ones, and shards that cannot be read are skipped.
      unfinished: names of the runs whose saved work is taken up.
      beam_options: of Beam and the runner.
      encoder_hints: Beam's resource hints for the step that runs the model.
    """

    run: Run
    read: beam.PTransform
    schema: pa.Schema
    rows_per_shard: int
    compression: str
    checkpoint: str
    max_tokens: int | None
    device: str
    dtype: str
    max_batch_tokens: int | None
    num_threads: int | None
    previous_shards: Sequence[Shard]
    previous_encoder: str | None
    unfinished: Sequence[str]
    beam_options: Sequence[str] = ("--runner=FnApiRunner",)
    encoder_hints: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """The encoder's."""
        return self.run.encoder["fingerprint"]


def build(pipeline: beam.Pipeline, job: Job) -> None:
    """Adds the job to a pipeline."""
    documents, unreadable = pipeline | "ReadDocuments" >> job.read
    previous_ids, known = pipeline | "ReadKnownVectors" >> ReadKnownVectors(
        job.previous_shards,
        job.previous_encoder == job.fingerprint,
        [work_folder(job.run.output, name) for name in job.unfinished],
        job.fingerprint,
        skip_damaged=job.previous_encoder is None,
    )
    references, texts = documents | "SplitOffTexts" >> SplitOffTexts()
    winners, duplicates, repeated, deleted = (
        (references, previous_ids) | "FlattenIds" >> beam.Flatten() | "ResolveIds" >> ResolveIds()
    )
    known_rows, to_encode, waiting, known_tokens = (
        (winners, texts, known) | "FlattenTexts" >> beam.Flatten() | "MatchTexts" >> MatchTexts()
    )
    encoded, failed = (
        to_encode
        | "ToDocument" >> beam.Map(_document_of)
        | "EncodeDocuments" >> EncodeDocuments(_handler(job), job.checkpoint, job.max_tokens, job.encoder_hints)
    )
    outcomes = (
        encoded | "ToVector" >> beam.Map(_vector_of),
        failed | "ToUnusable" >> beam.Map(_unusable_of),
    ) | "FlattenOutcomes" >> beam.Flatten()
    new_rows, unencodable = (outcomes, waiting) | "HandOutVectors" >> HandOutVectors()

    rows = (known_rows, new_rows) | "FlattenRows" >> beam.Flatten()
    rejected = (unreadable, duplicates, unencodable) | "FlattenRejected" >> beam.Flatten()
    row_by_row = is_flink(job.run.runner)
    shards = (rows, winners | "CountRows" >> CountElements()) | "WriteEmbeddings" >> WriteEmbeddings(
        job.run.folder, job.schema, job.rows_per_shard, job.compression, row_by_row
    )
    rejected_files = (
        rejected,
        rejected | "CountRejected" >> CountElements(),
    ) | "WriteRejected" >> WriteRejected(job.run.folder, job.rows_per_shard, row_by_row)
    tallies = (
        documents | "TallyDocuments" >> Tally("read"),
        unreadable | "TallyUnreadable" >> Tally("read", _blank_lines),
        repeated | "TallyRepeated" >> Tally("repeated"),
        deleted | "TallyDeleted" >> Tally("deleted"),
        encoded | "TallyEncoded" >> Tally("texts_encoded", _encoded_tallies),
        known_tokens,
    ) | "FlattenTallies" >> beam.Flatten()
    _ = (shards, rejected_files, tallies) | "PublishSnapshot" >> PublishSnapshot(job.run)


def _handler(job: Job) -> EncoderModelHandler:
    encoder = job.run.encoder
    return EncoderModelHandler(
        job.checkpoint,
        job.max_tokens,
        job.device,
        job.dtype,
        job.max_batch_tokens,
        num_threads=job.num_threads,
        expected_fingerprint=job.fingerprint,
        # Not known where a job is only shown.
        expected_tokenizer=(encoder["tokenizer_sha256"], encoder["max_tokens"]) if "max_tokens" in encoder else None,
        on_encoded=WorkSaver(work_folder(job.run.output, job.run.name), job.fingerprint),
    )


_WAITING = "waiting_references"
"""Name of the field in which a text's references pass the encoder."""


def _document_of(text: TextToEncode) -> Document:
    first = text.references[0]
    return Document(first.content_hash, text.text, first.source, first.position, {_WAITING: waiting_references(text)})


def _vector_of(encoded: Encoded) -> tuple[Any, tuple]:
    vector = KnownVector(encoded.vector.tobytes(), encoded.encoder, encoded.num_tokens, encoded.truncated, "encoded")
    return encoded.document.fields[_WAITING], pack(vector)


def _unusable_of(failed: Failed) -> tuple[Any, tuple]:
    return failed.document.fields[_WAITING], pack(Unusable(failed.reason, failed.detail))


def _blank_lines(rejected: Rejected) -> Iterator[tuple[str, float]]:
    if rejected.reason == "empty_text" and rejected.detail.startswith(BLANK_LINE):
        yield "blank_lines", 1


def _encoded_tallies(encoded: Encoded) -> Iterator[tuple[str, float]]:
    yield "tokens", encoded.window_tokens
    yield "padded_tokens", encoded.padded_tokens
    yield "encode_seconds", encoded.encode_seconds
    yield f"device {encoded.device}", 1
