"""The request that starts a Flex Template on Dataflow, from the options with which `embed` would be run."""

import os
from collections.abc import Mapping
from typing import Any

from pipeline import dataflow
from pipeline.options import EmbedOptions
from transforms.checkpoint import is_shipped

_ENVIRONMENT = {
    "autoscaling_algorithm": "autoscalingAlgorithm",
    "dataflow_kms_key": "kmsKeyName",
    "disk_size_gb": "diskSizeGb",
    "experiments": "additionalExperiments",
    "machine_type": "machineType",
    "max_num_workers": "maxWorkers",
    "network": "network",
    "num_workers": "numWorkers",
    "service_account_email": "serviceAccountEmail",
    "staging_location": "stagingLocation",
    "subnetwork": "subnetwork",
    "temp_location": "tempLocation",
    "worker_zone": "workerZone",
}
"""Options of Beam to fields of the request's environment."""

_PARAMETERS_OF_BEAM = ("dataflow_service_options", "sdk_container_image")
"""Options of Beam that are parameters of the template, beside all of ours but `_NO_PARAMETERS`."""

_NO_PARAMETERS = ("device", "dry_run", "skip_unchanged")

_NUMBERS = ("diskSizeGb", "maxWorkers", "numWorkers")

_AUTOSCALING_ALGORITHMS = {
    "NONE": "AUTOSCALING_ALGORITHM_NONE",
    "THROUGHPUT_BASED": "AUTOSCALING_ALGORITHM_BASIC",
}
"""Beam's names to the request's."""


def launch_request(
    given: Mapping[str, str | bool | list[str]], options: EmbedOptions, template: str, job_name: str
) -> dict[str, Any]:
    """Returns the body of Dataflow's request flexTemplates.launch.

    Args:
      given: options that were given, as `given_options` returned them.
      options: the same, as `parse` returned them.
      template: the template's file on gs://.
      job_name: Dataflow runs no two jobs of one name at once.

    Raises:
      ValueError: an option cannot be told to a template, or names a checkpoint or an input that its job would not find.
    """
    _check_checkpoint(str(given.get("checkpoint", options.checkpoint)))  # As it is sent.
    for path in options.input:
        if not path.startswith("gs://"):
            raise ValueError(
                f"--input {path!r} is not on gs://, from which alone the template reads: copy it there, or have "
                "launch.sh submit the job"
            )
    parameters: dict[str, str] = {"output": options.output}
    environment: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("runner", "project", "region", "bucket", "output"):
            continue  # The request's address, name, or what follows from the bucket.
        if name in _ENVIRONMENT:
            environment |= _environment(_ENVIRONMENT[name], value)
        elif name == "use_public_ips":
            environment["ipConfiguration"] = "WORKER_IP_PUBLIC" if value else "WORKER_IP_PRIVATE"
        elif name in _PARAMETERS_OF_BEAM or (name in vars(options) and name not in _NO_PARAMETERS):
            parameters |= _parameter(name, value, getattr(options, name, None))
        else:
            raise ValueError(f"--{name} cannot be told to a template: leave it out, or have launch.sh submit the job")
    if options.bucket is not None:
        folder = dataflow.bucket_folder(options.bucket)
        environment = {"tempLocation": f"{folder}/temp", "stagingLocation": f"{folder}/staging"} | environment
    launch = {"jobName": job_name, "containerSpecGcsPath": template, "parameters": parameters}
    return {"launchParameter": launch | ({"environment": environment} if environment else {})}


def _check_checkpoint(checkpoint: str) -> None:
    """Refuses a folder that only this machine can mean: an absolute one may be in the template's image."""
    if not (checkpoint.startswith("gs://") or os.path.isabs(checkpoint) or is_shipped(checkpoint)):
        raise ValueError(
            f"--checkpoint {checkpoint!r} is a folder of this machine, where a template's job cannot read it: copy it "
            "to gs:// and name it there, or name a folder of the template's image by its absolute path"
        )


def _environment(field: str, value: str | bool | list[str]) -> dict[str, Any]:
    """Returns a field of the request's environment, as its API takes it."""
    if field in _NUMBERS:
        return {field: int(str(value))}
    if field == "autoscalingAlgorithm":
        return {field: _AUTOSCALING_ALGORITHMS[str(value)]}
    return {field: value}


def _parameter(name: str, value: str | bool | list[str], parsed: object) -> dict[str, str]:
    """Returns a parameter as the template's metadata and deploy/flex_template/main.py take it; none for no value."""
    if isinstance(value, bool):
        return {name: str(value).lower()}
    if isinstance(parsed, int | float):
        return {name: str(parsed)}  # As Python writes numbers: 0.05 and 1000, where .05 and 1_000 were given.
    if isinstance(value, str):
        return {name: value}
    if name == "keep_fields":  # Commas part its own values too.
        fields = ",".join(filter(None, value))
        return {name: fields} if fields else {}
    for part in value:
        if "," in part:
            raise ValueError(f"--{name} {part!r} has a comma in it, which parts the values of a template's parameter")
    return {name: ",".join(value)}
