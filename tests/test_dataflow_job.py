"""Jobs sent to Dataflow: what the service gets, and what becomes of the one who waits for it."""

import _thread
import json
import signal
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow import dataflow_runner
from apache_beam.utils import proto_utils
from embed_runs import NOT_PUBLISHED, contents_of, counts_of, latest, rows_of
from fake_dataflow import JOB_ID, FakeDataflow, run_staged, running_dataflow

from pipeline.__main__ import main
from transforms import gcs, storage
from transforms.snapshots import read_latest

pytest_plugins = ["gcs_emulator", "packing"]

L4 = "type:nvidia-l4;count:1;install-nvidia-driver:5xx"
IMAGE = "us-docker.pkg.dev/project-1/images/embed-corpus:1"
PLACE = ["--project=project-1", "--region=us-central1"]


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Has Beam ask for the job's state every tenth of a second, not every five."""
    impatient = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 50), time=time.time)
    monkeypatch.setattr(dataflow_runner, "time", impatient)


@pytest.fixture
def bucket(gcs_bucket, tiny_checkpoint, monkeypatch, tmp_path) -> str:
    """The gs:// URL of a bucket with a corpus in `in` and the tiny checkpoint in `checkpoint`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = b'{"id": "a", "text": "read a zip archive"}\n{"id": "b", "text": "slow"}\n{"id": "c", "text": "slow"}\n'
    storage.create_exclusively(f"{gcs_bucket}/in/a.jsonl", lines)
    for name, data in contents_of(tiny_checkpoint).items():
        storage.create_exclusively(f"{gcs_bucket}/checkpoint/{name}", data)
    return gcs_bucket


def submit(bucket: str, *options: str, endpoint: str = "http://localhost:1") -> int:
    """Runs `embed` on Dataflow and returns the exit status."""
    corpus = [f"--input={bucket}/in/*", f"--checkpoint={bucket}/checkpoint"]
    return main(
        ["dataflow", *PLACE, f"--bucket={bucket}", *corpus, f"--dataflow_endpoint={endpoint}", "--no_auth", *options]
    )


def staged(bucket: str, name: str, job_name: str = "") -> bytes:
    """Returns a file that was staged; there must be one of that name, for a job whose name starts as said."""
    files = storage.list_files(f"{bucket}/staging")
    [found] = [file for file in files if file.endswith(f"/{name}") and file.startswith(job_name)]
    return storage.open_for_reading(f"{bucket}/staging/{found}").read()


def work_on(bucket: str, job_name: str, job: dict[str, Any]) -> None:
    """Does what the workers of a service would do."""
    assert job["name"].startswith(job_name)
    run_staged(staged(bucket, "pipeline.pb", job_name))


def captured(bucket: str, tmp_path: Path, *options: str) -> tuple[dict[str, Any], beam_runner_api_pb2.Pipeline]:
    """Returns what a template's launcher would start: the job, and its pipeline."""
    path = tmp_path / "job.json"
    assert submit(bucket, f"--template_location={path}", *options) == 0
    return json.loads(path.read_bytes()), beam_runner_api_pb2.Pipeline.FromString(staged(bucket, "pipeline.pb"))


def leaves(pipeline: beam_runner_api_pb2.Pipeline) -> dict[str, beam_runner_api_pb2.PTransform]:
    """Returns the steps that run code, by name."""
    transforms = pipeline.components.transforms.values()
    return {t.unique_name: t for t in transforms if t.environment_id and not t.subtransforms}


def hints(pipeline: beam_runner_api_pb2.Pipeline, step: beam_runner_api_pb2.PTransform) -> dict[str, str]:
    asked = pipeline.components.environments[step.environment_id].resource_hints
    return {urn: value.decode() for urn, value in asked.items()}


def pool_of(job: dict[str, Any]) -> dict[str, Any]:
    [pool] = job["environment"]["workerPools"]
    return pool


# What the service gets.


def test_only_the_encoding_step_asks_for_the_gpu(bucket, tmp_path):
    job, pipeline = captured(bucket, tmp_path, "--gpu=nvidia-l4", f"--sdk_container_image={IMAGE}")
    steps = leaves(pipeline)
    with_gpu = {name for name, step in steps.items() if hints(pipeline, step)}
    assert with_gpu == {name for name in steps if name.startswith("EncodeDocuments/Encode/")}
    assert {tuple(sorted(hints(pipeline, steps[name]).items())) for name in with_gpu} == {
        (("beam:resources:accelerator:v1", L4), ("beam:resources:min_ram_bytes:v1", str(16 * 10**9)))
    }
    # No other step can be fused with them: what they read comes out of a shuffle, and their environment is their own.
    producers = {name: step for step in steps.values() for name in step.outputs.values()}
    read = {pcollection for name in with_gpu for pcollection in steps[name].inputs.values()}
    feeding = {producers[name].unique_name for name in read} - with_gpu
    assert feeding
    assert all(name.startswith("EncodeDocuments/SpreadTexts/") for name in feeding)
    [spread] = [t for t in pipeline.components.transforms.values() if t.unique_name == "EncodeDocuments/SpreadTexts"]
    assert spread.spec.urn == common_urns.composites.RESHUFFLE.urn

    images = pool_of(job)["sdkHarnessContainerImages"]
    assert {image["containerImage"] for image in images} == {IMAGE}
    assert len(images) == 2
    # One process: without the experiment each core would load a model.
    assert "no_use_multiple_sdk_containers" in job["environment"]["experiments"]
    assert "use_multiple_sdk_containers" not in job["environment"]["experiments"]
    assert "serviceOptions" not in job["environment"]
    assert "machineType" not in pool_of(job)
    # Nothing but Beam's own list of what the submitter has, where that has pip to list it.
    packages = {package["name"] for package in pool_of(job).get("packages", [])}
    assert packages <= {"submission_environment_dependencies.txt"}


def test_all_machines_have_the_gpu_where_that_is_asked_for(bucket, tmp_path):
    options = ["--gpu=nvidia-l4", "--gpu_everywhere", f"--sdk_container_image={IMAGE}", "--max_num_workers=7"]
    job, pipeline = captured(bucket, tmp_path, *options)
    assert [step for step in leaves(pipeline).values() if hints(pipeline, step)] == []
    assert job["environment"]["serviceOptions"] == [f"worker_accelerator={L4}"]
    pool = pool_of(job)
    assert pool["machineType"] == "g2-standard-8"
    assert pool["workerHarnessContainerImage"] == IMAGE
    assert pool["autoscalingSettings"]["maxNumWorkers"] == 7


@pytest.mark.parametrize("gpu", [[], ["--gpu=nvidia-l4"]])
def test_without_an_image_the_package_is_staged(bucket, tmp_path, packed, gpu):
    job, pipeline = captured(bucket, tmp_path, "--max_num_workers=3", *gpu)
    # Packing leaves files beside setup.py: that of a copy, which is gone then.
    [path] = packed
    assert Path(__file__).parent.parent not in path.parents
    assert not path.parent.exists()
    pool = pool_of(job)
    packages = {package["name"]: package["location"] for package in pool["packages"]}
    assert "workflow.tar.gz" in packages
    assert "pickled_main_session" not in packages
    assert packages["workflow.tar.gz"].startswith(f"storage.googleapis.com/{bucket.removeprefix('gs://')}/staging/")
    (tmp_path / "workflow.tar.gz").write_bytes(staged(bucket, "workflow.tar.gz"))
    with tarfile.open(tmp_path / "workflow.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pipeline/embed.py", "transforms/inference.py", "transforms/checkpoints/default/lstm.safetensors"} <= names
    assert not [name for name in names if name.startswith("tests")]
    assert pool["diskSizeGb"] == 50
    images = {image["containerImage"] for image in pool["sdkHarnessContainerImages"]}
    assert all(image.startswith("gcr.io/cloud-dataflow/v1beta3/beam_python3.") for image in images)
    # Those with a GPU, whose environment is another one, get it too.
    environments = {step.environment_id: hints(pipeline, step) for step in leaves(pipeline).values()}
    assert len([asked for asked in environments.values() if asked]) == len(gpu)
    for name in environments:
        dependencies = pipeline.components.environments[name].dependencies
        roles = [beam_runner_api_pb2.ArtifactStagingToRolePayload.FromString(one.role_payload) for one in dependencies]
        assert "workflow.tar.gz" in [role.staged_name for role in roles], name


def test_options_of_the_job_reach_the_service(bucket, tmp_path):
    options = ["--job_name=nightly", "--temp_location=gs://elsewhere/t", "--labels=team=search", "--num_workers=2"]
    job, pipeline = captured(bucket, tmp_path, f"--sdk_container_image={IMAGE}", *options)
    assert job["name"] == "nightly"
    assert job["type"] == "JOB_TYPE_BATCH"
    assert job["labels"] == {"team": "search"}
    assert pool_of(job)["numWorkers"] == 2
    assert job["environment"]["tempStoragePrefix"].startswith("storage.googleapis.com/elsewhere/t/nightly.")
    environments = pipeline.components.environments.values()
    assert {environment.urn for environment in environments} == {common_urns.environments.DOCKER.urn}
    payloads = [proto_utils.parse_Bytes(e.payload, beam_runner_api_pb2.DockerPayload) for e in environments]
    assert {payload.container_image for payload in payloads} == {IMAGE}
    # The launcher starts the job only after this program has ended: the run's name stays claimed for it.
    assert [name for name in storage.list_files(f"{bucket}/output") if "/claims/" in name]


# Whoever waits for the job.


def test_a_job_that_is_done_is_published(bucket, capsys):
    work = partial(work_on, bucket, "embed-corpus-")
    with running_dataflow(["PENDING", "RUNNING", "RUNNING", "DONE"], work=work) as service:
        assert submit(bucket, f"--sdk_container_image={IMAGE}", endpoint=service.url) == 0
    [job] = service.submitted
    assert job["name"].startswith("embed-corpus-")
    jobs = "/v1b3/projects/project-1/locations/us-central1/jobs"
    assert service.asked[0] == f"POST {jobs}"
    assert service.asked.count(f"GET {jobs}/{JOB_ID}") >= 4
    snapshot = latest(f"{bucket}/output")
    assert counts_of(snapshot) == {"read": 3, "embedded": 3, "texts_encoded": 2}
    assert snapshot.manifest["runner"] == "DataflowRunner"
    out = capsys.readouterr().out
    assert f"https://console.cloud.google.com/dataflow/jobs/us-central1/{JOB_ID}?project=project-1" in out
    assert f"published  snapshot={snapshot.name}" in out
    # Nothing else is left, not even an empty object that stands for a folder, nor what was staged.
    blobs = gcs.storage_client().list_blobs(bucket.removeprefix("gs://"))
    assert {blob.name for blob in blobs if blob.name.partition("/")[0] not in ("in", "checkpoint")} == {
        "output/LATEST",
        f"output/snapshot={snapshot.name}/embeddings-00000-of-00001.parquet",
        f"output/snapshot={snapshot.name}/manifest.json",
    }


def test_a_job_that_is_done_is_done_where_nothing_staged_may_be_removed(bucket, capsys, monkeypatch):
    def refuse(google: Any) -> None:
        raise PermissionError(f"403: {google.staging_location} is under a retention policy")

    monkeypatch.setattr("pipeline.dataflow_job._remove_staged", refuse)
    with running_dataflow(["DONE"], work=partial(work_on, bucket, "embed-corpus-")) as service:
        options = [f"--sdk_container_image={IMAGE}", "--max_rejected_fraction=0", "--max_document_bytes=40"]
        assert submit(bucket, *options, endpoint=service.url) == NOT_PUBLISHED
    told = capsys.readouterr()
    assert "warning: what was staged for the job could not be removed: 403: gs://" in told.err
    assert "the rejected records are in gs://" in told.out


def failure(bucket: str, capsys, service: FakeDataflow) -> str:
    assert submit(bucket, f"--sdk_container_image={IMAGE}", endpoint=service.url) == 1
    assert read_latest(f"{bucket}/output") is None
    return capsys.readouterr().err.splitlines()[-1]


def test_a_failed_job_says_why_and_where_its_logs_are(bucket, capsys):
    error = (
        "Traceback (most recent call last):\n"
        '  File "/usr/local/lib/python3.11/site-packages/transforms/inference.py", line 1, in load_model\n'
        "transforms.hardware.DeviceError: --device=cuda, and this machine has no GPU [while running 'Encode']\n"
    )
    with running_dataflow(["RUNNING", "FAILED"], error=error) as service:
        said = failure(bucket, capsys, service)
    assert staged(bucket, "pipeline.pb")
    assert said == (
        f"error: Dataflow job {JOB_ID} ended FAILED: --device=cuda, and this machine has no GPU; its logs are at "
        f"https://console.cloud.google.com/dataflow/jobs/us-central1/{JOB_ID}?project=project-1"
    )


def test_what_the_service_itself_says_is_told(bucket, capsys):
    error = "Workflow failed. Causes: Quota NVIDIA_L4_GPUS exceeded.\nLimit: 0.0 in region us-central1."
    with running_dataflow(["PENDING", "FAILED"], error=error) as service:
        said = failure(bucket, capsys, service)
    assert f"ended FAILED: {' '.join(error.split())}; its logs" in said


def test_a_job_cancelled_in_the_console_is_no_success(bucket, capsys):
    with running_dataflow(["RUNNING", "CANCELLED"]) as service:
        assert "ended CANCELLED: it gave no reason; its logs" in failure(bucket, capsys, service)
    assert not service.cancelled


@pytest.fixture
def _heeds_ctrl_c() -> Iterator[None]:
    """Shells have what runs in the background ignore it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_heeds_ctrl_c")
def test_an_interrupt_cancels_the_job(bucket, capsys):
    with running_dataflow(["RUNNING"]) as service:
        polls = iter(range(1000))
        service.on_asked = lambda: _thread.interrupt_main() if next(polls) == 3 else None
        assert submit(bucket, f"--sdk_container_image={IMAGE}", endpoint=service.url) == 130
    assert service.cancelled
    assert capsys.readouterr().err.splitlines()[-2:] == [f"cancelling Dataflow job {JOB_ID}", "interrupted"]
    assert read_latest(f"{bucket}/output") is None


def test_a_job_that_the_service_refuses_is_an_error(bucket, capsys):
    with running_dataflow([], refusal="The caller lacks dataflow.jobs.create.") as service:
        assert "The caller lacks dataflow.jobs.create." in failure(bucket, capsys, service)
    assert service.submitted == []


def test_the_sample_corpus_is_uploaded_once(bucket, tmp_path, monkeypatch):
    sample = tmp_path / "sample.jsonl"
    sample.write_text('{"id": "m", "text": "words", "module": "zipfile", "kind": "module"}\n')
    monkeypatch.setattr("pipeline.embed.write_sample", lambda folder: sample)
    argv = ["dataflow", *PLACE, f"--bucket={bucket}", f"--checkpoint={bucket}/checkpoint", "--no_auth"]
    for count in ("embedded", "reused"):
        job_name = f"--job_name={count}"
        work = partial(work_on, bucket, count)
        with running_dataflow(["RUNNING", "DONE"], work=work) as service:
            options = [f"--sdk_container_image={IMAGE}", f"--dataflow_endpoint={service.url}", job_name]
            assert main([*argv, *options]) == 0
        counts = counts_of(latest(f"{bucket}/output"))
        assert (counts["read"], counts[count]) == (1, 1)
    [name] = [name for name in storage.list_files(f"{bucket}/staging") if name.startswith("sample/")]
    assert storage.open_for_reading(f"{bucket}/staging/{name}").read() == sample.read_bytes()
    [row] = rows_of(latest(f"{bucket}/output")).values()
    assert row.kept == {"module": "zipfile", "kind": "module"}
