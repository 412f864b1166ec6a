"""Streams: threads that each compute on one core, side by side, where many cores would compute one product together.

Cores that share a product wait for each other after each step of it, and stand idle in all that is not a product; where
another program takes one of them, all wait for that one.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Streams:
    """Threads of this process, each with one thread of PyTorch's; the process can end without waiting for them.

    They end once nobody holds this object. While they are made, threads of others that have not computed yet are told
    to use one core too.

    Args:
      count: how many.

    Raises:
      RuntimeError: the system starts no more threads.
    """

    def __init__(self, count: int):
        self.count = count
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        end = weakref.finalize(self, _end, self._tasks, count)
        end.atexit = False  # The process does not wait for them.
        threads_before = torch.get_num_threads()
        all_started = threading.Barrier(count + 1)
        started: list[threading.Thread] = []
        try:
            for number in range(count):
                thread = threading.Thread(
                    target=_run, args=[self._tasks, all_started], name=f"stream_{number}", daemon=True
                )
                thread.start()
                started.append(thread)
            all_started.wait()
        except BaseException as error:
            end()
            all_started.abort()  # Else those that have started would wait for ever.
            for thread in started:  # Else one that is late would undo what is set below.
                thread.join()
            if isinstance(error, RuntimeError):
                raise RuntimeError(
                    f"{error}: of {count} threads to compute in, {len(started)} could be started; let this process "
                    "have more, or ask for fewer with torch.set_num_threads or OMP_NUM_THREADS"
                ) from error
            raise
        finally:
            torch.set_num_threads(threads_before)

    def for_each(self, function: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Calls a function with each item, in their order, as many at a time as there are streams.

        When it returns or raises, no call goes on; only a second Ctrl-C does not wait for those that were under way.

        Raises:
          Exception: the first that the function raises; items that wait then are left out.
        """
        waiting = deque(items)
        under_way = 0
        errors: list[BaseException] = []
        changed = threading.Condition()

        def work() -> None:
            nonlocal under_way
            while True:
                with changed:
                    if not waiting:
                        return
                    item = waiting.popleft()
                    under_way += 1
                try:
                    function(item)
                except BaseException as error:  # noqa: BLE001 - raised where it is waited for.
                    errors.append(error)
                finally:
                    del item
                    with changed:
                        if errors:
                            waiting.clear()
                        under_way -= 1
                        changed.notify_all()

        def wait() -> None:
            with changed:
                changed.wait_for(lambda: not waiting and not under_way)

        try:
            for _ in range(min(self.count, len(waiting))):
                self._tasks.put(work)
            wait()
        except BaseException:  # Ctrl-C, say.
            with changed:
                waiting.clear()
            wait()
            raise
        if errors:
            try:
                raise errors[0]
            finally:
                errors.clear()  # Else the error would hold itself, and all that was computed with, by its frames.


def _run(tasks: "SimpleQueue[Callable[[], None] | None]", all_started: threading.Barrier) -> None:
    """Works on tasks until None comes; knows no Streams, which would never be forgotten then."""
    torch.get_num_threads()  # A thread's first question or product would undo what it was told before.
    torch.set_num_threads(1)  # In this thread, and in those that have not computed yet.
    try:
        all_started.wait()
    except threading.BrokenBarrierError:
        return
    while (task := tasks.get()) is not None:
        task()
        del task  # Else what it holds would stay until the next one comes.


def _end(tasks: "SimpleQueue[Callable[[], None] | None]", count: int) -> None:
    for _ in range(count):
        tasks.put(None)


_making = threading.Lock()
_made: Streams | None = None


def streams() -> Streams | None:
    """Returns as many streams as the caller has threads of PyTorch's; None where that is one, as in a stream itself.

    They are made once, and anew where the number is another than the last time.
    """
    global _made
    with _making:  # While others are made, the number may not be the caller's own.
        count = torch.get_num_threads()
        if count < 2:
            return None
        if _made is None or _made.count != count:
            _made = Streams(count)
        return _made


def _forget() -> None:
    """Lets a forked process make its own: of its parent's it has the memory, but not the threads.

    It has none of OpenMP's either, and a product shared among cores would wait for them for ever. So it computes with
    one thread, as PyTorch's own forked workers do; `torch.set_num_threads` gives it streams again.
    """
    global _making, _made
    _making = threading.Lock()
    if _made is not None:
        _made = None
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_forget)
