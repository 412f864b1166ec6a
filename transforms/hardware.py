"""Which device and number type the encoder runs with on this machine."""

import ctypes
import functools
import logging
import platform
import time
from pathlib import Path

import torch

from transforms.devices import DEVICES, DTYPES

_NATIVE_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""CPU flags, of x86 and Arm, that promise native bfloat16; without one it is emulated, up to 150 times slower."""

_WORTHWHILE_SPEED_UP = 1.2
"""Of bfloat16 over float32 on a CPU; less does not pay for the coarser numbers."""

_TIMED_PRODUCT = (512, 384, 1536)
"""Tokens, width and inner width of the product that is timed: small, but as in a BERT."""

_AMPERE = (8, 0)
"""The first CUDA compute capability with bfloat16."""

_MOUNTED_DRIVER = Path("/usr/local/nvidia/lib64")
"""Where Dataflow and GKE mount NVIDIA's driver; the loader of an image that was not made for it does not look there."""

_DRIVER_LIBRARIES = ("libnvidia-ml.so.1", "libcuda.so.1")


class DeviceError(RuntimeError):
    """The device that was asked for is not there."""


_logger = logging.getLogger(__name__)


def resolve_device(device: str) -> torch.device:
    """Returns the device to run on.

    Args:
      device: `cuda`, `cpu`, or `auto` for cuda where there is one.

    Raises:
      ValueError: it is none of these.
      DeviceError: cuda was asked for and there is none, or a driver cannot be loaded.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is none of {', '.join(DEVICES)}")
    if device != "cpu":
        load_mounted_driver(_MOUNTED_DRIVER)
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise DeviceError(
            f"device cuda was asked for, but {platform.node()} has no usable GPU (PyTorch {torch.__version__}, CUDA "
            f"{torch.version.cuda}): install a driver of that CUDA, use a machine with a GPU, or ask for --device "
            "cpu"
        )
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def load_mounted_driver(folder: Path) -> None:
    """Loads NVIDIA's driver from a folder, for those who then ask for it by name, as PyTorch does (dlopen(3)).

    Does nothing where the loader finds it without help, or where the folder does not hold it.

    Raises:
      DeviceError: a library of it cannot be loaded.
    """
    for path in (folder / name for name in _DRIVER_LIBRARIES if not _is_loadable(name)):
        if path.is_file():
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise DeviceError(
                    f"NVIDIA's driver {path} cannot be loaded ({error}): mend it, or ask for --device cpu"
                ) from error


def _is_loadable(library: str) -> bool:
    """Returns whether the loader finds a library; it is loaded then."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def cpu_flags() -> set[str]:
    """Returns this CPU's feature flags as Linux names them; none where they are not known."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Returns the type BERT computes in.

    Args:
      dtype: a type, or `auto`: on a GPU bfloat16 where it has it natively, else float16; on a CPU bfloat16 where it has
        it natively and a product in it is faster, else float32.
      device: where BERT runs.

    Raises:
      ValueError: it is no type known here, or float16 on a CPU.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if device.type == "cpu" and dtype == "float16":
        raise ValueError("dtype float16 is for GPUs: on a CPU take float32, bfloat16 or auto")
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= _AMPERE
        automatic = "bfloat16" if native else "float16"
    else:
        native = bool(_NATIVE_BFLOAT16_FLAGS & cpu_flags())
        automatic = "bfloat16" if native and bfloat16_speed_up() >= _WORTHWHILE_SPEED_UP else "float32"
    if dtype == "bfloat16" and not native:
        _logger.warning("bfloat16 is not native to this %s: it is emulated and far slower than float32", device.type)
    return getattr(torch, automatic if dtype == "auto" else dtype)


@functools.lru_cache(maxsize=1)
def bfloat16_speed_up() -> float:
    """Returns how many times faster than in float32 this CPU multiplies in bfloat16; takes a tenth of a second.

    A CPU's flags do not tell: an Intel CPU whose AMX a virtual machine hides still has AVX512-BF16, at half the speed
    of float32, while on other CPUs the same flag means twice that speed.
    """
    rows, width, inner_width = _TIMED_PRODUCT
    operands = {
        dtype: (torch.ones(rows, width, dtype=dtype), torch.ones(inner_width, width, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    best_seconds = dict.fromkeys(operands, float("inf"))
    for _ in range(8):  # The first prepare the kernels; the best of all is the least disturbed.
        for dtype, (tokens, weights) in operands.items():
            started = time.perf_counter()
            torch.nn.functional.linear(tokens, weights)
            best_seconds[dtype] = min(best_seconds[dtype], time.perf_counter() - started)
    return best_seconds[torch.float32] / best_seconds[torch.bfloat16]


def describe(device: torch.device) -> str:
    """Returns the device's name for a manifest: `cpu`, or `cuda` with the GPU's name."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
