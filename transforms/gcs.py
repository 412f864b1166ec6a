"""Google Cloud Storage: one client for the process, and objects that change only under a condition."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, PreconditionFailed, Unauthorized
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.cloud.storage import Blob, Client
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.fileio import BlobReader
from requests import RequestException

_READ_BYTES = 1 << 20
"""Least bytes of one ranged read: Parquet footers and small columns are read in few requests, and little in vain."""

_PARALLEL_DELETES = 16

_LOG_IN = (
    "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to the key file of a service "
    "account"
)


class ConflictError(Exception):
    """A file was not written because another process had changed it in the meantime."""


class GcsError(OSError):
    """Google Cloud Storage gave no answer, or an error; this says nothing about what is stored there."""


@lru_cache(maxsize=4)
def _client(emulator: str | None, process_id: int) -> Client:
    # Without a project: buckets are named, never created or listed here. With an emulator the client is anonymous.
    return Client(project=None)


def storage_client() -> Client:
    """Returns this process's client: anonymous with `STORAGE_EMULATOR_HOST`, else with the default credentials.

    Raises:
      PermissionError: there are no credentials on this machine.
    """
    try:
        return _client(os.environ.get("STORAGE_EMULATOR_HOST"), os.getpid())
    except DefaultCredentialsError as error:
        raise PermissionError(f"gs:// needs Google credentials, and this machine has none: {_LOG_IN}") from error


def split_url(url: str) -> tuple[str, str]:
    """Returns the bucket and the object name of gs://bucket/object; the object name may be empty.

    Raises:
      ValueError: the URL is not of this form.
    """
    bucket, _, name = url.removeprefix("gs://").partition("/")
    if not url.startswith("gs://") or not bucket:
        raise ValueError(f"{url!r} is not of the form gs://bucket/name")
    return bucket, name


@contextmanager
def errors_named(url: str, needs_only_bucket: bool = False) -> Iterator[None]:
    """Raises errors of Google's libraries as errors that name the URL and the remedy.

    Args:
      url: gs://bucket/name, what is being read or written.
      needs_only_bucket: whether all that can be missing is the bucket, as where an object is written or objects are
        listed.

    Raises:
      FileNotFoundError: there is no such object, or bucket.
      PermissionError: the credentials do not allow it, or are no longer valid.
      GcsError: no answer came, or it was an error all the same, or the bytes that came are not those that are stored.
    """
    try:
        yield
    except PreconditionFailed:
        raise
    except (Forbidden, Unauthorized) as error:
        raise PermissionError(
            f"{url}: these credentials do not allow it ({error.message}): have them granted the role Storage Object "
            f"User on gs://{split_url(url)[0]}, or use others"
        ) from error
    except NotFound as error:
        if needs_only_bucket:
            bucket = f"gs://{split_url(url)[0]}"
            raise FileNotFoundError(
                f"{url}: there is no bucket {bucket}: check its name, or create it with `gcloud storage buckets create "
                f"{bucket} --location=REGION`"
            ) from error
        raise FileNotFoundError(f"{url} does not exist ({error.message})") from error
    except (TransportError, RequestException) as error:  # Before GoogleAuthError, of which TransportError is one.
        raise GcsError(f"{url}: {error}") from error
    except GoogleAuthError as error:
        raise PermissionError(f"{url}: {error}: {_LOG_IN}") from error
    except (GoogleAPIError, DataCorruption) as error:
        raise GcsError(f"{url}: {error}") from error


def _blob(url: str) -> Blob:
    bucket, name = split_url(url)
    return storage_client().bucket(bucket).blob(name)


def read_with_generation(url: str) -> tuple[bytes, int] | None:
    """Returns an object's bytes and their generation, or None where there is no such object."""
    while True:
        blob = _blob(url)
        try:
            with errors_named(url):
                blob.reload()
                generation = blob.generation
                return blob.download_as_bytes(if_generation_match=generation), generation
        except FileNotFoundError:
            return None
        except PreconditionFailed:
            continue  # Replaced between the two requests.


def create_exclusively(url: str, data: bytes) -> None:
    """Creates an object unless there is one.

    Args:
      url: gs://bucket/name.
      data: its content; unique to the caller, so that a request that was sent again because its answer got lost is
        told from another process's.

    Raises:
      ConflictError: there is one with other content.
    """
    replace_if_generation(url, data, 0)


def replace_if_generation(url: str, data: bytes, generation: int) -> None:
    """Writes an object if it still has the generation that was read; 0 means that there is none.

    Args:
      url: gs://bucket/name.
      data: its new content, unique to the caller as in `create_exclusively`.
      generation: as `read_with_generation` returned it.

    Raises:
      ConflictError: the object has another generation, and other content than `data`.
      FileNotFoundError: there is no such bucket; the message tells how to create it.
      PermissionError: the credentials do not allow it.
    """
    try:
        with errors_named(url, needs_only_bucket=True):
            _blob(url).upload_from_string(data, "application/octet-stream", if_generation_match=generation)
    except PreconditionFailed as error:
        current = read_with_generation(url)
        if current is None or current[0] != data:
            raise ConflictError(
                f"{url} was written by another process: its generation is no longer {generation}"
            ) from error


class _ObjectReader(BlobReader):
    """An object as a seekable file that reads ranges; its errors name the URL."""

    def __init__(self, blob: Blob, url: str):
        super().__init__(blob, chunk_size=_READ_BYTES)
        self._url = url

    def read(self, size: int = -1) -> bytes:
        with errors_named(self._url):
            return super().read(size)


def open_for_reading(url: str) -> BinaryIO:
    """Opens an object as a seekable file that reads ranges; its reads raise as `errors_named` does.

    Raises:
      FileNotFoundError: there is no such object.
    """
    blob = _blob(url)
    with errors_named(url):
        blob.reload()
    return cast(BinaryIO, _ObjectReader(blob, url))


def upload(path: Path, url: str) -> None:
    """Writes a file of this machine to an object, which is replaced if it is there.

    Raises:
      FileNotFoundError: there is no such bucket; the message tells how to create it.
      PermissionError: the credentials do not allow it.
    """
    with errors_named(url, needs_only_bucket=True):
        _blob(url).upload_from_filename(str(path), "application/octet-stream")


def list_files(url: str) -> dict[str, int]:
    """Returns the sizes in bytes of all objects under a folder, by their names relative to it."""
    bucket, prefix = _folder_prefix(url)
    with errors_named(url, needs_only_bucket=True):
        blobs = storage_client().list_blobs(bucket, prefix=prefix, fields="items(name,size),nextPageToken")
        return {blob.name.removeprefix(prefix): blob.size for blob in blobs if not blob.name.endswith("/")}


def list_folders(url: str) -> list[str]:
    """Returns the names of the folders right under a folder, sorted."""
    bucket, prefix = _folder_prefix(url)
    with errors_named(url, needs_only_bucket=True):
        blobs = storage_client().list_blobs(bucket, prefix=prefix, delimiter="/", fields="prefixes,nextPageToken")
        for _ in blobs.pages:
            pass  # The prefixes are complete after the last page.
    return sorted(folder.removeprefix(prefix).rstrip("/") for folder in blobs.prefixes)


def delete_files(urls: Iterable[str]) -> None:
    """Deletes objects; one that is not there is no error."""
    with ThreadPoolExecutor(_PARALLEL_DELETES) as pool:
        for _ in pool.map(_delete, urls):
            pass


def _delete(url: str) -> None:
    # Not there: deleted by a request whose answer got lost, or by another process.
    with suppress(FileNotFoundError), errors_named(url):
        _blob(url).delete()


def _folder_prefix(url: str) -> tuple[str, str]:
    bucket, name = split_url(url)
    return bucket, name.rstrip("/") + "/" if name else ""
