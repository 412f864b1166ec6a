"""What options become on Dataflow, and which contradict each other."""

import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, WorkerOptions

from pipeline import dataflow
from pipeline.dataflow_machines import accelerator, encoder_hints
from pipeline.options import EmbedOptions, parse

PLACE = ("--runner=dataflow", "--project=project-1", "--region=us-central1")
HERE = (*PLACE, "--bucket=bucket-1")
IMAGE = "--sdk_container_image=images/embed:1"
L4 = "type:nvidia-l4;count:1;install-nvidia-driver:5xx"


def refusal(capsys, *argv: str) -> str:
    """Returns the message with which options are refused as wrong usage."""
    with pytest.raises(SystemExit) as refused:
        parse(argv)
    assert refused.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1].removeprefix("python -m pipeline embed: error: ")


def google(options: EmbedOptions) -> GoogleCloudOptions:
    return PipelineOptions(list(options.beam_options)).view_as(GoogleCloudOptions)


# What is filled in.


@pytest.mark.parametrize(
    ("bucket", "folder"),
    [
        ("bucket-1", "gs://bucket-1"),
        ("gs://bucket-1", "gs://bucket-1"),
        ("gs://bucket-1/", "gs://bucket-1"),
        ("gs://bucket-1/team/jobs/", "gs://bucket-1/team/jobs"),
        ("example.com", "gs://example.com"),
    ],
)
def test_a_bucket_gives_the_places(bucket, folder):
    options = parse([*PLACE, f"--bucket={bucket}"])
    assert options.output == f"{folder}/output"
    assert google(options).temp_location == f"{folder}/temp"
    assert google(options).staging_location == f"{folder}/staging"


def test_what_is_given_stands():
    given = ["--output=gs://o/out", "--temp_location=gs://t/t", "--staging_location=gs://s/s", "--job_name=nightly"]
    options = parse([*HERE, *given, "--experiments=use_multiple_sdk_containers", "--save_main_session"])
    assert options.output == "gs://o/out"
    assert set(given[1:]) <= set(options.beam_options)
    for word in ("temp_location", "staging_location", "job_name", "experiments", "save_main_session"):
        assert len([option for option in options.beam_options if word in option]) == 1


def test_a_bucket_is_not_needed_where_the_places_are_named():
    options = parse([*PLACE, "--temp_location=gs://t/temp", "--output=gs://o/out"])
    assert options.output == "gs://o/out"
    assert dataflow.upload_folder(options.beam_options) == "gs://t/temp"


def test_by_default_one_process_and_the_packed_checkout():
    options = parse(HERE)
    assert options.beam_options[:3] == ("--runner=DataflowRunner", "--project=project-1", "--region=us-central1")
    assert "--experiments=no_use_multiple_sdk_containers" in options.beam_options
    assert f"--setup_file={dataflow.setup_file()}" in options.beam_options
    assert options.device == "auto"


def test_names_of_jobs_are_ones_that_dataflow_takes_and_differ():
    names = {google(parse(HERE)).job_name for _ in range(3)}
    assert len(names) == 3
    for name in names:
        assert name is not None
        assert name == name.lower()
        assert len(name) < 64


@pytest.mark.parametrize("given", [IMAGE, "--extra_package=dist/embed_corpus-0.1.0.tar.gz", "--setup_file=./setup.py"])
def test_nothing_is_packed_where_the_workers_get_the_package_otherwise(given):
    options = parse([*HERE, given])
    assert not [option for option in options.beam_options if "setup_file" in option and option != given]


@pytest.mark.parametrize("gpu", [[], ["--gpu=nvidia-l4"]])
def test_an_installed_package_needs_an_image(monkeypatch, capsys, gpu):
    monkeypatch.setattr(dataflow, "setup_file", lambda: None)
    assert "give --sdk_container_image, an image that holds it" in refusal(capsys, *HERE, *gpu)
    assert parse([*HERE, *gpu, IMAGE]).beam_options


@pytest.mark.parametrize(
    ("given", "disk_size_gb"),
    [
        ([], 50),
        (["--gpu=nvidia-l4"], 50),
        (["--extra_package=dist/embed_corpus-0.1.0.tar.gz"], 50),
        (["--disk_size_gb=100"], 100),
        ([IMAGE], None),
    ],
)
def test_machines_that_install_pytorch_have_room_for_it(given, disk_size_gb):
    options = parse([*HERE, *given])
    assert PipelineOptions(list(options.beam_options)).view_as(WorkerOptions).disk_size_gb == disk_size_gb


@pytest.mark.parametrize("runner", ["dataflow", "DataflowRunner", "Dataflow"])
def test_every_name_of_the_runner_is_known(runner):
    assert dataflow.is_dataflow(runner)


@pytest.mark.parametrize("runner", ["local", "flink", "DirectRunner", "spark"])
def test_no_other_runner_is_dataflow(runner):
    assert not dataflow.is_dataflow(runner)


# GPUs.


def test_a_gpu_is_for_the_encoding_step_and_used():
    options = parse([*HERE, IMAGE, "--gpu=nvidia-l4"])
    assert encoder_hints(options.gpu, options.gpu_everywhere) == {"accelerator": L4, "min_ram": "16GB"}
    assert options.device == "cuda"
    assert google(options).dataflow_service_options is None


@pytest.mark.parametrize(
    ("given", "warns"),
    [
        (["--gpu=nvidia-l4"], True),
        (["--gpu=nvidia-l4", "--gpu_everywhere"], True),
        ([f"--dataflow_service_options=worker_accelerator={L4}"], True),
        (["--gpu=nvidia-l4", IMAGE], False),
        (["--gpu=nvidia-l4", "--prebuild_sdk_container_engine=cloud_build"], False),
        ([], False),
    ],
)
def test_a_gpu_that_waits_for_pytorch_is_worth_a_warning(given, warns):
    options = parse([*HERE, *given])
    warning = dataflow.idle_gpu_warning(options.device, options.beam_options)
    assert (warning is not None and "deploy/README.md says how to build an image" in warning) == warns


def test_a_whole_request_is_handed_on():
    spec = "type:nvidia-l4;count:1;machine_type:g2-standard-4;install-nvidia-driver"
    options = parse([*HERE, IMAGE, f"--gpu={spec}"])
    assert encoder_hints(options.gpu, options.gpu_everywhere)["accelerator"] == spec


@pytest.mark.parametrize(
    ("gpu", "given", "machine_type"),
    [
        ("nvidia-l4", [], "g2-standard-8"),
        ("nvidia-tesla-t4", [], "n1-standard-8"),
        ("nvidia-h100-80gb", [], "a3-highgpu-1g"),
        ("nvidia-l4", ["--machine_type=g2-standard-4"], "g2-standard-4"),
        ("type:nvidia-l4;count:1;machine_type:g2-standard-12", [], "g2-standard-12"),
        ("nvidia-brand-new", ["--machine_type=z9-gpu"], "z9-gpu"),
    ],
)
def test_a_gpu_everywhere_is_a_service_option_and_a_machine(gpu, given, machine_type):
    options = parse([*HERE, IMAGE, f"--gpu={gpu}", "--gpu_everywhere", *given])
    assert encoder_hints(options.gpu, options.gpu_everywhere) == {}
    spec = accelerator(gpu).spec
    assert google(options).dataflow_service_options == [f"worker_accelerator={spec}"]
    machines = PipelineOptions(list(options.beam_options)).view_as(WorkerOptions)
    assert machines.machine_type == machine_type


def test_mps_gets_the_processes_it_is_for():
    mps = f"{L4};use_nvidia_mps"
    for argv in (
        [IMAGE, f"--gpu={mps}", "--gpu_everywhere"],
        [IMAGE, f"--gpu={mps}"],
        [IMAGE, f"--dataflow_service_options=worker_accelerator={mps}"],
        ["--prebuild_sdk_container_engine=cloud_build", f"--gpu={mps}"],
    ):
        options = parse([*HERE, *argv])
        assert not [option for option in options.beam_options if "no_use_multiple_sdk_containers" in option]


def test_a_process_for_each_core_is_taken_where_they_share_the_gpu_or_there_is_none():
    for argv in ([IMAGE, f"--gpu={L4};use_nvidia_mps"], []):
        options = parse([*HERE, *argv, "--experiments=use_multiple_sdk_containers"])
        assert not [option for option in options.beam_options if "no_use_multiple_sdk_containers" in option]


def test_a_gpu_by_the_service_option_alone_is_taken():
    options = parse([*HERE, IMAGE, f"--dataflow_service_options=worker_accelerator={L4}", "--device=cuda"])
    assert options.device == "cuda"


def test_prime_is_taken_with_a_gpu_for_the_encoding_step():
    assert parse([*HERE, IMAGE, "--gpu=nvidia-l4", "--dataflow_service_options=enable_prime"]).device == "cuda"


# What is refused, and what to do.


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (["--runner=dataflow"], "--project and --region and --bucket"),
        (["--runner=dataflow", "--region=r", "--bucket=bucket-1"], "--project"),
        (["--runner=dataflow", "--project=project-1", "--bucket=bucket-1"], "--region"),
        (PLACE, "--bucket"),
        ([*PLACE, "--output=gs://o/out"], "--bucket"),
    ],
)
def test_what_is_missing_is_named(capsys, argv, missing):
    assert refusal(capsys, *argv).startswith(f"Dataflow needs {missing}: --project is the project's ID, ")


GPU = (*HERE, IMAGE, "--gpu=nvidia-l4")
EVERYWHERE = (*GPU, "--gpu_everywhere")
PRIME = "--dataflow_service_options=enable_prime"
ON_ALL = f"--dataflow_service_options=worker_accelerator={L4}"
ONE_PROCESS = "--experiments=no_use_multiple_sdk_containers"
PER_CORE = "--experiments=use_multiple_sdk_containers"
NO_RUNNER_V2 = "--experiments=no_use_runner_v2"
MPS = f"--dataflow_service_options=worker_accelerator={L4};use_nvidia_mps"


@pytest.mark.parametrize(
    ("argv", "message", "remedy"),
    [
        ([*PLACE, "--bucket=My Bucket"], "--bucket 'My Bucket' is no bucket", "write its name"),
        ([*PLACE, "--bucket=b"], "--bucket 'b' is no bucket", "at least three"),
        (["--runner=dataflow", "--region=r", "--bucket=bucket-1", "--project=My Project"], "no project's ID", "the ID"),
        (["--runner=dataflow", "--region=r", "--bucket=bucket-1", "--project=123456"], "no project's ID", "or number"),
        (
            ["--runner=dataflow", "--project=project-1", "--bucket=bucket-1", "--region=us-central1-a"],
            "--region 'us-central1-a' is a zone",
            "write its region, us-central1, or add --worker_zone=us-central1-a",
        ),
        ([*HERE, IMAGE, ON_ALL, "--device=cpu"], "worker_accelerator and --device=cpu contradict", "leave one out"),
        ([*HERE, IMAGE, ON_ALL, ON_ALL], "asks for type:nvidia-l4;", "leave all but one out"),
        ([*HERE, IMAGE, ON_ALL, "--machine_type=n1-standard-4"], "'n1-standard-4' cannot hold", "take g2-standard-8"),
        ([*GPU, "--dataflow_service_options=use_nvidia_mps"], "use_nvidia_mps alone has no effect", "--gpu='type:"),
        ([*HERE, "--temp_location=/tmp/t"], "--temp_location '/tmp/t' is not on gs://", "give --bucket"),
        ([*GPU, ON_ALL], "--gpu and the service option worker_accelerator both", "leave worker_accelerator out"),
        ([*GPU, f"--experiments=worker_accelerator={L4}"], "both ask for a GPU", "give --gpu_everywhere in its place"),
        ([*EVERYWHERE, ON_ALL], "both ask for a GPU", "leave worker_accelerator out"),
        (
            [*HERE, f"--gpu={L4};use_nvidia_mps"],
            "use_nvidia_mps starts several processes",
            "give --sdk_container_image",
        ),
        ([*HERE, MPS], "use_nvidia_mps starts several processes", "leave use_nvidia_mps out"),
        ([*GPU, f"--resource_hint=accelerator={L4}"], "asks for a GPU for every step", "leave the hint out"),
        ([*HERE, IMAGE, ON_ALL, f"--resource_hint=accelerator={L4}"], "for every step", "leave the hint out"),
        ([*HERE, IMAGE, f"--resource_hint=accelerator={L4}"], "for every step", "give --gpu for the encoding step"),
        ([*HERE, IMAGE, MPS, ONE_PROCESS], "use_nvidia_mps shares a GPU among several", "leave one of them out"),
        ([*HERE, IMAGE, f"--gpu={L4};use_nvidia_mps", ONE_PROCESS], "starts only one", "leave one of them out"),
        (
            [*HERE, PER_CORE, ONE_PROCESS],
            "no_use_multiple_sdk_containers and use_multiple_sdk",
            "leave one of them out",
        ),
        (
            [*HERE, IMAGE, MPS, "--experiments=use_multiple_sdk_containers,no_use_multiple_sdk_containers"],
            "no_use_multiple_sdk_containers and use_multiple_sdk_containers contradict each other",
            "leave one of them out",
        ),
        ([*GPU, PER_CORE], "all would load a model of their own onto the one GPU", f"'{L4};use_nvidia_mps'"),
        ([*EVERYWHERE, PER_CORE], "a process for each core", "leave it out"),
        ([*HERE, IMAGE, ON_ALL, PER_CORE], "a process for each core", "leave it out"),
        ([*GPU, NO_RUNNER_V2], "GPUs for Runner v2 only", "no_use_runner_v2 asks for the runner before it: leave"),
        ([*HERE, IMAGE, ON_ALL, NO_RUNNER_V2], "GPUs for Runner v2 only", "leave it out"),
        ([*HERE, IMAGE, f"--gpu={L4};use_nvidia_mps", PRIME], "Prime does not know use_nvidia_mps", "leave it out"),
        ([*HERE, IMAGE, MPS, PRIME], "no machines that all have a GPU", "leave enable_prime out"),
        (
            [*HERE, IMAGE, "--dataflow_service_options=worker_accelerator=l4", "--device=cuda"],
            "worker_accelerator 'l4' names no GPU",
            "did you mean nvidia-l4?",
        ),
        (
            [*HERE, IMAGE, "--dataflow_service_options=worker_accelerator=nvidia-l4"],
            "worker_accelerator 'nvidia-l4' is a bare name, and Dataflow takes whole requests only",
            f"write --dataflow_service_options='worker_accelerator={L4}'",
        ),
        (
            [*HERE, IMAGE, "--experiments=worker_accelerator=nvidia-l4"],
            "worker_accelerator 'nvidia-l4' is a bare name",
            f"write --dataflow_service_options='worker_accelerator={L4}'",
        ),
        (
            [
                *HERE,
                IMAGE,
                "--gpu=type:nvidia-l4;count:1;machine_type:g2-standard-4",
                "--gpu_everywhere",
                "--machine_type=g2-standard-8",
            ],
            "--gpu asks for the machine 'g2-standard-4', and --machine_type for 'g2-standard-8'",
            "leave one of them out",
        ),
        ([*EVERYWHERE, PRIME], "no machines that all have a GPU", "or --gpu_everywhere"),
        ([*HERE, PRIME, "--machine_type=n2-standard-4"], "Prime chooses the machines itself", "leave machine_type"),
        ([*HERE, "--experiments=enable_prime", "--machine_type=n2-standard-4"], "Prime chooses", "leave machine_type"),
        ([*GPU, "--device=cpu"], "--gpu and --device=cpu contradict", "leave one out"),
        ([*HERE, "--device=cuda"], "--device=cuda needs machines with a GPU", "give --gpu"),
        ([*HERE, "--gpu_everywhere"], "--gpu_everywhere says on which machines", "name the GPU"),
        ([*HERE, IMAGE, "--gpu=l4"], "--gpu 'l4' names no GPU", "did you mean nvidia-l4?"),
        ([*HERE, IMAGE, "--gpu=type:nvidia-l4;count:2"], "asks for 2 GPUs on each machine", "write count:1"),
        ([*HERE, IMAGE, "--gpu=type:nvidia-l4"], "asks for no number of GPUs", "write count:1"),
        (
            [*HERE, IMAGE, "--gpu=type:nvidia-l4;count:1;machine_type:n1-standard-4"],
            "'n1-standard-4' cannot hold a nvidia-l4, which comes with g2-* machines only",
            "take g2-standard-8",
        ),
        (
            [*EVERYWHERE, "--machine_type=n1-standard-4"],
            "'n1-standard-4' cannot hold a nvidia-l4",
            "take g2-standard-8",
        ),
        ([*GPU, "--machine_type=g2-standard-4"], "would put every step on machines with a GPU", "add --gpu_everywhere"),
        ([*GPU, "--flexrs_goal=COST_OPTIMIZED"], "FlexRS does not know machines of different", "--flexrs_goal out"),
        ([*HERE, IMAGE, "--gpu=nvidia-brand-new", "--gpu_everywhere"], "needs --machine_type", "that can hold"),
        (
            [*HERE, "--input=gs://b/a.txt", "--input=corpus/*.txt"],
            "--input 'corpus/*.txt' is on this",
            "gcloud storage",
        ),
        ([*HERE, "--input=file:///a.txt"], "--input 'file:///a.txt' is on this machine", "gcloud storage"),
        (
            [*HERE, "--output=s3://b/o"],
            "--output: 's3://b/o' is neither a folder of this machine nor gs://bucket/folder",
            "",
        ),
        ([*HERE, "--checkpoint=s3://b/c"], "--checkpoint 's3://b/c' is not on gs://", "copy it there"),
        ([*HERE, "--output=output"], "--output 'output' is on this machine", "give --bucket"),
        (
            [*PLACE, "--temp_location=gs://t/t"],
            "--output 'output' is on this machine",
            "leave it out and give --bucket",
        ),
        ([*HERE, "--checkpoint=./mine"], "--checkpoint './mine' is on this", "gcloud storage cp -r ./mine"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_remedy(capsys, argv, message, remedy):
    said = refusal(capsys, *argv)
    assert message in said
    assert remedy in said


@pytest.mark.parametrize("path", ["s3://b/a.txt", "azfs://account/container/a.txt", "hdfs://host/a.txt"])
def test_inputs_of_other_storage_are_left_to_beam(path):
    assert parse([*HERE, f"--input={path}"]).input == (path,)


def test_a_gpu_asked_for_in_dataflows_own_words_gets_its_machine_and_is_used():
    options = parse([*HERE, IMAGE, ON_ALL])
    assert options.device == "cuda"
    assert PipelineOptions(list(options.beam_options)).view_as(WorkerOptions).machine_type == "g2-standard-8"
    assert ONE_PROCESS in options.beam_options


@pytest.mark.parametrize("option", ["--bucket=bucket-1", "--gpu=nvidia-l4", "--gpu_everywhere"])
def test_options_of_dataflow_are_refused_elsewhere(capsys, option):
    name = option.partition("=")[0]
    assert refusal(capsys, option) == f"{name} is for Dataflow: add --runner=dataflow, or leave it out"


def test_a_launcher_may_name_a_checkpoint_of_its_image():
    options = parse([*HERE, IMAGE, "--template_location=gs://t/job", "--checkpoint=/opt/checkpoints/mine"])
    assert options.checkpoint == "/opt/checkpoints/mine"
    assert dataflow.is_launch(options.beam_options)
