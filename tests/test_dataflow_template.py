"""The Flex Template: its parameters, the program that takes them, and the script that builds it."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from embed_runs import contents_of
from google.cloud.dataflow import TemplateMetadata

from pipeline import options
from transforms import storage

pytest_plugins = ["gcs_emulator"]

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "flex_template"
METADATA = json.loads((FOLDER / "metadata.json").read_text(encoding="utf-8"))
PARAMETERS: dict[str, dict[str, Any]] = {parameter["name"]: parameter for parameter in METADATA["parameters"]}

LEFT_OUT = {
    "bucket": "the launcher brings places for temporary files, and the output is always named",
    "device": "follows from gpu",
    "dry_run": "there would be no job to start",
    "help": "there is nobody to read it",
    "help_beam": "there is nobody to read it",
    "runner": "always Dataflow",
    "skip_unchanged": "the launcher must start a job",
}
"""Options of `embed` that are no parameters, and why."""

OF_BEAM = {"sdk_container_image", "dataflow_service_options"}

# Each has values that it takes, and some that it must not.
EXAMPLES: dict[str, tuple[list[str], list[str]]] = {
    "input": (["gs://b/*.jsonl", "gs://b/a.txt,gs://c/d/**"], ["/tmp/a", "gs://b/a,", "b/*"]),
    "output": (["gs://b", "gs://b/out"], ["/out", "s3://b/out", "gs://"]),
    "text_field": (["title", "title,body"], ["", "a,,b"]),
    "id_field": (["url", ""], ["a\nb"]),
    "keep_fields": (["lang,stars:int16", "price:decimal128(5,2),lang"], [""]),
    "max_document_bytes": (["1", "67108864"], ["0", "-1", "1.5", "many"]),
    "rows_per_shard": (["1", "250000"], ["0", ""]),
    "keep_snapshots": (["3"], ["0"]),
    "max_tokens": (["512"], ["0"]),
    "max_batch_tokens": (["65536"], ["0"]),
    "max_rejected_fraction": (["0", "0.01", "1", "1.0", "1e-3"], ["-0.1", "2", "few"]),
    "checkpoint": (["default", "gs://b/head", "/opt/checkpoints/mine"], ["./mine", "gs://b"]),
    "gpu": (
        ["nvidia-l4", "type:nvidia-l4;count:1;install-nvidia-driver:5xx", "count:1;type:nvidia-l4"],
        ["l4", "nvidia l4"],
    ),
    "full": (["true", "false"], ["yes", ""]),
    "gpu_everywhere": (["true", "false"], ["yes", ""]),
    "sdk_container_image": (["r-docker.pkg.dev/p/x/embed:1"], ["", "a b"]),
    "dataflow_service_options": (["enable_prime"], [""]),
}


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flex_template_main", FOLDER / "main.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours() -> dict[str, Any]:
    return {action.dest: action for action in options._parser()._actions}


# Parameters.


def test_the_metadata_is_of_googles_form():
    found = TemplateMetadata.from_json(json.dumps(METADATA), ignore_unknown_fields=False)
    assert len(found.parameters) == len(PARAMETERS) == len(METADATA["parameters"])
    for parameter in found.parameters:
        assert re.fullmatch(r"[a-z][a-z_]*", parameter.name)
        assert parameter.label
        assert parameter.help_text
        assert parameter.param_type


def test_every_option_is_a_parameter_or_left_out_for_a_reason():
    assert set(PARAMETERS) - OF_BEAM == set(ours()) - set(LEFT_OUT)


@pytest.mark.parametrize("name", sorted(OF_BEAM))
def test_the_others_are_options_of_beam(name):
    assert f"--{name}" in options._beam_parser()._option_string_actions


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_has_the_options_default_and_choices(name):
    parameter, action = PARAMETERS[name], ours().get(name)
    default = None if action is None else action.default
    default = None if default in ([], "") else default
    expected = {False: "false", None: None}.get(default, str(default)) if default is not True else "true"
    assert parameter.get("defaultValue") == expected
    assert parameter["isOptional"] == (name != "output")
    choices = None if action is None or action.choices is None else list(action.choices)
    assert [option["value"] for option in parameter.get("enumOptions", [])] == (choices or [])
    assert (parameter["paramType"] == "ENUM") == bool(choices)
    is_switch = action is not None and action.nargs == 0
    assert (parameter["paramType"] == "BOOLEAN") == is_switch


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameters_pattern_takes_the_right_values_only(name):
    parameter = PARAMETERS[name]
    if parameter["paramType"] == "ENUM":
        assert "regexes" not in parameter
        return
    [pattern] = parameter["regexes"]
    assert pattern.startswith("^")
    assert pattern.endswith("$")
    right, wrong = EXAMPLES[name]
    if "defaultValue" in parameter:
        right = [*right, parameter["defaultValue"]]
    assert [value for value in right if not re.fullmatch(pattern, value)] == []
    assert [value for value in wrong if re.fullmatch(pattern, value)] == []


# The program.


def test_parameters_become_options():
    given = ["--runner=DataflowRunner", "--input=gs://b/a, gs://b/c", "--text_field=title,body", "--full=true"]
    given += ["--gpu_everywhere=false", "--output=gs://b/out", '--labels={"a":"b"}', "--template_location=gs://t/job"]
    assert program().options_of(given, "image:1") == [
        "--runner=dataflow",
        "--input=gs://b/a",
        "--input=gs://b/c",
        "--text_field=title",
        "--text_field=body",
        "--full",
        "--output=gs://b/out",
        '--labels={"a":"b"}',
        "--template_location=gs://t/job",
        "--sdk_container_image=image:1",
    ]


def test_a_named_image_is_taken_and_none_made_up():
    assert program().options_of(["--sdk_container_image=mine"], "image:1") == [
        "--runner=dataflow",
        "--sdk_container_image=mine",
    ]
    assert program().options_of([], "") == ["--runner=dataflow"]


def test_a_switch_is_true_or_false():
    with pytest.raises(ValueError, match="parameter full must be true or false, not 'yes'"):
        program().options_of(["--full=yes"], "")


def test_switches_and_lists_are_what_the_parser_says():
    module = program()
    actions = ours()
    repeatable = {
        name for name, action in actions.items() if type(action).__name__ in ("_AppendAction", "_ExtendAction")
    }
    assert set(module.LISTS) == repeatable - {"keep_fields"}
    assert set(module.SWITCHES) == {name for name, p in PARAMETERS.items() if p["paramType"] == "BOOLEAN"}


def test_a_launch_describes_the_job_and_ends(gcs_bucket, tiny_checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage.create_exclusively(f"{gcs_bucket}/in/a.txt", b"read a zip archive\n")
    for name, data in contents_of(tiny_checkpoint).items():
        storage.create_exclusively(f"{gcs_bucket}/checkpoint/{name}", data)
    # As the service calls it, but for the last two.
    launched = f"""
        --output={gcs_bucket}/out --input={gcs_bucket}/in/* --checkpoint={gcs_bucket}/checkpoint --full=false
        --gpu=nvidia-l4 --max_tokens=512
        --job_name=nightly --region=us-central1 --service_account_email=1-compute@developer.gserviceaccount.com
        --runner=DataflowRunner --project=project-1 --template_location={gcs_bucket}/launches/1/job_object
        --temp_location={gcs_bucket}/temp --staging_location={gcs_bucket}/staging
        --labels={{"goog-dataflow-provided-template-version":"1"}} --num_workers=2 --max_num_workers=9
        --dataflow_endpoint=http://localhost:1 --no_auth"""
    monkeypatch.setattr("sys.argv", ["/template/main.py", *launched.split()])
    monkeypatch.setenv("SDK_CONTAINER_IMAGE", "r-docker.pkg.dev/p/x/embed:1")
    assert program().main() == 0
    assert "; the launcher starts the job" in capsys.readouterr().out
    job = json.loads(storage.open_for_reading(f"{gcs_bucket}/launches/1/job_object").read())
    assert job["name"] == "nightly"
    assert job["labels"] == {"goog-dataflow-provided-template-version": "1"}
    assert job["environment"]["serviceAccountEmail"] == "1-compute@developer.gserviceaccount.com"
    [pool] = job["environment"]["workerPools"]
    images = {image["containerImage"] for image in pool["sdkHarnessContainerImages"]}
    assert images == {"r-docker.pkg.dev/p/x/embed:1"}
    assert pool["autoscalingSettings"]["maxNumWorkers"] == 9


# The script.


def build(*arguments: str, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", folder / "build.sh", *arguments], capture_output=True, text=True, timeout=60)


def put_program(path: Path, script: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


NEEDED = ["--project", "p", "--image=r-docker.pkg.dev/p/x/embed:1", "--template=gs://b/embed.json"]


def test_the_script_prints_what_it_would_run():
    result = build(*NEEDED, "--python=3.12", "--dry_run")
    assert result.stderr == ""
    image, template = result.stdout.splitlines()
    assert image.startswith(f"gcloud builds submit {ROOT} --project=p --config={FOLDER}/cloudbuild.yaml")
    assert "_IMAGE=r-docker.pkg.dev/p/x/embed:1\\,_PYTHON_VERSION=3.12\\,_TORCH_INDEX=" in image
    assert template.split() == [
        *("gcloud", "dataflow", "flex-template", "build", "gs://b/embed.json", "--project=p"),
        *("--image=r-docker.pkg.dev/p/x/embed:1", "--sdk-language=PYTHON", f"--metadata-file={FOLDER}/metadata.json"),
    ]
    assert build(*NEEDED, "--template_only", "--dry_run").stdout.splitlines() == [template]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--project, --image and --template are needed"),
        ([*NEEDED, "--image=r/x/embed"], "--image r/x/embed needs a tag"),
        ([*NEEDED, "--template=b/t.json"], "is not of the form gs://BUCKET/NAME.json"),
        ([*NEEDED, "--python=3.9"], "--python 3.9 is not one of"),
        ([*NEEDED, "--torch_index=https://i/whl"], "--torch_index https://i/whl does not end in /cu126, in another"),
        ([*NEEDED, "--pythn=3.11"], "unknown option --pythn=3.11"),
        (["--image"], "--image needs a value"),
    ],
)
def test_the_script_refuses_what_cannot_work(arguments, message):
    result = build(*arguments, "--dry_run") if arguments != ["--image"] else build(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("venv", "given", "expected"),
    [
        ("echo 3.13", [], "3.13"),
        ("echo 3.10", [], "3.10"),
        ("echo 3.13", ["--python=3.12"], "3.12"),
        ("echo 3.14", [], "3.11"),
        (None, [], "3.11"),
    ],
)
def test_the_image_gets_the_python_that_submits_jobs(tmp_path, venv, given, expected):
    folder = tmp_path / "deploy" / "flex_template"
    folder.mkdir(parents=True)
    shutil.copy(FOLDER / "build.sh", folder)
    if venv is not None:
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        put_program(tmp_path / ".venv" / "bin" / "python", venv)
    result = build(*NEEDED, *given, "--dry_run", folder=folder)
    assert result.stderr == ""
    assert re.findall(r"_PYTHON_VERSION=([\d.]+)", result.stdout) == [expected]


def test_a_venv_that_does_not_run_is_told(tmp_path):
    folder = tmp_path / "deploy" / "flex_template"
    folder.mkdir(parents=True)
    shutil.copy(FOLDER / "build.sh", folder)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    put_program(tmp_path / ".venv" / "bin" / "python", "exit 127")
    result = build(*NEEDED, "--dry_run", folder=folder)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {tmp_path}/.venv/bin/python does not run")


def test_cloud_build_gets_the_arguments_of_the_dockerfile():
    config = yaml.safe_load((FOLDER / "cloudbuild.yaml").read_text(encoding="utf-8"))
    [step] = config["steps"]
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    known = set(re.findall(r"^ARG (\w+)=", dockerfile, re.MULTILINE))
    given = {argument.split("=")[1] for argument in step["args"] if argument.startswith("--build-arg=")}
    assert given <= known
    used = set(re.findall(r"\$\{(_\w+)\}", json.dumps(config)))
    script = (FOLDER / "build.sh").read_text(encoding="utf-8")
    assert used == set(re.findall(r"(_[A-Z_]+)=", script))
    assert config["images"] == ["${_IMAGE}"]
    assert "--file=deploy/Dockerfile" in step["args"]


# What the image installs.

INSTALL = ROOT / "deploy" / "install.sh"
CUDA_PACKAGE = re.compile(r"(torch|triton)==|cuda-|nvidia-")
PINNED = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
[TORCH] = [line.removeprefix("torch==") for line in PINNED if line.startswith("torch==")]

PIP = """
echo "pip $*"
while (($#)); do
  if [[ $1 == --constraint ]]; then cp "$2" "$TAKEN"; fi
  shift
done"""
"""Says what it is called with, and keeps the constraints."""


@pytest.fixture
def install(tmp_path):
    """Runs the script with a pip that installs nothing, and a PyTorch for the CUDA that is named."""
    folder = tmp_path / "programs"
    folder.mkdir()
    put_program(folder / "pip", PIP)

    def run(index: str, cuda: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        put_program(folder / "python", f"echo {cuda}")
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "TAKEN": str(tmp_path / "taken"), "TMPDIR": str(tmp_path)}
        result = subprocess.run(
            ["bash", INSTALL, index], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        taken = tmp_path / "taken"
        return result, taken.read_text().splitlines() if taken.exists() else []

    return run


def test_without_an_index_all_is_installed_as_pinned(install):
    result, constraints = install("", "13.0")
    assert result.stdout.splitlines() == ["pip install --no-cache-dir --constraint constraints.txt .", "pip check"]
    assert (result.returncode, result.stderr, constraints) == (0, "", PINNED)


@pytest.mark.parametrize(("name", "cuda"), [("cu126", "12.6"), ("cu130", "13.0"), ("cpu", "None")])
def test_pytorch_comes_from_the_index_alone_and_brings_its_own_cuda(install, name, cuda):
    index = f"https://download.pytorch.org/whl/{name}"
    for given in (index, f"{index}/"):
        result, constraints = install(given, cuda)
        assert (result.returncode, result.stderr) == (0, "")
        called, checked = result.stdout.splitlines()
        assert called.endswith(f" --extra-index-url {index} .")
        assert checked == "pip check"
        kept = [line for line in PINNED if not CUDA_PACKAGE.match(line)]
        # PyPI has no version with such an ending.
        assert constraints == [*kept, f"torch=={TORCH}+{name}"]
    assert len(kept) < len(PINNED) - 10


def test_another_pytorch_than_that_of_the_index_is_refused(install):
    result, _ = install("https://download.pytorch.org/whl/cu126", "13.0")
    assert result.returncode == 1
    assert result.stderr == "error: the PyTorch of https://download.pytorch.org/whl/cu126 is for CUDA 13.0, not 12.6\n"


@pytest.mark.parametrize("index", ["https://download.pytorch.org/whl", "cu12", "https://i/cu1266", "https://i/rocm6.4"])
def test_an_index_that_does_not_tell_its_cuda_is_refused(install, index):
    result, constraints = install(index, "12.6")
    assert (result.returncode, result.stdout, constraints) == (1, "", [])
    assert result.stderr.startswith(f"error: TORCH_INDEX={index} must end in cu126")


def test_the_dockerfile_installs_with_that_script():
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert 'RUN bash install.sh "$TORCH_INDEX"\n' in dockerfile
    assert "pip install" not in dockerfile
    # All that is copied from the repository gets there.
    admitted = {
        f"!{name}" for name in re.findall(r"[\w./]+", " ".join(re.findall(r"^COPY ((?!--).*) \S+$", dockerfile, re.M)))
    }
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert admitted == {line for line in ignored if line.startswith("!")}


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_takes_the_metadata():
    command = ["gcloud", "dataflow", "flex-template", "build", "gs://b/t.json", "--image=r-docker.pkg.dev/p/x/embed:1"]
    command += ["--sdk-language=PYTHON", f"--metadata-file={FOLDER}/metadata.json", "--print-only", "--project=p"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    spec = json.loads(result.stdout.removeprefix("|-"))
    assert spec["image"] == "r-docker.pkg.dev/p/x/embed:1"
    assert spec["sdkInfo"] == {"language": "PYTHON"}
    assert spec["metadata"] == METADATA
