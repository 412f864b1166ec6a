"""A worker pool for several TaskManagers on one machine; needs Beam alone.

Each TaskManager numbers its workers from 1, and Beam's own pool goes by that number: told to stop the first one's
worker, it stops the second one's. Here nobody is stopped by number, and need not be: a worker ends by itself when its
TaskManager hangs up. On a cluster where each TaskManager has a pool of its own, Beam's will do.
"""

import argparse
import signal
import sys

from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer


class SharedWorkerPool(BeamFnExternalWorkerPoolServicer):
    """Beam's pool, but for the stopping."""

    def StopWorker(self, stop_worker_request, unused_context):  # The name is Beam's.
        """Does nothing: the worker is about to end."""
        return beam_fn_api_pb2.StopWorkerResponse()


def main() -> None:
    """Serves until it is told to end, and ends its workers then."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--service_port", type=int, required=True, help="where TaskManagers ask for workers")
    parser.add_argument("--container_executable", required=True, help="what starts a worker; gets Beam's boot options")
    arguments = parser.parse_args()
    _, server = SharedWorkerPool.start(  # It serves for as long as somebody holds it.
        use_process=True, port=arguments.service_port, container_executable=arguments.container_executable
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    server.wait_for_termination()


if __name__ == "__main__":
    main()
