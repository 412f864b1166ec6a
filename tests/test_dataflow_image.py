"""deploy/Dockerfile, as far as it can be checked without building it."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
IGNORED = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()


def instructions() -> list[tuple[str, str]]:
    """Returns each instruction and its arguments, in order; continued lines are joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(words[0], words[1]) for line in joined.splitlines() if (words := line.split(maxsplit=1))]


def values(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def arguments() -> dict[str, str]:
    return dict(value.partition("=")[::2] for value in values("ARG"))


def substituted(text: str) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda found: arguments()[found[1]], text)


def copies() -> list[tuple[str | None, list[str], str]]:
    """Returns of each COPY the stage, the sources and the target."""
    found = []
    for value in values("COPY"):
        words = value.split()
        stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
        found.append((stage, words[:-1], words[-1]))
    return found


def test_beam_is_the_version_of_the_constraints():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\napache-beam=={arguments()['BEAM_VERSION']}\n" in constraints


def test_every_stage_has_the_same_python():
    version = arguments()["PYTHON_VERSION"]
    assert version in {"3.10", "3.11", "3.12", "3.13"}
    images = [substituted(value).split()[0] for value in values("FROM")]
    assert images == [
        f"apache/beam_python{version}_sdk:{arguments()['BEAM_VERSION']}",
        "gcr.io/dataflow-templates-base/python311-template-launcher-base:20230622_RC00",
        f"python:{version}-slim-bookworm",
    ]


def test_what_is_copied_is_there():
    stages = {value.split()[-1] for value in values("FROM") if " AS " in value}
    for stage, sources, _ in copies():
        if stage is not None:
            assert stage in stages
            continue
        for source in sources:
            assert (ROOT / source).exists()
            assert f"!{source}" in IGNORED, f"{source} is not sent to the builder"
    assert IGNORED[0] == "*"


def test_beams_program_and_the_launcher_are_where_dataflow_looks():
    targets = {target: (stage, sources) for stage, sources, target in copies()}
    assert targets["/opt/apache/beam"] == ("beam", ["/opt/apache/beam"])
    launcher = "/opt/google/dataflow/python_template_launcher"
    assert targets[launcher] == ("launcher", [launcher])
    assert values("ENTRYPOINT") == ['["/opt/apache/beam/boot"]']
    assert targets["main.py"] == (None, ["deploy/flex_template/main.py"])
    [folder] = [value for value in values("WORKDIR") if value != "/"]
    assert f"FLEX_TEMPLATE_PYTHON_PY_FILE={folder}/main.py" in values("ENV")


def test_the_package_is_installed_with_the_tested_versions_and_its_sources_removed():
    runs = " ".join(values("RUN"))
    # test_dataflow_template.py runs it.
    assert 'bash install.sh "$TORCH_INDEX"' in runs
    folder = next(value for value in values("WORKDIR") if value != "/")
    packages = ["pipeline", "transforms"]
    assert f"rm -r {' '.join(f'{folder}/{package}' for package in packages)} " in runs
    # The builder fails where the default checkpoint, or its BERT, is not in the image.
    assert "BertLstmEncoder.from_pretrained('default')" in runs


def test_drivers_are_found_where_dataflow_mounts_them():
    variables = " ".join(values("ENV"))
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64" in variables
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in variables


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the image's default Python is 3.11")
def test_the_check_that_the_builder_runs_passes_here():
    [check] = re.findall(r'python -c "(.*)"', " ".join(values("RUN")))
    exec(compile(check, "Dockerfile", "exec"), {})
