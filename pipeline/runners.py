"""The Beam options that each runner needs, from the options a person gives; pure functions."""

from pathlib import Path

import apache_beam
from apache_beam.options.pipeline_options import StandardOptions

RUNNERS = {
    "local": "FnApiRunner",
    "fnapirunner": "FnApiRunner",
    "prism": "PrismRunner",
    "flink": "FlinkRunner",
    "dataflow": "DataflowRunner",
}
"""Short names of runners; Beam knows others by its own names."""

PRISM = Path(__file__).resolve().parent.parent / ".cache" / f"prism-{apache_beam.__version__}" / "prism"
"""Where a Prism that was built is looked for: the engine of Beam's own, of the same version."""

PRISM_PACKAGE = f"github.com/apache/beam/sdks/v2/go/cmd/prism@v{apache_beam.__version__}"
"""What `go install` makes it of."""


def beam_name(runner: str) -> str:
    """Returns Beam's name of a runner."""
    return RUNNERS.get(runner.lower(), runner)


def runner_options(runner: str) -> list[str]:
    """Returns Beam's options for a runner.

    Args:
      runner: a short name of `RUNNERS` or a name that Beam knows. Beam's own DirectRunner becomes another engine where
        there is a network, so `local` names the in-process one.

    Raises:
      ValueError: nobody knows the runner.
    """
    name = beam_name(runner)
    known = [known.lower() for known in StandardOptions.KNOWN_RUNNER_NAMES]
    # Beam takes its names in any case and without `Runner`, and any class by its full name.
    if "." not in name and name.lower() not in known and f"{name.lower()}runner" not in known:
        raise ValueError(
            f"no runner is called {runner!r}: take {', '.join(RUNNERS)}, or of Beam's own "
            f"{', '.join(StandardOptions.KNOWN_RUNNER_NAMES)}"
        )
    options = [f"--runner={name}"]
    # Without it, Beam downloads Prism from GitHub, and waits for as long as that takes.
    if _may_be_prism(name) and PRISM.is_file():
        options.append(f"--prism_location={PRISM}")
    return options


def _may_be_prism(name: str) -> bool:
    """Returns whether a runner is Prism, or becomes Prism where Beam finds it, as DirectRunner does."""
    return name.rpartition(".")[2].lower().removesuffix("runner") in ("prism", "direct", "switchingdirect")


def is_in_process(runner: str) -> bool:
    """Returns whether a runner computes in this very process, so that it can be watched from here."""
    return beam_name(runner) == RUNNERS["local"]
