"""Says what a snapshot holds, checks that it is whole, or tells two of them apart."""

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.option_types import not_negative
from pipeline.search import read_snapshot_of, shown_rows
from pipeline.text_table import text_pairs, text_table
from transforms.audit import audit
from transforms.diff import CATEGORIES, diff
from transforms.schema import REJECT_REASONS
from transforms.shards import embeddings_of, read_shard
from transforms.snapshots import Snapshot, list_published

SAMPLED_SHARDS = 8
SAMPLED_ROWS_PER_SHARD = 12_500
"""Norms and tokens are measured on the first so many rows of so many shards: 100,000 rows at most."""

_LISTED_SHARDS = 8
_SHOWN_ITEMS = 4
_SHOWN_FAULTS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("output", nargs="?", default="output", metavar="DIR", help="local or gs:// (default: output)")
    parser.add_argument("--snapshot", metavar="NAME", help="a published snapshot (default: the latest)")
    parser.add_argument("--rows", type=not_negative, default=3, metavar="N", help="rows to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--check",
        action="store_true",
        help="read everything and verify it: checksums, rows, schema, finite vectors of length 1, unique ids, rejected "
        "records; exit status 1 where something is wrong",
    )
    instead.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="say which ids were added, changed, deleted or re-encoded from snapshot A to B; needs temporary space, "
        "about 150 bytes for each row of both",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints what was asked for.

    Returns:
      0, or 1 where `--check` found faults.

    Raises:
      ValueError: there is no such snapshot, or it is damaged.
    """
    if arguments.diff:
        return _print_diff(arguments)
    snapshot = read_snapshot_of(arguments.output, arguments.snapshot)
    if arguments.check:
        return _print_check(snapshot, arguments.json)
    description = describe(snapshot, arguments.rows)
    print(_as_json(description) if arguments.json else _as_text(snapshot, description))
    return 0


def describe(snapshot: Snapshot, num_rows: int) -> dict[str, Any]:
    """Returns what a snapshot holds.

    Args:
      snapshot: which.
      num_rows: rows to show.

    Returns:
      The manifest, with the `schema` and footer `metadata` of the shards, `norms` and `num_tokens` (min, mean, max) of
      the `sampled_rows`, the first `rows`, and the names of all `published` snapshots.
    """
    schema = snapshot.schema() or pa.schema([])
    return {
        **snapshot.manifest,
        "folder": snapshot.folder,
        "published": list_published(snapshot.output),
        "schema": {field.name: str(field.type) for field in schema},
        "metadata": {
            key.decode(errors="replace"): value.decode(errors="replace")  # For people: damage is to be seen as well.
            for key, value in (schema.metadata or {}).items()
        },
        **_statistics(snapshot),
        "rows": list(itertools.islice(_rows(snapshot), num_rows)),
    }


def _statistics(snapshot: Snapshot) -> dict[str, Any]:
    shards = snapshot.shards
    places = np.linspace(0, len(shards) - 1, min(len(shards), SAMPLED_SHARDS)).astype(int)
    norms, num_tokens = [np.empty(0)], [np.empty(0, dtype=np.int64)]
    for shard in (shards[place] for place in places):
        left = SAMPLED_ROWS_PER_SHARD
        for batch in read_shard(shard.path, ["embedding", "num_tokens"], rows=shard.rows):
            part = batch.slice(0, left)
            norms.append(np.linalg.norm(embeddings_of(part).astype(np.float64), axis=1))
            num_tokens.append(part.column("num_tokens").to_numpy())
            left -= len(part)
            if left == 0:
                break
    return {
        "sampled_rows": sum(map(len, norms)),
        "norms": _spread(np.concatenate(norms)),
        "num_tokens": _spread(np.concatenate(num_tokens)),
    }


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    return {"min": values.min().item(), "mean": values.mean().item(), "max": values.max().item()}


def _rows(snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    for _, batch in snapshot.record_batches(batch_rows=64):
        yield from shown_rows(batch)


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _as_text(snapshot: Snapshot, description: Mapping[str, Any]) -> str:
    manifest = snapshot.manifest
    sections = [
        text_pairs(
            [
                ("snapshot", snapshot.name),
                ("in", snapshot.folder),
                ("created", manifest["created"]),
                ("made from", manifest["previous"] or "nothing"),
                ("took", f"{manifest['seconds']:,.1f} seconds on {manifest['runner']}"),
                ("published", f"{len(description['published'])} in this folder, {description['published'][-1]} last"),
            ],
            indent="",
        ),
        "encoder\n" + text_pairs(manifest["encoder"].items()),
        "counts\n" + text_table(["", "number"], list(manifest["counts"].items())),
    ]
    if manifest["rejected_by_reason"]:
        rejected = manifest["rejected_by_reason"].items()
        rows = [[reason, count, REJECT_REASONS.get(reason, "")] for reason, count in rejected]
        sections.append("rejected\n" + text_table(["reason", "records", "because"], rows))
    shards = manifest["shards"]
    listed = [[shard["file"], shard["rows"], shard["bytes"]] for shard in shards[:_LISTED_SHARDS]]
    if len(shards) > _LISTED_SHARDS:
        rest = shards[_LISTED_SHARDS:]
        listed.append([f"{len(rest)} more", sum(s["rows"] for s in rest), sum(s["bytes"] for s in rest)])
    sections.append(f"shards: {len(shards)}\n" + text_table(["file", "rows", "bytes"], listed))
    if shards:
        sections.append("schema\n" + text_pairs(description["schema"].items()))
        spreads = [[name, *map(float, description[name].values())] for name in ("norms", "num_tokens")]
        sections.append(
            f"measured on {description['sampled_rows']:,} of {snapshot.num_rows:,} rows\n"
            + text_table(["", "min", "mean", "max"], spreads)
        )
    if description["rows"]:
        sections.append(f"first {len(description['rows'])} rows")
        sections += [text_pairs((name, _shown(value)) for name, value in row.items()) for row in description["rows"]]
    return "\n\n".join(sections)


def _shown(value: Any) -> str:
    if isinstance(value, list) and len(value) > _SHOWN_ITEMS:
        items = [f"{item:.4f}" if isinstance(item, float) else str(item) for item in value[:_SHOWN_ITEMS]]
        return f"[{', '.join(items)}, … {len(value)} in all]"
    return str(value)


def _print_check(snapshot: Snapshot, as_json: bool) -> int:
    faults = list(audit(snapshot))
    if as_json:
        print(_as_json({"snapshot": snapshot.name, "faults": faults}))
    elif not faults:
        print(f"{snapshot.folder} is whole: {len(snapshot.shard_paths)} shards, {snapshot.num_rows:,} rows")
    else:
        print(f"{snapshot.folder} has {len(faults)} faults:")
        print("\n".join(f"  {fault}" for fault in faults[:_SHOWN_FAULTS]))
        if len(faults) > _SHOWN_FAULTS:
            print(f"  and {len(faults) - _SHOWN_FAULTS} more")
    return 1 if faults else 0


def _print_diff(arguments: argparse.Namespace) -> int:
    before, after = (read_snapshot_of(arguments.output, name) for name in arguments.diff)
    found = diff(before, after)
    if arguments.json:
        print(
            _as_json({"before": before.name, "after": after.name, "counts": found.counts, "examples": found.examples})
        )
        return 0
    rows = [[category, found.counts[category], meaning] for category, meaning in CATEGORIES.items()]
    print(f"from {before.name} to {after.name}")
    print(text_table(["", "ids", "meaning"], rows))
    for category, ids in found.examples.items():
        if ids:
            more = found.counts[category] - len(ids)
            print(f"\n{category}\n  " + "\n  ".join([*ids, *([f"and {more:,} more"] if more else [])]))
    return 0
