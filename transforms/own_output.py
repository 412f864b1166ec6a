"""Tells the files that runs wrote to their output folder from input beside them: no run reads its own output."""

import os

from transforms import storage
from transforms.snapshots import WORK_FOLDER, is_snapshot_name, latest_path, snapshot_folder


def is_own_output(path: str, output: str) -> bool:
    """Returns whether a file is LATEST, of a snapshot, or of unfinished work in an output folder.

    Args:
      path: the file's, absolute or on other storage.
      output: the output folder, absolute or gs://.
    """
    latest, snapshots, work = _names(output)
    if not any(os.path.basename(name) in path for name in (latest, snapshots, work)):
        return False  # Most files: their links need not be followed.
    if not storage.is_remote(output):
        path = os.path.realpath(path)
        latest, snapshots, work = _names(os.path.realpath(output))
    if path.startswith(snapshots):
        return is_snapshot_name(path.removeprefix(snapshots).partition("/")[0])
    return path in (latest, latest + storage.LOCK_SUFFIX) or path.startswith(f"{work}/")


def _names(output: str) -> tuple[str, str, str]:
    """Returns what the paths of LATEST, of files of snapshots and of files of work are or begin with."""
    return latest_path(output), snapshot_folder(output, ""), storage.join(output, WORK_FOLDER)
