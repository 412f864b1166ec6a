"""Files on any of the storages: locks, folders, and names that are refused."""

import os
import shutil
import signal
import threading
import time

import pytest

from transforms import gcs, storage

pytest_plugins = ["gcs_emulator"]


def test_a_folder_that_cannot_be_made_is_an_error_and_no_endless_loop(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(FileNotFoundError):
        storage.create_exclusively(str(tmp_path / "link" / "output" / "file"), b"data")


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    folder = tmp_path / "output"
    folder.mkdir()
    mkdir = os.mkdir

    def find_it_and_lose_it(path, *arguments):
        try:
            mkdir(path, *arguments)
        finally:
            monkeypatch.undo()
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", find_it_and_lose_it)
    storage.create_exclusively(str(folder / "file"), b"data")
    assert os.mkdir is mkdir
    assert storage.list_files(str(folder)) == {"file": 4}


@pytest.mark.parametrize("url", ["", "gs:/bucket/folder", "s3://bucket/folder"])
def test_an_output_that_is_neither_a_folder_nor_gs_is_refused(url):
    with pytest.raises(ValueError, match="is neither a folder of this machine nor gs://"):
        storage.check_url(url)


@pytest.mark.parametrize("function", [storage.list_files, storage.list_folders])
def test_a_folder_that_goes_while_it_is_listed_has_nothing_in_it(tmp_path, monkeypatch, function):
    folder = tmp_path / "folder"
    folder.mkdir()
    scandir = os.scandir

    def scan_what_has_gone(path):
        if os.path.exists(folder):
            os.rmdir(folder)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan_what_has_gone)
    assert not function(str(folder))
    assert not folder.exists()


def test_files_are_listed_with_their_sizes_at_any_depth(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "[1]*").write_bytes(b"12")
    (tmp_path / "c").write_bytes(b"")
    assert storage.list_files(str(tmp_path)) == {"a/b/[1]*": 2, "c": 0}
    assert storage.list_folders(str(tmp_path / "a")) == ["b"]
    for none in ("c", "none"):
        assert (storage.list_files(str(tmp_path / none)), storage.list_folders(str(tmp_path / none))) == ({}, [])


def test_a_folder_that_may_not_be_listed_is_an_error_and_not_empty(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        storage.list_files(str(tmp_path))


def test_two_that_delete_a_folder_leave_nothing_of_it(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(10):
        (folder / str(number)).touch()
    rmtree = shutil.rmtree

    def delete_after_another_has_begun(path):
        monkeypatch.undo()
        (folder / "0").unlink()
        raise FileNotFoundError(2, "No such file or directory", str(folder / "0"))

    monkeypatch.setattr(shutil, "rmtree", delete_after_another_has_begun)
    storage.delete_folder(str(folder))
    assert not folder.exists()
    assert shutil.rmtree is rmtree


def test_a_folder_into_which_another_writes_while_it_is_deleted_is_deleted(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").touch()
    rmdir = os.rmdir

    def write_and_remove(path, **options):
        if str(path).endswith("inner"):
            monkeypatch.undo()
            (folder / "inner" / "late").touch()
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", write_and_remove)
    storage.delete_folder(str(folder))
    assert not folder.exists()
    assert os.rmdir is rmdir


def test_a_folder_that_may_not_be_deleted_is_an_error_at_once(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for nothing"))
    with pytest.raises(PermissionError):
        storage.delete_folder(str(tmp_path))


def test_a_folder_that_cannot_be_deleted_is_an_error_and_no_endless_loop(tmp_path, monkeypatch):
    def find_nothing(path):
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(shutil, "rmtree", find_nothing)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(FileNotFoundError):
        storage.delete_folder(str(tmp_path))


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


@pytest.mark.parametrize("place", ["gs", "local"])
def test_a_folder_is_filled_wherever_it_is(request, tmp_path, place):
    url = f"{request.getfixturevalue('gcs_bucket')}/folder" if place == "gs" else f"{tmp_path}/folder"
    with storage.folder_to_fill(url, last="last") as folder:
        (folder / "sub").mkdir(parents=True)
        (folder / "last").write_bytes(b"the last")
        (folder / "sub" / "one").write_bytes(b"one")
    assert storage.list_files(url) == {"last": 8, "sub/one": 3}
    assert storage.open_for_reading(f"{url}/sub/one").read() == b"one"


def test_on_gs_the_last_file_comes_last_and_none_after_an_error(gcs_bucket, monkeypatch):
    upload, uploaded = gcs.upload, []

    def full(path, url):
        uploaded.append(url)
        if path.name == "c":
            raise OSError("no quota")
        upload(path, url)

    def fill(names: str, fails: bool = False) -> None:
        with storage.folder_to_fill(f"{gcs_bucket}/x", last="b") as folder:
            for name in names:
                (folder / name).write_bytes(b"1")
            if fails:
                raise ValueError("not whole")

    monkeypatch.setattr(gcs, "upload", full)
    with pytest.raises(ValueError, match="not whole"):
        fill("ab", fails=True)
    assert storage.list_files(f"{gcs_bucket}/x") == {}
    with pytest.raises(OSError, match="no quota"):
        fill("abc")
    assert storage.list_files(f"{gcs_bucket}/x") == {"a": 1}
    uploaded.clear()
    fill("abd")
    assert uploaded == [f"{gcs_bucket}/x/{name}" for name in "adb"]
