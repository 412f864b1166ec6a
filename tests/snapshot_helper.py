"""Writes small snapshots with pyarrow alone, for tests of what reads and publishes them."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transforms import storage
from transforms.publish import claim, publish
from transforms.schema import EMBEDDING_DIM, FIXED_COLUMNS, Embedding, Rejected, content_hash, output_schema
from transforms.snapshots import LatestVersion, Snapshot, latest_version, snapshot_folder
from transforms.storage import join

FINGERPRINT = "f" * 64
NO_FIELDS = pa.schema([])


class Prepared(NamedTuple):
    """The arguments of `publish`, for a run whose shards are written."""

    output: str
    name: str
    manifest: dict[str, Any]
    token: LatestVersion


def unit_vector(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(EMBEDDING_DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def embedding(row_id: str, text: str = "", encoder: str = FINGERPRINT, vector: np.ndarray | None = None, **fields):
    text = text or f"text of {row_id}"
    if vector is None:
        vector = unit_vector(int(content_hash(text)[:8], 16))
    return Embedding(row_id, vector, content_hash(text), encoder, len(text.split()), False, fields)


def table(rows: Sequence[Embedding], kept_fields: pa.Schema = NO_FIELDS) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in FIXED_COLUMNS.names}
    columns |= {name: [row.fields[name] for row in rows] for name in kept_fields.names}
    schema = output_schema(kept_fields, {"encoder.fingerprint": FINGERPRINT})
    return pa.table({name: pa.array(values, schema.field(name).type) for name, values in columns.items()}, schema)


def parquet_bytes(contents: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(contents, file, compression="zstd", write_page_checksum=True)
    return file.getvalue()


def prepare(
    output: str,
    rows: Sequence[Embedding],
    kept_fields: pa.Schema = NO_FIELDS,
    rejected: Sequence[Rejected] = (),
    rows_per_shard: int = 4,
    encoder: str = FINGERPRINT,
    max_tokens: int = 8192,
    now: datetime | None = None,
) -> Prepared:
    """Does all of a run but the publishing."""
    token = latest_version(output)
    name = claim(output, now or datetime.now(timezone.utc), token)
    folder = snapshot_folder(output, name)
    starts = range(0, len(rows), rows_per_shard)
    shards = []
    for index, start in enumerate(starts):
        part = rows[start : start + rows_per_shard]
        data = parquet_bytes(table(part, kept_fields))
        file = f"embeddings-{index:05d}-of-{len(starts):05d}.parquet"
        storage.create_exclusively(join(folder, file), data)
        checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
        shards.append({"file": file, "rows": len(part), "bytes": len(data), "checksum": checksum})
    rejected_files = []
    if rejected:
        data = "".join(json.dumps(record._asdict()) + "\n" for record in rejected).encode()
        file = "rejected-00000-of-00001.jsonl"
        storage.create_exclusively(join(folder, file), data)
        checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
        rejected_files.append({"file": file, "rows": len(rejected), "bytes": len(data), "checksum": checksum})
    tokens = sum(row.num_tokens for row in rows)
    manifest = {
        "format": 1,
        "snapshot": name,
        "previous": token.name,
        "created": "2026-11-22T18:00:00+00:00",
        "seconds": 1.5,
        "runner": "FnApiRunner",
        "encoder": {
            "fingerprint": encoder,
            "checkpoint": "default",
            "bert": "a-bert",
            "bert_sha256": "b" * 64,
            "lstm_sha256": "c" * 64,
            "pooling": "mean",
            "window": 512,
            "max_tokens": max_tokens,
            "dtype": "float32",
            "device": "cpu",
        },
        "counts": {
            "read": len(rows) + len(rejected),
            "embedded": len(rows),
            "reused": 0,
            "recovered": 0,
            "rejected": len(rejected),
            "deleted": 0,
            "truncated": 0,
            "tokens": tokens,
            "padded_tokens": tokens,
        },
        "rejected_by_reason": dict(Counter(record.reason for record in rejected)),
        "shards": shards,
        "rejected_files": rejected_files,
        "versions": {"python": "3.11"},
        "options": {"input": ["corpus.jsonl"]},
    }
    return Prepared(output, name, manifest, token)


def publish_rows(output: str, rows: Sequence[Embedding], *args, **kwargs) -> Snapshot:
    return publish(*prepare(output, rows, *args, **kwargs))
