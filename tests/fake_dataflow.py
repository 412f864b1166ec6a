"""The Dataflow service on this machine: takes a job, plays its states, and may run it from what was staged for it."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from google.cloud.dataflow import JobState

JOB_ID = "2026-11-23_10_00_00-1"

_PATH = re.compile(
    r"/v1b3/projects/(?P<project>[^/?]+)/locations/(?P<region>[^/?]+)/jobs(/(?P<job>[^/?]+)(?P<rest>.*))?"
)


@dataclass
class FakeDataflow:
    """What the service was asked, and what it answers.

    Attributes:
      states: of the job, one for each time it is asked for; the last one stays.
      error: message of the job, told with its failure.
      refusal: with which jobs are refused, as with status 403.
      work: called in a thread of its own once the job is there; the job is DONE only after it.
      url: http://localhost:PORT, as Beam takes it for a service without credentials.
      submitted: jobs that were created, as JSON.
      asked: method and path of every request, in order.
      cancelled: whether the job was asked to be cancelled.
      on_asked: called each time the job is asked for.
    """

    states: list[str]
    error: str | None = None
    refusal: str | None = None
    work: Callable[[dict[str, Any]], None] | None = None
    url: str = ""
    submitted: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    cancelled: bool = False
    on_asked: Callable[[], None] | None = None
    _worker: threading.Thread | None = None

    def create(self, project: str, region: str, job: dict[str, Any]) -> dict[str, Any]:
        self.submitted.append(job)
        if self.work is not None:
            self._worker = threading.Thread(target=self.work, args=(job,))
            self._worker.start()
        return job | {"id": JOB_ID, "projectId": project, "location": region, "currentState": "JOB_STATE_PENDING"}

    def get(self) -> dict[str, Any]:
        if self.on_asked is not None:
            self.on_asked()
        if self.cancelled:
            return {"id": JOB_ID, "currentState": "JOB_STATE_CANCELLED"}
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state == "DONE" and self._worker is not None:
            self._worker.join()
        return {"id": JOB_ID, "currentState": f"JOB_STATE_{state}"}

    def messages(self) -> dict[str, Any]:
        said = [("JOB_MESSAGE_BASIC", "Worker configuration: n1-standard-1 in us-central1.")]
        if self.error is not None:
            said.append(("JOB_MESSAGE_ERROR", self.error))
        return {
            "jobMessages": [
                {
                    "id": str(i),
                    "time": f"2026-11-23T10:00:{i:02}Z",
                    "messageText": text,
                    "messageImportance": importance,
                }
                for i, (importance, text) in enumerate(said)
            ]
        }

    def update(self, change: dict[str, Any]) -> dict[str, Any]:
        self.cancelled = self.cancelled or change["requestedState"] == JobState.JOB_STATE_CANCELLED
        return {"id": JOB_ID, **change}


@contextmanager
def running_dataflow(states: list[str], **arguments: Any) -> Iterator[FakeDataflow]:
    """Runs a service that knows one job; arguments as of `FakeDataflow`."""
    fake = FakeDataflow(states, **arguments)
    server = ThreadingHTTPServer(("localhost", 0), _handler(fake))
    server.daemon_threads = True
    fake.url = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def run_staged(pipeline: bytes) -> None:
    """Runs a pipeline as it was staged for Dataflow, in this process: its Docker images become this very Python."""
    proto = beam_runner_api_pb2.Pipeline.FromString(pipeline)
    for environment in proto.components.environments.values():
        assert environment.urn == common_urns.environments.DOCKER.urn
        environment.urn, environment.payload = "beam:env:embedded_python:v1", b""
        del environment.dependencies[:]
    FnApiRunner().run_via_runner_api(proto, PipelineOptions([])).wait_until_finish()


def _handler(fake: FakeDataflow) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self._found()
            if found["rest"].startswith("/messages"):
                self._answer(fake.messages())
            elif found["rest"].startswith("/metrics"):
                self._answer({"metrics": []})
            else:
                self._answer(fake.get())

        def do_POST(self):
            found = self._found()
            job = self._body()
            if fake.refusal is not None:
                self._answer({"error": {"code": 403, "message": fake.refusal, "status": "PERMISSION_DENIED"}}, 403)
            else:
                self._answer(fake.create(found["project"], found["region"], job))

        def do_PUT(self):
            self._found()
            self._answer(fake.update(self._body()))

        def _found(self) -> dict[str, str]:
            fake.asked.append(f"{self.command} {self.path.partition('?')[0]}")
            found = _PATH.fullmatch(self.path.partition("?")[0])
            assert found, f"{self.path} is no path of the service's"
            return {name: value or "" for name, value in found.groupdict().items()}

        def _body(self) -> dict[str, Any]:
            return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, content: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler
