"""Tallies of this process, counted by many threads at once."""

import threading

import pytest

from transforms import progress


@pytest.fixture(autouse=True)
def no_tallies():
    progress.reset()
    yield
    progress.reset()


def test_tallies_add_up_and_are_reset():
    progress.add("documents_read")
    progress.add("documents_read", 4)
    progress.add("texts_encoded", 2)
    assert progress.tallies() == {"documents_read": 5, "texts_encoded": 2}
    progress.reset()
    assert progress.tallies() == {}


def test_what_is_returned_is_a_copy():
    progress.add("documents_read")
    before = progress.tallies()
    progress.add("documents_read")
    assert before == {"documents_read": 1}


def test_threads_lose_nothing():
    threads = [threading.Thread(target=lambda: [progress.add("texts_encoded") for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert progress.tallies() == {"texts_encoded": 4000}
