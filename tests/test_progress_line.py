"""The line that says how far a job is."""

import io
import sys
import time

import pytest

from pipeline import progress_line
from pipeline.progress_line import ProgressLine, encoding_line, reading_line
from transforms import progress


class Screen(io.StringIO):
    """In place of stderr: a terminal, or a file."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def wait_for(self, text: str) -> None:
        for _ in range(6000):
            if text in self.getvalue():
                return
            time.sleep(0.01)
        raise AssertionError(f"{text!r} was not shown, but {self.getvalue()!r}")


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setattr(progress_line, "_TERMINAL_INTERVAL_SECONDS", 0.005)
    monkeypatch.setattr(progress_line, "_LOG_INTERVAL_SECONDS", 0.005)

    def make(is_terminal: bool) -> Screen:
        screen = Screen(is_terminal)
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    yield make
    progress.reset()


def encoding(texts: int, tokens: int, of_texts: int = 1000, of_tokens: int = 50_000) -> dict[str, int]:
    """Tallies in the order in which a run begins to count them."""
    return {
        "texts_to_encode": of_texts,
        "tokens_to_encode": of_tokens,
        "texts_encoded": texts,
        "tokens_encoded": tokens,
    }


@pytest.mark.parametrize(
    ("tallies", "line"),
    [
        ({}, "read 0 documents"),
        ({"documents_read": 12_345}, "read 12,345 documents"),
        ({"documents_read": 12_345, "texts_to_encode": 1234}, "read 12,345 documents, 1,234 texts to encode"),
    ],
)
def test_the_line_while_documents_are_read(tallies, line):
    assert reading_line(tallies) == line


@pytest.mark.parametrize(
    ("before", "now", "seconds", "line"),
    [
        # 400 of 50,000 tokens a second; 29,600 are left.
        ((10, 400), (210, 20_400), 50.0, "encoded 210 of 1,000 texts, 4/s, 1:14 left"),
        # The longest texts come first: by texts there would be far more time left.
        ((0, 0), (100, 40_000), 4.0, "encoded 100 of 1,000 texts, 25/s, 0:01 left"),
        ((0, 0), (1, 10), 36.0, "encoded 1 of 1,000 texts, 0/s, 49:59:24 left"),
        ((10, 400), (10, 400), 0.0, "encoded 10 of 1,000 texts"),
        ((10, 400), (10, 400), 5.0, "encoded 10 of 1,000 texts"),
        ((10, 400), (1000, 50_000), 5.0, "encoded 1,000 texts, writing"),
    ],
)
def test_the_line_while_texts_are_encoded(before, now, seconds, line):
    assert encoding_line(encoding(*now), encoding(*before), seconds) == line


def test_a_moment_at_which_texts_are_counted_but_not_their_tokens_breaks_nothing():
    now = encoding(5, 0)
    del now["tokens_encoded"]
    assert encoding_line(now, now, 0.5) == "encoded 5 of 1,000 texts"
    assert encoding_line(encoding(10, 400), now, 1.0) == "encoded 10 of 1,000 texts, 5/s, 2:04 left"


def test_on_a_terminal_one_line_is_written_over_and_in_the_end_wiped(screen):
    screen = screen(is_terminal=True)
    with ProgressLine(enabled=True):
        screen.wait_for("\r\033[Kread 0 documents")
        progress.add("documents_read", 7)
        screen.wait_for("\r\033[Kread 7 documents")
        for name, count in encoding(20, 1000).items():
            progress.add(name, count)
        screen.wait_for("\r\033[Kencoded 20 of 1,000 texts")
        progress.add("texts_encoded", 20)
        progress.add("tokens_encoded", 1000)
        screen.wait_for("\r\033[Kencoded 40 of 1,000 texts, ")
        progress.add("texts_encoded", 960)
        screen.wait_for("\r\033[Kencoded 1,000 texts, writing")
    assert screen.getvalue().endswith("\r\033[K")
    assert "\n" not in screen.getvalue()


def test_elsewhere_each_line_is_written_once(screen):
    screen = screen(is_terminal=False)
    with ProgressLine(enabled=True):
        screen.wait_for("read 0 documents\n")
        time.sleep(0.05)
        progress.add("documents_read", 7)
        screen.wait_for("read 7 documents\n")
    assert screen.getvalue() == "read 0 documents\nread 7 documents\n"


def test_what_an_earlier_job_counted_is_forgotten(screen):
    screen = screen(is_terminal=False)
    progress.add("documents_read", 99)
    with ProgressLine(enabled=True):
        screen.wait_for("read 0 documents\n")
    assert "99" not in screen.getvalue()


def test_a_job_in_other_processes_is_not_watched(screen):
    screen = screen(is_terminal=True)
    with ProgressLine(enabled=False):
        time.sleep(0.05)
    assert screen.getvalue() == ""


def test_the_line_ends_with_a_job_that_fails(screen):
    screen = screen(is_terminal=True)
    line = ProgressLine(enabled=True)

    def fail():
        with line:
            screen.wait_for("read 0")
            raise OSError("no such job")

    with pytest.raises(OSError, match="no such job"):
        fail()
    assert not line._thread.is_alive()
    assert screen.getvalue().endswith("\r\033[K")
