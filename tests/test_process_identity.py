import json
import os
import socket
import subprocess
import sys
from subprocess import PIPE

import pytest

from transforms import process_identity
from transforms.process_identity import is_alive, this_process

IN_CHILD = """
import json
from transforms.process_identity import this_process
print(json.dumps(this_process()), flush=True)
"""


def process_that_ended() -> dict:
    return json.loads(subprocess.check_output([sys.executable, "-c", IN_CHILD]))


@pytest.fixture(params=["with /proc", "without"])
def system(request, monkeypatch, tmp_path) -> str:
    if request.param == "without":
        monkeypatch.setattr(process_identity, "_PROC", tmp_path)
    return request.param


def test_this_process_lives_and_survives_json(system):
    process = this_process()
    assert is_alive(process)
    assert is_alive(json.loads(json.dumps(process)))
    assert (process["boot"] is None) == (process["started"] is None) == (system == "without")


def test_a_process_that_ended_is_dead():
    assert not is_alive(process_that_ended())


def test_a_process_that_ended_is_dead_without_proc_too(monkeypatch, tmp_path):
    ended = process_that_ended() | {"boot": None, "namespace": None, "started": None}
    monkeypatch.setattr(process_identity, "_PROC", tmp_path)
    assert not is_alive(ended)


def test_a_process_that_ended_is_dead_though_its_parent_has_not_asked_for_its_status():
    with subprocess.Popen(
        [sys.executable, "-c", IN_CHILD + "import sys; sys.stdin.read()"], stdin=PIPE, stdout=PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        process = json.loads(child.stdout.readline())
        assert is_alive(process)
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(process)


def test_a_process_whose_number_another_one_has_now_is_dead():
    assert not is_alive(this_process() | {"started": process_that_ended()["started"]})


@pytest.mark.parametrize("name", ["host", "boot", "namespace"])
def test_a_process_of_another_machine_or_container_counts_as_dead_whoever_has_its_number_here(name):
    assert not is_alive(this_process() | {name: "another"})


def test_a_process_of_another_user_lives(system, monkeypatch):
    def refuse(process, signal):
        raise PermissionError

    process = this_process()
    monkeypatch.setattr(os, "kill", refuse)
    assert is_alive(process)


def test_containers_that_share_a_host_name_are_told_apart(monkeypatch):
    process = this_process()
    assert process["host"] == socket.gethostname()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    assert this_process()["namespace"] == "pid:[1]"
    assert not is_alive(process)
