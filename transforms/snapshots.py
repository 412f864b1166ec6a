"""The output folder as state: where its files are, and what was published in it; on this machine and on gs://.

    LATEST                       the name of the snapshot published last
    snapshot=NAME/               shards, rejected records, and manifest.json, which is written last
    .work/claims/NAME.json       the name is taken by a run that has neither published nor given up
    .work/run=NAME/              what an unfinished run has encoded so far

Published are exactly the snapshot that LATEST names, the one that its manifest calls `previous`, and so on. So one
atomic write, LATEST's, publishes a snapshot, and nothing else that a crash leaves in the folder is read by anybody: a
snapshot whose run lost against another one, or died between its manifest and LATEST, is not in that history.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import pyarrow as pa

from transforms import storage
from transforms.manifest import check_manifest
from transforms.shards import BATCH_ROWS, DamagedSnapshotError, Shard, SnapshotError, open_shard, read_shard
from transforms.storage import join

LATEST_FILE = "LATEST"
MANIFEST_FILE = "manifest.json"
WORK_FOLDER = ".work"
CLAIMS_FOLDER = "claims"

NAME_FORMAT = "%Y%m%dT%H%M%SZ"
"""A snapshot's name is the UTC time at which its run began, so names sort by age."""

_SNAPSHOT_PREFIX = "snapshot="
_RUN_PREFIX = "run="


class LatestVersion(NamedTuple):
    """What LATEST says, and as of which write: what a run starts from and publishes upon.

    Attributes:
      name: of the snapshot; None where there is none, or where LATEST does not hold a snapshot's name.
      generation: as of `storage.read_versioned`, or `storage.ABSENT`.
    """

    name: str | None
    generation: int


@dataclass(frozen=True)
class Snapshot:
    """A snapshot whose manifest was read.

    Attributes:
      output: the output folder.
      name: its name.
      manifest: what `manifest.json` says (see `transforms.manifest`).
    """

    output: str
    name: str
    manifest: dict[str, Any]

    @property
    def folder(self) -> str:
        """The folder its files are in."""
        return snapshot_folder(self.output, self.name)

    @property
    def shards(self) -> list[Shard]:
        """Its Parquet files, in the manifest's order."""
        shards = self.manifest["shards"]
        return [Shard(join(self.folder, shard["file"]), shard["rows"], shard["checksum"]) for shard in shards]

    @property
    def shard_paths(self) -> list[str]:
        """Where its Parquet files are, in the manifest's order."""
        return [shard.path for shard in self.shards]

    @property
    def rejected_files(self) -> list[dict[str, Any]]:
        """Its files of rejected records, described as shards are; none where its manifest does not list them."""
        return self.manifest.get("rejected_files", [])

    @property
    def num_rows(self) -> int:
        """Rows of all its shards together, by the manifest."""
        return sum(shard["rows"] for shard in self.manifest["shards"])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the encoder that all its vectors come from."""
        return self.manifest["encoder"]["fingerprint"]

    def schema(self) -> pa.Schema | None:
        """Returns the shards' schema with kept fields and footer metadata; None where there are no shards."""
        for path in self.shard_paths:
            with open_shard(path) as shard:
                return shard.schema_arrow
        return None

    def record_batches(
        self, columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS
    ) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Reads its rows, one batch in memory at a time.

        Args:
          columns: the names of those to read; all where None.
          batch_rows: the most rows of a batch.

        Yields:
          A shard's path and rows of that shard, in order.

        Raises:
          DamagedSnapshotError: a shard is missing, cannot be decoded, or does not hold its rows.
        """
        for shard in self.shards:
            for batch in read_shard(shard.path, columns, batch_rows, shard.rows):
                yield shard.path, batch


# Paths and names.


def snapshot_folder(output: str, name: str) -> str:
    """Returns the folder of a snapshot's files."""
    return join(output, _SNAPSHOT_PREFIX + name)


def manifest_path(output: str, name: str) -> str:
    """Returns where a snapshot's manifest is."""
    return join(snapshot_folder(output, name), MANIFEST_FILE)


def latest_path(output: str) -> str:
    """Returns where LATEST is."""
    return join(output, LATEST_FILE)


def is_snapshot_name(name: str) -> bool:
    """Returns whether a text has the form of a snapshot's name."""
    try:
        return datetime.strptime(name, NAME_FORMAT).strftime(NAME_FORMAT) == name
    except ValueError:
        return False


def snapshot_names(output: str) -> list[str]:
    """Returns the names of all snapshot folders, oldest first, whether published or not."""
    folders = storage.list_folders(output)
    names = [folder.removeprefix(_SNAPSHOT_PREFIX) for folder in folders if folder.startswith(_SNAPSHOT_PREFIX)]
    return [name for name in names if is_snapshot_name(name)]


# What was published.


def latest_version(output: str) -> LatestVersion:
    """Returns what LATEST says now; a run takes it when it starts, and publishes upon it."""
    storage.check_url(output)
    found = storage.read_versioned(latest_path(output))
    if found is None:
        return LatestVersion(None, storage.ABSENT)
    name = found.data.decode("utf-8", errors="replace").strip()
    return LatestVersion(name if is_snapshot_name(name) else None, found.generation)


def read_latest(output: str) -> Snapshot | None:
    """Returns the snapshot that LATEST names, or None where nothing has been published.

    Raises:
      DamagedSnapshotError: LATEST names no snapshot, or its manifest is missing or invalid.
    """
    latest = latest_version(output)
    if latest.generation == storage.ABSENT:
        published = _published_without_latest(output)
        if published is None:
            return None
        latest = latest_version(output)  # Another run may have published since the first look, its first snapshot.
        if latest.generation == storage.ABSENT:
            raise DamagedSnapshotError(latest_path(output), f"is missing, though snapshot {published} was published")
    if latest.name is None:
        raise DamagedSnapshotError(latest_path(output), "does not hold the name of a snapshot")
    return read_manifest(output, latest.name)


def _published_without_latest(output: str) -> str | None:
    """Returns the last snapshot that has a manifest and no claim, if there is one: LATEST must have named it once.

    A run that died before LATEST has left its claim.
    """
    for name in reversed(snapshot_names(output)):
        if storage.read_versioned(manifest_path(output, name)) is not None:
            claim = join(output, WORK_FOLDER, CLAIMS_FOLDER, name + ".json")
            if storage.read_versioned(claim) is None:
                return name
    return None


def read_snapshot(output: str, name: str) -> Snapshot:
    """Returns the published snapshot of a name.

    Raises:
      SnapshotError: there is none; the message names those that there are.
      DamagedSnapshotError: its manifest is missing or invalid.
    """
    removed = storage.read_versioned(manifest_path(output, name)) is None and name != latest_version(output).name
    if is_published(output, name) and not removed:
        return read_manifest(output, name)
    names = list_published(output)
    raise SnapshotError(f"{output} has no published snapshot {name!r}, but these: {', '.join(names) or 'none'}")


def list_published(output: str) -> list[str]:
    """Returns the names of the published snapshots, oldest first.

    It reads one manifest for each, from the newest to the first one that has been removed or is damaged.
    """
    return [name for name, snapshot in history(output) if snapshot is not None][::-1]


def is_published(output: str, name: str) -> bool:
    """Returns whether a snapshot has been published; reads the manifests of those above it.

    One that was removed, as older ones are, counts as published only while the history shows it.

    Raises:
      DamagedSnapshotError: it may have been, but the manifest of one above it is missing or invalid.
    """
    for published, snapshot in history(output):
        if published <= name:
            return published == name
        if snapshot is None:
            if storage.read_versioned(manifest_path(output, name)) is None:
                return False  # A manifest is written before LATEST: without one it never was, or has been removed.
            raise DamagedSnapshotError(manifest_path(output, published), f"does not say whether {name} came before it")
    return False


def history(output: str) -> Iterator[tuple[str, Snapshot | None]]:
    """Yields what was published, newest first, names strictly falling.

    The last one comes as None where its manifest has been removed or is damaged; what came before it is not known.
    """
    name = latest_version(output).name
    while name is not None:
        try:
            snapshot = read_manifest(output, name)
        except DamagedSnapshotError:
            yield name, None
            return
        yield name, snapshot
        name = snapshot.manifest["previous"]


def read_manifest(output: str, name: str) -> Snapshot:
    """Reads the manifest of a snapshot, published or not.

    Raises:
      DamagedSnapshotError: it is missing, or does not say what it must.
    """
    path = manifest_path(output, name)
    found = storage.read_versioned(path)
    if found is None:
        raise DamagedSnapshotError(path, "is missing")
    try:
        manifest = json.loads(found.data)
        check_manifest(manifest)
    except ValueError as error:
        raise DamagedSnapshotError(path, f"is not a manifest ({error})") from error
    previous = manifest["previous"]
    if manifest["snapshot"] != name or (previous is not None and previous >= name):
        raise DamagedSnapshotError(path, f"is of snapshot {manifest['snapshot']} after {previous}")
    return Snapshot(output, name, manifest)


# Shards.


def check_shards(snapshot: Snapshot) -> None:
    """Compares the sizes of a snapshot's shards with its manifest; one listing, and nothing is read.

    Raises:
      DamagedSnapshotError: a shard is missing or has another size.
    """
    _check_sizes(snapshot, snapshot.manifest["shards"])


def check_files(snapshot: Snapshot) -> None:
    """As `check_shards`, for the files of rejected records too, which no later run reads.

    Raises:
      DamagedSnapshotError: a file is missing or has another size.
    """
    _check_sizes(snapshot, [*snapshot.manifest["shards"], *snapshot.rejected_files])


def _check_sizes(snapshot: Snapshot, files: Sequence[Mapping[str, Any]]) -> None:
    sizes = storage.list_files(snapshot.folder)
    for file in files:
        path = join(snapshot.folder, file["file"])
        if file["file"] not in sizes:
            raise DamagedSnapshotError(path, "is missing")
        if sizes[file["file"]] != file["bytes"]:
            raise DamagedSnapshotError(path, f"has {sizes[file['file']]} bytes, not {file['bytes']}")


# Work in progress.


def work_folder(output: str, run: str) -> str:
    """Returns the folder for what a run has encoded so far; `run` is the name that it claimed."""
    return join(output, WORK_FOLDER, _RUN_PREFIX + run)


def list_work(output: str) -> list[str]:
    """Returns the names of the runs that have left, or are at, work in progress, oldest first."""
    folders = storage.list_folders(join(output, WORK_FOLDER))
    return [folder.removeprefix(_RUN_PREFIX) for folder in folders if folder.startswith(_RUN_PREFIX)]


def remove_work(output: str, run: str) -> None:
    """Removes a run's work in progress; that there is none is no error."""
    storage.delete_folder(work_folder(output, run))
    storage.delete_if_empty(join(output, WORK_FOLDER))
