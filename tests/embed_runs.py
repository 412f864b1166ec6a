"""Runs `embed` as a person does, but in this process, and looks at what it left."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.__main__ import main
from pipeline.embed import NOT_PUBLISHED, PUBLISHED
from transforms import storage
from transforms.schema import FIXED_COLUMNS
from transforms.snapshots import Snapshot, read_latest

__all__ = [
    "NOT_PUBLISHED",
    "PUBLISHED",
    "Row",
    "contents_of",
    "counts_of",
    "embed",
    "failure_of",
    "kept_schema",
    "latest",
    "rows_of",
]


class Row(NamedTuple):
    """A row of a snapshot but for its id and its encoder; `kept` holds the kept fields."""

    content_hash: str
    num_tokens: int
    truncated: bool
    kept: dict[str, Any]
    vector: np.ndarray


def embed(*options: Any, output: Any) -> int:
    """Runs `python -m pipeline local`, in float32 on the CPU; returns the exit status."""
    return main(["local", "--device=cpu", "--dtype=float32", f"--output={output}", *map(str, options)])


def latest(output: Any) -> Snapshot:
    """Returns the last snapshot, which there must be."""
    snapshot = read_latest(str(output))
    assert snapshot is not None
    return snapshot


def rows_of(snapshot: Snapshot) -> dict[str, Row]:
    """Returns the rows of a snapshot by id; their encoder is the manifest's."""
    rows: dict[str, Row] = {}
    for _, batch in snapshot.record_batches():
        for row in batch.to_pylist():
            row_id, vector = row.pop("id"), np.array(row.pop("embedding"), np.float32)
            assert row.pop("encoder") == snapshot.fingerprint
            assert row_id not in rows, f"{row_id} is there twice"
            text_hash, num_tokens, truncated = (row.pop(name) for name in ("content_hash", "num_tokens", "truncated"))
            rows[row_id] = Row(text_hash, num_tokens, truncated, row, vector)
    return rows


def counts_of(snapshot: Snapshot) -> dict[str, int]:
    """Returns a snapshot's counts that are not 0, less those of tokens, which `rows_of` shows."""
    counts = snapshot.manifest["counts"]
    return {name: count for name, count in counts.items() if count and name not in ("tokens", "padded_tokens")}


def kept_schema(snapshot: Snapshot) -> pa.Schema:
    """Returns the kept fields' columns, of which all shards must have the same."""
    schema = snapshot.schema()
    assert schema is not None
    assert schema.names[: len(FIXED_COLUMNS)] == FIXED_COLUMNS.names
    return pa.schema(list(schema)[len(FIXED_COLUMNS) :])


def contents_of(output: Any) -> dict[str, bytes]:
    """Returns all files under a folder with what is in them."""
    names = storage.list_files(str(output))
    return {name: storage.open_for_reading(storage.join(str(output), name)).read() for name in names}


def failure_of(capfd, *options: Any, output: Any) -> str:
    """Runs `embed`, which must end with status 1 and say nothing but a message of one line; returns that."""
    capfd.readouterr()
    assert embed(*options, output=output) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err[len("error: ") : -1]
