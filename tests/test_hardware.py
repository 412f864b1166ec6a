"""Which device and number type a run gets, on machines of every sort."""

import logging
import shutil
import subprocess
import sys

import pytest
import torch

from transforms import hardware
from transforms.hardware import bfloat16_speed_up, cpu_flags, describe, resolve_device, resolve_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one with these CPU flags, this speed of bfloat16, and a GPU of this compute capability."""

    def make(
        flags: set[str] | None = None, capability: tuple[int, int] | None = None, bfloat16_speed_up: float = 2.0
    ) -> None:
        monkeypatch.setattr(hardware, "cpu_flags", lambda: flags or set())
        monkeypatch.setattr(hardware, "bfloat16_speed_up", lambda: bfloat16_speed_up)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")

    return make


@pytest.mark.parametrize(
    ("asked", "has_gpu", "expected"),
    [
        ("auto", False, "cpu"),
        ("auto", True, "cuda"),
        ("cpu", False, "cpu"),
        ("cpu", True, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_the_device(machine, asked, has_gpu, expected):
    machine(capability=(8, 9) if has_gpu else None)
    assert resolve_device(asked).type == expected


def test_cuda_is_refused_where_there_is_none(machine):
    machine()
    with pytest.raises(RuntimeError, match=r"device cuda was asked for, but .* has no usable GPU .* --device cpu"):
        resolve_device("cuda")


DRIVER = ("libmade-for-a-test-1.so.1", "libmade-for-a-test-2.so.1")  # Names that no machine has, be there a GPU or not.

FIND_DRIVER = f"""
import ctypes, sys
from pathlib import Path
from transforms import hardware

hardware._DRIVER_LIBRARIES = {DRIVER}
hardware.load_mounted_driver(Path(sys.argv[1]))
print(*(ctypes.CDLL(name).made_for_a_test() for name in {DRIVER}))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="drivers are mounted in containers, and these are Linux"
)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed, which makes a driver for this test")
def test_a_driver_that_is_mounted_where_nobody_looks_is_found_by_its_name(tmp_path):
    source = tmp_path / "driver.c"
    source.write_text("int made_for_a_test(void) { return 7; }\n")
    for name in DRIVER:
        subprocess.run(["gcc", "-shared", f"-Wl,-soname,{name}", "-o", tmp_path / name, source], check=True)
    # Loaded libraries are known to the whole process.
    done = subprocess.run(
        [sys.executable, "-c", FIND_DRIVER, tmp_path], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "7 7\n", done.stderr


def test_a_mounted_driver_that_cannot_be_loaded_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_DRIVER_LIBRARIES", DRIVER)
    hardware.load_mounted_driver(tmp_path)
    (tmp_path / DRIVER[0]).write_text("not a library")
    with pytest.raises(hardware.DeviceError, match=r"NVIDIA's driver .*/libmade-for-a-test-1.so.1 cannot be loaded \("):
        hardware.load_mounted_driver(tmp_path)


def test_the_mounted_driver_is_loaded_unless_the_cpu_is_asked_for(machine, monkeypatch):
    machine()
    loaded = []
    monkeypatch.setattr(hardware, "load_mounted_driver", loaded.append)
    resolve_device("cpu")
    assert loaded == []
    resolve_device("auto")
    assert [str(folder) for folder in loaded] == ["/usr/local/nvidia/lib64"]


@pytest.mark.parametrize("device", ["gpu", "", "CUDA", "cuda:1"])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ValueError, match=f"device '{device}' is none of auto, cpu, cuda"):
        resolve_device(device)


@pytest.mark.parametrize(
    ("asked", "device", "flags", "capability", "expected"),
    [
        ("auto", CPU, {"avx2", "fma"}, None, torch.float32),
        ("auto", CPU, {"avx512f"}, None, torch.float32),
        ("auto", CPU, {"avx512f", "avx512_bf16"}, None, torch.bfloat16),
        ("auto", CPU, {"amx_bf16"}, None, torch.bfloat16),
        ("auto", CPU, {"asimd", "bf16"}, None, torch.bfloat16),
        ("auto", CPU, set(), None, torch.float32),
        ("float32", CPU, {"avx512_bf16"}, None, torch.float32),
        ("bfloat16", CPU, {"avx512_bf16"}, None, torch.bfloat16),
        ("auto", CUDA, set(), (7, 5), torch.float16),
        ("auto", CUDA, set(), (8, 0), torch.bfloat16),
        ("auto", CUDA, set(), (9, 0), torch.bfloat16),
        ("float16", CUDA, set(), (9, 0), torch.float16),
        ("float32", CUDA, set(), (9, 0), torch.float32),
    ],
)
def test_the_dtype(machine, caplog, asked, device, flags, capability, expected):
    machine(flags, capability)
    assert resolve_dtype(asked, device) == expected
    assert caplog.records == []


@pytest.mark.parametrize(("speed_up", "expected"), [(0.5, torch.float32), (1.1, torch.float32), (1.9, torch.bfloat16)])
def test_native_bfloat16_is_only_taken_where_it_is_faster(machine, speed_up, expected):
    machine({"avx512_bf16"}, bfloat16_speed_up=speed_up)
    assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


def test_emulated_bfloat16_is_not_even_timed(machine, monkeypatch):
    machine({"avx2"})
    monkeypatch.setattr(hardware, "bfloat16_speed_up", lambda: pytest.fail("it would take seconds"))
    assert resolve_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize(("bfloat16_seconds", "speed_up"), [(0.5, 2.0), (2.0, 0.5)])
def test_the_speed_up_is_float32s_best_time_over_bfloat16s(monkeypatch, bfloat16_seconds, speed_up):
    clock = [0.0]

    def linear(tokens, weights):
        clock[0] += 1.0 if tokens.dtype == torch.float32 else bfloat16_seconds

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: clock[0])
    bfloat16_speed_up.cache_clear()
    try:
        assert bfloat16_speed_up() == speed_up
    finally:
        bfloat16_speed_up.cache_clear()


@pytest.mark.skipif(not {"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags(), reason="this CPU has no bfloat16")
def test_the_speed_of_bfloat16_is_measured_on_this_cpu():
    assert 0.1 < bfloat16_speed_up() < 20
    assert bfloat16_speed_up() == bfloat16_speed_up(), "measured once"


@pytest.mark.parametrize(("device", "capability"), [(CPU, None), (CUDA, (7, 5))])
def test_emulated_bfloat16_is_given_with_a_warning_to_who_asks_for_it(machine, caplog, device, capability):
    machine({"avx2"}, capability)
    with caplog.at_level(logging.WARNING):
        assert resolve_dtype("bfloat16", device) == torch.bfloat16
    assert [record.message for record in caplog.records] == [
        f"bfloat16 is not native to this {device.type}: it is emulated and far slower than float32"
    ]


def test_unknown_and_unfit_dtypes_are_refused(machine):
    machine()
    with pytest.raises(ValueError, match="dtype 'int8' is none of auto, float32, bfloat16, float16"):
        resolve_dtype("int8", CPU)
    with pytest.raises(ValueError, match="dtype float16 is for GPUs: on a CPU take float32, bfloat16 or auto"):
        resolve_dtype("float16", CPU)


@pytest.mark.parametrize(
    ("cpuinfo", "flags"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: fpu\n", {"fpu", "avx2"}),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("processor\t: 0\nmodel name\t: flags of old\n", set()),
        (None, set()),
    ],
)
def test_the_cpus_flags_are_read_on_x86_and_arm(monkeypatch, tmp_path, cpuinfo, flags):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    monkeypatch.setattr(hardware, "Path", lambda name: {"/proc/cpuinfo": path}[name])
    assert cpu_flags() == flags


def test_a_device_is_described_for_the_manifest(machine):
    machine(capability=(8, 9))
    assert (describe(CPU), describe(CUDA)) == ("cpu", "cuda (NVIDIA L4)")


@pytest.mark.gpu
def test_a_real_gpu_is_taken_and_named():
    device = resolve_device("auto")
    assert device.type == "cuda"
    assert describe(device).startswith("cuda (")
    assert resolve_dtype("auto", device) in (torch.bfloat16, torch.float16)
