"""What Ctrl-C does to a job on Flink, where no cluster is asked."""

from types import SimpleNamespace

import pytest

from pipeline.flink_session import FlinkSession


@pytest.mark.parametrize(
    ("options", "is_asked", "told"),
    [
        # It ends with its job server.
        ([], False, ""),
        (
            ["--job_endpoint=localhost:1"],
            True,
            "the job server was asked to cancel job nightly, but may let it run on: look for it on Flink's page; with "
            "--flink_master beside --job_endpoint it is cancelled there\n",
        ),
    ],
)
def test_an_interrupt_says_what_may_go_on(capsys, options, is_asked, told):
    asked = []
    session = FlinkSession(["--runner=FlinkRunner", "--job_name=nightly", *options])
    session._runner.result = SimpleNamespace(cancel=lambda: asked.append(True))
    with pytest.raises(KeyboardInterrupt), session:
        raise KeyboardInterrupt
    assert bool(asked) == is_asked
    assert capsys.readouterr().err == told
    assert session.is_over() == (not is_asked)
