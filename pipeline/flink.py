"""What a person's options become on Flink, and which job server hands the job over; pure functions."""

import re
import socket
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    JobServerOptions,
    PipelineOptions,
    PortableOptions,
    SetupOptions,
)

TESTED_FLINK_VERSION = "1.19"
"""Of Flink's versions the one that all is tested with."""

LOCAL = "[local]"
"""As master: an embedded Flink, in the job server's own process."""

WORKER_POOL = "localhost:50000"
"""Where each TaskManager finds its worker pool: beside it, at the port that Beam's images listen on."""

BUILD_COMMAND = "deploy/flink/build-job-server.sh"
BUILT_JAR = ".cache/flink/job-server/*job-server*.jar"
"""Made by the command, both from the repository's root."""

WORKER_PLUGIN = "pipeline.flink_worker"
"""What each worker imports before it begins."""

_DEFAULTS = {
    # One process for each TaskManager and its GPU: all its slots share the model.
    "sdk_worker_parallelism": "1",
    # It lives on from one phase of the job to the next, where the cluster allows it: see deploy/flink/README.md.
    "environment_cache_millis": "60000",
    # A bundle must hold many batches, which end with it; Flink 1.19 makes one bundle of a whole partition anyway.
    "max_bundle_size": "1000000",
    "max_bundle_time_mills": "60000",
    # What one step hands to the next is not copied: no step changes what it was given.
    "faster_copy": "true",
}

_SUBMITTER_JVM = "-XX:TieredStopAtLevel=1"
"""For a job server that hands a job over and ends: better optimised code would come too late for it."""

_EMBEDDED_JVM = "--add-opens=java.base/java.lang=ALL-UNNAMED"
"""As Flink's own scripts have it: without, Flink cannot tell of which memory it ran out."""


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"


class FlinkJobOptions(PipelineOptions):
    """Options that the job server knows and Beam's Python half does not list; it asks for them only when it submits."""

    @classmethod
    def _add_argparse_args(cls, parser):
        parser.add_argument("--max_bundle_size", type=int, help="most elements of a bundle; ours 1000000")
        parser.add_argument("--max_bundle_time_mills", type=int, help="longest time of a bundle; ours 60000")
        parser.add_argument(
            "--faster_copy", type=_flag, metavar="true|false", help="hand elements on without copying; ours true"
        )
        parser.add_argument("--object_reuse", type=_flag, metavar="true|false", help="Flink's object reuse mode")
        parser.add_argument(
            "--execution_mode_for_batch",
            choices=["PIPELINED", "PIPELINED_FORCED", "BATCH", "BATCH_FORCED"],
            help="how data passes between steps; Flink's default PIPELINED",
        )
        parser.add_argument("--flink_conf_dir", help="folder of Flink's settings for the job, and an embedded Flink")
        parser.add_argument("--disable_metrics", type=_flag, metavar="true|false", help="no Beam metrics in Flink")


def is_flink(beam_name: str) -> bool:
    """Returns whether Beam's name of a runner is Flink's."""
    return beam_name.rpartition(".")[2].lower() in ("flink", "flinkrunner")


def complete(given: Sequence[str], setup_file: str | None) -> list[str]:
    """Returns Beam's options with those that Flink needs; what a person gave stands.

    Args:
      given: Beam's options as given, the runner among them.
      setup_file: what our package is made from, for workers that do not have it; None where there is none.

    Raises:
      ValueError: options contradict each other, or lack one that nobody can guess.
    """
    options = PipelineOptions(list(given))
    portable, server = options.view_as(PortableOptions), options.view_as(JobServerOptions)
    if options.view_as(FlinkRunnerOptions).flink_submit_uber_jar:
        raise ValueError("--flink_submit_uber_jar is not supported: leave it out, and the job server submits the job")
    master = master_of(given)
    if master and master.startswith("[") and not re.match(r"\[[0-9a-fA-F:.]+\]:", master):  # An IPv6 address is one.
        raise ValueError(
            f"--flink_master {master!r} is no cluster: name its HOST:PORT, or take {LOCAL}, an embedded Flink, which "
            "runs too where you leave the option out"
        )
    defaults = dict(_DEFAULTS)
    if master is None and not portable.job_endpoint:
        defaults["flink_master"] = LOCAL
        if options.view_as(FlinkRunnerOptions).flink_job_server_jar is None:
            defaults["flink_version"] = TESTED_FLINK_VERSION  # Beam would take its newest, built here or not.
    kind = portable.environment_type or ("EXTERNAL" if is_on_cluster(given) else "LOOPBACK")
    defaults["environment_type"] = kind
    if kind == "EXTERNAL" and not (portable.environment_config or portable.environment_options):
        defaults["environment_config"] = WORKER_POOL
    if kind != "LOOPBACK" and setup_file is not None and options.view_as(SetupOptions).setup_file is None:
        defaults["setup_file"] = setup_file
    if master and not portable.job_endpoint and not server.job_server_jvm_properties:
        defaults["job_server_jvm_properties"] = _SUBMITTER_JVM
    elsewhere = elsewhere_of(given)
    if elsewhere and kind == "LOOPBACK":
        raise ValueError(
            f"--environment_type LOOPBACK has the work done in this process, which {elsewhere} cannot reach: leave it "
            f"out, and each TaskManager asks the worker pool beside it, at {WORKER_POOL}"
        )
    if elsewhere and kind != "LOOPBACK" and not portable.job_endpoint and not server.artifacts_dir:
        raise ValueError(
            f"the workers of {elsewhere} must be able to fetch the job's package: name a folder that they and this "
            "machine see with --artifacts_dir, on gs:// or on a shared disk"
        )
    names = {option.partition("=")[0] for option in given}
    added = [f"--{name}={value}" for name, value in defaults.items() if f"--{name}" not in names]
    beside = [f"--beam_plugin={WORKER_PLUGIN}"]  # As all that follows: beside those that were given.
    if master is None and not portable.job_endpoint:
        beside.append(f"--job_server_jvm_properties={_EMBEDDED_JVM}")
    return [*given, *added, *(option for option in beside if option not in given)]


def master_of(beam_options: Sequence[str]) -> str | None:
    """Returns HOST:PORT of the cluster that is named; None where none is, as for an embedded Flink."""
    master = _view(beam_options, FlinkRunnerOptions).flink_master.strip()
    return None if master in (LOCAL, "[auto]") else re.sub("^https?://", "", master).rstrip("/")


def elsewhere_of(beam_options: Sequence[str]) -> str | None:
    """Returns HOST:PORT of the cluster or job server where it is not on this machine; None where all is here."""
    places = master_of(beam_options), _view(beam_options, PortableOptions).job_endpoint
    return next((place for place in places if place and not _is_here(place)), None)


def check_paths(inputs: Sequence[str], output: str | None, beam_options: Sequence[str]) -> None:
    """Refuses defaults that are files of this machine where the work is done elsewhere.

    Args:
      inputs: globs as given.
      output: as given; None where it was not.
      beam_options: as given or completed.

    Raises:
      ValueError: input or output was not given, and workers of another machine would not find the default.
    """
    elsewhere = elsewhere_of(beam_options)
    if elsewhere and not inputs:
        raise ValueError(
            f"the sample corpus is a file of this machine, which the workers of {elsewhere} do not see: write it into "
            "a folder that they see with `./launch.sh sample --output FILE`, or copy it to gs://, and name it with "
            "--input"
        )
    if elsewhere and output is None:
        raise ValueError(
            f"the default output is a folder of this machine, which the workers of {elsewhere} do not see: name one "
            "that they and this machine see with --output, on gs:// or on a shared disk"
        )


def is_on_cluster(beam_options: Sequence[str]) -> bool:
    """Returns whether the job runs elsewhere than in a Flink of its own."""
    return bool(master_of(beam_options) or _view(beam_options, PortableOptions).job_endpoint)


def is_loopback(beam_options: Sequence[str]) -> bool:
    """Returns whether this process does the work itself."""
    return _view(beam_options, PortableOptions).environment_type == "LOOPBACK"


def find_jar(beam_options: Sequence[str], built: Path | None, cluster_version: str | None) -> str | None:
    """Returns the job server's jar; None where Beam has to fetch its own.

    Args:
      beam_options: completed.
      built: the jar that `BUILD_COMMAND` made; None where it was not run.
      cluster_version: of the cluster, `1.19.3` say; None where it is not known.

    Raises:
      FileNotFoundError: the jar that was named is not there.
      ValueError: the jar that was named is for another Flink than the cluster's.
    """
    named = _view(beam_options, FlinkRunnerOptions).flink_job_server_jar
    wanted = wanted_version(beam_options, cluster_version)
    if named is None:
        return str(built) if built and wanted in (None, version_of_jar(built)) else None
    if urlsplit(named).scheme in ("http", "https", "gs"):
        version = _version_in(named)
    else:
        if not Path(named).is_file():
            raise FileNotFoundError(
                f"--flink_job_server_jar names {named}, and there is no such file: {BUILD_COMMAND} builds one and "
                "prints where it is"
            )
        version = version_of_jar(Path(named))
    if version and cluster_version and version != _short(cluster_version):
        raise ValueError(
            f"the cluster runs Flink {cluster_version}, and the job server {named} is for Flink {version}, which it "
            f"does not understand: take one for {_short(cluster_version)}"
        )
    return named


def wanted_version(beam_options: Sequence[str], cluster_version: str | None) -> str | None:
    """Returns the Flink version, `1.19` say, that the job server must be of; None where any will do.

    Raises:
      ValueError: a version was asked for that is not the cluster's.
    """
    given = next((option for option in beam_options if option.partition("=")[0] == "--flink_version"), None)
    asked = _view(beam_options, FlinkRunnerOptions).flink_version if given else None
    if asked and cluster_version and asked != _short(cluster_version):
        raise ValueError(f"--flink_version is {asked}, but the cluster runs Flink {cluster_version}")
    return asked or (_short(cluster_version) if cluster_version else None)


def version_of_jar(jar: Path) -> str | None:
    """Returns the Flink version, `1.19` say, that a job server's jar is for; None where it does not tell."""
    found = _version_in(jar.name)
    if found is None and zipfile.is_zipfile(jar):
        with zipfile.ZipFile(jar) as archive:
            if "META-INF/MANIFEST.MF" in archive.namelist():
                # Lines of a manifest are broken anywhere.
                manifest = archive.read("META-INF/MANIFEST.MF").decode("utf-8", "replace")
                found = _version_in(re.sub(r"\r?\n ", "", manifest))
    return found


def no_jar_message(version: str, reason: object) -> str:
    """Returns what to do where no job server's jar is there and Beam cannot fetch one."""
    jar = f"beam-runners-flink-{version}-job-server-*.jar"
    return (
        f"there is no job server for Flink {version}, and Beam could not fetch its own: {reason}. Build one with "
        f"{BUILD_COMMAND} (needs Maven, which can use a proxy or mirror; for Flink 1.19, and it is found from then "
        f"on), or get {jar} from Maven Central (group org.apache.beam) and name it with --flink_job_server_jar"
    )


def given_of(overview: Mapping[str, Any], beam_options: Sequence[str]) -> list[str]:
    """Returns the options that follow from what a cluster says of itself: its free slots, unless a number is given.

    Raises:
      ValueError: no slot is free.
    """
    if any(option.partition("=")[0] == "--parallelism" for option in beam_options):
        return []
    # Without it, a job that comes through a job server runs on one slot. A cluster that starts TaskManagers as they
    # are needed has none yet: what it does then is its own settings' affair.
    total, free = overview["slots-total"], overview["slots-available"]
    if total and not free:
        raise ValueError(
            f"all {total} slots of the cluster are taken, and {overview['jobs-running']} jobs run there: wait for "
            "them, or cancel them; --parallelism N has the job wait there, for as long as the cluster's "
            "slot.request.timeout, five minutes unless it is set"
        )
    return [f"--parallelism={free}"] if free else []


def _version_in(text: str) -> str | None:
    found = re.search(r"beam-runners-flink[-_](\d+\.\d+)", text)
    return found[1] if found else None


def _short(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _is_here(place: str) -> bool:
    host = urlsplit(f"//{place}").hostname or ""
    return host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")


def _view(beam_options: Sequence[str], kind: type) -> Any:
    return PipelineOptions(list(beam_options)).view_as(kind)
