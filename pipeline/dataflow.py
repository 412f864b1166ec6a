"""What a person's options become on Dataflow, checked before anything is sent; pure functions."""

import re
from collections.abc import Sequence
from pathlib import Path

from apache_beam.options.pipeline_options import GoogleCloudOptions, SetupOptions, WorkerOptions

from pipeline.dataflow_machines import (
    accelerator,
    check_machines,
    has_image,
    machine_for,
    pool_accelerator,
    process_options,
    view,
)
from pipeline.runners import beam_name
from transforms.checkpoint import is_shipped

_BUCKET = re.compile(r"(gs://)?(?P<bucket>[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9])(?P<folder>/[^\r\n]*)?")
_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{1,61}[a-z0-9]")
_ZONE = re.compile(r"(?P<region>[a-z]+-[a-z]+[0-9]+)-[a-z]")

_INSTALLING_DISK_GB = 50
"""Disk of machines that install PyTorch with CUDA, 5 GB, as they start: Dataflow's own 25 GB hold its image too."""


def is_dataflow(runner: str) -> bool:
    """Returns whether a runner is Dataflow's, by whatever name."""
    return beam_name(runner).rpartition(".")[2].lower() in ("dataflow", "dataflowrunner")


def bucket_folder(bucket: str) -> str:
    """Returns gs://BUCKET, or the folder of it that was named.

    Raises:
      ValueError: a bucket cannot be called that.
    """
    found = _BUCKET.fullmatch(bucket.rstrip("/"))
    if found is None:
        raise ValueError(
            f"--bucket {bucket!r} is no bucket: write its name, at least three lower-case letters, digits and "
            "hyphens, or gs://NAME/FOLDER"
        )
    return f"gs://{found['bucket']}{found['folder'] or ''}"


def upload_folder(beam_options: Sequence[str]) -> str:
    """Returns the folder on gs:// to which this machine's files go for the workers to read."""
    google = view(beam_options, GoogleCloudOptions)
    return google.staging_location or google.temp_location


def is_launch(beam_options: Sequence[str]) -> bool:
    """Returns whether the job is only described in a file, from which a template's launcher starts it."""
    return view(beam_options, GoogleCloudOptions).template_location is not None


def idle_gpu_warning(device: str, beam_options: Sequence[str]) -> str | None:
    """Returns what to tell a person whose machines have a GPU and no image; None where that is not so.

    Args:
      device: as `dataflow_machines.device_for` returned it.
      beam_options: as `complete` returned them.
    """
    if device != "cuda" or has_image(beam_options):
        return None
    return (
        "without --sdk_container_image each machine installs PyTorch from PyPI before it encodes, minutes in which its "
        "GPU idles: deploy/README.md says how to build an image that holds all"
    )


def setup_file() -> str | None:
    """Returns the setup.py that this code can be packed with; None where it is installed, not checked out."""
    root = Path(__file__).resolve().parent.parent
    path = root / "setup.py"
    return str(path) if path.is_file() and (root / "transforms").is_dir() else None


def complete(
    given: Sequence[str],
    bucket: str | None,
    gpu: str | None,
    gpu_everywhere: bool,
    job_name: str,
    setup_path: str | None,
) -> list[str]:
    """Returns Beam's options for Dataflow: those given, then what they leave open.

    Args:
      given: options of Beam; what they say stands.
      bucket: `--bucket`.
      gpu: `--gpu`.
      gpu_everywhere: `--gpu_everywhere`: all machines have it, not just those that encode.
      job_name: taken where none is given.
      setup_path: as `setup_file` returned it.

    Raises:
      ValueError: something is missing, or options contradict each other; the message holds the remedy.
    """
    google = view(given, GoogleCloudOptions)
    _check_required(google, bucket)
    if gpu_everywhere and gpu is None:
        raise ValueError("--gpu_everywhere says on which machines --gpu is: name the GPU, --gpu=nvidia-l4 say")
    asked = None if gpu is None else accelerator(gpu)
    check_machines(given, asked, gpu_everywhere)
    added = []
    if bucket is not None:
        folder = bucket_folder(bucket)
        added += [] if google.temp_location else [f"--temp_location={folder}/temp"]
        added += [] if google.staging_location else [f"--staging_location={folder}/staging"]
    if not google.job_name:
        added.append(f"--job_name={job_name}")
    if view(given, SetupOptions).save_main_session is None:
        added.append("--no_save_main_session")  # It holds nothing that workers need.
    on_all = asked if gpu_everywhere else pool_accelerator(given)
    added += _package_options(given, setup_path)
    if asked is not None and gpu_everywhere:
        added.append(f"--dataflow_service_options=worker_accelerator={asked.spec}")
    if on_all is not None and not view(given, WorkerOptions).machine_type:
        added.append(f"--machine_type={machine_for(on_all)}")
    added += process_options(given, asked)
    return [*given, *added]


def check_paths(inputs: Sequence[str], output: str, checkpoint: str, beam_options: Sequence[str]) -> None:
    """Checks that the workers see what the options name.

    Args:
      inputs: `--input`.
      output: `--output`.
      checkpoint: `--checkpoint`.
      beam_options: as `complete` returned them.

    Raises:
      ValueError: a path is of this machine, or output or checkpoint of another storage than gs://; the message holds
        the remedy.
    """
    folder = upload_folder(beam_options)
    for path in inputs:
        if _is_local(path):  # Beam reads from elsewhere too, with its extra for the scheme.
            raise ValueError(
                f"--input {path!r} is on this machine, where Dataflow's workers cannot read it: copy it to gs:// "
                f"(gcloud storage cp -r {path} {folder}/input/) and name it there"
            )
    if not output.startswith("gs://"):
        place = "on this machine, where Dataflow's workers cannot write" if _is_local(output) else "not on gs://"
        raise ValueError(f"--output {output!r} is {place}: name a folder on gs://, or leave it out and give --bucket")
    # Whoever launches a template runs in the workers' own image: what is there for it is there for them.
    if not checkpoint.startswith("gs://") and not is_shipped(checkpoint):
        if not _is_local(checkpoint):
            raise ValueError(f"--checkpoint {checkpoint!r} is not on gs://: copy it there and name it there")
        if not is_launch(beam_options):
            raise ValueError(
                f"--checkpoint {checkpoint!r} is on this machine, where Dataflow's workers cannot read it: copy it to "
                f"gs:// (gcloud storage cp -r {checkpoint} {folder}/checkpoints/) and name it there"
            )


def _is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


def _check_required(google: GoogleCloudOptions, bucket: str | None) -> None:
    missing = [name for name in ("project", "region") if not getattr(google, name)]
    if bucket is None and not google.temp_location:
        missing.append("bucket")
    if missing:
        raise ValueError(
            f"Dataflow needs {' and '.join('--' + name for name in missing)}: --project is the project's ID, "
            "--region where its machines shall be (us-central1 say), --bucket a bucket of Cloud Storage in that region "
            "for temporary files and, without --output, the output"
        )
    if not _PROJECT.fullmatch(google.project):
        raise ValueError(
            f"--project {google.project!r} is no project's ID: write the ID, my-project-123 say, not its name or number"
        )
    if zone := _ZONE.fullmatch(google.region):
        raise ValueError(
            f"--region {google.region!r} is a zone: write its region, {zone['region']}, or add "
            f"--worker_zone={google.region}"
        )
    # Beam would say so in a warning, and make a bucket of its own.
    for name in ("temp_location", "staging_location"):
        folder = getattr(google, name)
        if folder and not folder.startswith("gs://") and "localhost" not in google.dataflow_endpoint:
            raise ValueError(f"--{name} {folder!r} is not on gs://: name a folder there, or give --bucket in its place")


def _package_options(given: Sequence[str], setup_path: str | None) -> list[str]:
    """Returns how the workers get this code, unless the options say it: packed from the checkout.

    Args:
      given: options of Beam.
      setup_path: as `setup_file` returned it.
    """
    worker, setup = view(given, WorkerOptions), view(given, SetupOptions)
    if worker.sdk_container_image:
        return []
    added = [] if worker.disk_size_gb else [f"--disk_size_gb={_INSTALLING_DISK_GB}"]
    if setup.setup_file or setup.extra_packages:
        return added
    if setup_path is None:
        raise ValueError(
            "Dataflow's workers need this package: give --sdk_container_image, an image that holds it (see "
            "deploy/README.md), or --extra_package, its source package (embed_corpus-VERSION.tar.gz)"
        )
    return [*added, f"--setup_file={setup_path}"]
