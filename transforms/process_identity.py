"""Which process on which machine this is, and whether another one, known by what it wrote down, still lives."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_PROC = Path("/proc")

_STATE_FIELD = 0
_STARTED_FIELD = 19
"""Places in `/proc/PID/stat`, counted from behind the program's name, which can hold spaces."""


def this_process() -> dict[str, Any]:
    """Returns what tells this process from all others, to be written as JSON.

    A process number alone does not: after a restart, and in every container, the same numbers are given again, and
    containers on one machine can share its host name. What a system without `/proc` does not tell is None.
    """
    return {**_numbering(), "process": os.getpid(), "started": _started(os.getpid())}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Returns whether a process lives.

    Args:
      process: as `this_process` returned it there. One of another machine or container is not to be seen from here,
        and counts as dead.
    """
    if any(process.get(name) != value for name, value in _numbering().items()):
        return False
    try:
        os.kill(process["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # It lives, and is another user's.
    fields = _stat(process["process"])
    # One that has ended keeps its number until its parent asks how, which in many a container nobody ever does.
    return fields is None or (fields[_STATE_FIELD] != "Z" and fields[_STARTED_FIELD] == process.get("started"))


def _numbering() -> dict[str, str | None]:
    """Returns within what process numbers mean something: a machine, since it started, and a namespace of it."""
    boot = namespace = None
    with suppress(OSError):
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink(_PROC / "self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _started(process: int) -> str | None:
    """Returns when a process started, in ticks since the machine did; None where that is not to be known."""
    fields = _stat(process)
    return None if fields is None else fields[_STARTED_FIELD]


def _stat(process: int) -> list[str] | None:
    """Returns what `/proc` says of a process behind its program's name; None where it says nothing."""
    try:
        stat = (_PROC / str(process) / "stat").read_text(errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()
