"""Imports point one way; files that are added are held to it without a change here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = {f"transforms.{path.stem}": path for path in sorted((ROOT / "transforms").glob("*.py"))}
PROGRAMS = {f"pipeline.{path.stem}": path for path in sorted((ROOT / "pipeline").glob("*.py"))}

MODEL_SIDE = {f"transforms.{name}" for name in ("tokenization", "encoder", "checkpoint")}
BEAM_SIDE = {f"transforms.{name}" for name in ("read", "write", "incremental", "snapshots")}
BOTH = {"transforms.inference"}
"""The one file that knows Beam and torch."""

MODEL_PACKAGES = {"torch", "transformers"}
BEAM = {"apache_beam"}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno} imports relatively"
            names.add(str(node.module))
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def packages_of(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def known_to(module: str) -> set[str]:
    """The packages that a module of the library imports, by itself or through others of the library."""
    names: set[str] = set()
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            names |= imports_of(LIBRARY[module])
            waiting.extend(names & set(LIBRARY))
    return packages_of(names)


def loaded_by(modules: set[str]) -> set[str]:
    """The packages that are loaded once these modules are imported in a new process."""
    script = f"import sys\nfor name in {sorted(modules)}: __import__(name)\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return packages_of(set(result.stdout.split()))


@pytest.mark.parametrize("module", LIBRARY)
def test_the_library_never_imports_the_programs(module):
    assert not packages_of(imports_of(LIBRARY[module])) & {"pipeline", "tests", "conftest"}


@pytest.mark.parametrize("module", PROGRAMS)
def test_the_programs_never_import_the_tests(module):
    assert not packages_of(imports_of(PROGRAMS[module])) & {"tests", "conftest"}


def test_the_schema_imports_pyarrow_and_nothing_else():
    assert packages_of(imports_of(LIBRARY["transforms.schema"])) - sys.stdlib_module_names == {"pyarrow"}


@pytest.mark.parametrize("module", sorted(MODEL_SIDE))
def test_the_model_side_never_knows_beam(module):
    assert not known_to(module) & BEAM


@pytest.mark.parametrize("module", sorted(BEAM_SIDE))
def test_the_beam_side_never_knows_the_model(module):
    assert not known_to(module) & MODEL_PACKAGES


@pytest.mark.parametrize("module", sorted(set(LIBRARY) - BOTH))
def test_only_inference_knows_beam_and_the_model(module):
    known = known_to(module)
    assert not (known & BEAM and known & MODEL_PACKAGES)


def test_inference_knows_beam_and_the_model():
    assert known_to("transforms.inference") >= {"apache_beam", "torch"}


def test_what_does_not_import_the_model_does_not_load_it_through_other_packages_either():
    modules = {module for module in LIBRARY if not known_to(module) & MODEL_PACKAGES}
    assert modules >= BEAM_SIDE
    assert not loaded_by(modules) & MODEL_PACKAGES


def test_what_does_not_import_beam_does_not_load_it_through_other_packages_either():
    modules = {module for module in LIBRARY if not known_to(module) & BEAM}
    assert modules >= MODEL_SIDE
    assert not loaded_by(modules) & BEAM


@pytest.mark.parametrize("package", ["pipeline", "transforms"])
def test_init_files_hold_a_docstring_only(package):
    (statement,) = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(ast.literal_eval(statement.value), str)
