"""What a person's options become on Dataflow, checked before anything is sent; pure functions."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
)

from pipeline.runners import beam_name
from transforms.checkpoint import is_shipped

ONE_PROCESS = "no_use_multiple_sdk_containers"
"""Experiment: one Python process per worker, whose threads share its model; Dataflow's default is one per core."""

ENCODER_MIN_RAM = "16GB"
"""Memory of a machine that encodes: the smallest with an L4 has 16 GiB."""

_MACHINES = {
    "nvidia-l4": ("g2-", "g2-standard-8"),
    "nvidia-tesla-t4": ("n1-", "n1-standard-8"),
    "nvidia-tesla-a100": ("a2-highgpu-", "a2-highgpu-1g"),
    "nvidia-a100-80gb": ("a2-ultragpu-", "a2-ultragpu-1g"),
    "nvidia-h100-80gb": ("a3-highgpu-", "a3-highgpu-1g"),
}
"""GPUs to how the machines that can hold them begin, and the one taken where none is named."""

_GPU_MACHINES = ("g2-", "a2-", "a3-")
"""Families of machines that always come with a GPU."""

_BUCKET = re.compile(r"(gs://)?(?P<bucket>[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9])(?P<folder>/[^\r\n]*)?")
_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{1,61}[a-z0-9]")
_ZONE = re.compile(r"(?P<region>[a-z]+-[a-z]+[0-9]+)-[a-z]")
_DRIVER = "install-nvidia-driver:5xx"
_MPS = "use_nvidia_mps"


class Accelerator(NamedTuple):
    """A GPU as Dataflow is asked for it.

    Attributes:
      type: Google's name of it.
      spec: the whole request, `type:nvidia-l4;count:1;install-nvidia-driver:5xx` say.
      machine_type: the machine that the request names; None where the service chooses.
    """

    type: str
    spec: str
    machine_type: str | None


def is_dataflow(runner: str) -> bool:
    """Returns whether a runner is Dataflow's, by whatever name."""
    return beam_name(runner).rpartition(".")[2].lower() in ("dataflow", "dataflowrunner")


def accelerator(gpu: str, option: str = "--gpu") -> Accelerator:
    """Returns the request for a GPU.

    Args:
      gpu: its name, or a whole request as Google's documentation has it: `type:...;count:1;...`.
      option: where it was given, for messages.

    Raises:
      ValueError: it is neither, or asks for several GPUs, or for a machine that cannot hold the GPU.
    """
    spec = gpu if ":" in gpu else f"type:{gpu};count:1;{_DRIVER}"
    parts = dict(part.partition(":")[::2] for part in spec.split(";"))
    name, count, machine_type = parts.get("type", ""), parts.get("count", ""), parts.get("machine_type")
    if not re.fullmatch(r"nvidia-[a-z0-9-]+", name):
        close = difflib.get_close_matches(name or gpu, _MACHINES, n=1, cutoff=0.2)
        raise ValueError(
            f"{option} {gpu!r} names no GPU: take {', '.join(_MACHINES)}, or a whole request "
            f"'type:NAME;count:1;{_DRIVER}'" + (f"; did you mean {close[0]}?" if close else "")
        )
    if count != "1":
        raise ValueError(
            f"{option} {gpu!r} asks for {count or 'no number of'} GPUs on each machine, and the encoder uses one: "
            "write count:1, and let Dataflow start more machines (--max_num_workers)"
        )
    _check_machine(name, machine_type, f"{option}'s machine_type")
    return Accelerator(name, spec, machine_type)


def encoder_hints(gpu: str | None, gpu_everywhere: bool) -> dict[str, str]:
    """Returns the resource hints of the encoding step, which alone shall run on machines with a GPU."""
    if gpu is None or gpu_everywhere:
        return {}
    return {"accelerator": accelerator(gpu).spec, "min_ram": ENCODER_MIN_RAM}


def bucket_folder(bucket: str) -> str:
    """Returns gs://BUCKET, or the folder of it that was named.

    Raises:
      ValueError: a bucket cannot be called that.
    """
    found = _BUCKET.fullmatch(bucket.rstrip("/"))
    if found is None:
        raise ValueError(
            f"--bucket {bucket!r} is no bucket: write its name, at least three lower-case letters, digits and "
            "hyphens, or gs://NAME/FOLDER"
        )
    return f"gs://{found['bucket']}{found['folder'] or ''}"


def upload_folder(beam_options: Sequence[str]) -> str:
    """Returns the folder on gs:// to which this machine's files go for the workers to read."""
    google = _view(beam_options, GoogleCloudOptions)
    return google.staging_location or google.temp_location


def is_launch(beam_options: Sequence[str]) -> bool:
    """Returns whether the job is only described in a file, from which a template's launcher starts it."""
    return _view(beam_options, GoogleCloudOptions).template_location is not None


def setup_file() -> str | None:
    """Returns the setup.py that this code can be packed with; None where it is installed, not checked out."""
    root = Path(__file__).resolve().parent.parent
    path = root / "setup.py"
    return str(path) if path.is_file() and (root / "transforms").is_dir() else None


def complete(
    given: Sequence[str],
    bucket: str | None,
    gpu: str | None,
    gpu_everywhere: bool,
    job_name: str,
    setup_path: str | None,
) -> list[str]:
    """Returns Beam's options for Dataflow: those given, then what they leave open.

    Args:
      given: options of Beam; what they say stands.
      bucket: `--bucket`.
      gpu: `--gpu`.
      gpu_everywhere: `--gpu_everywhere`: all machines have it, not just those that encode.
      job_name: taken where none is given.
      setup_path: as `setup_file` returned it.

    Raises:
      ValueError: something is missing, or options contradict each other; the message holds the remedy.
    """
    google = _view(given, GoogleCloudOptions)
    _check_required(google, bucket)
    if gpu_everywhere and gpu is None:
        raise ValueError("--gpu_everywhere says on which machines --gpu is: name the GPU, --gpu=nvidia-l4 say")
    asked = None if gpu is None else accelerator(gpu)
    _check_machines(given, asked, gpu_everywhere)
    added = []
    if bucket is not None:
        folder = bucket_folder(bucket)
        added += [] if google.temp_location else [f"--temp_location={folder}/temp"]
        added += [] if google.staging_location else [f"--staging_location={folder}/staging"]
    if not google.job_name:
        added.append(f"--job_name={job_name}")
    if _view(given, SetupOptions).save_main_session is None:
        added.append("--no_save_main_session")  # It holds nothing that workers need.
    on_all = asked if gpu_everywhere else _pool_accelerator(given)
    asking = "--gpu" if asked else "worker_accelerator" if on_all else None
    added += _package_options(given, asking, setup_path)
    if asked is not None and gpu_everywhere:
        added.append(f"--dataflow_service_options=worker_accelerator={asked.spec}")
    if on_all is not None and not _view(given, WorkerOptions).machine_type:
        added.append(f"--machine_type={_machine_for(on_all)}")
    added += _process_options(given, asked)
    return [*given, *added]


def check_paths(inputs: Sequence[str], output: str, checkpoint: str, beam_options: Sequence[str]) -> None:
    """Checks that the workers see what the options name.

    Args:
      inputs: `--input`.
      output: `--output`.
      checkpoint: `--checkpoint`.
      beam_options: as `complete` returned them.

    Raises:
      ValueError: a path is of this machine; the message holds the remedy.
    """
    folder = upload_folder(beam_options)
    for path in inputs:
        if not path.startswith("gs://"):
            raise ValueError(
                f"--input {path!r} is on this machine, where Dataflow's workers cannot read it: copy it to gs:// "
                f"(gcloud storage cp -r {path} {folder}/input/) and name it there"
            )
    if not output.startswith("gs://"):
        raise ValueError(
            f"--output {output!r} is on this machine, where Dataflow's workers cannot write: name a folder on gs://, "
            "or leave it out and give --bucket"
        )
    # Whoever launches a template runs in the workers' own image: what is there for it is there for them.
    if not checkpoint.startswith("gs://") and not is_shipped(checkpoint) and not is_launch(beam_options):
        raise ValueError(
            f"--checkpoint {checkpoint!r} is on this machine, where Dataflow's workers cannot read it: copy it to "
            f"gs:// (gcloud storage cp -r {checkpoint} {folder}/checkpoints/) and name it there"
        )


def device_for(device: str, gpu: str | None, beam_options: Sequence[str]) -> str:
    """Returns the device that the workers shall use: with a GPU never silently the CPU.

    Raises:
      ValueError: there is a GPU for nothing, or none.
    """
    if gpu is not None:
        if device == "cpu":
            raise ValueError("--gpu and --device=cpu contradict each other: leave one out")
        return "cuda"
    if _worker_accelerators(beam_options):
        if device == "cpu":
            raise ValueError("worker_accelerator and --device=cpu contradict each other: leave one out")
        return "cuda"
    if device == "cuda":
        raise ValueError("--device=cuda needs machines with a GPU: give --gpu, --gpu=nvidia-l4 say")
    return device


def _view(beam_options: Sequence[str], options_class):
    return PipelineOptions(list(beam_options)).view_as(options_class)


def _check_required(google: GoogleCloudOptions, bucket: str | None) -> None:
    missing = [name for name in ("project", "region") if not getattr(google, name)]
    if bucket is None and not google.temp_location:
        missing.append("bucket")
    if missing:
        raise ValueError(
            f"Dataflow needs {' and '.join('--' + name for name in missing)}: --project is the project's ID, "
            "--region where its machines shall be (us-central1 say), --bucket a bucket of Cloud Storage in that region "
            "for temporary files and, without --output, the output"
        )
    if not _PROJECT.fullmatch(google.project):
        raise ValueError(
            f"--project {google.project!r} is no project's ID: write the ID, my-project-123 say, not its name or number"
        )
    if zone := _ZONE.fullmatch(google.region):
        raise ValueError(
            f"--region {google.region!r} is a zone: write its region, {zone['region']}, or add "
            f"--worker_zone={google.region}"
        )
    # Beam would say so in a warning, and make a bucket of its own.
    for name in ("temp_location", "staging_location"):
        folder = getattr(google, name)
        if folder and not folder.startswith("gs://") and "localhost" not in google.dataflow_endpoint:
            raise ValueError(f"--{name} {folder!r} is not on gs://: name a folder there, or give --bucket in its place")


def _service_options(beam_options: Sequence[str]) -> list[str]:
    """Returns the options of the service; experiments can say the same, and once were the way to."""
    service = _view(beam_options, GoogleCloudOptions).dataflow_service_options or []
    return [*service, *(_view(beam_options, DebugOptions).experiments or [])]


def _worker_accelerators(beam_options: Sequence[str]) -> list[str]:
    found = (option.partition("=") for option in _service_options(beam_options))
    return [value for name, _, value in found if name == "worker_accelerator"]


def _pool_accelerator(given: Sequence[str]) -> Accelerator | None:
    """Returns the GPU that the service option asks for on all machines; None where it asks for none."""
    requests = _worker_accelerators(given)
    return accelerator(requests[0], "worker_accelerator") if requests else None


def _check_machines(given: Sequence[str], asked: Accelerator | None, gpu_everywhere: bool) -> None:
    """Refuses machines that contradict the GPU, the service's mode, or each other."""
    service = _service_options(given)
    prime = "enable_prime" in service
    pool = _worker_accelerators(given)
    machine_type = _view(given, WorkerOptions).machine_type
    hints = [hint.partition("=")[0] for hint in _view(given, StandardOptions).resource_hints]
    if len(pool) > 1:
        raise ValueError(f"worker_accelerator asks for {' and for '.join(pool)}: leave all but one out")
    if _MPS in service:
        raise ValueError(
            f"{_MPS} alone has no effect: it is a part of the request for the GPU, "
            f"--gpu='type:nvidia-l4;count:1;{_DRIVER};{_MPS}'"
        )
    on_all = _pool_accelerator(given)
    if on_all is not None and asked is None:
        _check_machine(on_all.type, machine_type, "--machine_type")
    if asked is not None and pool:
        raise ValueError(
            "--gpu and the service option worker_accelerator both ask for a GPU, the one for the encoding step, the "
            "other for all machines: leave worker_accelerator out, or give --gpu_everywhere in its place"
        )
    if "accelerator" in hints and (asked is not None or pool):
        raise ValueError(
            f"--resource_hint=accelerator asks for a GPU for every step, and {'--gpu' if asked else pool[0]} for "
            "another layout: leave the hint out"
        )
    if prime and (pool or gpu_everywhere):
        raise ValueError(
            "Dataflow Prime has no machines that all have a GPU (worker_accelerator): leave enable_prime out, or "
            "--gpu_everywhere, so that the encoding step alone asks for one"
        )
    if prime and (machine_type or (asked and asked.machine_type)):
        raise ValueError("Dataflow Prime chooses the machines itself: leave machine_type out, or enable_prime")
    if _uses_mps(given, asked):
        _check_mps(given, prime)
    if asked is None:
        return
    if gpu_everywhere:
        _check_machine(asked.type, machine_type, "--machine_type")
        if machine_type and asked.machine_type not in (None, machine_type):
            raise ValueError(
                f"--gpu asks for the machine {asked.machine_type!r}, and --machine_type for {machine_type!r}: leave "
                "one of them out"
            )
    elif machine_type and machine_type.startswith(_GPU_MACHINES):
        raise ValueError(
            f"--machine_type {machine_type!r} would put every step on machines with a GPU, and --gpu asks for one for "
            f"the encoding step alone: leave it out (or write --gpu='type:{asked.type};count:1;"
            f"machine_type:{machine_type};{_DRIVER}'), or add --gpu_everywhere"
        )
    if not gpu_everywhere and _view(given, GoogleCloudOptions).flexrs_goal:
        raise ValueError(
            "FlexRS does not know machines of different sorts in one job: leave --flexrs_goal out, or add "
            "--gpu_everywhere"
        )


def _check_mps(given: Sequence[str], prime: bool) -> None:
    if ONE_PROCESS in _service_options(given):
        raise ValueError(
            f"{_MPS} shares a GPU among several processes, and the experiment {ONE_PROCESS} starts only one: leave "
            "one of them out"
        )
    if prime:
        raise ValueError(f"Dataflow Prime does not know {_MPS}: leave it out, or enable_prime")


def _check_machine(gpu_type: str, machine_type: str | None, option: str) -> None:
    family = _MACHINES.get(gpu_type, ("",))[0]
    if machine_type and not machine_type.startswith(family):
        raise ValueError(
            f"{option} {machine_type!r} cannot hold a {gpu_type}, which comes with {family}* machines only: leave it "
            f"out, or take {_MACHINES[gpu_type][1]}"
        )


def _machine_for(asked: Accelerator) -> str:
    if asked.machine_type:
        return asked.machine_type
    if asked.type not in _MACHINES:
        raise ValueError(f"a GPU on all machines needs --machine_type, a machine that can hold a {asked.type}")
    return _MACHINES[asked.type][1]


def _package_options(given: Sequence[str], asking: str | None, setup_path: str | None) -> list[str]:
    """Returns how the workers get this code, unless the options say it: packed from the checkout.

    Args:
      given: options of Beam.
      asking: the option that asks for a GPU; None where none does.
      setup_path: as `setup_file` returned it.
    """
    worker, setup = _view(given, WorkerOptions), _view(given, SetupOptions)
    if worker.sdk_container_image:
        return []
    if asking is not None:
        raise ValueError(
            f"{asking} needs --sdk_container_image, an image in which PyTorch finds the GPU: deploy/README.md says how "
            "to build it from deploy/Dockerfile"
        )
    if setup.setup_file or setup.extra_packages:
        return []
    if setup_path is None:
        raise ValueError(
            "Dataflow's workers need this package: give --sdk_container_image, an image that holds it (see "
            "deploy/README.md), or --extra_package, its source package (embed_corpus-VERSION.tar.gz)"
        )
    return [f"--setup_file={setup_path}"]


def _process_options(given: Sequence[str], asked: Accelerator | None) -> list[str]:
    """Returns the experiment of one process per machine, unless the options decide for several."""
    service = _service_options(given)
    if ONE_PROCESS in service or "use_multiple_sdk_containers" in service or _uses_mps(given, asked):
        return []
    return [f"--experiments={ONE_PROCESS}"]


def _uses_mps(given: Sequence[str], asked: Accelerator | None) -> bool:
    specs = [*_worker_accelerators(given), *([asked.spec] if asked else [])]
    return any(_MPS in spec.split(";") for spec in specs)
