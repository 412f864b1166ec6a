"""PublishSnapshot: adds up what a run read, wrote and rejected, and publishes the snapshot only if it all agrees."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from transforms import storage
from transforms.publish import abandon, publish, remove_leftovers, remove_old
from transforms.schema import SNAPSHOT_FORMAT
from transforms.shard_files import PARTS_FOLDER, ShardFile
from transforms.snapshots import LatestVersion, remove_work, snapshot_folder

REPORT_FILE = "report.json"
"""In the folder of a snapshot that was not published: why, with the counts. Nothing but a person reads it."""

REJECTED_FILES = "rejected-*.jsonl"

_MEASURED_TOKENS = 10_000
"""A run that encodes fewer says little about the rate; it goes by the last snapshot's."""


@dataclass(frozen=True)
class Run:
    """What a run knows about itself when it starts.

    Attributes:
      output: the output folder.
      name: of its snapshot, as claimed.
      token: what LATEST said when it started.
      started: seconds since the epoch.
      created: the same as text, UTC.
      runner: Beam runner.
      encoder: fingerprint, BERT, pooling and so on, for the manifest; dtype and device are added.
      versions: of Python and the packages.
      options: the job's.
      max_rejected_fraction: of what was read; more is not published.
      keep_snapshots: how many published snapshots stay; all where None.
      finished_work: names of runs whose work this snapshot makes useless, its own included.
      seconds_per_token: of encoding, by the last snapshot or else by saved work; to tell what known vectors saved.
      input_digest: of what the snapshot is made from; None where nobody asked for it.
    """

    output: str
    name: str
    token: LatestVersion
    started: float
    created: str
    runner: str
    encoder: Mapping[str, Any]
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    max_rejected_fraction: float
    keep_snapshots: int | None = None
    finished_work: Sequence[str] = ()
    seconds_per_token: float | None = None
    input_digest: str | None = None

    @property
    def folder(self) -> str:
        """The folder of its snapshot."""
        return snapshot_folder(self.output, self.name)


def build_manifest(
    run: Run, shards: Sequence[ShardFile], rejected: Sequence[ShardFile], tallies: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the manifest of a run, from what its steps counted.

    Args:
      run: the run.
      shards: the Parquet files, with the tallies of their rows.
      rejected: the files of rejected records, with the tallies of theirs by reason.
      tallies: `read`, `blank_lines` of text files among them, `deleted`, `tokens`, `padded_tokens`, `encode_seconds`,
        `known_tokens` of distinct texts whose vector was known (all three with special tokens), and `device
        <description>`.
    """
    rows = _summed(shards)
    by_reason = _summed(rejected)
    tokens = int(tallies.get("tokens", 0))
    encode_seconds = float(tallies.get("encode_seconds", 0.0))
    seconds_per_token = run.seconds_per_token
    if tokens >= _MEASURED_TOKENS or (tokens and seconds_per_token is None):
        seconds_per_token = encode_seconds / tokens
    reused = rows.pop("reused", 0)
    recovered = rows.pop("recovered", 0)
    known_tokens = int(tallies.get("known_tokens", 0))
    devices = sorted(name.removeprefix("device ") for name in tallies if name.startswith("device "))
    return {
        "format": SNAPSHOT_FORMAT,
        "snapshot": run.name,
        "previous": run.token.name,
        "created": run.created,
        "seconds": round(time.time() - run.started, 3),
        "runner": run.runner,
        "encoder": {
            **run.encoder,
            "dtype": ", ".join(device.rpartition(" ")[2] for device in devices) or "none: nothing was encoded",
            "device": ", ".join(device.rpartition(" ")[0] for device in devices) or "none: nothing was encoded",
        },
        "counts": {
            "read": int(tallies.get("read", 0)),
            "embedded": rows.get("encoded", 0),
            "reused": reused + recovered,
            "recovered": recovered,
            "rejected": sum(file.rows for file in rejected),
            "deleted": int(tallies.get("deleted", 0)),
            "truncated": rows.get("truncated", 0),
            "texts_encoded": int(tallies.get("texts_encoded", 0)),
            "repeated": int(tallies.get("repeated", 0)),
            "blank_lines": int(tallies.get("blank_lines", 0)),
            "tokens": tokens,
            "padded_tokens": int(tallies.get("padded_tokens", 0)),
        },
        "encode_seconds": round(encode_seconds, 3),
        "seconds_per_token": seconds_per_token,
        "seconds_saved": round(known_tokens * seconds_per_token, 3) if seconds_per_token else 0.0,
        "rejected_by_reason": dict(sorted(by_reason.items())),
        "shards": [_described(shard) for shard in _in_order(shards)],
        "rejected_files": [_described(file) for file in _in_order(rejected)],
        "versions": dict(run.versions),
        "options": dict(run.options),
        "input_digest": run.input_digest,
    }


def reasons_against(run: Run, manifest: Mapping[str, Any]) -> list[str]:
    """Returns why a snapshot must not be published; nothing where it may."""
    counts = manifest["counts"]
    reasons = []
    accounted = counts["embedded"] + counts["reused"] + counts["rejected"]
    if counts["read"] != accounted:
        reasons.append(
            f"the counts disagree: {counts['read']} records were read, but {counts['embedded']} embedded + "
            f"{counts['reused']} reused + {counts['rejected']} rejected are {accounted}"
        )
    rows = sum(shard["rows"] for shard in manifest["shards"])
    if rows != counts["embedded"] + counts["reused"]:
        reasons.append(
            f"the counts disagree: the shards hold {rows} rows, but {counts['embedded']} were embedded and "
            f"{counts['reused']} reused"
        )
    # A text without an id that only repeats another one's is the same document once more: nothing is lost. Blank lines
    # of text files are no records, as in other formats.
    lost = counts["rejected"] - counts["repeated"] - counts["blank_lines"]
    records = counts["read"] - counts["blank_lines"]
    # Divided, not multiplied: 29 of 100 are the 0.29 that was allowed, but 0.29 * 100 is a little less than 29.
    if records and lost / records > run.max_rejected_fraction:
        reasons.append(
            f"{lost} of {records} records were rejected ({lost / records:.2%}), more than "
            f"--max_rejected_fraction {run.max_rejected_fraction} allows"
        )
    if records == 0:
        reasons.append("the input holds no record at all")
    return reasons


def _summed(files: Sequence[ShardFile]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for file in files:
        for name, count in file.tallies.items():
            sums[name] = sums.get(name, 0) + count
    return sums


def _in_order(files: Sequence[ShardFile]) -> list[ShardFile]:
    return sorted(files, key=lambda file: file.file)


def _described(file: ShardFile) -> dict[str, Any]:
    return {"file": file.file, "rows": file.rows, "bytes": file.bytes, "checksum": file.checksum}


def finish(
    run: Run, shards: Sequence[ShardFile], rejected: Sequence[ShardFile], tallies: Mapping[str, float]
) -> dict[str, Any]:
    """Publishes a run's snapshot, or says in its folder why not; safe to try again.

    Returns:
      The manifest; with a key `not_published`, the reasons, where it was not published.

    Raises:
      ConcurrentRunError: another run published first.
    """
    manifest = build_manifest(run, shards, rejected, tallies)
    reasons = reasons_against(run, manifest)
    storage.delete_folder(f"{run.folder}/{PARTS_FOLDER}")
    if reasons:
        manifest["not_published"] = reasons
        abandon(run.output, run.name, keep=[REJECTED_FILES, REPORT_FILE])
        report = f"{run.folder}/{REPORT_FILE}"
        earlier = storage.read_versioned(report)  # Of an earlier try.
        generation = storage.ABSENT if earlier is None else earlier.generation
        storage.replace_if_generation(report, json.dumps(manifest, indent=2).encode() + b"\n", generation)
        return manifest
    manifest = publish(run.output, run.name, manifest, run.token).manifest
    for name in run.finished_work:
        remove_work(run.output, name)
    remove_leftovers(run.output)
    if run.keep_snapshots is not None:
        remove_old(run.output, run.keep_snapshots)
    return manifest


class _Finish(beam.DoFn):
    """Calls `finish` once, with what the run's steps counted."""

    def __init__(self, run: Run):
        self._run = run

    def process(self, _, shards: Sequence[ShardFile], rejected: Sequence[ShardFile], tallies: Mapping[str, float]):
        yield finish(self._run, shards, rejected, tallies)


@dataclass
class PublishSnapshot(beam.PTransform):
    """(shards, rejected files, tallies) to one manifest: published, or with the reasons why not.

    Takes ShardFiles of rows, ShardFiles of rejected records, and (name, number) tallies, which are added up.

    Attributes:
      run: what the run knows about itself.
    """

    run: Run

    def expand(self, inputs):
        """Wires the sums and the one step that sees the list of files."""
        shards, rejected, tallies = inputs
        sums = tallies | "SumTallies" >> beam.CombinePerKey(sum)
        return (
            shards.pipeline
            | "Once" >> beam.Create([None], reshuffle=False)
            | "Finish"
            >> beam.ParDo(
                _Finish(self.run),
                beam.pvalue.AsList(shards),
                beam.pvalue.AsList(rejected),
                beam.pvalue.AsDict(sums),
            )
        )
