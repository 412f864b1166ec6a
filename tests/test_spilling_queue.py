"""What is put into a queue comes out in order and whole, whether memory or the disk held it, and no writer waits."""

import errno
import tempfile
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.spilling_queue import SpillingQueue


@given(
    max_memory_bytes=st.integers(0, 40),
    steps=st.lists(st.one_of(st.none(), st.binary(max_size=20)), max_size=60),
)
def test_items_come_out_in_order_whatever_memory_holds(max_memory_bytes, steps):
    """None takes an item out, where there is one."""
    queue, waiting, out, expected = SpillingQueue(max_memory_bytes), 0, [], []
    for step in steps:
        if step is not None:
            queue.put(step, len(step))
            expected.append(step)
            waiting += 1
        elif waiting:
            out.append(queue.get())
            waiting -= 1
    out += [queue.get() for _ in range(waiting)]
    assert out == expected


def test_what_does_not_fit_into_memory_is_on_disk_whose_room_is_given_back(monkeypatch):
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the queue's, to look into.
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: file)
    queue = SpillingQueue(1000)
    for _ in range(2):
        items = [bytes([number]) * 300 for number in range(100)]
        for item in items:
            queue.put(item, len(item))
        assert file.seek(0, 2) > 97 * 300
        assert [queue.get() for _ in items] == items
        assert file.seek(0, 2) == 0


def test_an_item_of_no_size_comes_out_as_the_object_that_it_is():
    queue, end = SpillingQueue(0), object()
    queue.put(b"large", 5)
    queue.put(end, 0)
    assert queue.get() == b"large"
    assert queue.get() is end


def test_a_reader_waits_for_many_writers():
    queue = SpillingQueue(100)

    def write(writer: int) -> None:
        for number in range(200):
            queue.put((writer, number), 10)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    items = [queue.get() for _ in range(800)]
    for thread in threads:
        thread.join()
    assert [[number for one, number in items if one == writer] for writer in range(4)] == [list(range(200))] * 4


def test_a_full_disk_is_named_with_a_remedy(monkeypatch):
    class Full:
        def seek(self, _):
            pass

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(OSError, match=r"cannot hold \d+ bytes more .*No space left.*TMPDIR") as raised:
        SpillingQueue(0).put(b"large", 5)
    assert raised.value.errno == errno.ENOSPC
