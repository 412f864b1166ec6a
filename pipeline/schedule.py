"""Prints what makes `embed` run on a schedule: entries for cron, Cloud Scheduler, Airflow and Kubernetes.

Options of the schedule come first, then the word and the options with which ./launch.sh runs the job:
schedule --cron '15 3 * * *' --format cron local --input 'corpus/*.jsonl' --output vectors
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import zoneinfo
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline import schedule_entries as entries
from pipeline.cron_expression import check_cron
from pipeline.options import EmbedOptions, given_options, parse
from pipeline.template_launch import launch_request
from transforms.checkpoint import is_shipped

WORDS = ("local", "prism", "flink", "dataflow")
"""Of `./launch.sh`: `embed` with a runner."""

_IN_PLACE = ("local", "prism")
"""Those that do the work where they are called; the others ask for it elsewhere."""


_CARRIED = ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG", "XDG_CACHE_HOME", "HTTPS_PROXY", "NO_PROXY")
"""Variables beside PATH that a run by cron needs as a run by hand does: keys, caches, the way out."""


class _LeftOutError(Exception):
    """There is no such entry for the options; the message says what it takes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `schedule`."""
    parser.add_argument(
        "--cron",
        type=_cron,
        default="0 3 * * *",
        metavar="EXPRESSION",
        help="minute, hour, day of the month, month, day of the week; default '0 3 * * *', every day at 3:00",
    )
    parser.add_argument(
        "--timezone", type=_timezone, default="Etc/UTC", metavar="NAME", help="Europe/Zurich, say; default Etc/UTC"
    )
    parser.add_argument(
        "--format",
        choices=("all", *_FORMATS),
        default="all",
        help="one entry alone, ready for its file; all: every one that the options allow, and why others are left out; "
        "default all",
    )
    parser.add_argument(
        "--name", type=_name, default="embed-corpus", help="of the entry and of its jobs; default embed-corpus"
    )
    google = parser.add_argument_group("Cloud Scheduler, and Airflow with a Flex Template")
    google.add_argument(
        "--template", type=_gs_file, metavar="gs://FILE", help="the Flex Template's file, as it was built"
    )
    google.add_argument(
        "--service_account", metavar="EMAIL", help="in whose name Cloud Scheduler asks Dataflow to start the job"
    )
    kubernetes = parser.add_argument_group("Kubernetes")
    kubernetes.add_argument("--image", help="container image that holds this package, as deploy/Dockerfile makes it")
    kubernetes.add_argument(
        "--cpus", type=_quantity, metavar="CORES", help="default 4; 1 for what is computed elsewhere"
    )
    kubernetes.add_argument("--memory", type=_quantity, help="default 16Gi; 4Gi for what is computed elsewhere")
    kubernetes.add_argument(
        "--gpus",
        type=int,
        choices=(0, 1),
        default=0,
        help="NVIDIA GPUs, with which the job gets --device=cuda; default 0",
    )
    kubernetes.add_argument(
        "--volume",
        type=_volume,
        action="append",
        default=[],
        metavar="CLAIM:/FOLDER",
        help="mount a persistent volume claim; repeatable",
    )
    kubernetes.add_argument("--namespace", type=_name, help="default: kubectl's")
    kubernetes.add_argument("--kubernetes_service_account", type=_name, metavar="NAME", help="default: the namespace's")
    parser.add_argument("word", choices=WORDS, metavar="WORD", help=f"how the job runs: {', '.join(WORDS)}")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="its options, as ./launch.sh takes them"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints one entry, or all; returns the exit status: 0, or 2 where none that was asked for can be made."""
    if told := _misleading(arguments):
        print(f"error: {told}", file=sys.stderr)
        return 2
    names = _FORMATS if arguments.format == "all" else (arguments.format,)
    parsed = {name: _parsed(arguments, name) for name in names}
    refusals = [options for options in parsed.values() if isinstance(options, str)]
    if len(refusals) == len(parsed) and len(set(refusals)) == 1:
        sys.stderr.write(refusals[0])
        return 2
    if arguments.format != "all":
        try:
            print(_entry(arguments, arguments.format, parsed[arguments.format]), end="")
        except (_LeftOutError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    made = 0
    for name, options in parsed.items():
        try:
            print(f"# ---- {name} ----\n{_entry(arguments, name, options)}")
            made += 1
        except (_LeftOutError, ValueError) as error:
            print(f"# ---- {name}: left out ----\n# {error}\n")
    if not made:
        print("error: every entry is left out; the lines above say why", file=sys.stderr)
    return 0 if made else 2


def _parsed(arguments: argparse.Namespace, name: str) -> EmbedOptions | str:
    """Returns the options of the job that a format's entry starts, or what `parse` writes where it refuses them.

    Raises:
      SystemExit: 0, after `--help` among the options.
    """
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):  # Another format may take them.
            return parse([f"--runner={arguments.word}", *_brought_by_template(arguments, name), *arguments.options])
    except SystemExit as stopped:
        if not stopped.code:
            raise
        return written.getvalue()


def _brought_by_template(arguments: argparse.Namespace, name: str) -> list[str]:
    """Returns options that a Flex Template's launcher adds, if it is what starts the job; those given count more."""
    if arguments.word != "dataflow" or not arguments.template or name not in _STARTING_TEMPLATE:
        return []
    return ["--sdk_container_image=the-templates", f"--template_location={arguments.template}"]


def _entry(arguments: argparse.Namespace, name: str, options: EmbedOptions | str) -> str:
    """Returns a format's entry, of options as `_parsed` returned them."""
    if isinstance(options, str):
        raise _LeftOutError(options.strip().partition(": error: ")[2])
    return _FORMATS[name](arguments, options)


def _misleading(arguments: argparse.Namespace) -> str | None:
    """Returns what a run would take in another way each night than it was meant today."""
    given = arguments.options
    names = [word.partition("=")[0] for word in given]
    own = argparse.ArgumentParser()
    add_arguments(own)
    for name in names:
        if name in own._option_string_actions.keys() - {"-h", "--help"}:
            return f"{name} is an option of the schedule itself: write it before the word {arguments.word!r}"
    if "--runner" in names:
        return f"--runner contradicts the word {arguments.word!r}: name the runner by the word alone"
    for name in ("dry_run", "template_location"):
        if f"--{name}" in names:
            return f"--{name} shows the job and runs nothing: leave it out of a schedule"
    for place, word in enumerate(given):
        files = given[place + 1 : place + 3]
        if word == "--input" and len(files) == 2 and all(map(os.path.isfile, files)):
            return (
                f"--input {' '.join(files)} ... are the files of today, and later ones would be left out: put the glob "
                "in quotes, or write --input before each file"
            )
    return None


# --- Entries ---


def _schedule(arguments: argparse.Namespace) -> entries.Schedule:
    return entries.Schedule(arguments.name, arguments.cron, arguments.timezone)


def _command(arguments: argparse.Namespace) -> list[str]:
    """Returns how the job is run on this machine from any folder."""
    launcher = Path(__file__).resolve().parent.parent / "launch.sh"
    if not launcher.is_file():  # Installed, not checked out.
        launcher = Path(sys.executable).with_name("embed-corpus")
    return [str(launcher), arguments.word, *arguments.options]


def _crontab(arguments: argparse.Namespace, options: EmbedOptions) -> str:
    variables = {"PATH": os.environ.get("PATH", os.defpath)}
    variables |= {name: os.environ[name] for name in _CARRIED if name in os.environ}
    machine = entries.Machine(os.getcwd(), variables, shutil.which("flock"))
    return entries.crontab(_schedule(arguments), _command(arguments), machine)


def _scheduler_job(arguments: argparse.Namespace, options: EmbedOptions) -> dict[str, Any]:
    launch = _launch(arguments, options)
    if not arguments.service_account:
        raise _LeftOutError(
            "Cloud Scheduler needs --service_account, the email of an account that may start Dataflow jobs "
            "(roles/dataflow.developer) and act as their workers' account (roles/iam.serviceAccountUser)"
        )
    project, region = _place(arguments)
    return entries.scheduler_job(_schedule(arguments), project, region, launch, arguments.service_account)


def _launch(arguments: argparse.Namespace, options: EmbedOptions) -> dict[str, Any]:
    if arguments.word != "dataflow" or not arguments.template:
        raise _LeftOutError("it starts a Flex Template on Dataflow: take the word dataflow, and give --template")
    return launch_request(_given(arguments), options, arguments.template, arguments.name)


def _place(arguments: argparse.Namespace) -> tuple[str, str]:
    """Returns Dataflow's project and region, without which `parse` has refused the options."""
    given = _given(arguments)
    return str(given["project"]), str(given["region"])


def _given(arguments: argparse.Namespace) -> dict[str, str | bool | list[str]]:
    return given_options([f"--runner={arguments.word}", *arguments.options])


def _gcloud(arguments: argparse.Namespace, options: EmbedOptions) -> str:
    return entries.gcloud_command(_scheduler_job(arguments, options))


def _scheduler_json(arguments: argparse.Namespace, options: EmbedOptions) -> str:
    return json.dumps(_scheduler_job(arguments, options), indent=2) + "\n"


def _airflow(arguments: argparse.Namespace, options: EmbedOptions) -> str:
    if arguments.template:
        launch = _launch(arguments, options)  # First: only Dataflow's options have a place.
        project, region = _place(arguments)
        return entries.airflow_template_dag(_schedule(arguments), project, region, launch)
    return entries.airflow_bash_dag(_schedule(arguments), _command(arguments), os.getcwd())


def _cron_job(arguments: argparse.Namespace, options: EmbedOptions) -> str:
    if not arguments.image:
        raise _LeftOutError("Kubernetes needs --image, the container image that deploy/README.md says how to build")
    in_place = arguments.word in _IN_PLACE
    if arguments.gpus and not in_place:
        raise ValueError(
            f"--gpus is for {' and '.join(_IN_PLACE)}: {arguments.word} computes elsewhere, where its GPUs are"
        )
    if arguments.gpus and options.device == "cpu":
        raise ValueError("--gpus asks for a GPU, and --device=cpu leaves it unused: leave one of them out")
    if arguments.word == "flink" and "job_endpoint" not in _given(arguments):
        raise ValueError(
            "--job_endpoint is missing: without a job server that runs, flink starts one, and the image has no Java"
        )
    volumes = {folder: claim for claim, folder in arguments.volume}
    if len(volumes) < len(arguments.volume):
        raise ValueError("two of --volume name the same folder")
    _check_seen_by_pod(arguments, options, volumes)
    pod = entries.Pod(
        image=arguments.image,
        cpus=arguments.cpus or ("4" if in_place else "1"),
        memory=arguments.memory or ("16Gi" if in_place else "4Gi"),
        gpus=arguments.gpus,
        volumes=volumes,
        namespace=arguments.namespace,
        service_account=arguments.kubernetes_service_account,
    )
    # By default a pod without a driver would embed on its CPU, in silence, and keep the GPU from others.
    device = ["--device=cuda"] if arguments.gpus and "device" not in _given(arguments) else []
    return entries.cron_job(_schedule(arguments), [arguments.word, *device, *arguments.options], pod)


_FORMATS: dict[str, Callable[[argparse.Namespace, EmbedOptions], str]] = {
    "cron": _crontab,
    "cloud-scheduler": _gcloud,
    "cloud-scheduler-json": _scheduler_json,
    "airflow": _airflow,
    "kubernetes": _cron_job,
}

_STARTING_TEMPLATE = ("cloud-scheduler", "cloud-scheduler-json", "airflow")
"""Formats whose entries start the Flex Template where one is given."""


def _check_seen_by_pod(arguments: argparse.Namespace, options: EmbedOptions, volumes: Mapping[str, str]) -> None:
    """Refuses what is on this machine alone.

    Raises:
      ValueError: a pod would not find a file, or lose what it writes; the message names the option.
    """
    given = _given(arguments)
    paths = [("input", path) for path in options.input] + [("output", options.output)]
    if not is_shipped(options.checkpoint):
        paths.append(("checkpoint", options.checkpoint))
    for name, path in paths:
        if "://" not in path and not any(_is_within(path, folder) for folder in volumes):
            raise ValueError(
                f"--{name} {path!r} is no place that a pod sees and keeps: name one on gs://, or in a folder that "
                "--volume CLAIM:/FOLDER mounts"
            )
    for name in given.keys() - vars(options).keys():
        value = given[name]
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not os.path.isabs(text) and os.path.exists(text):
                raise ValueError(f"--{name} {text!r} is a file of this machine: name one that the image has")
    if arguments.word == "dataflow" and not given.keys() & {"sdk_container_image", "extra_packages", "setup_file"}:
        raise ValueError(
            "--sdk_container_image is missing: Dataflow's workers get this package from a checkout, and a pod has none"
        )


def _is_within(path: str, folder: str) -> bool:
    return os.path.isabs(path) and os.path.commonpath([os.path.normpath(path), folder]) == folder


# --- Values ---


def _cron(text: str) -> str:
    try:
        check_cron(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return " ".join(text.split())


def _timezone(text: str) -> str:
    try:
        zoneinfo.ZoneInfo(text)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time zone: Etc/UTC, Europe/Zurich, America/New_York"
        ) from error
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name that all take: at most 52 lower-case letters, digits and hyphens, a letter first"
        )
    return text


def _gs_file(text: str) -> str:
    if not re.fullmatch(r"gs://[^/]+/.+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no gs://BUCKET/FILE")
    return text


def _quantity(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no quantity of Kubernetes: 4, 500m, 16Gi")
    return text


def _volume(text: str) -> tuple[str, str]:
    claim, _, folder = text.partition(":")
    if not re.fullmatch(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", claim) or not re.fullmatch(r"(/[^/:]+)+", folder):
        raise argparse.ArgumentTypeError(f"{text!r} is no CLAIM:/FOLDER, claim:/data say")
    return claim, folder
