"""What a person is told of a job that failed; the errors are made by Beam itself, or as its other runners send them."""

import logging
from urllib.error import URLError

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability import prism_runner

from pipeline.job_errors import quiet_beam, root_cause, was_interrupted
from pipeline.runners import PRISM
from transforms.shards import DamagedSnapshotError

HINT = "--traceback before the command shows where in the code"


def error_of_a_job(raised: BaseException) -> BaseException:
    """Returns what Beam makes of an error in a step."""

    def step(_):
        raise raised

    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"]))
    _ = pipeline | beam.Create([1], reshuffle=False) | "Step" >> beam.Map(step)
    with quiet_beam(), pytest.raises((type(raised), RuntimeError)) as caught:
        pipeline.run()
    return caught.value


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (RuntimeError("no more"), f"no more (in step Step; {HINT})"),
        (ValueError("one\n\n  two"), f"one\n\n  two (in step Step; {HINT})"),
        (OSError(28, "No space left on device"), f"OSError: [Errno 28] No space left on device (in step Step; {HINT})"),
        (MemoryError(), f"MemoryError (in step Step; {HINT})"),
        (KeyError("x"), f'KeyError: "x" (in step Step; {HINT})'),
        (
            DamagedSnapshotError("a/b.parquet", "is missing"),
            "a/b.parquet is missing: the snapshot is damaged. Restore the file, or run embed with --full, which "
            "encodes everything anew without it",
        ),
    ],
)
def test_an_error_in_a_step_is_told_without_its_traceback(raised, told, capfd, caplog):
    assert root_cause(error_of_a_job(raised)) == told
    assert capfd.readouterr().err == ""
    assert caplog.records == []


def broken_call(status: str, details: str, after: str = "") -> RuntimeError:
    told = f'\tstatus = StatusCode.{status}\n\tdetails = "{details}"\n'
    return RuntimeError(f"<_MultiThreadedRendezvous of RPC that terminated with:\n{told}>{after}")


@pytest.mark.parametrize(
    ("status", "details"),
    [("UNAVAILABLE", "Stream removed (Socket closed)"), ("DEADLINE_EXCEEDED", "Stream removed (Deadline Exceeded)")],
)
def test_a_runner_whose_process_is_gone_is_told_in_a_line(status, details):
    assert root_cause(broken_call(status, details)) == (
        f"the runner's own process no longer answers ({details}): it was killed, or ran out of memory, say"
    )


def test_a_runner_that_refuses_and_a_step_that_was_hung_up_on_are_told_as_they_are():
    assert 'details = "Unknown option --foo"' in root_cause(broken_call("INVALID_ARGUMENT", "Unknown option --foo"))
    of_step = broken_call("UNAVAILABLE", "Stream removed (Socket closed)", " [while running 'Step']")
    assert root_cause(of_step).endswith(f"(in step Step; {HINT})")


def test_an_error_outside_of_any_step_is_told_as_it_is():
    assert root_cause(OSError("no route to host")) == "OSError: no route to host"
    assert root_cause(RuntimeError("the job server is gone")) == "the job server is gone"


WORKERS_TEXT = """\
Traceback (most recent call last):
  File "transforms/write.py", line 3, in first
    first()
KeyError: 'first'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "transforms/write.py", line 218, in _write
    file.write(chunk)
    ^^^^^^^^^^^^^^^^^
{}: it is full
  of bees [while running 'Write/Shard-ptransform-12']
"""


@pytest.mark.parametrize("after", ["", "\n\tat org.apache.beam.sdk.Harness.run(Harness.java:1)\nCaused by: so and so"])
def test_an_error_of_another_process_is_told_from_its_traceback(after):
    told = f"it is full\n  of bees (in step Write/Shard-ptransform-12; {HINT})"
    assert root_cause(RuntimeError(WORKERS_TEXT.format("RuntimeError") + after)) == told
    assert root_cause(RuntimeError(WORKERS_TEXT.format("IOError") + after)) == f"IOError: {told}"
    own = WORKERS_TEXT.format("transforms.snapshots.SnapshotError")
    assert root_cause(RuntimeError(own + after)) == "it is full\n  of bees"


FLINKS_TEXT = "Pipeline embed-corpus-1_8e5f failed in state FAILED: "
"""How Beam begins what Flink says."""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("org.apache.flink.util.FlinkException: no more", "org.apache.flink.util.FlinkException: no more"),
        (
            "java.net.ConnectException: java.net.ConnectException: finishConnect(..) failed: Connection refused",
            "java.net.ConnectException: finishConnect(..) failed: Connection refused (a TaskManager found no worker "
            "pool at --environment_config)",
        ),
        (
            "io.grpc.StatusRuntimeException: io.grpc.StatusRuntimeException: CANCELLED: client cancelled",
            "io.grpc.StatusRuntimeException: CANCELLED: client cancelled (a worker process has died, killed or out of "
            "memory say)",
        ),
        (
            "java.io.IOException: Insufficient number of network buffers: required 512, but only 450 available",
            "java.io.IOException: Insufficient number of network buffers: required 512, but only 450 available (raise "
            "taskmanager.memory.network.min and .max on the cluster, to 256m say, or give a lower --parallelism)",
        ),
        (
            "org.apache.flink.util.FlinkExpectedException: The TaskExecutor is shutting down.",
            "org.apache.flink.util.FlinkExpectedException: The TaskExecutor is shutting down. (a TaskManager was "
            "stopped, or ended itself, out of memory say; its log, of an embedded Flink the job server's, tells why)",
        ),
        (f"java.lang.RuntimeException: Error received from SDK harness for instruction 5: {WORKERS_TEXT}", None),
    ],
)
def test_an_error_of_flinks_is_told_once_with_its_remedy(said, told):
    step = f"it is full\n  of bees (in step Write/Shard-ptransform-12; {HINT})"
    assert root_cause(RuntimeError(FLINKS_TEXT + said.format("RuntimeError"))) == (told or step)


def test_what_a_job_server_says_of_itself_is_not_repeated(caplog):
    logger = logging.getLogger("apache_beam.utils.subprocess_server")
    with quiet_beam():
        logger.warning("Really starting service at localhost:1 with cmd: java")
        logger.warning("Error bringing up service (attempt 1 of 3): no")
        logging.error("java.lang.IllegalStateException: SDK harness closed connection")
        logging.error("something else")
    assert [record.getMessage() for record in caplog.records] == [
        "Error bringing up service (attempt 1 of 3): no",
        "something else",
    ]


def test_an_interrupt_is_known_through_what_beam_makes_of_it():
    error = error_of_a_job(KeyboardInterrupt())
    assert not isinstance(error, KeyboardInterrupt)
    assert was_interrupted(error)
    assert not was_interrupted(error_of_a_job(ValueError("no interrupt")))


def test_beams_other_messages_are_let_through(caplog):
    logger = logging.getLogger("apache_beam.runners.common")
    with quiet_beam():
        logger.error("news")
        logger.warning("a warning [while running 'Step']")
        logger.error("an error [while running 'Step']")
    logger.error("another error [while running 'Step']")
    assert [record.getMessage() for record in caplog.records] == [
        "news",
        "a warning [while running 'Step']",
        "another error [while running 'Step']",
    ]


def test_a_prism_that_cannot_be_downloaded_can_be_built(tmp_path, monkeypatch):
    def refuse(url):
        raise URLError("Name or service not known")

    monkeypatch.setattr(prism_runner, "urlopen", refuse)
    monkeypatch.setattr(prism_runner.PrismJobServer, "BIN_CACHE", str(tmp_path))
    server = prism_runner.PrismJobServer(PipelineOptions([]))
    with pytest.raises(RuntimeError) as caught:
        server.local_bin(server.path_to_binary())
    told = root_cause(caught.value)
    assert told.startswith("Unable to fetch remote prism binary at https://github.com/apache/beam/releases/download/v")
    assert "<urlopen error Name or service not known>: give --prism_location=FILE; or build it where Go is" in told
    assert told.endswith(
        f"GOBIN={PRISM.parent} go install github.com/apache/beam/sdks/v2/go/cmd/prism@v{beam.__version__}"
    )
