"""Input files through Beam's filesystems: which files a glob matches, and how to open one."""

import os
from typing import BinaryIO, NamedTuple

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems


class InputFile(NamedTuple):
    """A file as it was when it was listed; what is appended to it later is not read.

    Attributes:
      path: where it is, local or gs://.
      size_bytes: its size, compressed if it is.
    """

    path: str
    size_bytes: int


def match_files(pattern: str, limit: int | None = None) -> list[InputFile]:
    """Returns the files that a glob matches, sorted by path.

    `*` matches within a folder, `**` across folders. Local paths become absolute, so that a file has one name whatever
    the glob and the folder of the process.

    Args:
      pattern: a glob or a path, local or gs://. A path that exists as it is written means that file, brackets and all.
      limit: list at most this many.

    Raises:
      FileNotFoundError: nothing matches.
      IsADirectoryError: the pattern is a folder.
      ValueError: no filesystem is known for it.
    """
    pattern = absolute_pattern(pattern)
    filesystem = FileSystems.get_filesystem(pattern)
    if os.path.isdir(pattern):
        raise IsADirectoryError(f"{pattern} is a folder: write {os.path.join(pattern, '*')} for the files in it")
    if any(character in pattern for character in "*?[") and filesystem.exists(pattern):
        matches = [filesystem.metadata(pattern)]
    else:
        matches = filesystem.match([pattern], [limit])[0].metadata_list
    # On gs:// an object whose name ends in a slash stands for a folder.
    files = [InputFile(match.path, match.size_in_bytes) for match in matches if not match.path.endswith("/")]
    if not files:
        raise FileNotFoundError(f"no file matches {pattern}")
    return sorted(files)


def absolute_pattern(pattern: str) -> str:
    """Returns a local pattern as an absolute one, and others as they are."""
    if FileSystems.get_scheme(pattern) is not None:
        return pattern
    # A slash at the end means the files in the folder; `abspath` drops it.
    return os.path.abspath(os.path.join(pattern, "*") if pattern.endswith(os.sep) else pattern)


def open_file(path: str) -> BinaryIO:
    """Opens a file's bytes as they are stored: Beam's own decompression takes a truncated file for a complete one.

    Raises:
      OSError: the file cannot be opened; the message names it.
    """
    try:
        return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)
    except Exception as error:  # Each filesystem raises errors of its own.
        raise OSError(f"cannot open {path}: {error}") from error
