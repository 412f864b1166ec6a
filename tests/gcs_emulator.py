"""A Google Cloud Storage on this machine: gcp-storage-emulator with generation preconditions and a metadata server.

The package ignores preconditions, so its storage is extended by them here. The metadata server hands out credentials
at once, where Google's libraries would otherwise search for some 20 seconds.
"""

import io
import json
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Client

_METADATA = {
    "project/project-id": "test-project",
    "universe/universe-domain": "googleapis.com",
    "instance/service-accounts/default/": {"email": "tester@test.test", "aliases": ["default"], "scopes": []},
    "instance/service-accounts/default/token": {"access_token": "t", "expires_in": 36000, "token_type": "Bearer"},
}


@dataclass(frozen=True)
class GcsEmulator:
    """A running emulator.

    Attributes:
      url: http://127.0.0.1:PORT.
    """

    url: str

    @property
    def environment(self) -> dict[str, str]:
        """What every process that uses it needs in its environment, from its start."""
        host = self.url.removeprefix("http://")
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "GCE_METADATA_HOST": host,
            "GCE_METADATA_IP": host,
            "GOOGLE_CLOUD_PROJECT": "test-project",
        }

    def client(self) -> Client:
        """Returns a client of it, whatever the environment says."""
        return Client("test-project", AnonymousCredentials(), client_options={"api_endpoint": self.url})

    def create_bucket(self) -> str:
        """Creates a bucket of a new name and returns its gs:// URL."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(name)
        return f"gs://{name}"

    def lose_next_answer(self) -> None:
        """Has the next upload succeed but be answered by an error, as if the answer was lost."""
        urllib.request.urlopen(f"{self.url}/lose-next-answer").close()


@contextmanager
def running_emulator() -> Iterator[GcsEmulator]:
    """Runs an emulator in a process of its own; it ends with the context, and with this process at the latest."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip().decode()
        assert port, "the emulator did not start: run tests/gcs_emulator.py to see why"
        yield GcsEmulator(f"http://127.0.0.1:{port}")
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[GcsEmulator]:
    """One emulator for all tests."""
    with running_emulator() as emulator:
        yield emulator


@pytest.fixture
def gcs_bucket(gcs_emulator, monkeypatch) -> str:
    """The gs:// URL of an empty bucket, which this process and those it starts can use, with Beam too."""
    for name, value in gcs_emulator.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    # Google's libraries read the metadata server's address when they are imported: too late for this process.
    from apache_beam.internal.gcp.auth import _Credentials

    monkeypatch.setattr(_Credentials, "_credentials_init", True)
    monkeypatch.setattr(_Credentials, "_credentials", None)
    return gcs_emulator.create_bucket()


def _serve() -> None:
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    class PreconditionFailedError(Exception):
        pass

    class ConditionalStorage(Storage):
        """A storage that honours `ifGenerationMatch` of the request at hand."""

        condition: str | None = None

        def _check(self, bucket_name, file_name):
            current = self.objects.get(bucket_name, {}).get(file_name, {"generation": 0})
            if self.condition is not None and int(self.condition) != int(current["generation"]):
                raise PreconditionFailedError

        def create_file(self, bucket_name, file_name, *args, **kwargs):
            self._check(bucket_name, file_name)
            super().create_file(bucket_name, file_name, *args, **kwargs)

        def get_file(self, bucket_name, file_name, *args, **kwargs):
            self._check(bucket_name, file_name)
            return super().get_file(bucket_name, file_name, *args, **kwargs)

    class Handler(RequestHandler):
        disable_nagle_algorithm = True  # Else each answer waits 40 ms between its headers and its body.
        losing = False
        wfile: Any

        def handle_one_request(self):
            try:
                super().handle_one_request()
            except PreconditionFailedError:
                self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})

        def parse_request(self):
            parsed = super().parse_request()
            if parsed:
                self.storage.condition = parse_qs(urlparse(self.path).query).get("ifGenerationMatch", [None])[0]
            return parsed

        def do_GET(self):
            path = urlparse(self.path).path
            if path == "/lose-next-answer":
                Handler.losing = True
                self._answer(200, {})
            elif path == "/":
                self._answer(200, "ok")
            elif path.startswith("/computeMetadata/v1/"):
                found = _METADATA.get(path.removeprefix("/computeMetadata/v1/"))
                self._answer(404 if found is None else 200, found)
            else:
                super().do_GET()

        def do_POST(self):
            if Handler.losing and "/upload/" in self.path:
                Handler.losing = False
                answer, self.wfile = self.wfile, io.BytesIO()
                super().do_POST()
                self.wfile = answer
                self._headers_buffer = []
                self._answer(503, {"error": {"code": 503, "message": "the answer was lost"}})
            else:
                super().do_POST()

        def _answer(self, status, content):
            body = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.send_header("Metadata-Flavor", "Google")
            self.send_header("Content-Type", "application/text" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    class Server(HTTPServer):
        request_queue_size = 128

    objects = ConditionalStorage(use_memory_fs=True)
    server = Server(("127.0.0.1", 0), lambda *args: Handler(objects, *args))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.buffer.read()  # Until the process that started this one closes it, or dies.


if __name__ == "__main__":
    _serve()
