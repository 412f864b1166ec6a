"""Short names of runners, and Beam's own."""

import pytest

from pipeline.runners import RUNNERS, is_in_process, runner_options


@pytest.mark.parametrize(
    ("runner", "beam_name"),
    [
        ("local", "FnApiRunner"),
        ("FnApiRunner", "FnApiRunner"),
        ("prism", "PrismRunner"),
        ("flink", "FlinkRunner"),
        ("Flink", "FlinkRunner"),
        ("FlinkRunner", "FlinkRunner"),
        ("dataflow", "DataflowRunner"),
        ("DirectRunner", "DirectRunner"),
        ("spark", "spark"),
        ("my.package.OwnRunner", "my.package.OwnRunner"),
    ],
)
def test_a_runners_name_becomes_beams(runner, beam_name):
    assert f"--runner={beam_name}" in runner_options(runner)


def test_local_is_never_an_engine_that_depends_on_the_network():
    """Beam's DirectRunner is Prism where it can be downloaded, and another one elsewhere."""
    assert runner_options("local") == ["--runner=FnApiRunner"]


@pytest.mark.parametrize("runner", ["floink", "", "locale"])
def test_a_runner_that_nobody_knows_is_refused(runner):
    with pytest.raises(ValueError, match=f"no runner is called '{runner}': take {', '.join(RUNNERS)}, or of Beam's"):
        runner_options(runner)


def test_only_the_local_runner_can_be_watched_from_here():
    assert [name for name in [*RUNNERS, "DirectRunner", "Local"] if is_in_process(name)] == [
        "local",
        "fnapirunner",
        "Local",
    ]
