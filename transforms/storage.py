"""Files and folders, the same on this machine and on gs://, with writes that are refused when another came first."""

import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from transforms import gcs
from transforms.gcs import ConflictError

__all__ = ["ConflictError"]  # The one exception of both kinds of storage.


class Versioned(NamedTuple):
    """A file's content, and a number that is another one after every write.

    Attributes:
      data: the content.
      generation: on gs:// the object's generation; on this machine inode and time of change.
    """

    data: bytes
    generation: int


LOCK_SUFFIX = ".lock"

_MOST_ATTEMPTS = 100
"""At a folder that others remove at the same time."""

_PAUSE_SECONDS = 0.1
"""Between two attempts to delete a folder: others that delete it are done meanwhile."""

_READ_BYTES = 1 << 24

ABSENT = 0
"""The generation of a file that does not exist."""


def check_url(url: str) -> None:
    """Raises ValueError unless a path is of this machine or of gs://."""
    scheme, separator, _ = url.partition("://")
    if not url or (separator and scheme != "gs") or (not separator and url.startswith("gs:")):
        raise ValueError(f"{url!r} is neither a folder of this machine nor gs://bucket/folder: name one of these two")


def is_remote(url: str) -> bool:
    """Returns whether a path is on gs://."""
    return url.startswith("gs://")


def join(folder: str, *names: str) -> str:
    """Returns the path of a file in a folder."""
    return "/".join([folder.rstrip("/"), *names])


def read_versioned(url: str) -> Versioned | None:
    """Returns a small file's content with its generation, or None where there is no such file."""
    if is_remote(url):
        found = gcs.read_with_generation(url)
        return None if found is None else Versioned(*found)
    try:
        with open(url, "rb") as file:
            return Versioned(file.read(), _generation(os.fstat(file.fileno())))
    except (FileNotFoundError, NotADirectoryError):
        return None


def create_exclusively(url: str, data: bytes) -> None:
    """Writes a small file whole and durably, unless there is one.

    Raises:
      ConflictError: there is one.
    """
    replace_if_generation(url, data, ABSENT)


def replace_if_generation(url: str, data: bytes, generation: int) -> None:
    """Writes a small file whole and durably, if it still has the generation that was read.

    Args:
      url: the file; its folder is created.
      data: its new content, unique to the caller (see `gcs.create_exclusively`).
      generation: as `read_versioned` returned it, or `ABSENT`.

    Raises:
      ConflictError: it has another generation.
    """
    if is_remote(url):
        gcs.replace_if_generation(url, data, generation)
        return
    with locked(url) as (lock_path, lock_file):
        current = read_versioned(url)
        if (ABSENT if current is None else current.generation) != generation:
            raise ConflictError(f"{url} was written by another process: its generation is no longer {generation}")
        os.ftruncate(lock_file, 0)
        with open(lock_file, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(lock_file)
        os.replace(lock_path, url)
        _sync_folder(os.path.dirname(url))


def open_for_reading(url: str) -> BinaryIO:
    """Opens a file for reading and seeking.

    Raises:
      FileNotFoundError: there is no such file.
    """
    return gcs.open_for_reading(url) if is_remote(url) else open(url, "rb")


def check_writable(folder: str) -> None:
    """Makes a folder where it is missing, and writes a file there and deletes it.

    Raises:
      OSError: that cannot be done.
    """
    probe = join(folder, f".probe-{uuid.uuid4().hex}")
    create_exclusively(probe, probe.encode())
    delete_files([probe])


@contextmanager
def folder_to_fill(url: str, last: str) -> Iterator[Path]:
    """Gives a folder of this machine, whose files are in `url` once the block has ended without an error.

    Args:
      url: the folder they are to be in.
      last: name of the file that comes last where the folder is on gs://: who finds it in a new one finds all others.

    Raises:
      ValueError: the folder is on other storage.
    """
    check_url(url)
    if not is_remote(url):
        yield Path(url)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        names = list_files(scratch).keys() - {last}
        for name in [*sorted(names), last]:
            gcs.upload(Path(scratch, name), join(url, name))


def checksum(url: str) -> str:
    """Returns `sha256:` and the SHA-256 of a file's bytes in hex."""
    digest = hashlib.sha256()
    with open_for_reading(url) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def list_files(folder: str) -> dict[str, int]:
    """Returns the sizes in bytes of all files under a folder, by relative path; none where there is no folder."""
    if is_remote(folder):
        return gcs.list_files(folder)
    sizes = {}
    # Not `Path.rglob`, which fails where a folder is deleted while it looks, and is silent about one it may not read.
    for parent, _, names in os.walk(folder, onerror=_raise_unless_gone):
        for name in names:
            path = Path(parent, name)
            try:
                if path.is_file():
                    sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
            except FileNotFoundError:
                continue  # Deleted while we looked.
    return sizes


def list_folders(folder: str) -> list[str]:
    """Returns the names of the folders right under a folder, sorted; none where there is no folder."""
    if is_remote(folder):
        return gcs.list_folders(folder)
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def delete_files(urls: Iterable[str]) -> None:
    """Deletes files; one that is not there is no error."""
    urls = list(urls)
    if urls and is_remote(urls[0]):
        gcs.delete_files(urls)
        return
    for url in urls:
        Path(url).unlink(missing_ok=True)


def delete_folder(folder: str) -> None:
    """Deletes a folder with all that is in it; one that is not there is no error."""
    if is_remote(folder):
        gcs.delete_files(join(folder, name) for name in gcs.list_files(folder))
        return
    for attempt in itertools.count(1):
        try:
            shutil.rmtree(folder)
            return
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not os.path.lexists(folder):
                return
            # Another process deletes it too, and was quicker with a file; or has just written one there.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or attempt == _MOST_ATTEMPTS:
                raise
            time.sleep(_PAUSE_SECONDS)


def delete_if_empty(folder: str) -> None:
    """Deletes a folder of this machine that holds nothing; elsewhere an empty folder does not exist."""
    if not is_remote(folder):
        with suppress(OSError):  # Not empty, or not there: both as it should be.
            os.rmdir(folder)


def make_durable(folder: str, names: Iterable[str]) -> None:
    """Has the operating system bring files of a folder to disk; objects on gs:// are durable as they are."""
    if is_remote(folder):
        return
    for name in names:
        with open(join(folder, name), "rb") as file:
            os.fsync(file.fileno())
    if os.path.isdir(folder):
        _sync_folder(folder)


def remove_lock(url: str) -> None:
    """Removes what a process that was killed in the middle of writing a file of this machine has left of it."""
    if not is_remote(url):
        with locked(url):
            pass  # Letting go of a lock removes it.


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _generation(status: os.stat_result) -> int:
    return (status.st_mtime_ns << 64) | status.st_ino


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(url: str) -> Iterator[tuple[str, int]]:
    """Holds the lock of a file of this machine: its neighbour `NAME.lock`, in which new content can be written as well.

    The kernel lets go of the lock when its holder dies, so a lock file that a crash left behind bars nobody.

    Yields:
      The lock file's path and its descriptor, empty and open for writing.
    """
    path = url + LOCK_SUFFIX
    for attempt in itertools.count(1):
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, FileExistsError):
            # Another process removed the folder, empty as it was, between the two calls, or within the first, which
            # then finds that it is there and is no folder; or it cannot be made at all.
            if attempt == _MOST_ATTEMPTS:
                raise
            continue
        # Waits for its holder, a process or thread that is about to write.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # Its holder has renamed or deleted it: take its successor.
    try:
        yield path, descriptor
    finally:
        try:
            if _is_at(descriptor, path):
                os.unlink(path)
        finally:
            # Closing alone would not do: a process that was forked meanwhile has the descriptor too, and so the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
