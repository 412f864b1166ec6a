"""Process-wide tallies of work done, for a person who watches a pipeline that runs in this very process."""

import threading
from collections import Counter

_lock = threading.Lock()
_tallies: Counter[str] = Counter()


def add(name: str, count: int = 1) -> None:
    """Adds to a tally."""
    with _lock:
        _tallies[name] += count


def tallies() -> dict[str, int]:
    """Returns a copy of all tallies."""
    with _lock:
        return dict(_tallies)


def reset() -> None:
    """Sets all tallies to nothing."""
    with _lock:
        _tallies.clear()
