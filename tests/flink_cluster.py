"""A Flink cluster for tests: brings one up with deploy/flink/cluster.sh, and looks at and kills its processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transforms.storage import list_files

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "deploy" / "flink" / "cluster.sh"
BUILD = ROOT / "deploy" / "flink" / "build-job-server.sh"


def why_not() -> str | None:
    """Returns why no cluster can be brought up here; None where one can."""
    if not sys.platform.startswith("linux"):
        return "deploy/flink/cluster.sh needs Linux"
    for tool, what in {"java": "Java", "mvn": "Maven", "go": "Go"}.items():
        if shutil.which(tool) is None:
            return f"{what} is not installed (no {tool})"
    return None


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def job_server_jar() -> Path:
    """Returns the job server's jar, which is built where it is not there yet."""
    return Path(subprocess.run([BUILD], stdout=subprocess.PIPE, text=True, check=True, timeout=900).stdout.strip())


def answers(port: int) -> bool:
    """Returns whether somebody listens on a port of this machine."""
    with socket.socket() as one:
        return one.connect_ex(("localhost", port)) == 0


def wait_until(what: str, condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Returns what a condition gives once that is true; fails after a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds} seconds")


def wait_for_work(submitter: subprocess.Popen[str], output: Path) -> None:
    """Returns once a run, the first one of an output, has saved work; fails where it ends."""

    def has_saved() -> bool:
        return any("/vectors-" in name for name in list_files(str(output)))

    wait_until("work is saved, or the run ends", lambda: has_saved() or submitter.poll() is not None, 240)
    assert submitter.poll() is None, submitter.communicate()


class Cluster:
    """A JobManager, two TaskManagers with two slots each, and a worker pool, at ports of their own.

    Args:
      folder: of the cluster.
      properties: lines for Flink's settings.
    """

    def __init__(self, folder: Path, properties: str = ""):
        # It may take minutes the first time, and ports are not kept free.
        subprocess.run([SCRIPT, "fetch"], env=os.environ | {"PYTHON": sys.executable}, check=True, timeout=900)
        self.folder = folder
        self.rest_port, rpc_port, self.pool_port = free_ports(3)
        self._environment = os.environ | {
            "FLINK_CLUSTER": str(folder),
            "FLINK_REST_PORT": str(self.rest_port),
            "FLINK_RPC_PORT": str(rpc_port),
            "FLINK_POOL_PORT": str(self.pool_port),
            "FLINK_PROPERTIES": properties,
            "PYTHON": sys.executable,
        }

    def script(self, word: str) -> subprocess.CompletedProcess[str]:
        """Runs the script, whose processes live on."""
        return subprocess.run(
            [SCRIPT, word], env=self._environment, capture_output=True, text=True, check=False, timeout=900
        )

    def up(self) -> None:
        """Starts what does not run."""
        done = self.script("up")
        assert done.returncode == 0, done.stderr

    @property
    def loopback(self) -> list[str]:
        """Options for a job whose work is done by its submitter."""
        return [f"--flink_master=localhost:{self.rest_port}", "--environment_type=LOOPBACK"]

    @property
    def staged(self) -> list[str]:
        """Options for a job whose work is done by workers that get our package from it."""
        return [
            f"--flink_master=localhost:{self.rest_port}",
            f"--environment_config=localhost:{self.pool_port}",
        ]

    @contextmanager
    def job_server(self, folder: Path) -> Iterator[list[str]]:
        """Runs a job server that serves the cluster; gives options for a job through it, whose workers get our package.

        Args:
          folder: for what it says, its temporary files, and what jobs bring.
        """
        (port,) = free_ports(1)
        command = ["java", f"-Djava.io.tmpdir={folder}", "-jar", str(job_server_jar()), f"--artifacts-dir={folder}"]
        command += [f"--flink-master=localhost:{self.rest_port}", f"--job-port={port}"]
        with (
            open(folder / "log", "wb") as log,
            subprocess.Popen(
                [*command, "--artifact-port=0", "--expansion-port=-1"], stdout=log, stderr=subprocess.STDOUT
            ) as server,
        ):
            try:
                wait_until("the job server listens", lambda: server.poll() is not None or answers(port))
                assert server.poll() is None, (folder / "log").read_text()
                yield [f"--job_endpoint=localhost:{port}", self.staged[-1]]
            finally:
                server.terminate()

    def ask(self, path: str) -> Any:
        """Returns what the REST service answers."""
        with urllib.request.urlopen(f"http://localhost:{self.rest_port}{path}", timeout=10) as answer:
            return json.load(answer)

    def jobs(self) -> list[str]:
        """Returns the states of all jobs there have been."""
        return [job["status"] for job in self.ask("/jobs")["jobs"]]

    def cancel_jobs(self) -> None:
        """Cancels all jobs that run, as Flink's page does."""
        for job in self.ask("/jobs")["jobs"]:
            if job["status"] == "RUNNING":
                url = f"http://localhost:{self.rest_port}/jobs/{job['id']}?mode=cancel"
                urllib.request.urlopen(urllib.request.Request(url, method="PATCH"), timeout=10).close()

    def processes(self) -> dict[int, str]:
        """Returns the command lines of all processes of the cluster by their ids."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(process / "cwd") == str(self.folder / "run"):
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def encoders(self) -> list[int]:
        """Returns the ids of the workers' processes that have loaded the encoder so far, each time they did."""
        loaded = [re.search(r"process (\d+) has loaded", line) for line in self.log_lines("has loaded the encoder")]
        return [int(found[1]) for found in loaded if found]

    def kill_task_manager(self) -> None:
        """Kills the first TaskManager."""
        os.kill(int((self.folder / "pids" / "taskmanager-1.pid").read_text()), signal.SIGKILL)

    def log_lines(self, words: str) -> list[str]:
        """Returns the lines of the TaskManagers' logs with these words in them."""
        logs = [path.read_text(errors="replace") for path in (self.folder / "log").glob("taskmanager-*.out")]
        return [line for log in logs for line in log.splitlines() if words in line]


def submit(options: list[Any], **arguments: Any) -> subprocess.Popen[str]:
    """Starts `python -m pipeline flink` in a process, and a group, of its own."""
    # Shells have what runs in the background ignore it, and so would the program, which is to hear it here.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "flink", *map(str, options)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **arguments,
    )
