"""Objects on gs:// that change only under a condition, against the emulator; and the same on this machine."""

import os
import subprocess
import sys
import threading
import time

import pytest
from google.api_core.exceptions import Forbidden, NotFound, RetryError, Unauthorized
from google.auth.exceptions import RefreshError, TransportError
from google.cloud.storage.exceptions import DataCorruption
from requests import exceptions as requests_exceptions

from transforms import gcs, storage
from transforms.storage import ABSENT, ConflictError

pytest_plugins = ["gcs_emulator"]


@pytest.fixture(params=["local", "gs"])
def folder(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "some" / "folder")
    return request.getfixturevalue("gcs_bucket") + "/some/folder"


def test_a_client_is_made_once_for_a_process(gcs_bucket):
    assert gcs.storage_client() is gcs.storage_client()


def test_missing_credentials_are_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "no-such-key.json"))
    gcs._client.cache_clear()
    with pytest.raises(PermissionError, match="gcloud auth application-default login"):
        gcs.storage_client()


@pytest.mark.parametrize("url", ["bucket/name", "gs://", "gs:///name", "s3://bucket/name"])
def test_what_is_no_gs_url_is_refused(url):
    with pytest.raises(ValueError, match="gs://bucket/name"):
        gcs.split_url(url)


def test_a_missing_bucket_is_named(gcs_bucket):
    url = "gs://there-is-no-such-bucket/LATEST"
    assert gcs.read_with_generation(url) is None
    for call in (lambda: gcs.create_exclusively(url, b"x"), lambda: gcs.list_files(url), lambda: gcs.list_folders(url)):
        with pytest.raises(
            FileNotFoundError,
            match=f"{url}: there is no bucket gs://there-is-no-such-bucket: .* `gcloud storage buckets create "
            "gs://there-is-no-such-bucket --location=REGION`",
        ):
            call()


@pytest.mark.parametrize(
    ("raised", "expected", "told"),
    [
        (
            Forbidden("no"),
            PermissionError,
            "gs://bucket/name: these credentials .* Storage Object User on gs://bucket,",
        ),
        (Unauthorized("no"), PermissionError, "gs://bucket/name: these credentials do not allow it"),
        (NotFound("no"), FileNotFoundError, "gs://bucket/name does not exist"),
        (RefreshError("expired"), PermissionError, "gs://bucket/name: expired: run `gcloud auth"),
        (TransportError("no such host"), gcs.GcsError, "^gs://bucket/name: no such host$"),
        (requests_exceptions.ConnectionError("no route"), gcs.GcsError, "^gs://bucket/name: no route$"),
        (requests_exceptions.ChunkedEncodingError("cut off"), gcs.GcsError, "^gs://bucket/name: cut off$"),
        (RetryError("gave up", None), OSError, "gs://bucket/name: gave up"),
        (DataCorruption(None, "other bytes"), OSError, "gs://bucket/name: other bytes"),
    ],
)
def test_errors_of_googles_libraries_name_the_url_and_the_remedy(raised, expected, told):
    with pytest.raises(expected, match=told), gcs.errors_named("gs://bucket/name"):
        raise raised


@pytest.mark.parametrize(
    ("raised", "expected", "told"),
    [
        (requests_exceptions.ConnectionError("no route"), gcs.GcsError, "numbers: no route"),
        (Forbidden("no"), PermissionError, "numbers: these credentials do not allow it"),
        (NotFound("gone"), FileNotFoundError, "numbers does not exist"),
    ],
)
def test_errors_of_reading_an_open_object_name_it(gcs_bucket, monkeypatch, raised, expected, told):
    url = f"{gcs_bucket}/numbers"
    gcs.create_exclusively(url, bytes(range(256)))

    def fail(*_, **__):
        raise raised

    with gcs.open_for_reading(url) as file:
        assert file.read(2) == b"\x00\x01"
        file.seek(0)
        monkeypatch.setattr(gcs.Blob, "download_as_bytes", fail)
        for read in (lambda: file.read(), lambda: file.readinto(bytearray(300))):
            with pytest.raises(expected, match=f"{gcs_bucket}/{told}"):
                read()


def test_a_lost_answer_to_a_write_that_succeeded_is_no_conflict(gcs_bucket, gcs_emulator):
    url = f"{gcs_bucket}/LATEST"
    gcs_emulator.lose_next_answer()
    gcs.create_exclusively(url, b"of run 1")
    data, generation = gcs.read_with_generation(url)
    assert data == b"of run 1"
    gcs_emulator.lose_next_answer()
    gcs.replace_if_generation(url, b"of run 2", generation)
    assert gcs.read_with_generation(url)[0] == b"of run 2"


def test_a_read_is_repeated_when_the_object_is_replaced_in_between(gcs_bucket, monkeypatch):
    url = f"{gcs_bucket}/LATEST"
    gcs.create_exclusively(url, b"old")
    download = gcs.Blob.download_as_bytes
    replaced = []

    def replace_then_download(blob, **kwargs):
        if not replaced:
            replaced.append(True)
            gcs._blob(url).upload_from_string(b"new")
        return download(blob, **kwargs)

    monkeypatch.setattr(gcs.Blob, "download_as_bytes", replace_then_download)
    data, generation = gcs.read_with_generation(url)
    assert data == b"new"
    gcs.replace_if_generation(url, b"newer", generation)


def test_a_beam_process_reads_and_writes_through_the_emulator_at_once(gcs_bucket, gcs_emulator):
    program = (
        "import sys, time\n"
        "from apache_beam.io.filesystems import FileSystems\n"
        "import apache_beam.io.gcp.gcsio\n"  # Not to be timed: it takes long where the machine is busy.
        "started = time.monotonic()\n"
        "with FileSystems.create(sys.argv[1]) as file: file.write(b'hello')\n"
        "with FileSystems.open(sys.argv[1]) as file: print(file.read().decode(), time.monotonic() - started)\n"
    )
    command = [sys.executable, "-c", program, f"{gcs_bucket}/beam.txt"]
    done = subprocess.run(command, env=os.environ | gcs_emulator.environment, capture_output=True, check=True)
    text, seconds = done.stdout.decode().split()
    assert text == "hello"
    assert float(seconds) < 15  # Without a metadata server, the search for credentials alone takes 20.
    assert gcs.list_files(gcs_bucket) == {"beam.txt": 5}


# Both kinds of storage.


def test_a_file_is_created_only_once(folder):
    url = storage.join(folder, "LATEST")
    assert storage.read_versioned(url) is None
    storage.create_exclusively(url, b"first")
    with pytest.raises(ConflictError, match="LATEST"):
        storage.create_exclusively(url, b"second")
    assert storage.read_versioned(url).data == b"first"
    assert storage.list_files(folder) == {"LATEST": 5}


def test_a_file_is_replaced_only_as_it_was_read(folder):
    url = storage.join(folder, "LATEST")
    storage.create_exclusively(url, b"first")
    first = storage.read_versioned(url)
    storage.replace_if_generation(url, b"second", first.generation)
    second = storage.read_versioned(url)
    assert second.data == b"second"
    for generation in (first.generation, ABSENT):
        with pytest.raises(ConflictError):
            storage.replace_if_generation(url, b"third", generation)
    storage.delete_files([url])
    with pytest.raises(ConflictError):
        storage.replace_if_generation(url, b"third", second.generation)
    assert storage.list_files(folder) == {}


def test_of_many_writers_at_once_exactly_one_wins_each_round(folder):
    url = storage.join(folder, "LATEST")
    for _ in range(3):
        current = storage.read_versioned(url)
        generation = current.generation if current else ABSENT
        barrier = threading.Barrier(8)
        won = []

        def write(name, barrier=barrier, generation=generation, won=won):
            barrier.wait()
            try:
                storage.replace_if_generation(url, name, generation)
            except ConflictError:
                return
            won.append(name)

        threads = [threading.Thread(target=write, args=(f"writer {i}".encode(),)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [storage.read_versioned(url).data] == won
    assert list(storage.list_files(folder)) == ["LATEST"]


def test_files_and_folders_are_listed_and_deleted(folder):
    for name in ("a", "b/c", "b/d/e"):
        storage.create_exclusively(storage.join(folder, name), name.encode())
    assert storage.list_files(folder) == {"a": 1, "b/c": 3, "b/d/e": 5}
    assert storage.list_files(storage.join(folder, "b")) == {"c": 3, "d/e": 5}
    assert storage.list_folders(folder) == ["b"]
    assert storage.list_folders(storage.join(folder, "b")) == ["d"]
    storage.delete_files([storage.join(folder, "a"), storage.join(folder, "never-was")])
    storage.delete_folder(storage.join(folder, "b", "d"))
    storage.delete_folder(storage.join(folder, "never-was"))
    assert storage.list_files(folder) == {"b/c": 3}
    assert storage.list_files(storage.join(folder, "never-was")) == {}
    assert storage.list_folders(storage.join(folder, "never-was")) == []


def test_a_folder_does_not_hold_the_files_of_one_whose_name_begins_alike(folder):
    storage.create_exclusively(storage.join(folder, "snapshot=1", "x"), b"x")
    storage.create_exclusively(storage.join(folder, "snapshot=10", "y"), b"y")
    assert storage.list_files(storage.join(folder, "snapshot=1")) == {"x": 1}
    storage.delete_folder(storage.join(folder, "snapshot=1"))
    assert storage.list_files(folder) == {"snapshot=10/y": 1}


def test_a_file_is_read_in_ranges(folder):
    url = storage.join(folder, "numbers")
    storage.create_exclusively(url, bytes(range(256)) * 8192)  # 2 MiB, above the least that is fetched at once.
    with storage.open_for_reading(url) as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"\xfd\xfe\xff"
        file.seek(1)
        assert file.read(2) == b"\x01\x02"
    with pytest.raises(FileNotFoundError, match="never-was"):
        storage.open_for_reading(storage.join(folder, "never-was"))


@pytest.mark.parametrize("url", ["", "s3://bucket/output", "file:///tmp/output", "hdfs://host/output"])
def test_other_file_systems_are_refused(url):
    with pytest.raises(ValueError, match="gs://bucket/folder: name one of these two"):
        storage.check_url(url)


# This machine.


def test_a_lock_file_that_a_crash_left_behind_bars_nobody(tmp_path):
    (tmp_path / "LATEST.lock").write_bytes(b"half of what was to be wri")
    storage.create_exclusively(str(tmp_path / "LATEST"), b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"LATEST": b"new"}


def test_a_writer_waits_for_one_that_is_about_to_write_and_sees_its_write(tmp_path):
    url = str(tmp_path / "LATEST")
    errors = []

    def create():
        try:
            storage.create_exclusively(url, b"late")
        except ConflictError as error:
            errors.append(error)

    late = threading.Thread(target=create)
    with storage.locked(url) as (lock_path, _):
        late.start()
        time.sleep(0.1)
        os.replace(lock_path, url)
    late.join()
    assert len(errors) == 1
    assert os.listdir(tmp_path) == ["LATEST"]


def test_a_writer_that_waited_for_one_that_gave_up_writes(tmp_path):
    url = str(tmp_path / "LATEST")
    late = threading.Thread(target=storage.create_exclusively, args=(url, b"late"))
    with storage.locked(url):
        late.start()
        time.sleep(0.1)
    late.join()
    assert storage.read_versioned(url).data == b"late"
    assert os.listdir(tmp_path) == ["LATEST"]


def test_relative_paths_and_odd_names_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = storage.join("out[1]*?", "LATEST")
    storage.create_exclusively(url, b"x")
    storage.create_exclusively("LATEST", b"y")
    assert storage.list_files("out[1]*?") == {"LATEST": 1}
    assert storage.list_folders(".") == ["out[1]*?"]
