"""Runs a job on Dataflow: uploads what its workers read, waits for it, cancels it, and says why it failed."""

import sys
from contextlib import suppress
from pathlib import Path

from apache_beam.options.pipeline_options import GoogleCloudOptions
from apache_beam.runners.dataflow.dataflow_runner import DataflowPipelineResult, DataflowRuntimeException
from apache_beam.runners.runner import PipelineResult

from pipeline.job_errors import root_cause
from transforms import storage
from transforms.checkpoint import sha256_of


class DataflowJobError(Exception):
    """A job ended otherwise than done."""


def upload_once(path: Path, folder: str) -> str:
    """Uploads a small file of this machine under a name of its content, unless it is there already.

    Args:
      path: the file.
      folder: on gs://.

    Returns:
      Where it is.
    """
    url = upload_url(path, folder)
    if storage.read_versioned(url) is None:
        with suppress(storage.ConflictError):  # Another run was faster, with the same content.
            storage.create_exclusively(url, path.read_bytes())
    return url


def upload_url(path: Path, folder: str) -> str:
    """Returns where `upload_once` puts a file."""
    return storage.join(folder, f"sha256-{sha256_of(path)[:16]}", path.name)


def wait(result: PipelineResult) -> str:
    """Waits for a job on any runner, and returns the state in which it ended.

    Where this process is interrupted, a job on Dataflow is cancelled; where it is killed, the job goes on. What was
    staged for a job on Dataflow is removed when it is done, and kept where it failed, for whoever looks for the reason.

    Raises:
      DataflowJobError: the job on Dataflow failed or was cancelled.
      KeyboardInterrupt: somebody interrupted it.
    """
    if not isinstance(result, DataflowPipelineResult) or not result.has_job:
        return result.wait_until_finish()
    console = console_url(result)
    print(f"Dataflow job {result.job_id()} was started; ending this program by Ctrl-C cancels it\n  {console}")
    sys.stdout.flush()
    try:
        state = result.wait_until_finish()
    except KeyboardInterrupt:
        print(f"cancelling Dataflow job {result.job_id()}", file=sys.stderr)
        result.cancel()
        raise
    except DataflowRuntimeException as error:
        raise DataflowJobError(
            f"Dataflow job {result.job_id()} ended {result.state}: {_cause(error)}; its logs are at {console}"
        ) from error
    if state == "DONE":
        try:
            _remove_staged(result._options.view_as(GoogleCloudOptions))
        except OSError as error:  # The job is done all the same.
            print(f"warning: what was staged for the job could not be removed: {error}", file=sys.stderr)
    return state


def _remove_staged(google: GoogleCloudOptions) -> None:
    """Removes the folders that Beam has made for this job alone, and that the options name once it is submitted."""
    for folder in google.staging_location, google.temp_location:
        if folder.rpartition("/")[2].startswith(f"{google.job_name}."):
            storage.delete_folder(folder)


def console_url(result: DataflowPipelineResult) -> str:
    """Returns the page of a job in Google Cloud's console."""
    google = result._options.view_as(GoogleCloudOptions)
    return f"https://console.cloud.google.com/dataflow/jobs/{google.region}/{result.job_id()}?project={google.project}"


def _cause(error: DataflowRuntimeException) -> str:
    """Returns what the service said last, which is a step's traceback where one failed."""
    said = str(error).partition("Error:\n")[2].strip()
    if not said or said == "None":
        return "it gave no reason"
    return root_cause(error) if "Traceback" in said else " ".join(said.split())
