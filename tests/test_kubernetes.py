"""The manifests of deploy/kubernetes: known to Kubernetes and the Flink operator, and of one mind with each other."""

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from apache_beam.options.pipeline_options import FlinkRunnerOptions
from apache_beam.version import __version__ as beam_version

from pipeline import flink
from pipeline.__main__ import main
from pipeline.options import parse

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "kubernetes"
KUBERNETES = "1.30"

MANIFESTS = [
    (path.name, manifest)
    for path in sorted(FOLDER.glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]


def strict(schema: Any) -> Any:
    """Returns a schema under which fields that it does not name are errors, as `kubectl apply` has it."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(part) for name, part in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed


FLINK_SCHEMA = strict(json.loads((ROOT / "tests" / "data" / "flinkdeployment-1.10.0.json").read_text()))


def check(manifest: dict[str, Any]) -> None:
    """Checks a manifest by the schema of its kind; pod templates of Flink's are those of Kubernetes."""
    if manifest["kind"] != "FlinkDeployment":
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, FLINK_SCHEMA)
    spec = manifest["spec"]
    for part in (spec, spec["jobManager"], spec["taskManager"]):
        if "podTemplate" in part:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **part["podTemplate"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def only(kind: str, name: str | None = None) -> dict[str, Any]:
    [found] = [
        manifest
        for _, manifest in MANIFESTS
        if manifest["kind"] == kind and name in (None, manifest["metadata"].get("name"))
    ]
    return found


def flink_pod() -> dict[str, Any]:
    return only("FlinkDeployment")["spec"]["taskManager"]["podTemplate"]["spec"]


def worker_pool() -> dict[str, Any]:
    [pool] = [container for container in flink_pod()["containers"] if container["name"] == "worker-pool"]
    return pool


@pytest.mark.parametrize(("file", "manifest"), MANIFESTS, ids=[f"{name}-{found['kind']}" for name, found in MANIFESTS])
def test_a_manifest_is_valid(file, manifest):
    check(manifest)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("FlinkDeployment", ("spec", "flinkVersions"), "v1_19"),
        ("FlinkDeployment", ("spec", "flinkVersion"), "v1_9"),
        ("FlinkDeployment", ("spec", "flinkConfiguration", "taskmanager.numberOfTaskSlots"), 4),
        ("FlinkDeployment", ("spec", "taskManager", "resource", "memroy"), "8g"),
        ("FlinkDeployment", ("spec", "taskManager", "podTemplate", "spec", "container"), []),
        ("FlinkDeployment", ("spec", "taskManager", "podTemplate", "spec", "containers", 1, "resource"), {}),
        ("FlinkDeployment", ("spec", "taskManager", "podTemplate", "spec", "containers", 1, "command"), "python"),
        ("Deployment", ("spec", "template", "spec", "container"), []),
        ("Job", ("spec", "backofLimit"), 1),
        ("Job", ("spec", "template", "spec", "containers", 0, "args"), [1]),
    ],
)
def test_a_mistake_in_a_manifest_is_found(kind, path, value):
    manifest = copy.deepcopy(only(kind))
    *parents, last = path
    place: Any = manifest
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(manifest)


def test_each_task_manager_has_a_worker_pool_with_a_gpu_where_embed_has_it_look():
    [port] = worker_pool()["ports"]
    assert f"localhost:{port['containerPort']}" == flink.WORKER_POOL
    assert f"--service_port={port['containerPort']}" in worker_pool()["args"]
    assert worker_pool()["resources"]["limits"]["nvidia.com/gpu"] == 1
    [other] = [container for container in flink_pod()["containers"] if container["name"] != "worker-pool"]
    assert other["name"] == "flink-main-container"  # By this name the operator knows its own.
    assert "resources" not in other


def test_the_pool_starts_workers_by_the_script_that_is_mounted():
    [mount] = worker_pool()["volumeMounts"]
    [volume] = [volume for volume in flink_pod()["volumes"] if volume["name"] == mount["name"]]
    scripts = only("ConfigMap", volume["configMap"]["name"])["data"]
    [script] = scripts
    assert f"--container_executable={mount['mountPath']}/{script}" in worker_pool()["args"]
    assert volume["configMap"]["defaultMode"] == 0o755


def in_megabytes(size: str) -> int:
    return int(size[:-1]) * {"m": 1, "g": 1024}[size[-1]]


def test_task_managers_have_the_memory_that_flink_needs_for_each_slot():
    readme = (ROOT / "deploy" / "flink" / "README.md").read_text(encoding="utf-8")
    needed = dict(re.findall(r"`(taskmanager\.[\w.-]+): (\S+)`", readme))
    assert set(needed) == {
        "taskmanager.memory.framework.off-heap.size",
        "taskmanager.memory.network.min",
        "taskmanager.memory.network.max",
        "taskmanager.network.sort-shuffle.min-buffers",
    }
    # They hold for two slots, as the cluster on one machine has them.
    script = (ROOT / "deploy" / "flink" / "cluster.sh").read_text(encoding="utf-8")
    assert re.findall(r"^slots=\$\{FLINK_SLOTS:-(\d+)\}", script, re.MULTILINE) == ["2"]
    off_heap = "taskmanager.memory.framework.off-heap.size"
    assert f"\n{off_heap}: ${{off_heap_mb}}m\n" in script  # See test_flink.py.
    others = {name: value for name, value in needed.items() if name != off_heap}
    assert [name for name, value in others.items() if f"\n{name}: {value}\n" not in script] == []
    settings = only("FlinkDeployment")["spec"]["flinkConfiguration"]
    slots = int(settings["taskmanager.numberOfTaskSlots"])
    for name, value in needed.items():
        if ".memory." in name:
            assert in_megabytes(settings[name]) * 2 >= in_megabytes(value) * slots, name
        else:
            assert settings[name] == value


def test_a_run_that_is_stuck_ends():
    assert only("Job")["spec"]["activeDeadlineSeconds"] == 12 * 3600


def test_flinks_readme_starts_workers_as_the_manifest_does():
    readme = (ROOT / "deploy" / "flink" / "README.md").read_text(encoding="utf-8")
    blocks = [
        re.sub("^  ", "", block, flags=re.MULTILINE) for block in re.findall(r"  ```\n(.*?)  ```\n", readme, re.DOTALL)
    ]
    [script] = only("ConfigMap")["data"].values()
    [command] = [block for block in blocks if "worker_pool_main" in block]
    assert script in blocks
    pool = [*worker_pool()["command"], *worker_pool()["args"]]
    assert shlex.split(command) == [word.replace("=/etc/embed/", "=/PATH/") for word in pool]


def test_all_are_of_one_flink_and_one_beam():
    spec = only("FlinkDeployment")["spec"]
    version = spec["flinkVersion"].removeprefix("v").replace("_", ".")
    assert version in FlinkRunnerOptions.PUBLISHED_FLINK_VERSIONS
    assert spec["image"].startswith(f"flink:{version}-")
    [server] = only("Deployment")["spec"]["template"]["spec"]["containers"]
    assert server["image"] == f"apache/beam_flink{version}_job_server:{beam_version}"


def test_the_job_server_submits_to_the_cluster_and_shares_its_artifacts():
    server_pod = only("Deployment")["spec"]["template"]["spec"]
    [server] = server_pod["containers"]
    arguments = dict(argument.removeprefix("--").split("=") for argument in server["args"])
    # The operator's service is called after the deployment.
    assert arguments["flink-master"] == f"{only('FlinkDeployment')['metadata']['name']}-rest:8081"
    main = flink_pod()["containers"][0]
    for container, pod in ((server, server_pod), (main, flink_pod())):
        [mount] = container["volumeMounts"]
        [volume] = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
        assert volume["persistentVolumeClaim"]["claimName"] == only("PersistentVolumeClaim")["metadata"]["name"]
        assert mount["mountPath"] == arguments["artifacts-dir"]
    assert only("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_job_hands_its_pipeline_to_the_job_server():
    [container] = only("Job")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "pipeline"]
    word, *options = container["args"]
    beam_options = parse([f"--runner={word}", *options]).beam_options
    assert "--environment_type=EXTERNAL" in beam_options
    assert f"--environment_config={flink.WORKER_POOL}" in beam_options
    service = only("Service")
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    name = service["metadata"]["name"]
    assert f"--job_endpoint={name}:{ports['jobs']}" in options
    assert f"--artifact_endpoint={name}:{ports['artifacts']}" in options
    server = only("Deployment")["spec"]["template"]
    assert server["metadata"]["labels"].items() >= service["spec"]["selector"].items()
    served = {port["name"]: port["containerPort"] for port in server["spec"]["containers"][0]["ports"]}
    assert served == ports
    arguments = server["spec"]["containers"][0]["args"]
    assert {f"--job-port={served['jobs']}", f"--artifact-port={served['artifacts']}"} <= set(arguments)


def test_the_image_is_one_and_yours_to_name():
    text = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.yaml"))
    assert set(re.findall(r"image: (.*embed-corpus.*)", text)) == {"REGISTRY/embed-corpus:TAG"}


def test_the_schedule_of_the_readme_is_a_cron_job_that_submits_as_the_job_does(capsys):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    [command] = [line for line in readme.splitlines() if line.startswith("./launch.sh schedule")]
    words = shlex.split(command.partition("|")[0])
    assert main(words[1:]) == 0
    cron_job = yaml.safe_load(capsys.readouterr().out)
    check(cron_job)
    [scheduled] = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    [once] = only("Job")["spec"]["template"]["spec"]["containers"]
    assert scheduled["command"] == once["command"]
    assert set(scheduled["args"]) == {argument.replace("BUCKET", "my-bucket") for argument in once["args"]}
