"""The table that ends a run: what was read, embedded and rejected, and where the output is."""

from collections.abc import Mapping
from typing import Any


def summary(folder: str, manifest: Mapping[str, Any]) -> str:
    """Returns the summary of a run.

    Args:
      folder: the snapshot's.
      manifest: its manifest, or the report in its place.
    """
    counts = manifest["counts"]
    published = "not_published" not in manifest
    output = folder.rpartition("/")[0]
    lines = ["", f"{'published' if published else 'NOT published'}  snapshot={manifest['snapshot']}", ""]
    lines += [f"  {name:<22}{value:>14,}" for name, value in _rows(counts)]
    lines += [f"    {reason:<20}{count:>14,}" for reason, count in manifest["rejected_by_reason"].items()]
    if counts["tokens"]:
        lines.append(f"  {'padding ratio':<22}{counts['padded_tokens'] / counts['tokens']:>14.3f}")
        lines.append(f"  {'encoder ran on':<22}{manifest['encoder']['device']:>14}, {manifest['encoder']['dtype']}")
    lines.append(f"  {'seconds':<22}{manifest['seconds']:>14,.1f}")
    lines.append(f"  {'seconds saved':<22}{manifest['seconds_saved']:>14,.1f}")
    lines += ["", f"  in {folder}", ""]
    if published:
        lines += [
            "  open it with",
            f"    duckdb -c \"SELECT * FROM '{folder}/*.parquet' LIMIT 5\"",
            f"    python -c \"import polars; print(polars.read_parquet('{folder}/*.parquet'))\"",
            f'    ./launch.sh search "what you look for" --output {output}{_checkpoint_option(manifest)}',
        ]
    else:
        lines += [f"  because {reason}" for reason in manifest["not_published"]]
        if counts["rejected"]:
            lines.append(f"  the rejected records are in {folder}/rejected-*.jsonl")
    if manifest["rejected_files"] and published:
        lines.append(f"  the rejected records are in {folder}/rejected-*.jsonl")
    return "\n".join(lines)


def _checkpoint_option(manifest: Mapping[str, Any]) -> str:
    checkpoint = manifest["encoder"]["checkpoint"]
    return "" if checkpoint == "default" else f" --checkpoint {checkpoint}"


def _rows(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [
        ("records read", counts["read"]),
        ("embedded", counts["embedded"]),
        ("reused", counts["reused"]),
        ("  of a crashed run", counts["recovered"]),
        ("deleted", counts["deleted"]),
        ("truncated", counts["truncated"]),
        ("tokens encoded", counts["tokens"]),
        ("rejected", counts["rejected"]),
    ]
