"""Streams: threads that each compute on one core, side by side, where many cores would compute one product together.

Cores that share a product wait for each other after each step of it, and stand idle in all that is not a product; where
another program takes one of them, all wait for that one.
"""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Streams:
    """Threads of this process, each with one thread of PyTorch's; the process can end without waiting for them.

    While they are made, threads of others that have not computed yet are told to use one core too.

    Args:
      count: how many.

    Raises:
      RuntimeError: the system starts no more threads.
    """

    def __init__(self, count: int):
        self.count = count
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threads_before = torch.get_num_threads()
        all_started = threading.Barrier(count + 1)
        try:
            for number in range(count):
                threading.Thread(target=self._run, args=[all_started], name=f"stream_{number}", daemon=True).start()
            all_started.wait()
        except BaseException:
            all_started.abort()  # Else those that have started would wait for ever.
            raise
        finally:
            torch.set_num_threads(threads_before)

    def _run(self, all_started: threading.Barrier) -> None:
        torch.get_num_threads()  # A thread's first question or product would undo what it was told before.
        torch.set_num_threads(1)  # In this thread, and in those that have not computed yet.
        try:
            all_started.wait()
        except threading.BrokenBarrierError:
            return
        while True:
            self._work.get()()

    def for_each(self, function: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Calls a function with each item, in their order, as many at a time as there are streams.

        When it returns or raises, no call goes on; only a second Ctrl-C does not wait for those that were under way.

        Raises:
          Exception: the first that the function raises; items that wait then are left out.
        """
        waiting = deque(items)
        ended: SimpleQueue[BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                while waiting:
                    try:
                        item = waiting.popleft()
                    except IndexError:  # Another stream was faster.
                        break
                    function(item)
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for.
                waiting.clear()
                ended.put(error)
            else:
                ended.put(None)

        running = min(self.count, len(waiting))
        for _ in range(running):
            self._work.put(work)
        errors: list[BaseException | None] = []
        try:
            while len(errors) < running:
                errors.append(ended.get())
        except BaseException:
            waiting.clear()
            while len(errors) < running:
                errors.append(ended.get())
            raise
        for error in errors:
            if error is not None:
                raise error


_making = threading.Lock()


def streams() -> Streams | None:
    """Returns as many streams as the caller has threads of PyTorch's; None where that is one, as in a stream itself."""
    with _making:  # While others are made, the number may not be the caller's own.
        count = torch.get_num_threads()
        return None if count < 2 else _streams(count)


_streams = functools.lru_cache(maxsize=None)(Streams)


def _forget() -> None:
    """Lets a forked process make its own: of its parent's it has the memory, but not the threads."""
    global _making
    _making = threading.Lock()
    _streams.cache_clear()


os.register_at_fork(after_in_child=_forget)
