"""Runs the whole job on documents made in code, and reads back what it published."""

import json
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.embed import describe_encoder
from pipeline.graph import Job, build
from transforms import storage
from transforms.publish import claim
from transforms.reconcile import REPORT_FILE, Run
from transforms.schema import Document, Rejected, output_schema
from transforms.snapshots import check_shards, latest_version, list_work, read_latest


@dataclass
class Given(beam.PTransform):
    """In place of ReadDocuments: documents and rejected records that are there already."""

    documents: list[Document]
    rejected: list[Rejected]

    def expand(self, pipeline):
        documents = pipeline | "Documents" >> beam.Create(self.documents)
        return documents, pipeline | "Rejected" >> beam.Create(self.rejected)


def documents_of(texts: dict[str, str], **fields: Any) -> list[Document]:
    """Documents by id, each of a line of its own."""
    return [Document(id_, text, "made.jsonl", line, fields) for line, (id_, text) in enumerate(texts.items(), 1)]


def make_job(
    output: str,
    checkpoint: str,
    documents: list[Document],
    rejected: list[Rejected] | None = None,
    kept_fields: pa.Schema | None = None,
    full: bool = False,
    max_tokens: int | None = None,
    rows_per_shard: int = 250_000,
    **run_arguments: Any,
) -> Job:
    """Plans a job as `embed` does, but for the reading."""
    started = time.time()
    encoder = describe_encoder(checkpoint, max_tokens)
    token = latest_version(output)
    latest = read_latest(output)
    if latest is not None:
        check_shards(latest)
    unfinished = [] if full else list_work(output)
    name = claim(output, datetime.fromtimestamp(started, timezone.utc), token)
    arguments: dict[str, Any] = {"max_rejected_fraction": 1.0, "finished_work": [*list_work(output), name]}
    arguments |= run_arguments
    run = Run(
        output=output, name=name, token=token, started=started, created="2026-01-01T00:00:00+00:00", runner="local",
        encoder=encoder, versions={}, options={}, **arguments,
    )  # fmt: skip
    return Job(
        run=run,
        read=Given(documents, rejected or []),
        schema=output_schema(kept_fields or pa.schema([]), {}),
        rows_per_shard=rows_per_shard,
        compression="zstd",
        checkpoint=checkpoint,
        max_tokens=max_tokens,
        device="cpu",
        dtype="float32",
        max_batch_tokens=None,
        num_threads=None,
        previous_shards=latest.shards if latest else [],
        previous_encoder=latest.fingerprint if latest and not full else None,
        unfinished=unfinished,
    )


def run_job(job: Job) -> dict[str, Any]:
    """Runs a job and returns its manifest, or its report where it was not published."""
    pipeline = beam.Pipeline(options=PipelineOptions(list(job.beam_options)))
    build(pipeline, job)
    pipeline.run().wait_until_finish()
    for name in ("manifest.json", REPORT_FILE):
        found = storage.read_versioned(f"{job.run.folder}/{name}")
        if found is not None:
            return json.loads(found.data)
    raise AssertionError(f"no manifest in {job.run.folder}")


def published_rows(output: str) -> dict[str, dict[str, Any]]:
    """Returns the rows of the last snapshot by id, vectors as bytes."""
    snapshot = read_latest(output)
    assert snapshot is not None
    rows = [row for _, batch in snapshot.record_batches() for row in batch.to_pylist()]
    by_id = {
        row["id"]: row | {"embedding": pa.array(row["embedding"], pa.float32()).buffers()[1].to_pybytes()}
        for row in rows
    }
    assert len(by_id) == len(rows), "an id is there twice"
    return by_id


__all__ = ["Given", "documents_of", "make_job", "published_rows", "replace", "run_job"]
