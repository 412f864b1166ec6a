"""The entries that run `embed` on a schedule, for cron, Cloud Scheduler, Airflow and Kubernetes; pure functions."""

import base64
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

_CLOUD_PLATFORM = "https://www.googleapis.com/auth/cloud-platform"

CRONTAB_COMMAND_LENGTH = 998
"""Bytes of a command that Debian's cron takes; it refuses a longer one, and other crons drop the rest of it."""

_LOCKED = 75
"""Exit status of a run that was left out; the job has none of that number."""

_RUN_DEADLINE_SECONDS = 12 * 3600
"""How long a run of a CronJob may take, its second try included."""


@dataclass(frozen=True)
class Schedule:
    """When something runs, and what it is called.

    Attributes:
      name: of the entry; lower-case letters, digits and hyphens.
      cron: checked expression of five fields.
      timezone: name of the IANA time zone that it is meant in.
    """

    name: str
    cron: str
    timezone: str


@dataclass(frozen=True)
class Machine:
    """How a command runs on this very machine.

    Attributes:
      folder: absolute; relative paths of the command are meant from there, and its log and lock lie there.
      variables: of the environment, that the command needs; `PATH` among them.
      flock: absolute path of the program `flock`; None where there is none.
    """

    folder: str
    variables: Mapping[str, str]
    flock: str | None


@dataclass(frozen=True)
class Pod:
    """What a command needs in Kubernetes.

    Attributes:
      image: has our package, and a `python` that imports it.
      cpus: cores asked for, `4` or `500m`.
      memory: asked for and never exceeded, `16Gi`.
      gpus: NVIDIA GPUs.
      volumes: persistent volume claims by the folder where each is mounted.
      namespace: None for the one that kubectl has.
      service_account: of Kubernetes; None for the default one.
    """

    image: str
    cpus: str
    memory: str
    gpus: int
    volumes: Mapping[str, str]
    namespace: str | None
    service_account: str | None


def crontab(schedule: Schedule, command: Sequence[str], machine: Machine) -> str:
    """Returns the lines of a crontab that run a command, not twice at once.

    Args:
      schedule: when.
      command: program, by an absolute path, and arguments.
      machine: where.

    Raises:
      ValueError: the command holds what a crontab cannot.
    """
    # cron starts programs in the home folder, with hardly a search path.
    log, lock = (shlex.quote(f"{machine.folder}/{schedule.name}.{kind}") for kind in ("log", "lock"))
    run = shlex.join(command)
    if machine.flock:
        # Closed for the command: else whatever it leaves behind would lock out all later runs.
        locked = f"{shlex.quote(machine.flock)} --close --nonblock --conflict-exit-code {_LOCKED} {lock} {run}"
        told = "echo 'left out: an earlier run still goes on'"
        run = f"{{ {locked} || {{ s=$?; [ $s -ne {_LOCKED} ] || {told}; exit $s; }}; }}"
    line = f"cd {shlex.quote(machine.folder)} && {run} >> {log} 2>&1"
    if "\n" in line or "\r" in line:
        raise ValueError("an option has a line break in it, which a crontab cannot hold: put the command into a script")
    line = line.replace("%", r"\%")  # Else a line break to cron, also within quotes.
    if len(line.encode()) > CRONTAB_COMMAND_LENGTH:
        raise ValueError(
            f"the command has {len(line.encode())} bytes, and not every cron takes more than {CRONTAB_COMMAND_LENGTH}: "
            "put it into a script, and schedule that"
        )
    overlap = (
        "# While a run still goes on, the next one is left out."
        if machine.flock
        else "# Runs that overlap are safe: one publishes, the other ends with an error."
    )
    return "\n".join(
        [
            "# Add at the end of what `crontab -e` shows: the settings count for all lines that follow them.",
            "# Debian's and Ubuntu's cron ignores CRON_TZ and goes by the machine's time zone (timedatectl shows it).",
            overlap,
            "SHELL=/bin/sh",
            *(_crontab_setting(name, value) for name, value in machine.variables.items()),
            f"CRON_TZ={schedule.timezone}",
            f"{schedule.cron} {line}",
            "",
        ]
    )


def _crontab_setting(name: str, value: str) -> str:
    line = f"{name}={value}"
    if "\n" in line or "\r" in line or len(line.encode()) > CRONTAB_COMMAND_LENGTH:
        raise ValueError(
            f"the environment's {name} has a line break or {len(value.encode())} bytes, and not every cron takes more "
            f"than {CRONTAB_COMMAND_LENGTH} in a line: make it shorter while this command runs"
        )
    return line


def scheduler_job(
    schedule: Schedule, project: str, region: str, launch: Mapping[str, Any], service_account: str
) -> dict[str, Any]:
    """Returns a job of Cloud Scheduler, as its API takes it, that starts a Flex Template.

    Args:
      schedule: when.
      project: Google Cloud project of both.
      region: of both.
      launch: body of Dataflow's request flexTemplates.launch.
      service_account: email of the account in whose name Dataflow is asked.
    """
    return {
        "name": f"projects/{project}/locations/{region}/jobs/{schedule.name}",
        "description": "Embeds what is new in a corpus, on Dataflow.",
        "schedule": schedule.cron,
        "timeZone": schedule.timezone,
        "attemptDeadline": "180s",
        "retryConfig": {"retryCount": 3, "minBackoffDuration": "60s"},
        "httpTarget": {
            "uri": f"https://dataflow.googleapis.com/v1b3/projects/{project}/locations/{region}/flexTemplates:launch",
            "httpMethod": "POST",
            "headers": {"Content-Type": "application/json"},
            "body": base64.b64encode(json.dumps(launch).encode()).decode(),
            "oauthToken": {"serviceAccountEmail": service_account, "scope": _CLOUD_PLATFORM},
        },
    }


def gcloud_command(job: Mapping[str, Any]) -> str:
    """Returns the command that creates a job of Cloud Scheduler, as `scheduler_job` made it."""
    _, project, _, region, _, name = job["name"].split("/")
    target, retries = job["httpTarget"], job["retryConfig"]
    headers = ",".join(f"{header}={value}" for header, value in target["headers"].items())
    options = {
        "project": project,
        "location": region,
        "description": job["description"],
        "schedule": job["schedule"],
        "time-zone": job["timeZone"],
        "uri": target["uri"],
        "http-method": target["httpMethod"],
        "headers": headers,
        "message-body": json.dumps(json.loads(base64.b64decode(target["body"])), indent=2),
        "oauth-service-account-email": target["oauthToken"]["serviceAccountEmail"],
        "oauth-token-scope": target["oauthToken"]["scope"],
        "attempt-deadline": job["attemptDeadline"],
        "max-retry-attempts": str(retries["retryCount"]),
        "min-backoff": retries["minBackoffDuration"],
    }
    words = [f"--{option}={shlex.quote(value)}" for option, value in options.items()]
    return " \\\n  ".join([f"gcloud scheduler jobs create http {shlex.quote(name)}", *words]) + "\n"


def airflow_bash_dag(schedule: Schedule, command: Sequence[str], folder: str) -> str:
    """Returns the file of a DAG for Airflow 3 that runs a command where the Airflow worker runs.

    Args:
      schedule: when.
      command: program, by an absolute path, and arguments.
      folder: absolute; relative paths of the command are meant from there.
    """
    return _dag(
        schedule,
        "from airflow.providers.standard.operators.bash import BashOperator",
        "BashOperator",
        # Literal, or else Jinja would read the command, and a command that ends in .sh would be the name of a file.
        {"bash_command": f"literal({shlex.join(command)!r})", "cwd": repr(folder)},
    )


def airflow_template_dag(schedule: Schedule, project: str, region: str, launch: Mapping[str, Any]) -> str:
    """Returns the file of a DAG for Airflow 3 that starts a Flex Template and waits for its job.

    Args:
      schedule: when.
      project: Google Cloud project.
      region: of the job.
      launch: body of Dataflow's request flexTemplates.launch.
    """
    return _dag(
        schedule,
        "from airflow.providers.google.cloud.operators.dataflow import DataflowStartFlexTemplateOperator",
        "DataflowStartFlexTemplateOperator",
        {
            "project_id": repr(project),
            "location": repr(region),
            "body": f"literal({launch!r})",
            "append_job_name": "False",  # Dataflow runs no two jobs of one name at once.
        },
    )


def _dag(schedule: Schedule, operator_import: str, operator: str, arguments: Mapping[str, str]) -> str:
    lines = [f"        {name}={value}," for name, value in arguments.items()]
    return "\n".join(
        [
            '"""Embeds what is new in a corpus; made by `./launch.sh schedule`."""',
            "",
            "import pendulum",
            operator_import,
            "from airflow.sdk import DAG, literal",
            "",
            "with DAG(",
            f"    dag_id={schedule.name!r},",
            f"    schedule={schedule.cron!r},",
            f"    start_date=pendulum.datetime(2026, 1, 1, tz={schedule.timezone!r}),",
            "    catchup=False,",
            "    max_active_runs=1,",
            "):",
            f"    {operator}(",
            '        task_id="embed",',
            *lines,
            "        retries=1,",
            "    )",
            "",
        ]
    )


def cron_job(schedule: Schedule, arguments: Sequence[str], pod: Pod) -> str:
    """Returns the manifest, in YAML, of a Kubernetes CronJob that runs `python -m pipeline`.

    No two runs overlap: while one goes on, the next is left out. One that is stuck is ended after twelve hours.

    Args:
      schedule: when.
      arguments: command and options.
      pod: what it needs.
    """
    container: dict[str, Any] = {
        "name": "embed",
        "image": pod.image,
        "command": ["python", "-m", "pipeline"],
        # Kubernetes puts variables in the place of $(NAME), and takes $$ for a dollar sign.
        "args": [argument.replace("$", "$$") for argument in arguments],
        "resources": {
            "requests": {"cpu": pod.cpus, "memory": pod.memory},
            "limits": {"memory": pod.memory} | ({"nvidia.com/gpu": pod.gpus} if pod.gpus else {}),
        },
    }
    spec: dict[str, Any] = {"restartPolicy": "Never", "containers": [container]}
    if pod.service_account:
        spec["serviceAccountName"] = pod.service_account
    if pod.volumes:
        names = {folder: f"volume-{number}" for number, folder in enumerate(pod.volumes)}
        container["volumeMounts"] = [{"name": names[folder], "mountPath": folder} for folder in pod.volumes]
        spec["volumes"] = [
            {"name": names[folder], "persistentVolumeClaim": {"claimName": claim}}
            for folder, claim in pod.volumes.items()
        ]
    labels = {"app.kubernetes.io/name": "embed-corpus", "app.kubernetes.io/instance": schedule.name}
    manifest = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": schedule.name, "labels": labels} | ({"namespace": pod.namespace} if pod.namespace else {}),
        "spec": {
            "schedule": schedule.cron,
            "timeZone": schedule.timezone,
            "concurrencyPolicy": "Forbid",
            # A turn that was missed by more than an hour is left out.
            "startingDeadlineSeconds": 3600,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {
                "spec": {
                    "backoffLimit": 1,
                    # As runs must not overlap, one that is stuck would keep all later ones from starting. What is
                    # merely slow loses little: the next run takes up what this one has saved.
                    "activeDeadlineSeconds": _RUN_DEADLINE_SECONDS,
                    "template": {"metadata": {"labels": labels}, "spec": spec},
                }
            },
        },
    }
    return yaml.dump(manifest, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=120)


class _PlainDumper(yaml.SafeDumper):
    """Writes what is there twice twice, not as a reference."""

    def ignore_aliases(self, data: Any) -> bool:
        """Returns that nothing is an alias."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quotes all but plain words: `1e-3`, `08` and `y` are text to PyYAML, but not to the YAML of Kubernetes."""
    plain = _PLAIN_TEXT.fullmatch(text) is not None and text.lower() not in _NO_TEXT
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_PLAIN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9/._-]*")
_NO_TEXT = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "inf", "nan"}
_PlainDumper.add_representer(str, _represent_text)
