"""The package: what a wheel and the source package that Beam stages for its workers hold."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
CHECKPOINT_FILES = ["config.json", "lstm.safetensors", "README.md"]


def files_of(folder: Path) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what is packaged, since building leaves files beside it; with a checkpoint of this test's own."""
    folder = tmp_path_factory.mktemp("sources") / "copy"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("pipeline", "transforms", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in CHECKPOINT_FILES:
        path = folder / "transforms" / "checkpoints" / "of_the_test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return folder


def build(sources: Path, kind: str, output: Path) -> Path:
    """Builds as pip does, but without a network."""
    script = f"from setuptools import build_meta as b; import sys; print(b.build_{kind}(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(output)], cwd=sources, capture_output=True, check=True)
    (package,) = output.iterdir()
    return package


@pytest.fixture(scope="module")
def source_package(sources, tmp_path_factory) -> Path:
    return build(sources, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(source_package, tmp_path_factory) -> Path:
    """The wheel that a worker builds from the source package."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(source_package) as archive:
        archive.extractall(folder)
    (unpacked,) = folder.iterdir()
    return build(unpacked, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_source_package_leaves_the_tests_out(source_package):
    with tarfile.open(source_package) as archive:
        folders = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"pipeline", "transforms", "setup.py"} <= folders
    assert "tests" not in folders


def test_the_wheel_holds_both_packages_with_the_checkpoints_and_nothing_else(wheel):
    expected = files_of(ROOT / "pipeline") | files_of(ROOT / "transforms")
    expected |= {f"transforms/checkpoints/of_the_test/{name}" for name in CHECKPOINT_FILES}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        licenses = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert names == expected
    assert len(licenses) == 1
    assert "\nLicense: Apache-2.0\n" in text
    assert "\nRequires-Python: >=3.10\n" in text


def test_an_installed_wheel_runs_and_finds_its_checkpoints(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    script = (
        "import transforms.checkpoint as c; print(c.__file__); print(c.checkpoint_folder('of_the_test'))\n"
        "from importlib.metadata import distribution\n"
        "(entry,) = distribution('embed-corpus').entry_points\n"
        "import sys; sys.argv[1:] = ['--help']\n"
        "print(entry.name); entry.load()()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    module, checkpoint, entry, usage, *_ = result.stdout.splitlines()
    assert Path(module).is_relative_to(tmp_path)
    assert Path(checkpoint) == tmp_path / "installed" / "transforms" / "checkpoints" / "of_the_test"
    assert entry == "embed-corpus"
    assert usage.startswith("usage: ")


def requirements() -> list[Requirement]:
    """The requirements in setup.py, those of its extras too."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    ]
    return [Requirement(text) for texts in lists for text in texts]


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", [("Linux", "linux"), ("Darwin", "darwin")])
def test_every_requirement_has_one_tested_version(python, system):
    machine = dict(zip(("platform_system", "sys_platform"), system, strict=True))
    environment = {**machine, "python_version": python, "python_full_version": f"{python}.4"}
    pins = [pin for pin in constraints() if pin.marker is None or pin.marker.evaluate(environment)]
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    assert len(versions) == len(pins)
    assert all(re.fullmatch(r"==[\w.+!-]+", version) for version in versions.values())
    for requirement in requirements():
        version = versions[canonicalize_name(requirement.name)].removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} is not met by {version}"


def test_constraints_say_how_they_were_made_and_leave_the_index_to_the_user():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "uv pip compile setup.py --extra test --universal --python-version 3.10" in text
    assert "://" not in text
    assert "--index" not in text
