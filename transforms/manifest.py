"""What `manifest.json` of a snapshot must say."""

from collections.abc import Mapping
from typing import Any

from transforms.schema import SNAPSHOT_FORMAT

MANIFEST_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "format": int,
    "snapshot": str,
    "previous": (str, type(None)),
    "created": str,
    "seconds": (int, float),
    "runner": str,
    "encoder": dict,
    "counts": dict,
    "rejected_by_reason": dict,
    "shards": list,
    "versions": dict,
    "options": dict,
}
"""The keys that every manifest has, with their types; it may have more.

`previous` is the snapshot that LATEST named when the run began, also where `--full` ignored its contents.
"""

ENCODER_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "fingerprint": str,
    "bert": (str, type(None)),
    "bert_sha256": str,
    "lstm_sha256": str,
    "pooling": str,
    "window": int,
    "max_tokens": int,
    "dtype": str,
    "device": str,
}
"""The keys of `encoder`; `bert` is the name it can be loaded by, if there is one."""

COUNT_KEYS = (
    "read",
    "embedded",
    "reused",
    "recovered",
    "rejected",
    "deleted",
    "truncated",
    "tokens",
    "padded_tokens",
)
"""The keys of `counts`; `recovered` counts those of `reused` whose vector an unfinished run had encoded."""

SHARD_KEYS: Mapping[str, type | tuple[type, ...]] = {"file": str, "rows": int, "bytes": int, "checksum": str}
"""The keys of each of `shards`; `checksum` is `sha256:` and 64 hex digits."""


def check_manifest(manifest: Any) -> None:
    """Checks that a manifest is complete and that its counts agree.

    Raises:
      ValueError: it is not; the message says where.
    """
    if not isinstance(manifest, dict):
        raise ValueError("it is not a JSON object")
    if manifest.get("format") != SNAPSHOT_FORMAT:
        raise ValueError(f"its format is {manifest.get('format')!r}, not {SNAPSHOT_FORMAT}: another release wrote it")
    _check_keys(manifest, MANIFEST_KEYS, "the manifest")
    _check_keys(manifest["encoder"], ENCODER_KEYS, "encoder")
    counts, rejected, shards = manifest["counts"], manifest["rejected_by_reason"], manifest["shards"]
    _check_keys(counts, dict.fromkeys(COUNT_KEYS, int), "counts")
    _check_keys(rejected, dict.fromkeys(rejected, int), "rejected_by_reason")
    for name in COUNT_KEYS:
        if counts[name] < 0:
            raise ValueError(f"counts: {name} is {counts[name]}")
    for shard in shards:
        _check_keys(shard, SHARD_KEYS, "shards")
        if "/" in shard["file"] or shard["rows"] < 1:
            raise ValueError(f"shards: {shard} is not a file of this folder with rows in it")
    if len({shard["file"] for shard in shards}) != len(shards):
        raise ValueError("shards: a file is named twice")
    rows = counts["embedded"] + counts["reused"]
    _check_sum("read", counts["read"], "embedded, reused and rejected", rows + counts["rejected"])
    _check_sum("the shards' rows", sum(shard["rows"] for shard in shards), "embedded and reused", rows)
    _check_sum("rejected_by_reason", sum(rejected.values()), "rejected", counts["rejected"])
    if counts["recovered"] > counts["reused"]:
        raise ValueError(f"counts: recovered is {counts['recovered']}, but reused only {counts['reused']}")


def _check_keys(values: Any, keys: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a JSON object")
    for key, types in keys.items():
        if key not in values:
            raise ValueError(f"{where} lacks {key}")
        # A bool is an int for Python, but not here.
        if isinstance(values[key], bool) or not isinstance(values[key], types):
            raise ValueError(f"{where}: {key} is {values[key]!r}")


def _check_sum(name: str, value: int, parts: str, total: int) -> None:
    if value != total:
        raise ValueError(f"{name} is {value}, but {parts} together are {total}")
