"""What travels through the pipeline and what lands on disk: records, reject reasons and the Parquet schema."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

EMBEDDING_DIM = 256
"""Numbers in one text embedding; fixed for every encoder of this project."""

SNAPSHOT_FORMAT = 1
"""Version of the snapshot layout; readers refuse a manifest with another one."""

PREVIEW_CHARS = 120
"""How much of an unusable record its reject keeps, so that a person can recognise it."""

REJECT_REASONS: Mapping[str, str] = {
    "invalid_utf8": "the bytes are not UTF-8",
    "malformed_record": "the record does not parse as its format (JSON object, CSV row)",
    "missing_text": "the text field is absent or null",
    "empty_text": "the text holds no character the tokenizer keeps",
    "wrong_type": "a field holds a value of another type than it must",
    "missing_id": "the id field is absent, null or empty",
    "duplicate_id": "another document with this id won",
    "truncated_file": "the compressed file ends before its stream does",
    "corrupt_file": "the file, or a part of it, cannot be decoded",
    "too_large": "the record is longer than the limit",
    "encode_error": "the encoder raised an error on this text alone",
    "non_finite": "the encoder gave NaN or infinity for this text",
}
"""Every reason a record can be rejected for, with what it means."""


class Document(NamedTuple):
    """One text to embed, and where it came from.

    Attributes:
      id: the document's name, unique in a corpus.
      text: what is embedded.
      source: the file it was read from.
      position: its place in that file: line number from 1, row index from 0, or byte offset (see `read`).
      fields: kept fields by name, already of the types of the output's columns.
      id_is_hash: true where the input named no id and `id` is the content hash.
    """

    id: str
    text: str
    source: str = ""
    position: int = 0
    fields: Mapping[str, Any] = {}
    id_is_hash: bool = False


class Rejected(NamedTuple):
    """One record that could not be embedded, and why.

    Attributes:
      source: the file it was read from.
      position: its place in that file, as in `Document`.
      id: the document's id where one was known, else empty.
      reason: a key of `REJECT_REASONS`.
      detail: what exactly was wrong, for a person.
      preview: the start of the offending text.
    """

    source: str
    position: int
    id: str
    reason: str
    detail: str
    preview: str


class Embedding(NamedTuple):
    """One row of the output.

    Attributes:
      id: the document's id.
      embedding: a numpy array (256,) of float32, finite and of unit length.
      content_hash: `content_hash` of the text.
      encoder: fingerprint of the encoder that made the vector.
      num_tokens: WordPiece tokens of the text that were encoded, special tokens not counted.
      truncated: true where the text had more than `max_tokens` tokens.
      fields: the document's kept fields.
      origin: where the vector comes from: `encoded` in this run, `reused` from the last snapshot, or
        `recovered` from the work of a run that did not finish.
    """

    id: str
    embedding: Any
    content_hash: str
    encoder: str
    num_tokens: int
    truncated: bool
    fields: Mapping[str, Any] = {}
    origin: str = "encoded"


def pack_row(row: Embedding) -> tuple:
    """Returns a row as a plain tuple with its vector as bytes: Beam encodes that ten times faster than it pickles."""
    return row[0], row.embedding.tobytes(), *row[2:]


def content_hash(text: str) -> str:
    """Returns the SHA-256 of the text's UTF-8 bytes in hex: equal texts, equal hashes, on every machine."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def preview(value: str | bytes) -> str:
    """Returns the first `PREVIEW_CHARS` characters of a value; undecodable bytes show as U+FFFD."""
    if isinstance(value, bytes):
        value = value[: 4 * PREVIEW_CHARS].decode("utf-8", errors="replace")
    # Surrogates cannot be written as UTF-8.
    return value[:PREVIEW_CHARS].encode("utf-8", errors="replace").decode("utf-8")


FIXED_COLUMNS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32(), EMBEDDING_DIM), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("encoder", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
    ]
)
"""The columns every shard has; the kept fields follow them."""


def output_schema(kept_fields: pa.Schema, metadata: Mapping[str, str]) -> pa.Schema:
    """Returns the schema of the shards.

    Values come back from Parquet as they were, types but for these: seconds are read as milliseconds (`timestamp[s]`,
    `time32[s]`), `date64` as `date32`, items of lists are named `element`. Only Arrow's readers know of durations
    (others see int64 in the duration's unit), of time zones but UTC (others see the same instant in UTC), and of large
    strings, binaries and lists, which to others are like small ones.

    Args:
      kept_fields: the fields copied from the input, with their types.
      metadata: key/value pairs for every shard's footer; what only workers know, dtype and device, is in the manifest.

    Raises:
      ValueError: a kept field has the name of a fixed column, or a type that Parquet has not.
    """
    clashes = sorted(set(FIXED_COLUMNS.names) & set(kept_fields.names))
    if clashes:
        raise ValueError(
            f"kept fields {clashes} have the names of output columns: rename them in the input, or leave them out "
            "of --keep_fields"
        )
    for field in kept_fields:
        try:
            # Nothing is written but to memory: an OSError is of the type, too.
            pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])).close()
        except (pa.ArrowNotImplementedError, OSError) as error:
            raise ValueError(
                f"kept field {field.name!r} is {field.type}, which Parquet has no type for: give another one, as in "
                f"--keep_fields {field.name}:string"
            ) from error
    return pa.schema([*FIXED_COLUMNS, *kept_fields], metadata=dict(metadata))
