"""Short names of runners, and Beam's own."""

import pytest
from apache_beam.options.pipeline_options import PipelineOptions, PrismRunnerOptions

from pipeline import runners
from pipeline.options import parse
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


@pytest.fixture
def built_prism(tmp_path, monkeypatch):
    """A file in the place of a Prism that was built."""
    prism = tmp_path / "prism"
    prism.touch()
    monkeypatch.setattr(runners, "PRISM", prism)
    return prism


@pytest.mark.parametrize("runner", ["prism", "PrismRunner", "DirectRunner", "direct"])
def test_prism_is_the_one_that_was_built_so_that_beam_downloads_none(runner, built_prism):
    assert runner_options(runner)[1:] == [f"--prism_location={built_prism}"]
    built_prism.unlink()
    assert runner_options(runner)[1:] == []


@pytest.mark.parametrize("runner", ["local", "flink", "dataflow"])
def test_other_runners_are_told_nothing_of_prism(runner, built_prism):
    assert "--prism" not in " ".join(runner_options(runner))


def test_a_prism_that_is_named_counts_before_the_one_that_was_built(built_prism):
    options = parse(["--runner=prism", "--prism_location=/elsewhere/prism"])
    named = PipelineOptions(list(options.beam_options)).view_as(PrismRunnerOptions)
    assert named.prism_location == "/elsewhere/prism"
