"""Input files through Beam's filesystems: which files a glob matches, and their bytes as they are stored."""

import itertools
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import BinaryIO, NamedTuple, TypeVar

from apache_beam.io.filesystem import BeamIOError, CompressionTypes, FileMetadata, FileSystem
from apache_beam.io.filesystems import FileSystems

from transforms.own_output import is_own_output

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
"""How much is read at a time."""

_PACKAGES = {"s3": ("boto3", "aws"), "azfs": ("azure.storage.blob", "azure"), "hdfs": ("hdfs", "hadoop")}
"""Storage that Beam reads with a package of its own: scheme to module and extra of `apache-beam`."""

_ANY_FOLDERS = "/**/"
"""In a glob: any folders, or none."""


class InputFile(NamedTuple):
    """A file as it was when it was listed; what is appended to it later is not read.

    Attributes:
      path: where it is, local or gs://.
      size_bytes: its size, compressed if it is.
    """

    path: str
    size_bytes: int


class ListedFile(NamedTuple):
    """A file, and what else its listing tells.

    Attributes:
      file: as the job reads it.
      modified_seconds: when it was written last, since the epoch; None where its storage does not tell.
    """

    file: InputFile
    modified_seconds: float | None


def match_files(pattern: str, limit: int | None = None, output: str | None = None) -> list[InputFile]:
    """Returns the files that a glob matches, sorted by path; see `list_files`."""
    return [listed.file for listed in list_files(pattern, limit, output)]


def list_files(pattern: str, limit: int | None = None, output: str | None = None) -> list[ListedFile]:
    """Returns the files that a glob matches, sorted by path, with the times of their last writing.

    `*` matches within a folder, `**` across folders, and `**/` any folders or none. Local paths become absolute, so
    that a file has one name whatever the glob and the folder of the process.

    Args:
      pattern: a glob or a path, local or gs://. A path that exists as it is written means that file, brackets and all.
      limit: list at most this many.
      output: an output folder, absolute or gs://; what runs wrote there is left out.

    Raises:
      OSError: nothing matches, or what matches cannot be read: a folder, a pipe, a broken link.
      ValueError: no filesystem is known for the pattern, its package is missing, or a file's name is not UTF-8.
    """
    pattern = absolute_pattern(pattern)
    scheme = FileSystems.get_scheme(pattern)
    files: Iterable[ListedFile]
    if scheme is None:
        paths = [pattern] if os.path.lexists(pattern) else _list_local(pattern)
        files = (_stat(path) for path in paths if output is None or not is_own_output(path, output))
    else:
        _check_scheme(scheme, pattern)
        files = _list_remote(pattern, limit, output)
    listed = sorted(itertools.islice(files, limit), key=lambda found: found.file.path)
    if not listed and output is not None:
        list_files(pattern, 1)  # Raises where there is nothing to leave out either.
        raise FileNotFoundError(
            f"no file matches {pattern} but those that runs wrote to the output folder {output}, which are never read "
            "as input: name other files, or another --output"
        )
    if not listed:
        raise FileNotFoundError(f"no file matches {pattern}")
    for file, _ in listed:
        try:
            file.path.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"the name of {file.path!r} is not UTF-8: rename it") from None
    return listed


def _check_scheme(scheme: str, pattern: str) -> None:
    """Raises ValueError where Beam cannot read what a pattern's scheme stands for, with the remedy."""
    if scheme in _PACKAGES:
        module, extra = _PACKAGES[scheme]
        try:
            import_module(module)
        except ImportError as error:
            raise ValueError(
                f"{pattern}: reading {scheme}:// needs a package that is not installed ({error}): run "
                f"`{sys.executable} -m pip install 'apache-beam[{extra}]'`, on the workers' machines too"
            ) from error
    try:
        FileSystems.get_filesystem(pattern)
    except ValueError as error:
        raise ValueError(
            f"{pattern}: files cannot be read from {scheme}://: name files of this machine or gs://, or install Beam's "
            f"extra for {', '.join(f'{known}://' for known in _PACKAGES)}; copy others there first"
        ) from error


def _list_remote(pattern: str, limit: int | None, output: str | None) -> Iterator[ListedFile]:
    found = _match_remote(pattern, limit)
    wanted = [file for file in found if output is None or not is_own_output(file.path, output)]
    if not wanted and len(found) == limit:  # The limit may hide the files that are not left out.
        wanted = [file for file in _match_remote(pattern, None) if not is_own_output(file.path, str(output))]
    for file in wanted:
        # An object whose name ends in a slash stands for a folder.
        if not file.path.endswith("/"):
            # Beam has 0 for a time that it does not know.
            yield ListedFile(InputFile(file.path, file.size_in_bytes), file.last_updated_in_seconds or None)


def _match_remote(pattern: str, limit: int | None) -> Sequence[FileMetadata]:
    try:
        filesystem = FileSystems.get_filesystem(pattern)
        if any(character in pattern for character in "*?[") and filesystem.exists(pattern):
            return [filesystem.metadata(pattern)]
        if _ANY_FOLDERS in pattern:
            # Beam takes `**/` for one folder at least: it lists more, and the glob decides.
            wider = filesystem.match([pattern.replace(_ANY_FOLDERS, "/**")], [None])[0].metadata_list
            is_match = _regex(pattern).match
            return [file for file in wider if is_match(file.path)]
        return filesystem.match([pattern], [limit])[0].metadata_list
    except BeamIOError as error:
        raise OSError(f"cannot list {pattern}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Returns what is behind an error of Beam's filesystems, which put it into one that tells little, or into two."""
    details = error.exception_details if isinstance(error, BeamIOError) else None
    return "; ".join(map(_reason, details.values())) if details else str(error)


def _list_local(pattern: str) -> Iterator[str]:
    """Yields the paths of the files that an absolute glob matches.

    Beam's own listing leaves out broken links and folders that may not be read, and walks through all subfolders.
    """
    root = os.path.dirname(re.split(r"[*?[]", pattern, maxsplit=1)[0])
    is_match = _regex(pattern).match
    # Through links to folders above, `**` would go round in circles.
    for folder, subfolders, names in os.walk(root, onerror=_raise_unless_missing, followlinks="**" not in pattern):
        subfolders[:] = [name for name in subfolders if _leads_on(os.path.join(folder, name), pattern)]
        for path in (os.path.join(folder, name) for name in names):
            if is_match(path):
                yield path


def _regex(pattern: str) -> re.Pattern[str]:
    """Returns what matches the paths that a glob means: Beam's, but for `/**/`, which also stands for a mere `/`."""
    return re.compile(re.sub(r"(?:/\.\*)+/", "/(?:.*/)?", FileSystem.translate_pattern(pattern)))


def _leads_on(folder: str, pattern: str) -> bool:
    """Returns whether files that a glob matches may be in a folder."""
    if "**" in pattern:
        return True
    parts = pattern.split(os.sep)
    start = parts[: folder.count(os.sep) + 1]
    return len(start) < len(parts) and re.match(FileSystem.translate_pattern(os.sep.join(start)), folder) is not None


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _stat(path: str) -> ListedFile:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path} is a folder: write {os.path.join(path, '*')} for the files in it")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is no regular file: write what it gives to a file first")
    return ListedFile(InputFile(path, status.st_size), status.st_mtime)


def absolute_pattern(pattern: str) -> str:
    """Returns a local pattern as an absolute one, and others as they are."""
    if FileSystems.get_scheme(pattern) is not None:
        return pattern
    # A slash at the end means the files in the folder; `abspath` drops it.
    return os.path.abspath(os.path.join(pattern, "*") if pattern.endswith(os.sep) else pattern)


class RawFile:
    """An open file whose errors name it.

    Args:
      file: seekable.
      path: its name.

    Attributes:
      path: its name.
      error: of the last read that failed, else None: a decoder may report it as something else.
      closed: whether it was closed.
    """

    def __init__(self, file: BinaryIO, path: str):
        self._file = file
        self.path = path
        self.error: OSError | None = None
        self.closed = False

    def read(self, num_bytes: int = -1) -> bytes:
        """Returns the next bytes, fewer only at the end."""
        return self._named(lambda: self._file.read(num_bytes))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to another place and returns its offset."""
        return self._named(lambda: self._file.seek(offset, whence))

    def tell(self) -> int:
        """Returns the offset of the next byte."""
        return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        self.closed = True
        self._file.close()

    def chunks(self, num_bytes: int | None = None) -> Iterator[bytes]:
        """Yields the next bytes, at most `CHUNK_BYTES` at a time.

        Args:
          num_bytes: how many; None for all.

        Raises:
          OSError: there are fewer.
        """
        remaining = num_bytes
        while remaining is None or remaining > 0:
            chunk = self.read(CHUNK_BYTES if remaining is None else min(CHUNK_BYTES, remaining))
            if chunk:
                yield chunk
            elif remaining is None:
                return
            else:
                raise OSError(f"{self.path} became {remaining:,} bytes shorter while it was being read: start again")
            if remaining is not None:
                remaining -= len(chunk)

    def _named(self, operation: Callable[[], T]) -> T:
        try:
            return operation()
        except Exception as error:  # Each filesystem raises errors of its own.
            self.error = OSError(f"cannot read {self.path}: {error}")
            raise self.error from error


def open_file(path: str) -> RawFile:
    """Opens a file's bytes as they are stored: Beam's own decompression takes a truncated file for a complete one.

    Raises:
      OSError: it cannot be opened; the message names it.
    """
    try:
        return RawFile(FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED), path)
    except Exception as error:  # Each filesystem raises errors of its own.
        raise OSError(f"cannot open {path}: {error}") from error
