"""Entries of every sort, each read back by a parser of its own kind, and run where that can be done here."""

import argparse
import base64
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cronsim import CronSim, CronSimError
from crontab import CronTab
from embed_runs import counts_of, latest, rows_of
from google.cloud.dataflow_v1beta3 import LaunchFlexTemplateRequest
from google.cloud.scheduler_v1 import HttpMethod, Job
from google.protobuf.json_format import ParseDict, ParseError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import schedule, schedule_entries, template_launch
from pipeline.__main__ import RUNNERS, main
from pipeline.cron_expression import check_cron
from pipeline.options import given_options, parse
from pipeline.schedule_entries import Machine, Schedule
from pipeline.template_launch import launch_request
from transforms.snapshots import list_published

ROOT = Path(__file__).parent.parent
DAILY = Schedule("embed-corpus", "15 3 * * *", "Europe/Zurich")
KUBERNETES = "1.30"

NASTY = [
    "a b", "100%", r"\%", "$HOME", "$(NAME)", "$$", "`date`", "it's", '"', "\\", "{{ ds }}", "{% raw %}", "{# x #}",
    "*", "~", "# no", "a;b", "&", "", "ü 東京", "run.sh", "--", "yes", "0x1", "'''", "- a: b", "1e-3", "08", "y",
]  # fmt: skip
"""Arguments that one or the other format could take for something else."""

CLOUD = ["dataflow", "--project=my-project", "--region=us-central1", "--bucket=my-bucket", "--input=gs://in/*.jsonl"]
TEMPLATE = ["--template=gs://my-bucket/templates/embed.json", "--service_account=caller@my-project.iam"]


def printed(capsys, *argv: str) -> str:
    """Runs `schedule`, which must succeed, and returns what it printed."""
    capsys.readouterr()
    assert main(["schedule", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refusal(capsys, *argv: str) -> str:
    """Runs `schedule`, which must be refused as wrong usage, and returns the message."""
    capsys.readouterr()
    status: Any = None
    try:
        status = main(["schedule", *argv])
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    return err.splitlines()[-1].partition("error: ")[2]


# --- cron expressions ---


def part(lowest: int, highest: int):
    number = st.integers(lowest, highest)
    ranges = st.tuples(number, number).map(sorted).map(lambda pair: f"{pair[0]}-{pair[1]}")
    steps = st.tuples(st.one_of(st.just("*"), ranges), st.integers(1, highest)).map(lambda pair: f"{pair[0]}/{pair[1]}")
    return st.one_of(number.map(str), ranges, steps)


def field(lowest: int, highest: int):
    return st.one_of(st.just("*"), st.lists(part(lowest, highest), min_size=1, max_size=3).map(",".join))


TODAY = datetime(2026, 11, 23)
EXPRESSIONS = st.tuples(field(0, 59), field(0, 23), field(1, 31), field(1, 12), field(0, 6)).map(" ".join)


@settings(deadline=None, max_examples=300)
@given(EXPRESSIONS)
@example("0 0 30 2 *")
@example("0 0 29 2 *")
@example("0 0 31 4,6,9,11 *")
@example("*/15 0-6/2 1,15 * *")
def test_a_checked_expression_is_one_to_a_cron_library_and_comes_true(expression):
    try:
        check_cron(expression)
        told = ""
    except ValueError as error:
        told = str(error)
    try:
        comes_true = next(CronSim(expression, TODAY)) > TODAY
    except (CronSimError, StopIteration):
        comes_true = False
    assert comes_true == ("never comes true" not in told)
    assert not told or not comes_true or "disagree" in told


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("0 3 * *", "has 4 fields, not 5"),
        ("0 3 * * * *", "has 6 fields, not 5"),
        ("", "has 0 fields, not 5"),
        ("@daily", "has 1 fields, not 5"),
        ("60 3 * * *", "'60' is no minute: it goes from 0 to 59"),
        ("0 24 * * *", "'24' is no hour: it goes from 0 to 23"),
        ("0 3 0 * *", "'0' is no day of the month: it goes from 1 to 31"),
        ("0 3 * 13 *", "'13' is no month: it goes from 1 to 12"),
        ("0 3 * * 7", "'7' is no day of the week: it goes from 0 to 6; Sunday is 0"),
        ("0 3 * * MON", "'MON' is no day of the week: write numbers from 0 to 6"),
        ("0 5-3 * * *", "'5-3' is no hour"),
        ("5/10 3 * * *", "'5/10' is no minute: write numbers"),
        ("*/0 3 * * *", "'*/0' is no minute: a step goes from 1 to 59"),
        ("0, 3 * * *", "'' is no minute"),
        ("٣ 3 * * *", "'٣' is no minute"),
        ("0 3 30 2 *", "never comes true: no such month has a day 30"),
        ("5,* 3 * * *", "'5,*': write * alone, as it holds every minute"),
        ("0 3 1,*/2 * 1", "schedulers disagree whether the day must fit '1,*/2' and '1' or one of them"),
        ("0 3 */2 * 1", "schedulers disagree whether the day must fit '*/2' and '1' or one of them"),
    ],
)
def test_an_expression_that_not_all_schedulers_take_is_refused(expression, told, capsys):
    assert told in refusal(capsys, f"--cron={expression}", "local")


# --- Options ---


def test_the_words_are_those_of_the_runners():
    assert set(schedule.WORDS) == set(RUNNERS)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["local", "--inptu=x"], "unknown option --inptu=x; did you mean --input?"),
        (["local", "--max_tokens=many"], "argument --max_tokens: 'many' is not a whole number"),
        (["local", "--bucket=b"], "--bucket is for Dataflow"),
        (["dataflow", "--project=p", "--input=gs://a/b"], "Dataflow needs --region and --bucket"),
        (["spark"], "argument WORD: invalid choice: 'spark'"),
        (["local", "--dry_run"], "--dry_run shows the job and runs nothing"),
        ([*CLOUD, "--template_location=gs://b/t"], "--template_location shows the job and runs nothing"),
        (["local", "--format", "cron"], "--format is an option of the schedule itself: write it before the word"),
        ([*CLOUD, "--gpu=nvidia-l4", "--device=cpu"], "--gpu and --device=cpu contradict each other"),
        (["--timezone=Mars/Phobos", "local"], "'Mars/Phobos' is no time zone"),
        (["--timezone=../x", "local"], "'../x' is no time zone"),
        (["--name=Nightly", "local"], "'Nightly' is no name that all take"),
        (["--volume=/data", "local"], "'/data' is no CLAIM:/FOLDER"),
        (["--memory=lots", "local"], "'lots' is no quantity of Kubernetes"),
        (["--template=t.json", "local"], "'t.json' is no gs://BUCKET/FILE"),
        (["--format=cloud-scheduler", "local"], "it starts a Flex Template on Dataflow"),
        (["--format=cloud-scheduler", *CLOUD], "it starts a Flex Template on Dataflow"),
        (["--format=cloud-scheduler", TEMPLATE[0], *CLOUD], "Cloud Scheduler needs --service_account"),
        (["--format=kubernetes", "local"], "Kubernetes needs --image"),
        (["--format=cron", "local", "--id_field=a\nb"], "a line break in it, which a crontab cannot hold"),
        (["--format=cron", "local", f"--input={'x' * 1000}"], "put it into a script, and schedule that"),
        (
            ["--format=airflow", TEMPLATE[0], *CLOUD, "--dataflow_endpoint=http://localhost:1"],
            "--dataflow_endpoint cannot be told to a template",
        ),
        (["--format=airflow", TEMPLATE[0], *CLOUD, "--device=cpu"], "--device cannot be told to a template"),
        (["--format=airflow", TEMPLATE[0], *CLOUD, "--input=s3://b/a.txt"], "from which alone the template reads"),
        (["--format=airflow", TEMPLATE[0], *CLOUD, "--text_field=a,b"], "--text_field 'a,b' has a comma in it"),
        (["--format=airflow", TEMPLATE[0], "local", "--output=gs://b/o"], "take the word dataflow"),
        (["--format=airflow", TEMPLATE[0], *CLOUD, "--checkpoint=mine"], "--checkpoint 'mine' is a folder of this"),
        (["--format=airflow", TEMPLATE[0], *CLOUD, "--checkpoint=./a/b"], "--checkpoint './a/b' is a folder of this"),
        ([*TEMPLATE, *CLOUD, "--inptu=x"], "unknown option --inptu=x; did you mean --input?"),
        ([*TEMPLATE, *CLOUD, "--gpu=L5"], "--gpu 'L5' names no GPU"),
    ],
)
def test_what_would_fail_in_the_night_fails_now(argv, told, capsys):
    assert told in refusal(capsys, *argv)


def test_all_prints_what_the_options_allow_and_why_the_rest_is_missing(capsys):
    out = printed(capsys, "local", "--output=/data/vectors")
    assert re.findall(r"^# ---- (.*) ----$", out, re.MULTILINE) == [
        "cron", "cloud-scheduler: left out", "cloud-scheduler-json: left out", "airflow", "kubernetes: left out",
    ]  # fmt: skip
    assert "# it starts a Flex Template on Dataflow" in out
    out = printed(capsys, *TEMPLATE, "--image=i", *CLOUD, "--sdk_container_image=i")
    assert ": left out" not in out
    for name in schedule._FORMATS:
        entry = printed(capsys, f"--format={name}", *TEMPLATE, "--image=i", *CLOUD, "--sdk_container_image=i")
        assert f"# ---- {name} ----\n{entry}\n" in out


def entries_of(out: str) -> dict[str, str]:
    """Returns what stands under each heading."""
    _, *parts = re.split(r"^# ---- (.*) ----\n", out, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_what_one_format_refuses_others_may_take(capsys):
    # The template brings the image that holds the checkpoint.
    options = [*TEMPLATE, "--image=i", *CLOUD, "--checkpoint=/opt/checkpoints/mine"]
    out = entries_of(printed(capsys, *options))
    assert list(out) == [
        "cron: left out", "cloud-scheduler", "cloud-scheduler-json", "airflow", "kubernetes: left out",
    ]  # fmt: skip
    for name, text in out.items():
        if name in schedule._FORMATS:
            assert text == printed(capsys, f"--format={name}", *options) + "\n"
        else:
            told = refusal(capsys, f"--format={name.partition(':')[0]}", *options)
            assert told.startswith("--checkpoint '/opt/checkpoints/mine' is on this machine, where Dataflow's workers")
            assert text == f"# {told}\n\n"


def test_a_template_is_left_out_where_only_a_run_from_here_can_be_made(capsys):
    out = entries_of(printed(capsys, TEMPLATE[0], "local", "--output=gs://b/o"))
    assert list(out) == [
        "cron", "cloud-scheduler: left out", "cloud-scheduler-json: left out", "airflow: left out",
        "kubernetes: left out",
    ]  # fmt: skip
    assert "take the word dataflow" in out["airflow: left out"]


def test_where_each_entry_is_left_out_for_its_own_reason_nothing_is_made(capsys):
    assert main(["schedule", *TEMPLATE, *CLOUD, "--checkpoint=mine"]) == 2
    out, err = capsys.readouterr()
    assert all(name.endswith(": left out") for name in entries_of(out))
    assert out.count("--checkpoint 'mine' is a folder of this machine") == 3
    assert out.count("--checkpoint 'mine' is on this machine") == 2
    assert err == "error: every entry is left out; the lines above say why\n"


def test_help_among_the_options_is_that_of_the_job(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["schedule", "local", "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.count("--max_rejected_fraction") == 2  # Once in the usage, once among the options.


# --- cron ---


@pytest.fixture
def launcher(tmp_path) -> Path:
    """A program that writes its arguments, each with a null character after it, and where it is."""
    path = tmp_path / "a folder's % launch.sh"
    path.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\nprintf "%s\\0%s" "$PWD" "$PATH"\n')
    path.chmod(0o755)
    return path


def cron_command(text: str) -> tuple[str, dict[str, str]]:
    """Returns the command of a crontab's only entry as cron hands it to the shell, and the variables set before it."""
    [job] = CronTab(tab=text)
    assert job.is_valid()
    assert str(job.slices) == DAILY.cron
    *settings, line = [line for line in text.splitlines() if not line.startswith("#")]
    command = line.split(" ", 5)[5]
    assert "%" not in command.replace(r"\%", "")  # It would end the command.
    return command.replace(r"\%", "%"), dict(setting.split("=", 1) for setting in settings)


def run_as_cron(command: str, variables: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs a command as cron does: from the home folder, with little else in the environment."""
    environment = {"HOME": "/", "LOGNAME": "root"} | variables
    return subprocess.run(
        [variables["SHELL"], "-c", command], env=environment, cwd="/", capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("flock", [None, shutil.which("flock")])
def test_a_crontab_runs_the_very_command(tmp_path, launcher, flock):
    folder = tmp_path / "the folder's 5%"
    folder.mkdir()
    machine = Machine(str(folder), {"PATH": "/usr/bin:/bin:/opt/java bin", "XDG_CACHE_HOME": "/a b"}, flock)
    command, variables = cron_command(schedule_entries.crontab(DAILY, [str(launcher), "local", *NASTY], machine))
    assert variables == {"SHELL": "/bin/sh", **machine.variables, "CRON_TZ": "Europe/Zurich"}
    done = run_as_cron(command, variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    log = (folder / "embed-corpus.log").read_text()
    words = ["local", *NASTY, str(folder), machine.variables["PATH"]]
    assert log == "\0".join(words)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), max_size=10), max_size=5))
def test_no_argument_is_too_odd_for_a_crontab(tmp_path_factory, arguments):
    folder = tmp_path_factory.mktemp("cron")
    machine = Machine(str(folder), {"PATH": "/usr/bin:/bin"}, None)
    text = schedule_entries.crontab(DAILY, ["/usr/bin/printf", r"<%s>", *arguments], machine)
    line = next(line for line in text.split("\n") if line.startswith(DAILY.cron))
    done = run_as_cron(line.split(" ", 5)[5].replace(r"\%", "%"), {"SHELL": "/bin/sh", **machine.variables})
    assert done.returncode == 0
    log = (folder / "embed-corpus.log").read_bytes().decode()
    assert log == "".join(f"<{argument}>" for argument in arguments) or (not arguments and log == "<>")


@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock on this machine")
def test_while_a_run_goes_on_cron_starts_no_other(tmp_path):
    slow = tmp_path / "launch.sh"
    # What the run leaves behind, a job server say, locks nobody out.
    slow.write_text("#!/bin/sh\necho started\nread line <going-on\nsleep 600 >&- 2>&- &\necho $! >left\necho ended\n")
    slow.chmod(0o755)
    os.mkfifo(tmp_path / "going-on")
    machine = Machine(str(tmp_path), {"PATH": "/usr/bin:/bin"}, shutil.which("flock"))
    command, variables = cron_command(schedule_entries.crontab(DAILY, [str(slow)], machine))
    first = subprocess.Popen([variables["SHELL"], "-c", command], env=variables, cwd="/")
    with open(tmp_path / "going-on", "w"):  # Opens once the first run reads it.
        assert run_as_cron(command, variables).returncode == 75
    assert first.wait(timeout=60) == 0
    left = int((tmp_path / "left").read_text())
    slow.write_text("#!/bin/sh\necho again\n")
    try:
        assert run_as_cron(command, variables).returncode == 0
    finally:
        os.kill(left, signal.SIGKILL)
    log = (tmp_path / "embed-corpus.log").read_text()
    assert log == "started\nleft out: an earlier run still goes on\nended\nagain\n"


def test_the_command_prints_a_crontab_for_where_one_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/opt/java/bin:/usr/bin")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/keys/mine.json")
    options = ["local", "--input=corpus/*.jsonl", "--output", "vectors", "--id_field=100%"]
    text = printed(capsys, "--format=cron", "--cron= 15 3 * * *", "--timezone=Europe/Zurich", *options)
    command, variables = cron_command(text)
    assert variables["PATH"] == "/opt/java/bin:/usr/bin"
    assert variables["GOOGLE_APPLICATION_CREDENTIALS"] == "/keys/mine.json"
    words = shlex.split(command)
    assert words[:3] == ["cd", str(tmp_path), "&&"]
    start = words.index(str(ROOT / "launch.sh"))
    assert words[start + 1 : start + 1 + len(options)] == options
    assert words[-3:] == [">>", f"{tmp_path}/embed-corpus.log", "2>&1"]
    assert os.access(ROOT / "launch.sh", os.X_OK)


def test_a_search_path_that_not_every_cron_takes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/opt/java/bin:" * 100)
    assert "the environment's PATH has" in refusal(capsys, "--format=cron", "local")


WAITING_RUN = """\
import os, sys, time
from pathlib import Path
from pipeline.__main__ import main
from transforms import known_vectors, reconcile

known_vectors._MIN_INTERVAL_SECONDS = known_vectors._MAX_INTERVAL_SECONDS = 1e6
publish = reconcile.publish
folder = Path.cwd()

def publish_together(*arguments):
    (folder / f"there-{os.getpid()}").touch()
    until = time.monotonic() + 120
    while len(list(folder.glob("there-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    return publish(*arguments)

reconcile.publish = publish_together
sys.exit(main(sys.argv[1:]))
"""
"""Runs a command that waits, before it publishes, until another one is as far; neither takes up the other's work."""


@pytest.mark.slow
def test_of_two_scheduled_runs_at_once_one_publishes_and_the_other_says_so(tmp_path, tiny_checkpoint):
    (tmp_path / "corpus.txt").write_text("read the file\nwrite the archive\nred green blue\n")
    (tmp_path / "waiting_run.py").write_text(WAITING_RUN)
    launcher = tmp_path / "launch.sh"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" waiting_run.py "$@"\n')
    launcher.chmod(0o755)
    options = ["local", "--device=cpu", "--dtype=float32", "--input=corpus.txt", f"--checkpoint={tiny_checkpoint}"]
    machine = Machine(str(tmp_path), {"PATH": os.environ["PATH"]}, None)
    command, variables = cron_command(schedule_entries.crontab(DAILY, [str(launcher), *options], machine))
    variables |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([variables["SHELL"], "-c", command], env=variables, cwd="/") for _ in range(2)]
    assert sorted(run.wait(timeout=240) for run in runs) == [0, 1]

    snapshot = latest(tmp_path / "output")
    log = (tmp_path / "embed-corpus.log").read_text()
    assert log.count("published  snapshot=") == 1
    assert f"published  snapshot={snapshot.name}" in log
    [told] = [line for line in log.splitlines() if line.startswith("error: ")]
    assert told.startswith(f"error: another run published snapshot {snapshot.name} into output while this one was at")
    assert told.endswith("Run it again; it will encode only what that snapshot lacks")
    assert len(rows_of(snapshot)) == 3
    assert counts_of(snapshot) == {"read": 3, "embedded": 3, "texts_encoded": 3}
    assert list_published(str(tmp_path / "output")) == [snapshot.name]


# --- Cloud Scheduler ---


EVERYTHING = [
    *CLOUD,
    "--input", "gs://in/b", "gs://in/c", "--text_field=title", "--text_field=body", "--dataflow_service_options=a=b",
    "--keep_fields=a,b:int64", "--id_field=it's 100%", "--full", "--max_rejected_fraction=0.5",
    "--gpu=nvidia-l4", "--sdk_container_image=us-docker.pkg.dev/my-project/images/embed:1", "--num_workers=2",
    "--max_num_workers=20", "--service_account_email=worker@my-project.iam", "--no_use_public_ips",
    "--subnetwork=regions/us-central1/subnetworks/default", "--experiments=use_runner_v2", "--staging_location=gs://s/t",
]  # fmt: skip

LAUNCH = {
    "launchParameter": {
        "jobName": "nightly",
        "containerSpecGcsPath": "gs://my-bucket/templates/embed.json",
        "parameters": {
            "input": "gs://in/*.jsonl,gs://in/b,gs://in/c",
            "output": "gs://my-bucket/output",
            "text_field": "title,body",
            "keep_fields": "a,b:int64",
            "id_field": "it's 100%",
            "full": "true",
            "max_rejected_fraction": "0.5",
            "gpu": "nvidia-l4",
            "sdk_container_image": "us-docker.pkg.dev/my-project/images/embed:1",
            "dataflow_service_options": "a=b",
        },
        "environment": {
            "tempLocation": "gs://my-bucket/temp",
            "stagingLocation": "gs://s/t",
            "numWorkers": 2,
            "maxWorkers": 20,
            "serviceAccountEmail": "worker@my-project.iam",
            "ipConfiguration": "WORKER_IP_PRIVATE",
            "subnetwork": "regions/us-central1/subnetworks/default",
            "additionalExperiments": ["use_runner_v2"],
        },
    }
}


PARAMETERS = {
    parameter["name"]: parameter
    for parameter in json.loads((ROOT / "deploy" / "flex_template" / "metadata.json").read_text())["parameters"]
}


def check_launch(body: dict[str, Any], project: str, region: str) -> None:
    """Checks a request by the types of Google's own library and the template's metadata, as Dataflow does."""
    values = body["launchParameter"].get("parameters", {})
    for name, value in values.items():
        assert all(re.fullmatch(regex, value) for regex in PARAMETERS[name].get("regexes", [])), name
    assert all(name in values for name, parameter in PARAMETERS.items() if not parameter["isOptional"])
    request = {"projectId": project, "location": region, **body}
    ParseDict(request, LaunchFlexTemplateRequest.pb(LaunchFlexTemplateRequest()))


def test_cloud_scheduler_starts_the_template_with_the_options(capsys):
    job = json.loads(
        printed(
            capsys, "--format=cloud-scheduler-json", "--name=nightly", "--cron=15 3 * * *",
            "--timezone=Europe/Zurich", *TEMPLATE, *EVERYTHING,
        )
    )  # fmt: skip
    read = Job(ParseDict(job, Job.pb(Job())))
    assert read.name == "projects/my-project/locations/us-central1/jobs/nightly"
    assert (read.schedule, read.time_zone) == ("15 3 * * *", "Europe/Zurich")
    target = read.http_target
    assert target.uri == (
        "https://dataflow.googleapis.com/v1b3/projects/my-project/locations/us-central1/flexTemplates:launch"
    )
    assert (target.http_method, dict(target.headers)) == (HttpMethod.POST, {"Content-Type": "application/json"})
    assert target.oauth_token.service_account_email == "caller@my-project.iam"
    assert target.oauth_token.scope == "https://www.googleapis.com/auth/cloud-platform"
    assert read.attempt_deadline.seconds == 180
    body = json.loads(target.body)
    assert body == LAUNCH
    check_launch(body, "my-project", "us-central1")


def test_the_gcloud_command_creates_the_same_job(capsys):
    options = [*TEMPLATE, *EVERYTHING]
    job = json.loads(printed(capsys, "--format=cloud-scheduler-json", *options))
    command = printed(capsys, "--format=cloud-scheduler", *options)
    # Everything after the shell has read it: line breaks within the body stay, those between options do not.
    words = subprocess.run(
        ["sh", "-c", f'gcloud() {{ for word; do printf "%s\\0" "$word"; done; }}\n{command}'],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout.split("\0")[:-1]  # fmt: skip
    assert words[:4] == ["scheduler", "jobs", "create", "http"]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("job")
    names = (  # Those of `gcloud scheduler jobs create http`.
        "project", "location", "description", "schedule", "time-zone", "uri", "http-method", "headers", "message-body",
        "oauth-service-account-email", "oauth-token-scope", "attempt-deadline", "max-retry-attempts", "min-backoff",
    )  # fmt: skip
    for name in names:
        parser.add_argument(f"--{name}", required=True)
    read = parser.parse_args(words[4:])
    target = job["httpTarget"]
    assert json.loads(read.message_body) == json.loads(base64.b64decode(target["body"]))
    assert job["name"] == f"projects/{read.project}/locations/{read.location}/jobs/{read.job}"
    assert (read.schedule, read.time_zone, read.uri) == (job["schedule"], job["timeZone"], target["uri"])
    assert (read.http_method, read.headers) == ("POST", "Content-Type=application/json")
    assert target["oauthToken"] == {
        "serviceAccountEmail": read.oauth_service_account_email,
        "scope": read.oauth_token_scope,
    }
    assert job["retryConfig"] == {"retryCount": int(read.max_retry_attempts), "minBackoffDuration": read.min_backoff}
    assert read.attempt_deadline == job["attemptDeadline"]


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_itself_asks_for_the_same_job(tmp_path, capsys):
    asked: list[tuple[str, dict[str, Any]]] = []

    class Service(BaseHTTPRequestHandler):
        def do_POST(self):  # The name is the library's.
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(asked[-1][1]).encode())

        def log_message(self, *_):
            pass

    options = [*TEMPLATE, *EVERYTHING]
    job = json.loads(printed(capsys, "--format=cloud-scheduler-json", *options))
    command = printed(capsys, "--format=cloud-scheduler", *options)
    (tmp_path / "token").write_text("nobody's")
    with ThreadingHTTPServer(("localhost", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = {
            name: value for name, value in os.environ.items() if name[:9] != "CLOUDSDK_" or name == "CLOUDSDK_PYTHON"
        }
        environment = own | {
            "CLOUDSDK_CONFIG": str(tmp_path / "config"),
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(tmp_path / "token"),
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDSCHEDULER": f"http://localhost:{server.server_port}/",
        }
        done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=200)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    [(path, body)] = asked
    assert path.partition("?")[0] == f"/v1/{job['name'].rpartition('/')[0]}"
    # Beside what the command says, gcloud fills in defaults of how to try again.
    assert body["retryConfig"].items() >= job.pop("retryConfig").items()
    del body["retryConfig"]
    sent, meant = body["httpTarget"].pop("body"), job["httpTarget"].pop("body")
    assert json.loads(base64.b64decode(sent)) == json.loads(base64.b64decode(meant))
    assert body == job


def test_a_misspelt_field_of_a_request_is_found():
    launch = {"containerSpecPath": "gs://a/b", "parameters": {"output": "gs://a/b"}}
    with pytest.raises(ParseError, match="containerSpecPath"):
        check_launch({"launchParameter": launch}, "p", "r")


ENVIRONMENT = {
    "autoscaling_algorithm": ("NONE", "AUTOSCALING_ALGORITHM_NONE"),
    "dataflow_kms_key": ("projects/p/locations/r/keyRings/k/cryptoKeys/c",) * 2,
    "disk_size_gb": ("50", 50),
    "experiments": ("use_runner_v2", ["use_runner_v2"]),
    "machine_type": ("n1-standard-4",) * 2,
    "max_num_workers": ("20", 20),
    "network": ("default",) * 2,
    "num_workers": ("2", 2),
    "service_account_email": ("worker@my-project.iam",) * 2,
    "staging_location": ("gs://s/t",) * 2,
    "subnetwork": ("regions/us-central1/subnetworks/default",) * 2,
    "temp_location": ("gs://t/t",) * 2,
    "worker_zone": ("us-central1-a",) * 2,
}
"""Options to a value of each, and what the request has of it."""


@pytest.mark.parametrize(
    "environment",
    [ENVIRONMENT, {**ENVIRONMENT, "autoscaling_algorithm": ("THROUGHPUT_BASED", "AUTOSCALING_ALGORITHM_BASIC")}],
)
def test_every_option_of_the_environment_is_one_that_google_takes(environment):
    assert environment.keys() == template_launch._ENVIRONMENT.keys()
    words = [*CLOUD[1:], *(f"--{name}={value}" for name, (value, _) in environment.items())]
    launch = launch_request(given_options(words), parse(["--runner=dataflow", *words]), "gs://b/t", "n")
    check_launch(launch, "my-project", "us-central1")
    assert launch["launchParameter"]["environment"] == {
        template_launch._ENVIRONMENT[name]: sent for name, (_, sent) in environment.items()
    }


def test_every_parameter_of_the_template_can_be_scheduled():
    options = vars(parse(["--runner=local"])).keys() - {"runner", "bucket", "beam_options"}
    assert {*options, *template_launch._PARAMETERS_OF_BEAM} - {*template_launch._NO_PARAMETERS} == PARAMETERS.keys()


def test_the_templates_program_gets_the_very_options():
    main_py = runpy.run_path(str(ROOT / "deploy" / "flex_template" / "main.py"))
    launch = launch_request(
        given_options(EVERYTHING[1:]), parse([f"--runner={EVERYTHING[0]}", *EVERYTHING[1:]]), "", ""
    )
    parameters = launch["launchParameter"]["parameters"]
    words = main_py["options_of"]([f"--{name}={value}" for name, value in parameters.items()], "")
    got = given_options(words)
    sent = given_options(EVERYTHING[1:])
    assert got.pop("output") == "gs://my-bucket/output"
    assert {name: sent[name] for name in got.keys() - {"runner"}} == {
        name: value for name, value in got.items() if name != "runner"
    }
    assert got.keys() == parameters.keys() - {"output"} | {"runner"}


def test_a_template_brings_an_image_and_what_is_in_it(capsys):
    own = ["--gpu=nvidia-l4", "--checkpoint=/opt/checkpoints/mine"]
    job = json.loads(printed(capsys, "--format=cloud-scheduler-json", *TEMPLATE, *CLOUD, *own))
    launch = json.loads(base64.b64decode(job["httpTarget"]["body"]))
    check_launch(launch, "my-project", "us-central1")
    assert launch["launchParameter"]["parameters"] == {
        "input": "gs://in/*.jsonl",
        "output": "gs://my-bucket/output",
        "gpu": "nvidia-l4",
        "checkpoint": "/opt/checkpoints/mine",
    }


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "id_field": st.sampled_from(["", "url", "a b"]),
            "keep_fields": st.sampled_from(["", "lang", "a,b:int64"]),
            "max_rejected_fraction": st.one_of(
                st.sampled_from([".05", "1", "0", "1.", "1e-3", "1E-9", "0_0.5"]),
                st.floats(0, 1).map(repr),
            ),
            "rows_per_shard": st.sampled_from(["1_000", "+5", " 7", "0012"]),
            "max_batch_tokens": st.integers(1, 10**6).map("{:_}".format),
            "gpu": st.sampled_from(
                ["nvidia-l4", "count:1;type:nvidia-l4;install-nvidia-driver:5xx", "type:nvidia-tesla-t4;count:1"]
            ),
        },
    )
)
def test_what_embed_takes_the_template_takes(values):
    own = [f"--{name}={value}" for name, value in values.items()]
    words = [*CLOUD[1:], "--sdk_container_image=i", *own]
    options = parse(["--runner=dataflow", *words])
    launch = launch_request(given_options(words), options, "gs://b/t", "n")
    check_launch(launch, "my-project", "us-central1")
    parameters = launch["launchParameter"]["parameters"]
    main_py = runpy.run_path(str(ROOT / "deploy" / "flex_template" / "main.py"))
    got = main_py["options_of"]([f"--{name}={value}" for name, value in parameters.items()], "")
    read = parse([*got, *CLOUD[1:4]])
    assert {name: value for name, value in vars(read).items() if name != "beam_options"} == {
        name: value for name, value in vars(options).items() if name != "beam_options"
    }


# --- Airflow ---

AIRFLOW = ["apache-airflow-core==3.3.2", "apache-airflow-task-sdk==1.3.2", "apache-airflow-providers-standard==1.21.0"]
GOOGLE_PROVIDER = "apache-airflow-providers-google==22.8.0"
"""Of which one file is read: all that it needs would bring 1.2 GB with it."""
AIRFLOW_DAY = "2026-11-20T00:00:00Z"
"""What Airflow needs is taken as it was then."""

RUN_DAGS = """\
import __future__, ast, importlib.util, json, sys, types
from airflow.configuration import conf
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import BaseOperator

# Google's operator with its own constructor and templated fields, which tells what it would send.
module = types.ModuleType("airflow.providers.google.cloud.operators.dataflow")
module.__dict__.update(BaseOperator=BaseOperator, conf=conf, PROVIDE_PROJECT_ID=None)
[folder] = importlib.util.find_spec("airflow.providers.google").submodule_search_locations
with open(folder + "/cloud/operators/dataflow.py") as file:
    nodes = {node.name: node for node in ast.parse(file.read()).body if isinstance(node, ast.ClassDef)}
operator = nodes["DataflowStartFlexTemplateOperator"]
operator.bases = [ast.Name("BaseOperator", ast.Load())]
operator.body = [part for part in operator.body if ast.unparse(part).startswith(("template_fields:", "def __init__("))]
assert len(operator.body) == 2
tree = ast.fix_missing_locations(ast.Module([operator], []))
exec(compile(tree, "dataflow.py", "exec", __future__.annotations.compiler_flag), module.__dict__)
sent = lambda self, context: [self.project_id, self.location, self.append_job_name, self.body]
module.DataflowStartFlexTemplateOperator.execute = sent
module.DataflowStartFlexTemplateOperator._validate_deferrable_params = lambda self: None
sys.modules[module.__name__] = module

found = {}
for path in sys.argv[2:]:
    bag = DagBag(path)
    assert not bag.import_errors, bag.import_errors
    [dag] = bag.dags.values()
    [task] = dag.tasks
    task.render_template_fields({"ds": "RENDERED", "params": {}})
    found[path] = {
        "dag": [dag.dag_id, dag.schedule, dag.timezone.name, dag.catchup, dag.max_active_runs],
        "task": [task.task_id, type(task).__name__, task.retries],
        "result": task.execute({}),
    }
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""
"""Loads files as Airflow's scheduler does, and runs the task of each; what came of it goes into the first file."""


@pytest.fixture(scope="module")
def airflow_python() -> Path:
    """A Python with Airflow, of its own: Airflow's packages and Beam's do not agree."""
    versions = "-".join(package.rpartition("=")[2] for package in (AIRFLOW[0], GOOGLE_PROVIDER))
    folder = ROOT / ".cache" / f"airflow-{versions}-python{sys.version_info[0]}.{sys.version_info[1]}"
    leave = pytest.fail if os.environ.get("NOTHING_MAY_BE_SKIPPED") else pytest.skip
    if not folder.is_dir():
        uv = next(filter(None, (shutil.which("uv"), *map(str, (ROOT / ".cache").glob("uv-*/bin/uv")))), None)
        if uv is None:
            leave("there is no uv, which fetches Airflow")
        new = f"{folder}.{os.getpid()}"
        install = [uv, "pip", "install", "--quiet", "--exclude-newer", AIRFLOW_DAY, "--python", new]
        for command in (
            [uv, "venv", "--quiet", "--relocatable", "--python", sys.executable, new],
            [*install, *AIRFLOW],
            [*install, "--no-deps", GOOGLE_PROVIDER],
        ):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
            if done.returncode:
                shutil.rmtree(new, ignore_errors=True)
                leave(f"Airflow could not be fetched: {done.stderr.strip()}")
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.is_dir():  # Else another process made it meanwhile.
                raise
            shutil.rmtree(new)
    return folder / "bin" / "python"


@pytest.mark.timeout(1800)  # The first run fetches Airflow.
def test_airflow_runs_the_very_command_and_starts_the_template(tmp_path, launcher, airflow_python, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(schedule, "_command", lambda arguments: [str(launcher), arguments.word, *arguments.options])
    when = ["--name=nightly", "--cron=15 3 * * *", "--timezone=Europe/Zurich", "--format=airflow"]
    odd = [word for argument in NASTY for word in ("--text_field", argument) if argument != "--"]
    bash, template = tmp_path / "bash_dag.py", tmp_path / "template_dag.py"
    bash.write_text(printed(capsys, *when, "local", *odd, "--output=run.sh"))
    template.write_text(printed(capsys, *when, *TEMPLATE, *EVERYTHING, "--checkpoint=gs://b/{{ ds }}"))

    results = tmp_path / "results.json"
    environment = os.environ | {
        "AIRFLOW_HOME": str(tmp_path / "home"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT": "0",  # None: a busy machine is slow to load Airflow.
    }
    done = subprocess.run(
        [str(airflow_python), "-c", RUN_DAGS, str(results), str(bash), str(template)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    for path in (bash, template):
        assert found[str(path)]["dag"] == ["nightly", "15 3 * * *", "Europe/Zurich", False, 1]
    assert found[str(bash)]["task"] == ["embed", "BashOperator", 1]
    assert found[str(template)]["task"] == ["embed", "DataflowStartFlexTemplateOperator", 1]
    words = found[str(bash)]["result"].split("\0")
    assert words[:-1] == ["local", *odd, "--output=run.sh", str(tmp_path)]
    *place, body = found[str(template)]["result"]
    assert place == ["my-project", "us-central1", False]
    assert body["launchParameter"]["parameters"]["checkpoint"] == "gs://b/{{ ds }}"
    check_launch(body, "my-project", "us-central1")


# --- Kubernetes ---


def expanded(text: str) -> str:
    """What Kubernetes makes of an argument where no variable is set: $$ is a dollar sign, $(NAME) stays as it is."""
    return re.sub(r"\$(\$|\([^)]*\))?", lambda match: "$" if match[1] == "$" else match[0], text)


def test_a_cron_job_runs_the_very_options_in_a_pod(capsys):
    odd = [word for argument in NASTY for word in ("--text_field", argument) if argument != "--"]
    options = ["--input=gs://in/*.jsonl", "--output", "/data/vectors", *odd]
    text = printed(
        capsys, "--format=kubernetes", "--name=nightly", "--cron=15 3 * * *", "--timezone=Europe/Zurich",
        "--image=registry.example/embed:1", "--gpus=1", "--cpus=8", "--memory=32Gi", "--volume=vectors:/data",
        "--namespace=embeddings", "--kubernetes_service_account=embed", "local", *options,
    )  # fmt: skip
    manifest = yaml.safe_load(text)
    assert kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    labels = {"app.kubernetes.io/name": "embed-corpus", "app.kubernetes.io/instance": "nightly"}
    assert manifest["metadata"] == {"name": "nightly", "labels": labels, "namespace": "embeddings"}
    spec = manifest["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("15 3 * * *", "Europe/Zurich")
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] == 43200
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["serviceAccountName"] == "embed"
    [container] = pod["containers"]
    assert container["image"] == "registry.example/embed:1"
    assert container["command"] == ["python", "-m", "pipeline"]
    assert [expanded(argument) for argument in container["args"]] == ["local", "--device=cuda", *options]
    assert container["resources"] == {
        "requests": {"cpu": "8", "memory": "32Gi"},
        "limits": {"memory": "32Gi", "nvidia.com/gpu": 1},
    }
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/data"}
    assert volume["persistentVolumeClaim"] == {"claimName": "vectors"}


@pytest.mark.parametrize(
    ("options", "device"),
    [
        (["--gpus=1", "local"], ["--device=cuda"]),
        (["--gpus=1", "local", "--device", "auto"], ["--device", "auto"]),
        (["local"], []),
    ],
)
def test_a_pod_with_a_gpu_does_not_embed_on_its_cpu_unless_told(options, device, capsys):
    given = ["--input=gs://a/b", "--output=gs://b/o"]
    manifest = yaml.safe_load(printed(capsys, "--format=kubernetes", "--image=i", *options, *given))
    [container] = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["local", *device, *given]


def test_what_computes_elsewhere_asks_for_a_small_pod(capsys):
    flink = ["flink", "--job_endpoint=job-server:8099", "--environment_type=EXTERNAL", "--input=gs://a/b"]
    flink = [*flink, "--environment_config=localhost:50000", "--parallelism=8"]
    for options in ([*CLOUD, "--sdk_container_image=i"], [*flink, "--output=gs://b/o"]):
        manifest = yaml.safe_load(printed(capsys, "--format=kubernetes", "--image=i", *options))
        assert kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        pod = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        assert pod["containers"][0]["resources"] == {
            "requests": {"cpu": "1", "memory": "4Gi"},
            "limits": {"memory": "4Gi"},
        }
        assert pod.keys() == {"restartPolicy", "containers"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["local"], "--output 'output' is no place that a pod sees and keeps"),
        (["local", "--output=/elsewhere/x"], "--output '/elsewhere/x' is no place"),
        (["local", "--output=/data/../x"], "--output '/data/../x' is no place"),
        (["local", "--output=gs://b/o", "--input=corpus/*.txt"], "--input 'corpus/*.txt' is no place"),
        (["local", "--output=gs://b/o", "--checkpoint=./mine"], "--checkpoint './mine' is no place"),
        (["--gpus=1", *CLOUD], "--gpus is for local and prism: dataflow computes elsewhere"),
        (CLOUD, "--sdk_container_image is missing"),
        (["--gpus=1", "local", "--output=gs://b/o", "--device=cpu"], "--device=cpu leaves it unused"),
        (
            ["flink", "--flink_master=rest:8081", "--artifacts_dir=gs://b/a", "--input=gs://a/b", "--output=gs://b/o"],
            "--job_endpoint is missing",
        ),
        (["--volume=other:/data", "local", "--output=/data"], "two of --volume name the same folder"),
    ],
)
def test_what_a_pod_would_not_find_is_refused(options, told, capsys):
    assert told in refusal(capsys, "--format=kubernetes", "--image=i", "--volume=vectors:/data", *options)


def test_a_file_of_this_machine_is_refused_for_a_pod(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "server.jar").touch()
    places = ["--output=gs://b/o", "--input=gs://a/b"]
    options = ["flink", "--job_endpoint=h:1", "--parallelism=8", "--environment_type=DOCKER", *places]
    options.append("--flink_job_server_jar=server.jar")
    message = refusal(capsys, "--format=kubernetes", "--image=i", *options)
    assert message == "--flink_job_server_jar 'server.jar' is a file of this machine: name one that the image has"


def test_what_looks_like_a_number_to_kubernetes_is_quoted(capsys):
    """PyYAML reads them as text without quotes; the YAML of Kubernetes does not."""
    odd = ["--text_field", "08", "--text_field", "y", "--text_field", "1e-3"]
    manifest = printed(
        capsys, "--format=kubernetes", "--image=i", "local", *odd, "--output=gs://b/o", "--input=gs://b/i.csv"
    )
    for value in ("08", "y", "1e-3"):
        assert re.search(rf'- "{value}"$', manifest, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--input", "a.jsonl", "b.jsonl"], "are the files of today, and later ones would be left out"),
        (["--runner=flink"], "--runner contradicts the word 'local'"),
    ],
)
def test_what_would_mean_something_else_at_night_is_refused(tmp_path, monkeypatch, capsys, options, told):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text('{"text": "a"}\n')
    assert main(["schedule", "--format=cron", "local", *options]) == 2
    assert told in capsys.readouterr().err
    assert main(["schedule", "--format=cron", "local", "--input", "a.jsonl", "--input", "b.jsonl"]) == 0


def test_a_checkpoint_folder_with_a_plain_name_is_not_taken_for_a_shipped_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    argv = [
        "--format=kubernetes",
        "--image=i",
        "local",
        "--output=gs://b/o",
        "--input=gs://b/i.csv",
        "--checkpoint=mine",
    ]
    assert main(["schedule", *argv]) == 2
    assert "--checkpoint 'mine' is no place that a pod sees" in capsys.readouterr().err
