"""A worker pool for several TaskManagers on one machine, which tells when a worker cannot start; needs Beam alone.

Each TaskManager numbers its workers from 1, and Beam's own pool goes by that number: told to stop the first one's
worker, it stops the second one's. Here nobody is stopped by number, and need not be: a worker ends by itself when its
TaskManager hangs up. And where a worker dies before it has connected, its package cannot be installed say, a
TaskManager waits for it without end, unless the pool says what happened.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer

_START_SECONDS = 300.0
_LOOK_SECONDS = 0.2
_MAX_STARTING = 32  # At the same time.
_HARNESS = b"apache_beam.runners.worker.sdk_worker_main"
_TOLD_CHARACTERS = 2000


class WorkerPool(BeamFnExternalWorkerPoolServicer):
    """Starts workers.

    Args:
      executable: called for each worker with the options of Beam's boot program, which it becomes.
      folder: where each worker gets a folder of its own; what it says goes into the file `log` there.
    """

    def __init__(self, executable: str, folder: str):
        super().__init__(use_process=True, container_executable=executable)
        self._executable = executable
        self._folder = folder

    def StartWorker(self, start_worker_request, unused_context):  # The name is Beam's.
        """Starts a worker; answers when its Python runs, or with the end of its log where it does not come to that."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        endpoints = ("logging_endpoint", "artifact_endpoint", "provision_endpoint", "control_endpoint")
        command = [self._executable, str(folder), f"--id={start_worker_request.worker_id}"]
        command += [f"--{name}={getattr(start_worker_request, name).url}" for name in endpoints]
        # Into a file: nobody would read a pipe, and a worker that says much would wait for ever.
        with open(folder / "log", "wb") as log:
            # In a session of its own, so that it can be killed with all that it has started.
            worker = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + _START_SECONDS
        while worker.poll() is None and time.monotonic() < deadline:
            if _runs_harness(worker.pid):
                return beam_fn_api_pb2.StartWorkerResponse()
            time.sleep(_LOOK_SECONDS)
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)  # Started late, it would work for a job that has failed.
            worker.wait()
            why = f"was killed, for it did not start within {_START_SECONDS:.0f} seconds"
        else:
            why = f"ended with status {worker.returncode} before it started"
        told = (folder / "log").read_text(errors="replace")[-_TOLD_CHARACTERS:]
        return beam_fn_api_pb2.StartWorkerResponse(error=f"a worker {why} ({folder}/log): {told}")

    def StopWorker(self, stop_worker_request, unused_context):
        """Does nothing: the worker is about to end."""
        return beam_fn_api_pb2.StopWorkerResponse()


def _runs_harness(process_id: int) -> bool:
    """Returns whether a process has started the Python that does the work."""
    try:
        for thread in Path(f"/proc/{process_id}/task").iterdir():
            for child in (thread / "children").read_text().split():
                if _HARNESS in Path(f"/proc/{child}/cmdline").read_bytes():
                    return True
    except (FileNotFoundError, ProcessLookupError):
        pass  # Ended while we looked; the next look tells.
    return False


def serve(pool: WorkerPool, port: int) -> grpc.Server:
    """Returns a server that has begun to serve TaskManagers on this machine."""
    server = grpc.server(ThreadPoolExecutor(max_workers=_MAX_STARTING))
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    server.add_insecure_port(f"localhost:{port}")
    server.start()
    return server


def main() -> None:
    """Serves until it is told to end."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--service_port", type=int, required=True, help="where TaskManagers ask for workers")
    parser.add_argument("--executable", required=True, help="becomes a worker; gets its folder and Beam's boot options")
    parser.add_argument("--folder", required=True, help="for the workers' folders")
    arguments = parser.parse_args()
    # It serves for as long as somebody holds it.
    server = serve(WorkerPool(arguments.executable, arguments.folder), arguments.service_port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    server.wait_for_termination()


if __name__ == "__main__":
    main()
