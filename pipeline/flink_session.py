"""A job on Flink while this process waits for it: the job server it comes through, and what Ctrl-C does."""

import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import DebugOptions, GoogleCloudOptions, PipelineOptions
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.portability.flink_runner import FlinkJarJobServer, FlinkRunner
from apache_beam.runners.worker import sdk_worker_main
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
from apache_beam.transforms.environments import ExternalEnvironment

from pipeline.flink import is_on_cluster, master_of
from pipeline.flink_setup import ask

_CANCEL_SECONDS = 60.0
_LOOK_SECONDS = 1.0

_TERMINAL = ("FINISHED", "FAILED", "CANCELED")

_KEEPER = Path(__file__).with_name("flink_job_server.py")


class FlinkSession:
    """Runs one job on Flink; a context that ends the job server.

    Args:
      beam_options: as `flink_setup.prepare` returned them.
    """

    def __init__(self, beam_options: Sequence[str]):
        self._master = master_of(beam_options)
        self._is_embedded = not is_on_cluster(beam_options)
        name = PipelineOptions(list(beam_options)).view_as(GoogleCloudOptions).job_name
        self.job_name = name or f"embed-corpus-{uuid.uuid4().hex[:12]}"
        self.beam_options = [*beam_options, f"--job_name={self.job_name}"]
        handle, log = tempfile.mkstemp(prefix="flink-job-server-", suffix=".log")
        os.close(handle)
        self.log = Path(log)
        self._runner = _Runner(self.log)

    def __enter__(self) -> "FlinkSession":
        threading.excepthook = _tell_of_thread
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        try:
            if error_type is not None and issubclass(error_type, KeyboardInterrupt):
                self._cancel()
        except OSError as error:
            print(f"job {self.job_name} could not be cancelled ({error}): look for it on Flink's page", file=sys.stderr)
        finally:
            self._runner.stop()
            if error_type is None or not self.log.stat().st_size:
                self.log.unlink()

    def pipeline(self) -> beam.Pipeline:
        """Returns an empty pipeline."""
        return beam.Pipeline(runner=self._runner, options=PipelineOptions(self.beam_options))

    def is_over(self) -> bool:
        """Returns whether the job is known to run no longer, so that it can write and publish nothing more."""
        if self._is_embedded:
            return self._runner.is_stopped
        if self._master is None:
            return False
        try:
            if self._running(self._master):
                return False
            time.sleep(_LOOK_SECONDS)  # What the job server sent last may only now have arrived.
            return not self._running(self._master)
        except OSError:
            return False

    def _running(self, master: str) -> list[str]:
        """Returns the cluster's ids of this job while it runs; nothing before it is there, and afterwards."""
        # Not /jobs/overview, which has the names too, but may be three seconds old.
        running = [job["id"] for job in ask(master, "/jobs")["jobs"] if job["status"] not in _TERMINAL]
        return [job_id for job_id in running if ask(master, f"/jobs/{job_id}")["name"] == self.job_name]

    def _cancel(self) -> None:
        """Cancels the job, and waits until it runs no longer; told to, the job server alone would let it run on."""
        if self._is_embedded:
            return  # It ends with its job server.
        if self._master is None:
            if self._runner.result is not None:
                self._runner.result.cancel()
                print(
                    f"the job server was asked to cancel job {self.job_name}, but may let it run on: look for it on "
                    "Flink's page; with --flink_master beside --job_endpoint it is cancelled there",
                    file=sys.stderr,
                )
            return
        print("cancelling the job on Flink ...", file=sys.stderr)
        self._runner.end_process()  # It may be about to hand the job over.
        deadline = time.monotonic() + _CANCEL_SECONDS
        while not self.is_over() and time.monotonic() < deadline:
            for job_id in self._running(self._master):
                ask(self._master, f"/jobs/{job_id}?mode=cancel", method="PATCH")
            time.sleep(_LOOK_SECONDS)


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Tells of a thread that failed, unless the other side of a connection of Beam's hung up: the job tells why."""
    if not isinstance(failed.exc_value, grpc.RpcError):
        threading.__excepthook__(failed)


class _Runner(FlinkRunner):
    """Beam's runner, with a job server that ends with us and says what it does in a file, and with our own loopback."""

    def __init__(self, log: Path):
        super().__init__()
        self._log = log
        self._server: _JobServer | None = None
        self.result: Any = None
        self.is_stopped = False

    def run_portable_pipeline(self, pipeline, options):
        self.result = super().run_portable_pipeline(pipeline, options)
        return self.result

    def default_job_server(self, options):
        self._server = _JobServer(options, self._log)
        return self._server

    def end_process(self) -> None:
        """Ends the job server's process, and with it an embedded Flink."""
        if self._server is not None:
            self._server.end_process()

    def stop(self) -> None:
        """Ends the job server, and removes its files, the job's package among them."""
        if self._server is not None:
            self._server.stop()
        self.is_stopped = True

    @staticmethod
    def start_and_replace_loopback_environments(pipeline, options):
        experiments = options.view_as(DebugOptions)
        servers = []
        for environment in pipeline.components.environments.values():
            if environment.urn == python_urns.EMBEDDED_PYTHON_LOOPBACK:
                address, server = _Loopback.start(
                    use_process=experiments.lookup_experiment("use_loopback_process_worker", False),
                    state_cache_size=sdk_worker_main._get_state_cache_size_bytes(options=options),
                    data_buffer_time_limit_ms=sdk_worker_main._get_data_buffer_time_limit_ms(
                        experiments.experiments or []
                    ),
                )
                external = ExternalEnvironment(address).to_runner_api(None)  # type: ignore[arg-type] # As Beam does.
                environment.urn, environment.payload = external.urn, external.payload
                servers.append(lambda server=server: server.stop(1))
        return servers


class _JobServer(FlinkJarJobServer):
    def __init__(self, options, log: Path):
        super().__init__(options)
        self._log = log

    def subprocess_cmd_and_endpoint(self):
        (java, *command), endpoint = super().subprocess_cmd_and_endpoint()
        keeper = [sys.executable, str(_KEEPER), str(os.getpid()), str(self._log)]
        return [*keeper, java, "-Djava.io.tmpdir={temporary}", *command], endpoint

    def end_process(self) -> None:
        if self._server is not None:
            self._server.stop()


class _Loopback(BeamFnExternalWorkerPoolServicer):
    """Workers as threads of this process, for several TaskManagers at once.

    Each of these numbers its workers from 1, and Beam's own pool goes by the number: told to stop the first one's
    worker, it stops the second one's. A worker ends by itself when its TaskManager hangs up.
    """

    def StopWorker(self, stop_worker_request, unused_context):  # The name is Beam's.
        return beam_fn_api_pb2.StopWorkerResponse()
