"""A line on the terminal that says how far a job in this process is."""

import sys
import threading
import time
from collections.abc import Mapping

from transforms import progress

_TERMINAL_INTERVAL_SECONDS = 0.5
_LOG_INTERVAL_SECONDS = 15.0
"""Where the output is no terminal, each line stays: there are fewer."""


class ProgressLine:
    """Shows progress on stderr while its `with` block runs.

    Args:
      enabled: false where the work is done in other processes, of which this one knows nothing.
    """

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._first: Mapping[str, int] | None = None  # What was done when the first texts were.
        self._first_at = 0.0

    def __enter__(self) -> "ProgressLine":
        progress.reset()
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._enabled:
            self._thread.join()
            if sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _show(self) -> None:
        terminal = sys.stderr.isatty()
        last = ""
        while not self._stop.wait(_TERMINAL_INTERVAL_SECONDS if terminal else _LOG_INTERVAL_SECONDS):
            tallies = progress.tallies()
            if self._first is None and tallies.get("texts_encoded"):
                self._first, self._first_at = tallies, time.monotonic()
            line = reading_line(tallies)
            if self._first is not None:
                line = encoding_line(tallies, self._first, time.monotonic() - self._first_at)
            if terminal:
                print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            elif line != last:
                print(line, file=sys.stderr, flush=True)
            last = line


def reading_line(tallies: Mapping[str, int]) -> str:
    """Returns the line before the first text is encoded."""
    read, to_encode = tallies.get("documents_read", 0), tallies.get("texts_to_encode", 0)
    return f"read {read:,} documents" + (f", {to_encode:,} texts to encode" if to_encode else "")


def encoding_line(tallies: Mapping[str, int], before: Mapping[str, int], seconds: float) -> str:
    """Returns the line while texts are encoded; the time left goes by tokens, since the longest texts come first.

    Args:
      tallies: of `transforms.progress`.
      before: the tallies some seconds ago.
      seconds: how many.
    """
    encoded, total = tallies["texts_encoded"], tallies["texts_to_encode"]
    # Tallies are added one by one: a moment after the first text, its tokens may not be there yet.
    tokens_encoded, tokens_before = tallies.get("tokens_encoded", 0), before.get("tokens_encoded", 0)
    if encoded >= total:
        return f"encoded {total:,} texts, writing"
    line = f"encoded {encoded:,} of {total:,} texts"
    tokens = tokens_encoded - tokens_before
    if not tokens or seconds <= 0:
        return line
    rate = (encoded - before["texts_encoded"]) / seconds
    left_seconds = (tallies["tokens_to_encode"] - tokens_encoded) / tokens * seconds
    return f"{line}, {rate:,.0f}/s, {_duration(left_seconds)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
