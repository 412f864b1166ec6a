"""Shows a job without running it: the runner's options, and which step runs on what; no input or network is asked."""

import json
import shlex
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions, TestOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner
from apache_beam.transforms.resources import AcceleratorHint, MinRamHint

from pipeline import dataflow
from pipeline.dataflow_machines import encoder_hints
from pipeline.graph import Job, build
from pipeline.options import EmbedOptions
from pipeline.runners import beam_name
from pipeline.sample import KEPT_FIELDS
from transforms.fields import parse_kept_fields
from transforms.files import absolute_pattern
from transforms.inputs import DEFAULT_ID_FIELD, DEFAULT_TEXT_FIELD
from transforms.read import ReadDocuments
from transforms.reconcile import Run
from transforms.schema import output_schema
from transforms.snapshots import LatestVersion

_SAMPLE = "the sample corpus"
_UNKNOWN = "unknown before the run"

_HINTS = {AcceleratorHint.urn: "accelerator", MinRamHint.urn: "min_ram_bytes"}


def describe_job(options: EmbedOptions, packed: Sequence[str]) -> str:
    """Returns what a run with these options would give to its runner, as text for a person.

    Args:
      options: as they were given and completed.
      packed: Beam's among them, with what they pack in a place where packing may leave files behind.

    The input, the checkpoint and the output are not looked at, so what a run learns from them is not in it: types of
    kept fields, the last snapshot, saved work.
    """
    beam_options = PipelineOptions(list(packed))
    beam_options.view_as(TestOptions).dry_run = True  # Dataflow's runner then submits nothing.
    beam_options.view_as(SetupOptions).prebuild_sdk_container_engine = None  # It would build the image all the same.
    pipeline = beam.Pipeline(options=beam_options)
    build(pipeline, _job(options))
    lines = ["Options of Beam", *(f"  {option}" for option in _paired(options.beam_options)), ""]
    lines += ["Reads", *(f"  {pattern}" for pattern in options.input or [_sample(options)]), ""]
    lines += ["Writes", f"  {options.output}", ""]
    if dataflow.is_dataflow(options.runner):
        runner: Any = pipeline.runner
        pipeline.run()
        proto = runner.proto_pipeline
        packages, request = _request(runner)
        lines += ["Job for Dataflow", *_facts(runner, packages, request), ""]
        lines += ["Environment in the request", *textwrap.indent(json.dumps(request, indent=2), "  ").split("\n"), ""]
    else:
        proto = pipeline.to_runner_api()
    lines += ["Steps", *(f"  {step}" for step in _steps(proto))]
    return "\n".join(lines)


def _paired(beam_options: Sequence[str]) -> Iterator[str]:
    """Yields options as a shell takes them, a value beside its name."""
    words = list(beam_options)
    while words:
        count = 2 if len(words) > 1 and "=" not in words[0] and not words[1].startswith("--") else 1
        yield shlex.join(words[:count])
        del words[:count]


def _sample(options: EmbedOptions) -> str:
    if not dataflow.is_dataflow(options.runner):
        return _SAMPLE
    return f"{_SAMPLE}, uploaded below {dataflow.upload_folder(options.beam_options)}/sample"


def _job(options: EmbedOptions) -> Job:
    kept = parse_kept_fields(options.keep_fields or (() if options.input else KEPT_FIELDS))
    kept_fields = pa.schema([(field.name, field.type or pa.string()) for field in kept])
    run = Run(
        output=options.output,
        name=_UNKNOWN,
        token=LatestVersion(None, 0),
        started=time.time(),
        created=_UNKNOWN,
        runner=beam_name(options.runner),
        encoder={"fingerprint": _UNKNOWN},
        versions={},
        options={},
        max_rejected_fraction=options.max_rejected_fraction,
    )
    return Job(
        run=run,
        read=ReadDocuments(
            [absolute_pattern(pattern) for pattern in options.input or [_SAMPLE]],
            options.input_format,
            options.text_field or (DEFAULT_TEXT_FIELD,),
            options.id_field or DEFAULT_ID_FIELD,
            kept_fields,
            options.max_document_bytes,
        ),
        schema=output_schema(kept_fields, {}),
        rows_per_shard=options.rows_per_shard,
        compression=options.compression,
        checkpoint=options.checkpoint,
        max_tokens=options.max_tokens,
        device=options.device,
        dtype=options.dtype,
        max_batch_tokens=options.max_batch_tokens,
        num_threads=None,
        previous_shards=[],
        previous_encoder=None,
        unfinished=[],
        beam_options=options.beam_options,
        encoder_hints=encoder_hints(options.gpu, options.gpu_everywhere),
    )


def _request(runner: DataflowRunner) -> tuple[list[str], dict[str, Any]]:
    """Returns the names of what is staged, and the job's environment as the service gets it, but for Beam's options."""
    # Only here, because it loads Google's client of the service.
    from apache_beam.runners.dataflow.internal.apiclient import Environment

    job, proto = runner.job, runner.proto_pipeline
    environments = proto.components.environments.values()
    packages = sorted({_staged_name(artifact) for environment in environments for artifact in environment.dependencies})
    message = Environment(packages, job.options, "8", "pipeline.pb", proto).proto
    request = json.loads(
        type(message).to_json(message, use_integers_for_enums=False, always_print_fields_with_no_presence=False)
    )
    del request["sdkPipelineOptions"]
    return packages, request


def _facts(runner: DataflowRunner, packages: Sequence[str], request: Mapping[str, Any]) -> Iterator[str]:
    """Yields what most people want to know of a job: its machines, their image, and what they get."""
    job = runner.job
    pool = request["workerPools"][0]
    google = job.google_cloud_options
    images = sorted({image["containerImage"] for image in pool["sdkHarnessContainerImages"]})
    facts: Mapping[str, object] = {
        "name": job.proto.name,
        "project": google.project,
        "region": google.region,
        "temporary files": google.temp_location,
        "container image": ", ".join(images),
        "packages": ", ".join(packages) or "none: the image holds all",
        "machine type": pool.get("machineType", "Dataflow's choice"),
        "disk in GB": pool.get("diskSizeGb", "Dataflow's choice"),
        "most workers": pool["autoscalingSettings"].get("maxNumWorkers", "Dataflow's choice"),
        "service options": ", ".join(request.get("serviceOptions", [])) or "none",
        "experiments": ", ".join(request["experiments"]),
    }
    for name, value in facts.items():
        yield f"  {name:<18}{value}"


def _staged_name(artifact: beam_runner_api_pb2.ArtifactInformation) -> str:
    return beam_runner_api_pb2.ArtifactStagingToRolePayload.FromString(artifact.role_payload).staged_name


def _steps(proto: beam_runner_api_pb2.Pipeline) -> Iterator[str]:
    """Yields the steps, two levels deep, each with what it asks of its machines."""
    transforms = proto.components.transforms
    for root in (name for top in proto.root_transform_ids for name in transforms[top].subtransforms or [top]):
        yield from _described_step(proto, root)
        for child in transforms[root].subtransforms:
            yield from (f"  {line}" for line in _described_step(proto, child))


def _described_step(proto: beam_runner_api_pb2.Pipeline, name: str) -> Iterator[str]:
    transform = proto.components.transforms[name]
    asked = {_hints_of(proto, leaf) for leaf in _leaves(proto, name)}
    title = transform.unique_name.rpartition("/")[2]
    if transform.spec.urn == common_urns.primitives.FLATTEN.urn:
        return
    yield f"{title}  [{asked.pop()}]" if len(asked) == 1 and asked != {""} else title


def _leaves(proto: beam_runner_api_pb2.Pipeline, name: str) -> Iterator[str]:
    children = proto.components.transforms[name].subtransforms
    if not children:
        yield name
    for child in children:
        yield from _leaves(proto, child)


def _hints_of(proto: beam_runner_api_pb2.Pipeline, name: str) -> str:
    environment = proto.components.environments[proto.components.transforms[name].environment_id]
    hints = sorted(environment.resource_hints.items())
    return ", ".join(f"{_HINTS.get(urn, urn)} {value.decode()}" for urn, value in hints)
