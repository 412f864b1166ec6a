"""Streams: threads that each compute on one core, side by side, where many cores would compute one product together.

Cores that share a product wait for each other after each step of it, and stand idle in all that is not a product; where
another program takes one of them, all wait for that one.
"""

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Streams:
    """Threads of this process, each with one thread of PyTorch's.

    Args:
      count: how many.
    """

    def __init__(self, count: int):
        self.count = count
        threads_before = torch.get_num_threads()
        all_started = threading.Barrier(count + 1)

        def start() -> None:
            torch.get_num_threads()  # A thread's first question or product would undo what it was told before.
            torch.set_num_threads(1)  # In this thread, and in those that have not computed yet.
            all_started.wait()

        self._pool = ThreadPoolExecutor(count, thread_name_prefix="stream", initializer=start)
        for _ in range(count):
            self._pool.submit(int)
        all_started.wait()
        torch.set_num_threads(threads_before)

    def for_each(self, function: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Calls a function with each item, in their order, as many at a time as there are streams.

        Raises:
          Exception: the first that the function raises; items that wait then are left out.
        """
        waiting = deque(items)

        def work() -> None:
            try:
                while waiting:
                    try:
                        item = waiting.popleft()
                    except IndexError:  # Another stream was faster.
                        return
                    function(item)
            except BaseException:
                waiting.clear()
                raise

        for future in [self._pool.submit(work) for _ in range(min(self.count, len(waiting)))]:
            future.result()


_making = threading.Lock()


def streams() -> Streams | None:
    """Returns as many streams as the caller has threads of PyTorch's; None where that is one, as in a stream itself."""
    count = torch.get_num_threads()
    if count < 2:
        return None
    with _making:
        return _streams(count)


_streams = functools.lru_cache(maxsize=None)(Streams)
