"""The worker pool of deploy/flink with workers that are scripts: one that says much, one that ends, one that hangs."""

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from flink_cluster import ROOT, free_ports, wait_until

_SPEC = importlib.util.spec_from_file_location("worker_pool", ROOT / "deploy" / "flink" / "worker_pool.py")
assert _SPEC is not None
assert _SPEC.loader is not None
worker_pool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(worker_pool)

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the pool looks into /proc")

HARNESS = worker_pool._HARNESS.decode()
SAY_A_MEGABYTE = "head -c 1000000 /dev/zero | tr '\\0' x"


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[[str], str]]:
    """Has a pool start a worker that runs a script; returns its answer's error, empty where there is none."""
    executable = tmp_path / "worker"
    (port,) = free_ports(1)
    folder = tmp_path / "workers"
    folder.mkdir()
    server = worker_pool.serve(worker_pool.WorkerPool(str(executable), str(folder)), port)

    def start_worker(script: str) -> str:
        # Its process group, by which the test ends it.
        executable.write_text(f'#!/bin/bash\necho "$$" >{tmp_path}/id\necho "$@" >{tmp_path}/options\n{script}\n')
        executable.chmod(0o755)
        request = beam_fn_api_pb2.StartWorkerRequest(worker_id="7-1")
        request.control_endpoint.url = "localhost:1234"
        with grpc.insecure_channel(f"localhost:{port}") as channel:
            return beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolStub(channel).StartWorker(request, timeout=30).error

    yield start_worker
    server.stop(None)
    with suppress(ProcessLookupError):
        os.killpg(int((tmp_path / "id").read_text()), signal.SIGKILL)


def test_a_worker_that_says_much_does_its_work_all_the_same(start, tmp_path):
    harness = f"{SAY_A_MEGABYTE}; touch {tmp_path}/worked; sleep 60; true"  # Bash would become its last command.
    assert start(f'{SAY_A_MEGABYTE}; bash -c "{harness}" {HARNESS} & wait') == ""
    wait_until("the worker works", (tmp_path / "worked").exists, 60)
    (log,) = (tmp_path / "workers").glob("*/log")
    assert log.stat().st_size == 2_000_000
    folder, *options = (tmp_path / "options").read_text().split()
    assert Path(folder) == log.parent
    assert {"--id=7-1", "--control_endpoint=localhost:1234"} < set(options)


def test_a_worker_that_ends_is_told_with_what_it_said_last(start):
    error = start(f"{SAY_A_MEGABYTE}; echo there is no setuptools >&2; exit 3")
    assert error.startswith("a worker ended with status 3 before it started (")
    assert error.endswith("xxx" + "there is no setuptools\n")
    assert len(error) < 3000


def test_a_worker_that_does_not_start_is_killed_with_all_it_has_started(start, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_pool, "_START_SECONDS", 5.0)
    error = start("echo installing; sleep 60 & wait")
    assert error.startswith("a worker was killed, for it did not start within 5 seconds (")
    assert error.endswith("installing\n")

    def is_over() -> bool:
        try:
            os.killpg(int((tmp_path / "id").read_text()), 0)
        except ProcessLookupError:
            return True
        return False

    wait_until("nothing of it runs", is_over, 60)
