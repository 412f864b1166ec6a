"""The Beam options that each runner needs, from the options a person gives; pure functions."""

RUNNERS = {
    "local": "FnApiRunner",
    "fnapirunner": "FnApiRunner",
    "prism": "PrismRunner",
    "flink": "FlinkRunner",
    "dataflow": "DataflowRunner",
}
"""Short names of runners; Beam knows others by its own names."""


def runner_options(runner: str) -> list[str]:
    """Returns Beam's options for a runner.

    Args:
      runner: a short name of `RUNNERS` or a name that Beam knows. Beam's own DirectRunner becomes another engine where
        there is a network, so `local` names the in-process one.
    """
    return [f"--runner={RUNNERS.get(runner.lower(), runner)}"]


def is_in_process(runner: str) -> bool:
    """Returns whether a runner computes in this very process, so that it can be watched from here."""
    return RUNNERS.get(runner.lower(), runner) == RUNNERS["local"]
