"""Publishing a snapshot: taking its name, moving LATEST, removing what nobody needs; on this machine and on gs://.

A run takes a name (`claim`), writes its shards, and calls `publish`, which goes through these steps:

1. LATEST is as it was when the run began, and every file is there; else nothing is written.
2. manifest.json is created.
3. LATEST is made to name the snapshot, if it still is as it was: compare-and-swap.
4. The claim is let go of.

A crash before 3 leaves LATEST on the old snapshot and this one outside the history, thus unread, until another run
removes it; after 3 the snapshot is published, and only its claim is left. Every step may be done twice.
"""

import json
import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatch
from typing import Any

from transforms import storage
from transforms.manifest import check_manifest
from transforms.process_identity import is_alive, this_process
from transforms.shards import BrokenShardError, DamagedSnapshotError, SnapshotError
from transforms.snapshots import (
    CLAIMS_FOLDER,
    MANIFEST_FILE,
    NAME_FORMAT,
    WORK_FOLDER,
    LatestVersion,
    Snapshot,
    check_files,
    history,
    is_published,
    latest_path,
    latest_version,
    manifest_path,
    read_manifest,
    snapshot_folder,
    snapshot_names,
)
from transforms.storage import ConflictError, join


class ConcurrentRunError(SnapshotError):
    """Another run published into the same output folder first."""


def claim(output: str, now: datetime, token: LatestVersion) -> str:
    """Takes a name for a new snapshot, which no other run gets.

    Args:
      output: the output folder.
      now: the time the run begins, with a time zone.
      token: `latest_version` as of the run's start.

    Returns:
      `now` in UTC to the second, or the next second that is free and above the last snapshot's.
    """
    instant = now.astimezone(timezone.utc).replace(microsecond=0)
    if token.name is not None:
        last = datetime.strptime(token.name, NAME_FORMAT).replace(tzinfo=timezone.utc)
        instant = max(instant, last + timedelta(seconds=1))
    run = {
        "run": uuid.uuid4().hex,  # Tells this run's request from another one's, see `gcs.create_exclusively`.
        "generation": token.generation,
        **this_process(),
    }
    while True:
        name = instant.strftime(NAME_FORMAT)
        try:
            storage.create_exclusively(_claim_path(output, name), json.dumps(run).encode())
        except ConflictError:
            pass
        else:
            # Looked for only now: whoever had the name may have published and let go of it just before.
            if not storage.list_files(snapshot_folder(output, name)):
                return name
            _release(output, name)
        instant += timedelta(seconds=1)


def check_not_overtaken(output: str, token: LatestVersion) -> None:
    """Checks that no other run has published since this one began.

    A run that is overtaken can never publish, and the other one may remove its shards: whatever error it meets may
    come from that, so ask here before reporting the error.

    Raises:
      ConcurrentRunError: another run has published.
    """
    latest = latest_version(output)
    if latest != token:
        raise ConcurrentRunError(
            f"another run published snapshot {latest.name} into {output} while this one was at work, which had "
            f"started from {token.name or 'an empty folder'}: this one publishes nothing. Run it again; it will "
            "encode only what that snapshot lacks"
        )


def publish(output: str, name: str, manifest: dict[str, Any], token: LatestVersion) -> Snapshot:
    """Writes the manifest and has LATEST name the snapshot, unless another run has published since `token`.

    May be called again with the same arguments after an error at any point, and after success: the manifest that was
    written first stands.

    Args:
      output: the output folder.
      name: as `claim` returned it; all its files are whole and closed. Its hidden folders, in which files wait to be
        moved to their place, are removed.
      manifest: see `transforms.manifest`.
      token: `latest_version` as of the run's start.

    Returns:
      The published snapshot.

    Raises:
      ValueError: the manifest is invalid, or the name is not claimed.
      BrokenShardError: a file of the manifest is missing or has another size.
      ConcurrentRunError: another run has published; all that this one wrote, but for its work, is removed.
    """
    check_manifest(manifest)
    if (manifest["snapshot"], manifest["previous"]) != (name, token.name):
        raise ValueError(
            f"the manifest is of snapshot {manifest['snapshot']} after {manifest['previous']}, not of {name} after "
            f"{token.name}"
        )
    try:
        check_not_overtaken(output, token)
        snapshot = _write_manifest(Snapshot(output, name, manifest))
        _move_latest(output, name, token)
    except ConcurrentRunError:
        if not is_published(output, name):
            _remove_snapshot(output, name)
            _release(output, name)
            raise
        snapshot = read_manifest(output, name)  # By an earlier call for this very run.
    _release(output, name)
    return snapshot


def abandon(output: str, name: str, keep: Sequence[str] = ()) -> None:
    """Removes what a run that will not publish has written, but for its work, which the next run takes up.

    Call it when the run's job has ended; files that a worker writes later stay there, though nobody reads them.

    Args:
      output: the output folder.
      name: as `claim` returned it.
      keep: patterns of file names that stay for a person to read, `rejected-*.jsonl` say.

    Raises:
      ValueError: the snapshot is published.
    """
    if is_published(output, name):
        raise ValueError(f"snapshot {name} of {output} is published: remove_old removes such")
    _remove_snapshot(output, name, keep)
    _release(output, name)


def is_running(output: str, name: str) -> bool:
    """Returns whether the run that claimed a name is a living process of this machine."""
    found = storage.read_versioned(_claim_path(output, name))
    return found is not None and is_alive(json.loads(found.data))


def remove_leftovers(output: str) -> list[str]:
    """Removes the snapshots of runs that died or were overtaken, and can never publish; to be called after publishing.

    What is left alone: runs that may still publish, those of living processes of this machine, work in progress, and
    what abandoned runs keep for a person.

    Returns:
      The names of the runs whose files were removed, oldest first.
    """
    latest = latest_version(output)
    removed = []
    for file in storage.list_files(_claims_folder(output)):
        if file.endswith(storage.LOCK_SUFFIX):
            storage.remove_lock(join(_claims_folder(output), file.removesuffix(storage.LOCK_SUFFIX)))
    for name in _claimed(output):
        found = storage.read_versioned(_claim_path(output, name))
        if found is None:
            continue  # Let go of while we looked.
        run = json.loads(found.data)
        if run["generation"] == latest.generation or is_alive(run):
            continue
        try:
            published = is_published(output, name)
        except DamagedSnapshotError:
            continue  # Not to be known, so not to be removed.
        if not published:
            _remove_snapshot(output, name)
            removed.append(name)
        _release(output, name)
    _remove_empty_work(output)
    return removed


def remove_old(output: str, keep: int) -> list[str]:
    """Removes the oldest published snapshots, and what else lies in the folder from before those that stay.

    Args:
      output: the output folder.
      keep: how many published ones stay. The latest one and the one that it was made from always do.

    Returns:
      The names of the removed ones, oldest first.

    Raises:
      ValueError: `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"at least 1 snapshot must be kept, not {keep}")
    kept = []
    for name, snapshot in history(output):
        if snapshot is not None:
            kept.append(name)
        if len(kept) == max(keep, 2):
            break
    else:
        return []
    claimed = _claimed(output)
    old = [name for name in snapshot_names(output) if name < kept[-1] and name not in claimed]
    for name in old:  # Oldest first: a crash leaves a history without gaps.
        _remove_snapshot(output, name)
    return old


def _write_manifest(snapshot: Snapshot) -> Snapshot:
    """Writes the manifest of a snapshot that is whole; returns the snapshot as its first manifest has it."""
    output, name, manifest = snapshot.output, snapshot.name, snapshot.manifest
    if storage.read_versioned(_claim_path(output, name)) is None:
        raise ValueError(f"snapshot {name} of {output} is not claimed: its run has been abandoned")
    try:
        check_files(snapshot)
    except DamagedSnapshotError as error:  # Which tells how to do without a published snapshot, and this is none yet.
        raise BrokenShardError(*error.args) from error
    for folder in storage.list_folders(snapshot.folder):
        if folder.startswith("."):
            storage.delete_folder(join(snapshot.folder, folder))
    storage.make_durable(snapshot.folder, [file["file"] for file in (*manifest["shards"], *snapshot.rejected_files)])
    path = manifest_path(output, name)
    try:
        storage.create_exclusively(path, json.dumps(manifest, indent=2).encode() + b"\n")
    except ConflictError:
        first = read_manifest(output, name)
        for key in ("encoder", "counts", "shards"):
            if first.manifest[key] != manifest[key]:
                raise ValueError(f"{path} was written by an earlier try with other {key}: abandon this run") from None
        return first
    return snapshot


def _move_latest(output: str, name: str, token: LatestVersion) -> None:
    try:
        storage.replace_if_generation(latest_path(output), name.encode(), token.generation)
    except ConflictError:
        check_not_overtaken(output, token)
        raise


def _remove_snapshot(output: str, name: str, keep: Sequence[str] = ()) -> None:
    folder = snapshot_folder(output, name)
    storage.delete_files([join(folder, MANIFEST_FILE)])  # First: what is left without it is no snapshot.
    kept = [file for file in storage.list_files(folder) if any(fnmatch(file, pattern) for pattern in keep)]
    if not kept:
        storage.delete_folder(folder)
        return
    for subfolder in storage.list_folders(folder):
        storage.delete_folder(join(folder, subfolder))
    storage.delete_files(join(folder, file) for file in storage.list_files(folder) if file not in kept)


def _claims_folder(output: str) -> str:
    return join(output, WORK_FOLDER, CLAIMS_FOLDER)


def _claim_path(output: str, name: str) -> str:
    return join(_claims_folder(output), name + ".json")


def _claimed(output: str) -> list[str]:
    files = storage.list_files(_claims_folder(output))
    return sorted(file.removesuffix(".json") for file in files if file.endswith(".json"))


def _release(output: str, name: str) -> None:
    storage.delete_files([_claim_path(output, name)])
    _remove_empty_work(output)


def _remove_empty_work(output: str) -> None:
    storage.delete_if_empty(_claims_folder(output))
    storage.delete_if_empty(join(output, WORK_FOLDER))
