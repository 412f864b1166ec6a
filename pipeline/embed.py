"""Embeds a corpus: plans the job from its options, runs it on a Beam runner, and prints a summary."""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions

from pipeline import dataflow, flink
from pipeline.dataflow_job import upload_once, wait
from pipeline.dataflow_machines import encoder_hints
from pipeline.dry_run import describe_job
from pipeline.flink_session import FlinkSession
from pipeline.flink_setup import prepare
from pipeline.graph import Job, build
from pipeline.job_errors import quiet_beam, root_cause, was_interrupted
from pipeline.options import EmbedOptions
from pipeline.own_sources import packed_from_a_copy
from pipeline.progress_line import ProgressLine
from pipeline.runners import beam_name, is_in_process
from pipeline.sample import KEPT_FIELDS, write_sample
from pipeline.summary import summary
from transforms import storage
from transforms.checkpoint import cache_folder, is_shipped
from transforms.fingerprint import describe_checkpoint
from transforms.hardware import resolve_device, resolve_dtype
from transforms.input_digest import input_digest
from transforms.inputs import InputPlan
from transforms.known_vectors import find_work, flush_work
from transforms.publish import abandon, check_not_overtaken, claim, is_running
from transforms.read import ReadDocuments, plan_inputs
from transforms.reconcile import REPORT_FILE, Run
from transforms.schema import output_schema
from transforms.shards import DamagedSnapshotError, SnapshotError
from transforms.snapshots import (
    MANIFEST_FILE,
    Snapshot,
    check_shards,
    is_published,
    latest_version,
    list_work,
    read_latest,
    work_folder,
)

PUBLISHED, FAILED, NOT_PUBLISHED = 0, 1, 3
"""Exit statuses; 2 is wrong usage."""

_PACKAGES = ("apache-beam", "torch", "transformers", "tokenizers", "pyarrow", "numpy", "embed-corpus")


class JobError(Exception):
    """The job ran and failed."""


def embed(options: EmbedOptions) -> int:
    """Embeds a corpus and publishes a snapshot.

    Returns:
      `PUBLISHED`, or `NOT_PUBLISHED` where too much was rejected or the counts disagree; 0 too where nothing changed
      and that was to be skipped, and where the job was only shown, or described for a template's launcher, which starts
      it once this program has ended.

    Raises:
      ValueError: an option does not fit the input, or the checkpoint is damaged.
      OSError: an input, a checkpoint or the output cannot be read or written.
      SnapshotError: the last snapshot is damaged, or another run published first.
      DeviceError: cuda was asked for and there is none, or a driver cannot be loaded.
      JobError: the pipeline failed.
      KeyboardInterrupt: somebody interrupted it.
    """
    if dataflow.is_dataflow(options.runner):
        warning = dataflow.idle_gpu_warning(options.device, options.beam_options)
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr)
    with packed_from_a_copy(options.beam_options) as beam_options:
        if options.dry_run:
            print(describe_job(options, beam_options))
            return PUBLISHED
        return _plan_and_run(replace(options, beam_options=beam_options))


def _plan_and_run(options: EmbedOptions) -> int:
    job = plan(options)
    if job is None:
        print(f"nothing changed since the last snapshot in {options.output}: there is nothing to publish")
        return PUBLISHED
    if dataflow.is_dataflow(options.runner) and dataflow.is_launch(options.beam_options):
        _run_pipeline(job)
        print(f"described snapshot={job.run.name} of {job.run.output}; the launcher starts the job")
        return PUBLISHED
    watchable = is_in_process(options.runner) and _worker_processes(job.beam_options) is None
    watchable = watchable or (flink.is_flink(options.runner) and flink.is_loopback(job.beam_options))
    with ProgressLine(watchable):
        manifest = run(job)
    print(summary(job.run.folder, manifest))
    return NOT_PUBLISHED if "not_published" in manifest else PUBLISHED


def run(job: Job) -> dict[str, Any]:
    """Runs a planned job to its end; a run that fails leaves nothing behind but its saved work.

    Whatever this process has encoded of it is saved then; of worker processes, what they had saved by themselves.

    Returns:
      The manifest; with a key `not_published`, the reasons, where it was not published.

    Raises:
      SnapshotError: another run published first.
      JobError: the pipeline failed.
    """
    session = FlinkSession(job.beam_options) if flink.is_flink(job.run.runner) else None
    try:
        _run_pipeline(job, session)
    except BaseException as error:
        try:
            if is_published(job.run.output, job.run.name):
                # Only what comes after publishing failed: old snapshots or work are still there, and nothing is lost.
                print(f"warning: published, but cleaning up failed: {error}", file=sys.stderr)
                return _outcome(job.run)
            # Elsewhere it may go on without us, and still publish.
            if is_in_process(job.run.runner) or (session is not None and session.is_over()):
                abandon(job.run.output, job.run.name)
            flush_work(work_folder(job.run.output, job.run.name), job.fingerprint)
            has_work = job.run.name in list_work(job.run.output)
        except (SnapshotError, OSError) as another:
            raise JobError(f"{error}; then cleaning up failed too: {another}") from error
        if isinstance(error, KeyboardInterrupt) and has_work:
            raise KeyboardInterrupt("what was encoded so far is kept, and the next run takes it up") from error
        raise
    return _outcome(job.run)


def plan(options: EmbedOptions) -> Job | None:
    """Checks options against the machine, the input, the checkpoint and the output, and claims a snapshot's name.

    Returns:
      The job; None where nothing changed since the last snapshot, and such a run is to be skipped.
    """
    started = time.time()
    if is_in_process(options.runner):  # Elsewhere the workers' hardware decides, when they load the model.
        resolve_dtype(options.dtype, resolve_device(options.device))
    if _worker_processes(options.beam_options) is not None:
        _check_imports_of_processes()
    storage.check_url(options.output)
    if not is_in_process(options.runner):  # The workers may stand in other folders.
        checkpoint = options.checkpoint if is_shipped(options.checkpoint) else _absolute(options.checkpoint)
        options = replace(options, output=_absolute(options.output), checkpoint=checkpoint)
    if flink.is_flink(options.runner):
        options = replace(options, beam_options=tuple(prepare(options.beam_options)))
        if flink.is_loopback(options.beam_options):
            import_module(flink.WORKER_PLUGIN)  # This process is the worker, and Beam imports plugins only in others.
    encoder = describe_encoder(options.checkpoint, options.max_tokens)
    # Other storage than gs:// is reached with them; Beam hands them over only when a pipeline is made.
    FileSystems.set_options(PipelineOptions(list(options.beam_options)))
    patterns = options.input or (_sample(options),)
    inputs = plan_inputs(
        patterns,
        options.input_format,
        options.text_field,
        options.id_field,
        options.keep_fields or (() if options.input else KEPT_FIELDS),
        _absolute(options.output),
    )
    schema = output_schema(inputs.kept_fields, {f"encoder.{name}": str(value) for name, value in encoder.items()})
    token = latest_version(options.output)
    latest = _latest(options.output, options.full)
    began = datetime.fromtimestamp(started, timezone.utc)
    work = find_work(options.output, encoder["fingerprint"], began)
    rate = latest.manifest.get("seconds_per_token") if latest else None
    versions = _versions()
    digest = _digest(options, inputs, encoder["fingerprint"], versions, started) if options.skip_unchanged else None
    unchanged = latest is not None and digest is not None and latest.manifest.get("input_digest") == digest
    if unchanged and not options.full and not work.usable:
        return None
    name = claim(options.output, began, token)
    run = Run(
        output=options.output,
        name=name,
        token=token,
        started=started,
        created=began.isoformat(timespec="seconds"),
        runner=beam_name(options.runner),
        encoder=encoder,
        versions=versions,
        options=_described(options),
        max_rejected_fraction=options.max_rejected_fraction,
        keep_snapshots=options.keep_snapshots,
        # A living run's work is left to it: it may still publish, or the run after it take it up.
        finished_work=[*(run for run in work.usable + work.outdated if not is_running(options.output, run)), name],
        seconds_per_token=None if options.full else rate or work.seconds_per_token,
        input_digest=digest,
    )
    return Job(
        run=run,
        read=ReadDocuments.from_plan(inputs, max_document_bytes=options.max_document_bytes),
        schema=schema,
        rows_per_shard=options.rows_per_shard,
        compression=options.compression,
        checkpoint=options.checkpoint,
        max_tokens=options.max_tokens,
        device=options.device,
        dtype=options.dtype,
        max_batch_tokens=options.max_batch_tokens,
        num_threads=_threads_per_process(options),
        previous_shards=latest.shards if latest else [],
        previous_encoder=latest.fingerprint if latest and not options.full else None,
        unfinished=[] if options.full else work.usable,
        beam_options=options.beam_options,
        encoder_hints=encoder_hints(options.gpu, options.gpu_everywhere),
    )


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _digest(
    options: EmbedOptions, inputs: InputPlan, fingerprint: str, versions: Mapping[str, str], started: float
) -> str | None:
    """Returns the digest of everything the rows of the snapshot depend on."""
    settings = {
        "encoder": fingerprint,
        "embed-corpus": versions["embed-corpus"],
        "input_format": inputs.input_format,
        "text_fields": inputs.text_fields,
        "id_field": inputs.id_field,
        "kept_fields": str(inputs.kept_fields),
        "max_document_bytes": options.max_document_bytes,
        "rows_per_shard": options.rows_per_shard,
        "compression": options.compression,
        "max_rejected_fraction": options.max_rejected_fraction,
        "keep_snapshots": options.keep_snapshots,
    }
    return input_digest(inputs.patterns, settings, started, inputs.output)


def _sample(options: EmbedOptions) -> str:
    """Returns the path of the sample corpus, where the workers can read it."""
    path = write_sample(cache_folder())
    if dataflow.is_dataflow(options.runner):
        return upload_once(path, storage.join(dataflow.upload_folder(options.beam_options), "sample"))
    return str(path)


def _versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages; of ours where it is installed, not a mere checkout."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def describe_encoder(checkpoint: str, max_tokens: int | None) -> dict[str, Any]:
    """Returns what a manifest says about a checkpoint's encoder; dtype and device are known only to the workers."""
    return {"checkpoint": checkpoint, **describe_checkpoint(checkpoint, max_tokens)._asdict()}


def _latest(output: str, is_full: bool) -> Snapshot | None:
    """Returns the last snapshot; None where there is none, or where it is damaged and a full run does without it."""
    try:
        latest = read_latest(output)
    except DamagedSnapshotError:
        if is_full:
            return None
        raise
    if latest is not None and not is_full:
        check_shards(latest)
    return latest


def _described(options: EmbedOptions) -> dict[str, Any]:
    described = dict(vars(options))
    del described["beam_options"]  # They can hold credentials.
    return described


def _worker_processes(beam_options: Sequence[str]) -> int | None:
    """Returns how many processes the in-process runner starts: None where none, 0 where one for each core."""
    direct = PipelineOptions(list(beam_options)).view_as(DirectOptions)
    return direct.direct_num_workers if direct.direct_running_mode == "multi_processing" else None


def _check_imports_of_processes() -> None:
    """Raises ValueError where worker processes would import other packages than these.

    Beam starts them with `python -m`, which looks into the current folder first, unless it is told not to and is Python
    3.11 or later.
    """
    if sys.version_info >= (3, 11) and os.environ.get("PYTHONSAFEPATH"):
        return
    for own in Path(__file__).parent, Path(storage.__file__).parent:
        for found in Path.cwd() / own.name, Path.cwd() / f"{own.name}.py":
            if found.exists() and not found.samefile(own):
                raise ValueError(
                    f"worker processes would import {found} in place of this program's {own.name}: run it from another "
                    "folder, or with PYTHONSAFEPATH=1 on Python 3.11 or later"
                )


def _threads_per_process(options: EmbedOptions) -> int | None:
    """Returns how many threads each local worker process computes with; without it, each would use every core."""
    processes = _worker_processes(options.beam_options)
    if processes is None or processes == 1:
        return None
    cores = os.cpu_count() or 1
    return max(1, cores // (processes or cores))


def _run_pipeline(job: Job, session: FlinkSession | None = None) -> None:
    options = PipelineOptions(list(job.beam_options))
    pipeline = beam.Pipeline(options=options) if session is None else session.pipeline()
    build(pipeline, job)
    try:
        with quiet_beam(), session or nullcontext():
            state = wait(pipeline.run())
    except Exception as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        if not is_published(job.run.output, job.run.name):
            check_not_overtaken(job.run.output, job.run.token)
        message = root_cause(error)
        if session is not None and session.log.exists():
            message += f"; the job server's log is {session.log}"
        raise JobError(message) from error
    if state not in (None, "DONE"):
        raise JobError(f"the runner says the job ended {state}")


def _outcome(run: Run) -> dict[str, Any]:
    """Returns the manifest of a run, published or not."""
    for name in (MANIFEST_FILE, REPORT_FILE):
        found = storage.read_versioned(f"{run.folder}/{name}")
        if found is not None:
            return json.loads(found.data)
    raise JobError(f"the job ended without {MANIFEST_FILE} or {REPORT_FILE} in {run.folder}")
