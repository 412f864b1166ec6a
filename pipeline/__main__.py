"""Dispatches the commands; kept short, because Beam pickles what `__main__` defines by value."""

import argparse
import atexit
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from pipeline.option_types import UsageError

COMMANDS = {
    "embed": "embed a corpus and publish a snapshot",
    "search": "find the documents of a snapshot that are closest to a query",
    "inspect": "say what a snapshot holds",
    "train": "train the LSTM of a checkpoint",
    "evaluate": "score a checkpoint on pairs of sentences that people rated",
    "benchmark": "measure how fast this machine embeds",
    "schedule": "print what makes embed run on a schedule: cron, Cloud Scheduler, Airflow, Kubernetes",
    "sample": "write the sample corpus to a file",
}
"""Modules of this package and what each does."""

RUNNERS = {"local": "FnApiRunner", "prism": "prism", "flink": "flink", "dataflow": "dataflow"}
"""Words for `embed` with a runner: word to `--runner`."""

USER_ERRORS = (ValueError, OSError)
"""What a command raises about its input, beside the errors this project defines; all else is a bug, and shows where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the command and its options; those of this process where None.

    Returns:
      The exit status: 0 done; 1 failed, with a message; what else the command says.

    Raises:
      SystemExit: 2 for wrong usage, 0 after `--help`.
    """
    arguments = _parser().parse_args(argv)
    name, options = arguments.command, arguments.options
    if name in RUNNERS:
        name, options = "embed", [f"--runner={RUNNERS[name]}", *options]
    try:
        status = _run(name, options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output (`inspect | head`) has seen enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.traceback or not _is_for_users(error):
            raise
        sys.stderr.write(f"error: {error}\n")  # At once: other threads may be writing what they failed of.
        return 1
    except KeyboardInterrupt as interrupt:
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    return status


def _is_for_users(error: Exception) -> bool:
    return isinstance(error, USER_ERRORS) or type(error).__module__.partition(".")[0] in ("pipeline", "transforms")


def _run(name: str, options: list[str]) -> int:
    # Modules are imported only when they are needed, so that help and mistakes are answered soon.
    if name == "embed":  # It takes the options of Beam's runners too; PyTorch and the job are loaded after them.
        parsed = import_module("pipeline.options").parse(options)
        return import_module("pipeline.embed").embed(parsed)
    module = import_module(f"pipeline.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline {name}",
        description=module.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    arguments = parser.parse_args(options)
    try:
        return module.run(arguments)
    except UsageError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, (*COMMANDS, *RUNNERS)))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    lines += [f"  {word:{width}}  embed --runner={runner}" for word, runner in RUNNERS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Embeds a text corpus, and re-embeds only what changed.",
        epilog="commands (each has a --help of its own):\n" + "\n".join(lines),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="where a command fails, show where in the code")
    parser.add_argument("command", choices=(*COMMANDS, *RUNNERS), metavar="COMMAND", help="one of those below")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="its options")
    return parser


def run_and_leave() -> None:
    """Runs the command of this process, and ends it.

    Where it failed or was interrupted, threads of the job may still compute with what Python takes apart at its end,
    and the process would be aborted in place of ending with its status.
    """
    status = 0

    def leave() -> None:
        if status:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    atexit.register(leave)  # The first to be registered is the last to be called.
    status = main()
    sys.exit(status)


if __name__ == "__main__":
    run_and_leave()
