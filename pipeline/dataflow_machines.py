"""The machines that a job on Dataflow asks for, and their processes; pure functions."""

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
)

ONE_PROCESS = "no_use_multiple_sdk_containers"
"""Experiment: one Python process per worker, whose threads share its model; Dataflow's default is one per core."""

_PROCESS_PER_CORE = "use_multiple_sdk_containers"
_NO_RUNNER_V2 = "no_use_runner_v2"

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


def pool_accelerator(given: Sequence[str]) -> Accelerator | None:
    """Returns the GPU that the service option asks for on all machines; None where it asks for none.

    Raises:
      ValueError: it asks for none that there is, or by the bare name, which only our own `--gpu` takes.
    """
    requests = _worker_accelerators(given)
    if not requests:
        return None
    asked = accelerator(requests[0], "worker_accelerator")
    if requests[0] != asked.spec:
        raise ValueError(
            f"worker_accelerator {requests[0]!r} is a bare name, and Dataflow takes whole requests only: write "
            f"--dataflow_service_options='worker_accelerator={asked.spec}'"
        )
    return asked


def machine_for(asked: Accelerator) -> str:
    """Returns the machine for a GPU that all machines shall have.

    Raises:
      ValueError: the request names none, and the GPU is one that this project does not know.
    """
    if asked.machine_type:
        return asked.machine_type
    if asked.type not in _MACHINES:
        raise ValueError(f"a GPU on all machines needs --machine_type, a machine that can hold a {asked.type}")
    return _MACHINES[asked.type][1]


def check_machines(given: Sequence[str], asked: Accelerator | None, gpu_everywhere: bool) -> None:
    """Refuses machines that contradict the GPU, the service's mode, or each other.

    Args:
      given: options of Beam.
      asked: what `--gpu` asks for; None where it is not given.
      gpu_everywhere: `--gpu_everywhere`.

    Raises:
      ValueError: the options contradict each other; the message holds the remedy.
    """
    service = _service_options(given)
    prime = "enable_prime" in service
    pool = _worker_accelerators(given)
    machine_type = view(given, WorkerOptions).machine_type
    hints = [hint.partition("=")[0] for hint in view(given, StandardOptions).resource_hints]
    if len(pool) > 1:
        raise ValueError(f"worker_accelerator asks for {' and for '.join(pool)}: leave all but one out")
    if _MPS in service:
        raise ValueError(
            f"{_MPS} alone has no effect: it is a part of the request for the GPU, "
            f"--gpu='type:nvidia-l4;count:1;{_DRIVER};{_MPS}'"
        )
    on_all = pool_accelerator(given)
    if on_all is not None and asked is None:
        _check_machine(on_all.type, machine_type, "--machine_type")
    if asked is not None and pool:
        raise ValueError(
            "--gpu and the service option worker_accelerator both ask for a GPU, the one for the encoding step, the "
            "other for all machines: leave worker_accelerator out, or give --gpu_everywhere in its place"
        )
    if "accelerator" in hints:
        raise ValueError(
            "--resource_hint=accelerator asks for a GPU for every step, the small ones too: leave the hint out, and "
            "give --gpu for the encoding step alone, with --gpu_everywhere for all machines"
        )
    if prime and (pool or gpu_everywhere):
        raise ValueError(
            "Dataflow Prime has no machines that all have a GPU (worker_accelerator): leave enable_prime out, or "
            "--gpu_everywhere, so that the encoding step alone asks for one"
        )
    if prime and (machine_type or (asked and asked.machine_type)):
        raise ValueError("Dataflow Prime chooses the machines itself: leave machine_type out, or enable_prime")
    _check_processes(service, asked or on_all, _uses_mps(given, asked))
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
    if not gpu_everywhere and view(given, GoogleCloudOptions).flexrs_goal:
        raise ValueError(
            "FlexRS does not know machines of different sorts in one job: leave --flexrs_goal out, or add "
            "--gpu_everywhere"
        )


def process_options(given: Sequence[str], asked: Accelerator | None) -> list[str]:
    """Returns the experiment of one process per machine, unless the options decide for several."""
    service = _service_options(given)
    if ONE_PROCESS in service or _PROCESS_PER_CORE in service or _uses_mps(given, asked):
        return []
    return [f"--experiments={ONE_PROCESS}"]


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


def view(beam_options: Sequence[str], options_class):
    """Returns Beam's options as one of its classes of them."""
    return PipelineOptions(list(beam_options)).view_as(options_class)


def has_image(beam_options: Sequence[str]) -> bool:
    """Returns whether the workers' image is named, or one with PyTorch in it is built by Beam before the job starts."""
    engine = view(beam_options, SetupOptions).prebuild_sdk_container_engine
    return bool(view(beam_options, WorkerOptions).sdk_container_image or engine)


def _service_options(beam_options: Sequence[str]) -> list[str]:
    """Returns the options of the service; experiments can say the same, and once were the way to."""
    service = view(beam_options, GoogleCloudOptions).dataflow_service_options or []
    return [*service, *(view(beam_options, DebugOptions).experiments or [])]


def _worker_accelerators(beam_options: Sequence[str]) -> list[str]:
    found = (option.partition("=") for option in _service_options(beam_options))
    return [value for name, _, value in found if name == "worker_accelerator"]


def _check_processes(service: Sequence[str], gpu: Accelerator | None, uses_mps: bool) -> None:
    if ONE_PROCESS in service and _PROCESS_PER_CORE in service:
        raise ValueError(
            f"the experiments {ONE_PROCESS} and {_PROCESS_PER_CORE} contradict each other: leave one of them out; "
            "without both, each machine runs one process"
        )
    if gpu is None:
        return
    if _PROCESS_PER_CORE in service and not uses_mps:
        raise ValueError(
            f"the experiment {_PROCESS_PER_CORE} starts a process for each core, and all would load a model of their "
            "own onto the one GPU: leave it out, and the threads of one process share the model, or have them share "
            f"the GPU by MPS, with ';{_MPS}' at the end of the request: '{gpu.spec};{_MPS}'"
        )
    if _NO_RUNNER_V2 in service:
        raise ValueError(
            f"Dataflow has GPUs for Runner v2 only, and the experiment {_NO_RUNNER_V2} asks for the runner before it: "
            "leave it out"
        )


def _check_mps(given: Sequence[str], prime: bool) -> None:
    if ONE_PROCESS in _service_options(given):
        raise ValueError(
            f"{_MPS} shares a GPU among several processes, and the experiment {ONE_PROCESS} starts only one: leave "
            "one of them out"
        )
    if prime:
        raise ValueError(f"Dataflow Prime does not know {_MPS}: leave it out, or enable_prime")
    if not has_image(given):
        raise ValueError(
            f"{_MPS} starts several processes on each machine, and each would install PyTorch for itself, 5 GB: give "
            f"--sdk_container_image, an image that holds it (see deploy/README.md), or leave {_MPS} out"
        )


def _check_machine(gpu_type: str, machine_type: str | None, option: str) -> None:
    family = _MACHINES.get(gpu_type, ("",))[0]
    if machine_type and not machine_type.startswith(family):
        raise ValueError(
            f"{option} {machine_type!r} cannot hold a {gpu_type}, which comes with {family}* machines only: leave it "
            f"out, or take {_MACHINES[gpu_type][1]}"
        )


def _uses_mps(given: Sequence[str], asked: Accelerator | None) -> bool:
    specs = [*_worker_accelerators(given), *([asked.spec] if asked else [])]
    return any(_MPS in spec.split(";") for spec in specs)
