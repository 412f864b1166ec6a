"""What a person is told of a job that failed: its root cause, once, without what Beam puts around it."""

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.runners import PRISM, PRISM_PACKAGE

_STEP = re.compile(r" ?\[while running '([^']*)'\]")
"""What Beam puts into the message of a step's error."""

_TRACEBACK = "Traceback (most recent call last):\n"

_OWN_TYPE = re.compile(r"^(transforms|pipeline)\.[\w.]+: ")
"""How an error starts that this project raises: its message says all there is to say."""

_MERE_TYPE = re.compile(r"^((RuntimeError|ValueError): )+")
"""Types that add nothing to a message; Beam turns what it cannot copy into a RuntimeError."""

_NO_PRISM = "Unable to fetch remote prism binary"

_PRISM_REMEDY = (
    "give --prism_location=FILE; or build it where Go is, and it is found from then on: "
    f"GOBIN={PRISM.parent} go install {PRISM_PACKAGE}"
)

# Of these loggers, see `quiet_beam`.
_LOGGERS = (
    "",
    "apache_beam.runners.common",
    "apache_beam.runners.portability.local_job_service",
    "apache_beam.runners.portability.stager",
    "apache_beam.runners.worker.data_plane",
    "apache_beam.utils.subprocess_server",
)
_LOGGED_AND_RAISED = ("[while running '", "[while running \\'", "Error processing instruction")
_BESIDE_THE_POINT = (
    "No semi_persistent_directory found",  # Of every worker process on this machine.
    "Couldn't stage a list of installed dependencies",  # Nothing but a list for people to read.
    # A job server starts and ends.
    "Really starting service",
    "Really destroying service",
    "Waiting for grpc channel to be ready",
    "Failed to read inputs in the data plane",  # The other side hangs up when it is done.
)
_STATE = re.compile(r"^Pipeline \S+ failed in state [A-Z]+: ")
"""What Beam puts before the message of a runner in another process."""

_REPEATED_TYPE = re.compile(r"^([\w.$]+: )\1+")
"""Java puts the type of an error before it once for each error it passed through."""

_REMEDIES = {
    "Insufficient number of network buffers": "raise taskmanager.memory.network.min and .max on the cluster, to 256m "
    "say, or give a lower --parallelism",
    "Timeout has occurred: 300000 ms": "the cluster had fewer free slots than --parallelism for five minutes",
    "java.net.ConnectException": "a TaskManager found no worker pool at --environment_config",
    "CANCELLED: client cancelled": "a worker process has died, killed or out of memory say",
    "SDK harness closed connection": "a worker process has died, killed or out of memory say",
    "JobCancellationException": "on Flink's page, or with its command; the next run takes up what was encoded",
    "TaskExecutor is shutting down": "a TaskManager was stopped, or ended itself, out of memory say; its log, of an "
    "embedded Flink the job server's, tells why",
}
"""What to do about errors of Flink's that do not say it."""

_HUNG_UP = re.compile(r'RPC that terminated with:\s*status = StatusCode\.\w+\s*details = "(Stream removed [^"]*)"')
"""How an error reads where the process of a runner, Prism or a job server, is gone."""

_JAVA = re.compile(r"^(java|javax|org\.apache)\.[\w.$]+: ")
"""How an error starts that came from a runner in Java: it is raised as well."""


def root_cause(error: BaseException) -> str:
    """Returns what went wrong in a step and in which one, given the error that Beam ended the job with.

    Args:
      error: the step's own one, changed by Beam, or one that holds the text of another process's traceback.
    """
    text = str(error)
    if _TRACEBACK in text:
        text = _message_of(text.rpartition(_TRACEBACK)[2])
    else:
        text = "".join(traceback.format_exception_only(error)).strip()
    step = _STEP.search(text)
    text = _STEP.sub("", text)
    if _OWN_TYPE.match(text):
        return _OWN_TYPE.sub("", text)
    text = _REPEATED_TYPE.sub(r"\1", _STATE.sub("", _MERE_TYPE.sub("", text)))
    for words, remedy in _REMEDIES.items():
        if words in text:
            return f"{text} ({remedy})"
    if step is None and (hung_up := _HUNG_UP.search(text)):
        return f"the runner's own process no longer answers ({hung_up[1]}): it was killed, or ran out of memory, say"
    if _NO_PRISM in text:
        return f"{text}: {_PRISM_REMEDY}"
    return f"{text} (in step {step[1]}; --traceback before the command shows where in the code)" if step else text


def _message_of(trace: str) -> str:
    """Returns the type and the message that a traceback ends with; Java's own trace may follow it."""
    lines = trace.split("\n")
    while len(lines) > 1 and lines[0].startswith("  "):
        del lines[0]
    end = next((place for place, line in enumerate(lines) if not line.strip() or line.startswith("\t")), len(lines))
    return "\n".join(lines[:end])


def was_interrupted(error: BaseException | None) -> bool:
    """Returns whether Ctrl-C is behind an error: Beam makes another one of it where it hits a step."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def quiet_beam() -> Iterator[None]:
    """Keeps Beam from logging the tracebacks of errors that it raises as well."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if any(part in message for part in _BESIDE_THE_POINT) or (record.name == "root" and _JAVA.match(message)):
        return False
    return not (record.levelno >= logging.ERROR and any(part in message for part in _LOGGED_AND_RAISED))
