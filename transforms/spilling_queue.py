"""SpillingQueue: a queue between threads whose writers never wait, since what memory cannot hold waits on disk."""

import pickle
import tempfile
import threading
from collections import deque
from typing import Any, BinaryIO, NamedTuple


class _InMemory(NamedTuple):
    item: Any
    size_bytes: int


class _OnDisk(NamedTuple):
    start: int
    size_bytes: int


class SpillingQueue:
    """First in, first out; any number of writers, and one reader.

    Items that go to disk are pickled. The file has no name, so that nothing is left behind whatever ends the process.

    Args:
      max_memory_bytes: what the items in memory may take up together; those that are put beyond it go to disk.
    """

    def __init__(self, max_memory_bytes: int):
        self._max_memory_bytes = max_memory_bytes
        self._memory_bytes = 0
        self._waiting: deque[_InMemory | _OnDisk] = deque()
        self._file: BinaryIO | None = None
        self._end_of_file = 0
        self._on_disk = 0
        self._changed = threading.Condition()

    def put(self, item: Any, size_bytes: int) -> None:
        """Adds an item; one of no size stays in memory, and comes out as the very object that it is.

        Raises:
          OSError: the disk takes no more.
        """
        with self._changed:
            if size_bytes == 0 or self._memory_bytes + size_bytes <= self._max_memory_bytes:
                self._waiting.append(_InMemory(item, size_bytes))
                self._memory_bytes += size_bytes
            else:
                self._waiting.append(self._write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL)))
            self._changed.notify()

    def get(self) -> Any:
        """Returns the oldest item, once there is one.

        Raises:
          OSError: the disk does not give back what it took.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            oldest = self._waiting.popleft()
            if isinstance(oldest, _OnDisk):
                return pickle.loads(self._read(oldest))
            self._memory_bytes -= oldest.size_bytes
            return oldest.item

    def _write(self, data: bytes) -> _OnDisk:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it lives as long as the queue.
            self._file.seek(self._end_of_file)
            if self._file.write(data) != len(data):
                raise OSError(f"only a part of {len(data)} bytes was written")
        except OSError as error:
            raise OSError(
                error.errno,
                f"what is to be handed over waits on disk, and {tempfile.gettempdir()} cannot hold {len(data)} bytes "
                f"more beside {self._end_of_file} ({error}): have TMPDIR name a folder with more room",
            ) from error
        written = _OnDisk(self._end_of_file, len(data))
        self._end_of_file += len(data)
        self._on_disk += 1
        return written

    def _read(self, place: _OnDisk) -> bytes:
        assert self._file is not None
        self._file.seek(place.start)
        data = self._file.read(place.size_bytes)
        if len(data) != place.size_bytes:
            raise OSError(f"the queue's file gave {len(data)} of {place.size_bytes} bytes back")
        self._on_disk -= 1
        if not self._on_disk:  # The file's room is given back.
            self._file.truncate(0)
            self._end_of_file = 0
        return data
