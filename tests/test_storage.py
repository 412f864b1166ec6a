"""Files on any of the storages: locks, folders, and names that are refused."""

import os
import signal
import threading

import pytest

from transforms import storage


def test_a_folder_that_cannot_be_made_is_an_error_and_no_endless_loop(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(FileNotFoundError):
        storage.create_exclusively(str(tmp_path / "link" / "output" / "file"), b"data")


@pytest.mark.parametrize("url", ["", "gs:/bucket/folder", "s3://bucket/folder"])
def test_an_output_that_is_neither_a_folder_nor_gs_is_refused(url):
    with pytest.raises(ValueError, match="is neither a folder of this machine nor gs://"):
        storage.check_url(url)


def taken(path: str) -> bool:
    """Returns whether a lock can be had within some seconds."""

    def take():
        with storage.locked(path):
            pass

    taker = threading.Thread(target=take, daemon=True)
    taker.start()
    taker.join(timeout=20)
    return not taker.is_alive()


def test_a_lock_is_free_again_though_its_file_could_not_be_removed(tmp_path, monkeypatch):
    path = str(tmp_path / "file")

    def refuse(path):
        raise PermissionError(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(PermissionError), storage.locked(path):
            pass
    assert taken(path)


def test_a_lock_is_free_again_though_a_process_was_forked_under_it(tmp_path, monkeypatch):
    path = str(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda path: None)  # So that the same file is locked again.
        with storage.locked(path):
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
    try:
        assert taken(path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
