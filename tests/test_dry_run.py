"""A job that is only shown."""

import json
import socket

import pytest

from pipeline.__main__ import main
from pipeline.dataflow import setup_file

pytest_plugins = ["packing"]

L4 = "type:nvidia-l4;count:1;install-nvidia-driver:5xx"
IMAGE = "images/embed:1"


@pytest.fixture
def offline(monkeypatch):
    """Refuses every connection."""

    def refuse(*_):
        raise AssertionError("a dry run needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def shown(capsys, *argv: str) -> dict[str, list[str]]:
    """Returns the lines of each part of what is shown."""
    assert main([*argv, "--dry_run"]) == 0
    parts = capsys.readouterr().out.rstrip("\n").split("\n\n")
    return {title: lines for title, *lines in (part.splitlines() for part in parts)}


def test_a_job_on_dataflow(offline, capsys):
    argv = ["--project", "project-1", "--region=us-central1", "--bucket=bucket-1", f"--sdk_container_image={IMAGE}"]
    argv += ["--input=gs://corpus/*.jsonl", "--checkpoint=gs://corpus/head", "--gpu=nvidia-l4", "--job_name=nightly"]
    parts = shown(capsys, "dataflow", *argv)
    assert parts["Options of Beam"] == [
        "  --runner=DataflowRunner",
        "  --project project-1",
        "  --region=us-central1",
        f"  --sdk_container_image={IMAGE}",
        "  --job_name=nightly",
        "  --temp_location=gs://bucket-1/temp",
        "  --staging_location=gs://bucket-1/staging",
        "  --no_save_main_session",
        "  --experiments=no_use_multiple_sdk_containers",
    ]
    assert parts["Reads"] == ["  gs://corpus/*.jsonl"]
    assert parts["Writes"] == ["  gs://bucket-1/output"]
    job = dict(line.strip().split("  ", 1) for line in parts["Job for Dataflow"])
    assert {name: job[name].strip() for name in ("name", "container image", "machine type", "service options")} == {
        "name": "nightly",
        "container image": IMAGE,
        "machine type": "Dataflow's choice",
        "service options": "none",
    }
    assert job["experiments"].strip().startswith("no_use_multiple_sdk_containers, ")
    request = json.loads("\n".join(parts["Environment in the request"]))
    assert request["experiments"] == job["experiments"].strip().split(", ")
    assert request["tempStoragePrefix"] == job["temporary files"].strip().replace("gs://", "storage.googleapis.com/")
    [pool] = request["workerPools"]
    assert [image["containerImage"] for image in pool["sdkHarnessContainerImages"]] == [IMAGE, IMAGE]
    steps = parts["Steps"]
    assert [step for step in steps if "accelerator" in step] == [
        f"    Encode  [accelerator {L4}, min_ram_bytes 16000000000]"
    ]
    for name in ("  ReadDocuments", "    Tokenize", "  WriteEmbeddings", "  PublishSnapshot"):
        assert name in steps


def test_the_sample_corpus_is_not_uploaded(offline, capsys):
    argv = ["--project=project-1", "--region=r", "--bucket=bucket-1", f"--sdk_container_image={IMAGE}"]
    parts = shown(capsys, "dataflow", *argv, "--gpu=nvidia-l4", "--gpu_everywhere")
    assert parts["Reads"] == ["  the sample corpus, uploaded below gs://bucket-1/staging/sample"]
    assert not [step for step in parts["Steps"] if "[" in step]
    assert f"  service options   worker_accelerator={L4}" in parts["Job for Dataflow"]
    assert "  machine type      g2-standard-8" in parts["Job for Dataflow"]


def test_a_job_with_a_gpu_needs_no_image_and_is_not_packed_in_the_checkout(offline, capsys, packed):
    argv = ["--project=project-1", "--region=us-central1", "--bucket=bucket-1", "--gpu=nvidia-l4"]
    assert main(["dataflow", *argv, "--dry_run"]) == 0
    shown_parts = capsys.readouterr()
    assert "  disk in GB        50" in shown_parts.out.splitlines()
    [path] = packed
    assert str(path) != setup_file()
    assert f"  --setup_file={setup_file()}" in shown_parts.out.splitlines()
    assert f"    Encode  [accelerator {L4}, min_ram_bytes 16000000000]" in shown_parts.out.splitlines()
    assert shown_parts.err.startswith("warning: without --sdk_container_image each machine installs PyTorch from PyPI")
    assert main(["dataflow", *argv, "--dry_run", f"--sdk_container_image={IMAGE}"]) == 0
    assert capsys.readouterr().err == ""


def test_an_image_that_beam_would_build_is_not_built(offline, capsys):
    argv = ["--project=project-1", "--region=us-central1", "--bucket=bucket-1"]
    engine = "--prebuild_sdk_container_engine=cloud_build"
    assert f"  {engine}" in shown(capsys, "dataflow", *argv, engine)["Options of Beam"]


def test_a_job_on_this_machine(offline, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = shown(capsys, "local", "--input=nowhere/*.txt", "--keep_fields=year:int16,lang")
    assert parts["Options of Beam"] == ["  --runner=FnApiRunner"]
    assert parts["Writes"] == ["  output"]
    assert list(parts) == ["Options of Beam", "Reads", "Writes", "Steps"]
    assert list(tmp_path.iterdir()) == []
