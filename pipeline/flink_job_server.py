"""Runs a command, Java with the job server, for as long as the process that wants it lives; a script of its own.

Usage: flink_job_server.py PARENT_ID LOG COMMAND...

In the command, {temporary} stands for a folder that is removed at the end: an embedded Flink leaves files in its own.

A process that is killed cannot end what it started, and a job server without its submitter would sit there for ever.
"""

import os
import signal
import subprocess
import sys
import tempfile

_LOOK_SECONDS = 1.0
_END_SECONDS = 3.0


def main(parent_id: int, log: str, command: list[str]) -> int:
    """Returns the exit status of the command, which is ended by SIGINT and SIGTERM to this process, too."""
    with tempfile.TemporaryDirectory(prefix="flink-job-server-", ignore_cleanup_errors=True) as folder:
        return _keep(parent_id, log, [word.replace("{temporary}", folder) for word in command])


def _keep(parent_id: int, log: str, command: list[str]) -> int:
    os.setsid()  # Ctrl-C is the submitter's: it cancels the job first, through this job server.
    with open(log, "ab") as file:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.terminate())
    while True:
        try:
            return server.wait(_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            if os.getppid() != parent_id:
                break
    server.terminate()
    try:
        return server.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
