"""Finds the documents of a snapshot whose embeddings are closest to a query's.

The query is encoded by the encoder that made the snapshot, and compared with every row: exact, no index. Rows are
read in batches, so memory does not grow with the snapshot; a million rows take about ten seconds from a local disk.
"""

import argparse
import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.option_types import positive
from pipeline.text_table import text_table
from transforms.fields import storage_type
from transforms.schema import FIXED_COLUMNS
from transforms.shards import embeddings_of
from transforms.snapshots import Snapshot, is_snapshot_name, read_latest, read_snapshot, snapshot_folder

_PREFIX = snapshot_folder("", "").lstrip("/")
"""What the names of snapshots' folders begin with."""


class Hit(NamedTuple):
    """A row close to the query.

    Attributes:
      score: cosine of its embedding and the query's.
      id: the document's.
      fields: its kept fields.
    """

    score: float
    id: str
    fields: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("query", help="a text of any length")
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="hits to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the hits as JSON")
    where = parser.add_argument_group("where to look")
    where.add_argument("--output", default="output", metavar="DIR", help="local or gs:// (default: %(default)s)")
    where.add_argument("--snapshot", metavar="NAME", help="a published snapshot (default: the latest)")
    encoder = parser.add_argument_group("encoder of the query")
    encoder.add_argument(
        "--checkpoint",
        default="default",
        metavar="NAME",
        help="the one the snapshot was made with: shipped name, folder or gs:// (default: %(default)s)",
    )
    encoder.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="cpu",
        help="a single query is encoded fastest where the model loads fastest (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the hits.

    Raises:
      ValueError: the query is empty, the snapshot is missing or damaged, or it is of another encoder.
    """
    if not arguments.query.strip():
        raise ValueError("the query is empty: give a text to look for")
    snapshot = read_snapshot_of(arguments.output, arguments.snapshot)
    hits = nearest(snapshot, encode_query(snapshot, arguments), arguments.top)
    if arguments.json:
        print(json.dumps([hit._asdict() for hit in hits], indent=2, ensure_ascii=False, default=str))
        return 0
    names = list(hits[0].fields) if hits else []
    rows = [[rank, hit.score, hit.id, *hit.fields.values()] for rank, hit in enumerate(hits, 1)]
    print(text_table(["rank", "score", "id", *names], rows))
    return 0


def read_snapshot_of(output: str, name: str | None) -> Snapshot:
    """Returns the named snapshot of an output folder, or the latest.

    Args:
      output: the output folder, or the folder of a snapshot in it, which is taken where none is named.
      name: the snapshot's, or its folder's; None for the latest.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    parent, _, last = output.rstrip("/").rpartition("/")
    if last.startswith(_PREFIX) and is_snapshot_name(last.removeprefix(_PREFIX)):
        output = parent or ("/" if output.startswith("/") else ".")
        name = name or last
    if name is not None:
        return read_snapshot(output, name.removeprefix(_PREFIX))
    latest = read_latest(output)
    if latest is None:
        raise ValueError(f"{output} holds no snapshot yet: run `./launch.sh local --output {output}` first")
    return latest


def encode_query(snapshot: Snapshot, arguments: argparse.Namespace) -> np.ndarray:
    """Returns the query's embedding, (256,) float32, by the encoder that made the snapshot.

    Raises:
      ValueError: the checkpoint is not that encoder.
    """
    from transforms.encoder import BertLstmEncoder  # Takes seconds; what is wrong before needs no encoder.
    from transforms.hardware import resolve_device

    made_by = snapshot.manifest["encoder"]
    encoder = BertLstmEncoder.from_pretrained(arguments.checkpoint, made_by["max_tokens"])
    fingerprint = encoder.fingerprint()
    if fingerprint != snapshot.fingerprint:
        raise ValueError(
            f"snapshot {snapshot.name} was made by encoder {snapshot.fingerprint} (checkpoint "
            f"{made_by.get('checkpoint', 'unknown')}), but checkpoint {arguments.checkpoint} is encoder {fingerprint}: "
            "their vectors cannot be compared. Name the snapshot's with --checkpoint, or run embed with this one"
        )
    return encoder.on(resolve_device(arguments.device)).encode([arguments.query])[0]


def nearest(snapshot: Snapshot, query: np.ndarray, top: int) -> list[Hit]:
    """Compares a vector with every row of a snapshot.

    Args:
      snapshot: what to look through.
      query: (256,) float32 of unit length.
      top: how many hits at most.

    Returns:
      The closest rows, closest first; equally close ones by id.

    Raises:
      ValueError: `top` is below 1.
    """
    if top < 1:
        raise ValueError(f"--top must be at least 1, not {top}")
    best: list[Hit] = []
    for _, batch in snapshot.record_batches():
        scores = embeddings_of(batch) @ query
        candidates = np.flatnonzero(scores >= (best[-1].score if len(best) == top else -np.inf))
        if len(candidates) > top:
            # All that reach the top-th score: among equals the id decides, not the place in the batch.
            candidates = candidates[scores[candidates] >= np.partition(scores[candidates], -top)[-top]]
        rows = shown_rows(batch.drop_columns(["embedding"]).take(candidates))
        best += [_hit(score, row) for score, row in zip(scores[candidates].tolist(), rows, strict=True)]
        best = sorted(best, key=lambda hit: (-hit.score, hit.id))[:top]
    return best


def shown_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Returns rows as Python's values by column, for a person to read.

    Dates and times are Arrow's text of them, since Python's have neither nanoseconds nor all of Arrow's years; they are
    numbers, in the unit of their type, where they are durations or Arrow does not know their time zone.
    """
    columns = {name: _shown(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    return pa.record_batch(columns).to_pylist()


def _shown(column: pa.Array) -> pa.Array:
    try:
        return column.cast(_shown_type(column.type))
    except pa.ArrowInvalid:
        return column.cast(storage_type(column.type))


def _shown_type(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(_shown_type(field.type)) for field in type_])
    if pa.types.is_list(type_):
        return pa.list_(type_.value_field.with_type(_shown_type(type_.value_type)))
    is_text = pa.types.is_temporal(type_) and not pa.types.is_duration(type_)
    return pa.string() if is_text else storage_type(type_)


def _hit(score: float, row: dict[str, Any]) -> Hit:
    return Hit(score, row["id"], {name: value for name, value in row.items() if name not in FIXED_COLUMNS.names})
