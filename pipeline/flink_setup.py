"""Looks for what a job on Flink needs, on this machine and in the cluster, and says early what is missing."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import FlinkRunnerOptions, JobServerOptions, PipelineOptions, PortableOptions
from apache_beam.runners.portability.job_server import JavaJarJobServer
from apache_beam.utils.subprocess_server import JavaJarServer

from pipeline import flink

_ROOT = Path(__file__).resolve().parent.parent
_ANSWER_SECONDS = 10
_MIN_JAVA = 11


class FlinkError(Exception):
    """Flink, or something that it needs, is not there."""


def prepare(beam_options: Sequence[str], root: Path = _ROOT) -> list[str]:
    """Returns options with the job server's jar and the cluster's slots, after looking whether all is there.

    Args:
      beam_options: as `flink.complete` returned them.
      root: of the repository, where a jar may have been built.

    Raises:
      FlinkError: Java, a cluster, a job server or its jar is missing.
      ValueError: the job server is for another Flink than the cluster's.
    """
    options = PipelineOptions(list(beam_options))
    master, endpoint = flink.master_of(beam_options), options.view_as(PortableOptions).job_endpoint
    overview = _overview(master) if master else None
    found = list(beam_options) if overview is None else [*beam_options, *flink.given_of(overview, beam_options)]
    if endpoint:
        _check_listens(endpoint)
        if PipelineOptions(found).view_as(FlinkRunnerOptions).parallelism in (None, -1):
            print(
                f"warning: nothing tells how many slots the cluster behind --job_endpoint {endpoint} has, and without "
                "a number the job runs on one: add --parallelism N, all slots say",
                file=sys.stderr,
            )
        return found
    java = _java(options.view_as(JobServerOptions).job_server_java_launcher)
    version = overview["flink-version"] if overview else None
    built = next(iter(sorted(root.glob(flink.BUILT_JAR))), None)
    jar = flink.find_jar(beam_options, built, version) or _fetched_jar(
        flink.wanted_version(beam_options, version) or options.view_as(FlinkRunnerOptions).flink_version,
        options.view_as(JobServerOptions).jar_cache_dir,
    )
    return [*found, f"--flink_job_server_jar={jar}", f"--job_server_java_launcher={java}"]


def _overview(master: str) -> dict[str, Any]:
    try:
        return ask(master, "/overview")
    except (OSError, ValueError) as error:
        raise FlinkError(
            f"no Flink answers at http://{master}/overview ({error}): is the cluster up, and is --flink_master the "
            "address of its web page? On this machine, deploy/flink/cluster.sh up starts one, and without "
            "--flink_master an embedded Flink runs"
        ) from error


def ask(master: str, path: str, method: str = "GET") -> Any:
    """Returns what a cluster's REST service answers.

    Raises:
      OSError: it does not answer, or refuses.
      ValueError: the answer is not JSON.
    """
    request = urllib.request.Request(f"http://{master}{path}", method=method)
    with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
        return json.loads(answer.read() or "{}")


def _check_listens(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise FlinkError(
            f"no job server answers at --job_endpoint {endpoint} ({error}): write HOST:PORT of one that runs, or leave "
            "it out, and one is started"
        ) from error


def _java(launcher: str) -> str:
    """Returns the Java to start, which must be new enough."""
    java = shutil.which(launcher)
    if java is None and launcher == "java" and os.environ.get("JAVA_HOME"):
        java = shutil.which(os.path.join(os.environ["JAVA_HOME"], "bin", "java"))
    needed = (
        f"Flink needs Java {_MIN_JAVA} or later: install it (on Debian and Ubuntu `apt install "
        "openjdk-17-jre-headless`)"
    )
    if java is None:
        raise FlinkError(f"there is no {launcher!r}. {needed}, or name it with --job_server_java_launcher")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    version = re.search(r'version "(?:1\.)?(\d+)', said.stderr + said.stdout)
    if said.returncode or version is None:
        raise FlinkError(f"{java} -version fails: {(said.stderr or said.stdout).strip()}. {needed}")
    if int(version[1]) < _MIN_JAVA:
        raise FlinkError(f"{java} is Java {version[1]}. {needed}, or name another with --job_server_java_launcher")
    return java


def _fetched_jar(version: str, cache: str | None) -> str:
    """Returns Beam's own jar from its cache, into which it is downloaded first where it is not there."""
    url = JavaJarJobServer.path_to_beam_jar(f":runners:flink:{version}:job-server:shadowJar")
    cached = os.path.join(cache or JavaJarServer.JAR_CACHE, os.path.basename(url))
    if not os.path.exists(cached):
        # Beam waits without end for a network that swallows what it is sent.
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_ANSWER_SECONDS).close()
        except OSError as error:
            raise FlinkError(flink.no_jar_message(version, f"{url}: {error}")) from error
    return JavaJarJobServer.local_jar(url, cache)
