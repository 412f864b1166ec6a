"""Flink without Flink: options, jars, what is missing, the job server's keeper, and the scripts' own errors."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from apache_beam.options.pipeline_options import JobServerOptions, PipelineOptions, SetupOptions
from apache_beam.runners.portability.job_server import JavaJarJobServer
from flink_cluster import BUILD, ROOT, SCRIPT, free_ports, wait_until

from pipeline import flink, flink_setup
from pipeline.__main__ import main
from pipeline.options import parse

SETUP = "/a/setup.py"
FLINK = "--runner=FlinkRunner"
PLUGIN = "--beam_plugin=pipeline.flink_worker"


def added(*given: str) -> set[str]:
    """Returns the options that Flink gets beside those given."""
    completed = flink.complete([FLINK, *given], SETUP)
    assert completed[: len(given) + 1] == [FLINK, *given]
    return set(completed[len(given) + 1 :])


ELSEWHERE = ["--flink_master=flink:8081", "--artifacts_dir=gs://b/staged"]
ALWAYS = {
    "--sdk_worker_parallelism=1",
    "--environment_cache_millis=60000",
    "--max_bundle_size=1000000",
    "--max_bundle_time_mills=60000",
    "--faster_copy=true",
    PLUGIN,
}
SUBMITTER = "--job_server_jvm_properties=-XX:TieredStopAtLevel=1"
"""Where the job server only hands the job over."""
EMBEDDED = "--job_server_jvm_properties=--add-opens=java.base/java.lang=ALL-UNNAMED"


# Options.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {"--flink_master=[local]", "--flink_version=1.19", "--environment_type=LOOPBACK", EMBEDDED}),
        (["--flink_master=[auto]"], {"--flink_version=1.19", "--environment_type=LOOPBACK", EMBEDDED}),
        (["--flink_version=2.2"], {"--flink_master=[local]", "--environment_type=LOOPBACK", EMBEDDED}),
        (["--flink_job_server_jar=own.jar"], {"--flink_master=[local]", "--environment_type=LOOPBACK", EMBEDDED}),
        (
            ["--flink_master=localhost:8081"],
            {"--environment_type=EXTERNAL", "--environment_config=localhost:50000", f"--setup_file={SETUP}", SUBMITTER},
        ),
        (
            ["--flink_master", "http://flink:8081", "--artifacts_dir=gs://b/staged"],
            {"--environment_type=EXTERNAL", "--environment_config=localhost:50000", f"--setup_file={SETUP}", SUBMITTER},
        ),
        (
            ["--job_endpoint=flink:8099", "--parallelism=8"],
            {"--environment_type=EXTERNAL", "--environment_config=localhost:50000", f"--setup_file={SETUP}"},
        ),
        (
            ["--flink_master=localhost:8081", "--job_endpoint=localhost:8099", "--environment_type=LOOPBACK"],
            set(),
        ),
        (["--flink_master=localhost:8081", "--environment_type=LOOPBACK"], {SUBMITTER}),
        (
            ["--flink_master=localhost:8081", "--environment_type=EXTERNAL", "--environment_config=localhost:1"],
            {f"--setup_file={SETUP}", SUBMITTER},
        ),
        (
            ["--flink_master=127.0.0.1:8081", "--environment_options=external_service_address=localhost:1"],
            {"--environment_type=EXTERNAL", f"--setup_file={SETUP}", SUBMITTER},
        ),
        (
            ["--flink_master=localhost:8081", "--setup_file=own.py"],
            {"--environment_type=EXTERNAL", "--environment_config=localhost:50000", SUBMITTER},
        ),
        (["--flink_master=localhost:8081", "--environment_type=DOCKER"], {f"--setup_file={SETUP}", SUBMITTER}),
    ],
)
def test_what_flink_needs_is_filled_in(given, expected):
    assert added(*given) == ALWAYS | expected


def test_a_job_servers_java_keeps_the_properties_that_are_given():
    given = "--job_server_jvm_properties=-Xmx2g"
    assert not any("jvm_properties" in option for option in added(given, "--flink_master=localhost:8081"))
    completed = flink.complete([FLINK, given], None)
    properties = PipelineOptions(completed).view_as(JobServerOptions).job_server_jvm_properties
    assert properties == ["-Xmx2g", EMBEDDED.partition("=")[2]]
    assert flink.complete(completed, None) == completed


def test_what_a_person_gives_stands():
    numbers = ALWAYS - {"--faster_copy=true", PLUGIN}
    given = {option.partition("=")[0] + "=7" for option in numbers} | {"--faster_copy=false", PLUGIN}
    assert added(*given) == {
        "--flink_master=[local]",
        "--flink_version=1.19",
        "--environment_type=LOOPBACK",
        EMBEDDED,
    }


def test_a_plugin_of_ones_own_is_imported_beside_ours():
    completed = flink.complete([FLINK, "--beam_plugin=mine"], None)
    assert PipelineOptions(completed).view_as(SetupOptions).beam_plugins == ["mine", flink.WORKER_PLUGIN]


def test_an_installed_package_has_no_setup_file():
    assert not any("setup_file" in option for option in flink.complete([FLINK, "--flink_master=localhost:8081"], None))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--flink_master=[collection]"], "--flink_master '[collection]' is no cluster: name its HOST:PORT, or"),
        (["--flink_master=[local"], "--flink_master '[local' is no cluster"),
        (["--flink_submit_uber_jar"], "--flink_submit_uber_jar is not supported"),
        (["--flink_master=flink:8081", "--environment_type=LOOPBACK"], "flink:8081 cannot reach: leave it out"),
        (["--job_endpoint=flink:8099", "--environment_type=LOOPBACK"], "flink:8099 cannot reach: leave it out"),
        (["--flink_master=flink:8081"], "name a folder that they and this machine see with --artifacts_dir"),
        ([*ELSEWHERE, "--output=gs://b/out"], "the workers of flink:8081 do not see: write it into a folder"),
        ([*ELSEWHERE, "--input=gs://b/in/*"], "the default output is a folder of this machine, which the workers of"),
        (["--job_endpoint=flink:8099", "--parallelism=2"], "which the workers of flink:8099 do not see"),
    ],
)
def test_options_that_cannot_work_are_refused(given, told, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--runner=flink", *given])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_what_workers_of_another_machine_see_or_what_stays_here_is_taken():
    parse(["--runner=flink", *ELSEWHERE, "--input=/shared/in.jsonl", "--output=/shared/out"])
    parse(["--runner=flink", "--flink_master=localhost:8081"])
    parse(["--runner=flink", "--flink_master=[::1]:8081"])


def test_the_job_servers_own_options_are_known():
    options = parse(
        ["--runner=flink", "--execution_mode_for_batch=BATCH", "--object_reuse=false", "--rows_per_shard=7"]
    )
    assert {"--execution_mode_for_batch=BATCH", "--object_reuse=false"} < set(options.beam_options)
    assert options.rows_per_shard == 7
    with pytest.raises(SystemExit):
        parse(["--runner=flink", "--object_reuse=perhaps"])


@pytest.mark.parametrize("name", ["flink", "Flink", "FlinkRunner", "apache_beam.runners.portability.FlinkRunner"])
def test_flink_is_known_by_all_its_names(name):
    assert flink.is_flink(name)


def test_other_runners_are_not_flink():
    assert not any(map(flink.is_flink, ("local", "PrismRunner", "dataflow", "my.flink.OwnRunner")))


# The job server's jar.


def jar_of(path: Path, manifest: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("META-INF/MANIFEST.MF", manifest)
    return path


@pytest.fixture
def built(tmp_path) -> Path:
    return jar_of(tmp_path / "beam-runners-flink-1.19-job-server-2.62.0.jar", "")


def test_the_version_of_a_jar_is_in_its_name_or_among_its_libraries(tmp_path, built):
    manifest = "Manifest-Version: 1.0\r\nClass-Path: lib/a.jar lib/beam-runners-fl\r\n ink-1.18-2.60.0.jar\r\n"
    assert flink.version_of_jar(built) == "1.19"
    assert flink.version_of_jar(Path("beam-runners-flink-2.2-job-server-2.77.0.jar")) == "2.2"
    assert flink.version_of_jar(jar_of(tmp_path / "own.jar", manifest)) == "1.18"
    assert flink.version_of_jar(jar_of(tmp_path / "other.jar", "Manifest-Version: 1.0\r\n")) is None


def test_the_jar_that_is_named_is_taken_else_the_built_one_where_it_fits(tmp_path, built):
    named = jar_of(tmp_path / "own.jar", "")
    assert flink.find_jar([f"--flink_job_server_jar={named}"], built, "1.19.3") == str(named)
    assert flink.find_jar([], built, "1.19.3") == str(built)
    assert flink.find_jar([], built, None) == str(built)
    assert flink.find_jar(["--flink_version=1.19"], built, None) == str(built)
    assert flink.find_jar(["--flink_version=2.2"], built, None) is None
    assert flink.find_jar([], built, "2.2.0") is None
    assert flink.find_jar([], None, "1.19.3") is None


def test_a_jar_that_is_not_there_or_of_another_flink_is_refused(built):
    with pytest.raises(FileNotFoundError, match=r"names nowhere.jar, and there is no such file: deploy/flink/build"):
        flink.find_jar(["--flink_job_server_jar=nowhere.jar"], built, None)
    with pytest.raises(ValueError, match=r"the cluster runs Flink 2.2.0, and the job server .* is for Flink 1.19"):
        flink.find_jar([f"--flink_job_server_jar={built}"], None, "2.2.0")
    with pytest.raises(ValueError, match=r"is for Flink 1.18"):
        flink.find_jar(["--flink_job_server_jar=https://host/beam-runners-flink-1.18-job-server.jar"], None, "1.19.3")
    with pytest.raises(ValueError, match=r"--flink_version is 2.2, but the cluster runs Flink 1.19.3"):
        flink.find_jar(["--flink_version=2.2"], built, "1.19.3")


# What is looked for before anything runs.


class FakeFlink(BaseHTTPRequestHandler):
    """Answers as a cluster of three slots, two of them free."""

    overview: ClassVar[dict] = {"flink-version": "1.19.3", "slots-total": 3, "slots-available": 2, "jobs-running": 1}

    def do_GET(self):
        self.send_response(200 if self.path == "/overview" else 404)
        self.end_headers()
        self.wfile.write(json.dumps(self.overview).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def fake_flink(monkeypatch) -> Iterator[str]:
    """HOST:PORT of something that answers as a cluster."""
    monkeypatch.setattr(FakeFlink, "overview", dict(FakeFlink.overview))
    server = HTTPServer(("localhost", 0), FakeFlink)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def root(tmp_path, built) -> Path:
    """A repository in which the job server is built."""
    folder = tmp_path / "root" / ".cache" / "flink" / "job-server"
    folder.mkdir(parents=True)
    shutil.copy(built, folder)
    return tmp_path / "root"


@pytest.fixture
def bin_folder(tmp_path, monkeypatch) -> Path:
    """The only folder of programs there is, with a Java 17 in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    put_program(folder / "java", "echo 'openjdk version \"17.0.15\" 2025-04-15' >&2")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return folder


def put_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def prepared(root: Path, *given: str) -> list[str]:
    """Returns what is found beside the options given."""
    options = flink.complete([FLINK, *given], None)
    return flink_setup.prepare(options, root)[len(options) :]


def test_java_the_built_jar_and_the_free_slots_are_found(root, bin_folder, fake_flink):
    jar = root / ".cache/flink/job-server/beam-runners-flink-1.19-job-server-2.62.0.jar"
    found = [f"--flink_job_server_jar={jar}", f"--job_server_java_launcher={bin_folder}/java"]
    assert prepared(root) == found
    assert prepared(root, f"--flink_master={fake_flink}") == ["--parallelism=2", *found]
    assert prepared(root, f"--flink_master={fake_flink}", "--parallelism=9") == found


def test_a_cluster_without_task_managers_yet_says_nothing_of_slots(root, bin_folder, fake_flink):
    FakeFlink.overview |= {"slots-total": 0, "slots-available": 0}
    assert not any("parallelism" in option for option in prepared(root, f"--flink_master={fake_flink}"))


def test_a_full_cluster_is_told_at_once(root, bin_folder, fake_flink):
    FakeFlink.overview |= {"slots-available": 0}
    with pytest.raises(ValueError, match="all 3 slots of the cluster are taken, and 1 jobs run there"):
        prepared(root, f"--flink_master={fake_flink}")
    assert prepared(root, f"--flink_master={fake_flink}", "--parallelism=3")


def test_no_java_or_an_old_one_is_told_at_once(root, bin_folder, monkeypatch):
    put_program(bin_folder / "java", "echo 'java version \"1.8.0_292\"' >&2")
    with pytest.raises(flink_setup.FlinkError, match=r"java is Java 8. Flink needs Java 11 or later"):
        prepared(root)
    put_program(bin_folder / "java", "echo broken >&2; exit 3")
    with pytest.raises(flink_setup.FlinkError, match=r"java -version fails: broken. Flink needs Java 11"):
        prepared(root)
    (bin_folder / "java").rename(bin_folder / "hidden")
    with pytest.raises(flink_setup.FlinkError, match=r"there is no 'java'\. Flink needs Java 11 or later: install it"):
        prepared(root)
    (bin_folder / "bin").mkdir()
    put_program(bin_folder / "bin" / "java", "echo 'openjdk version \"21\" 2025-04-15' >&2")
    monkeypatch.setenv("JAVA_HOME", str(bin_folder))
    assert prepared(root)[-1] == f"--job_server_java_launcher={bin_folder}/bin/java"


def test_an_unreachable_cluster_or_job_server_is_told_at_once(root, bin_folder):
    (port,) = free_ports(1)
    with pytest.raises(flink_setup.FlinkError, match=f"no Flink answers at http://localhost:{port}/overview"):
        prepared(root, f"--flink_master=localhost:{port}")
    with pytest.raises(flink_setup.FlinkError, match=f"no job server answers at --job_endpoint localhost:{port}"):
        prepared(root, f"--job_endpoint=localhost:{port}", "--parallelism=2")
    with pytest.raises(flink_setup.FlinkError, match="no job server answers at --job_endpoint somewhere"):
        prepared(root, "--job_endpoint=somewhere", "--parallelism=2")


def test_a_job_server_that_runs_needs_neither_java_nor_jar(tmp_path, fake_flink):
    assert prepared(tmp_path, f"--job_endpoint={fake_flink}", "--parallelism=2") == []


def test_a_job_that_would_run_on_one_slot_is_told_so(tmp_path, fake_flink, capsys):
    assert prepared(tmp_path, f"--job_endpoint={fake_flink}") == []
    assert "without a number the job runs on one: add --parallelism N" in capsys.readouterr().err
    for told in "--parallelism=2", f"--flink_master={fake_flink}":
        prepared(tmp_path, f"--job_endpoint={fake_flink}", told)
    assert capsys.readouterr().err == ""


def test_the_slots_of_a_job_servers_cluster_are_known_where_its_master_is_named_too(tmp_path, fake_flink):
    assert prepared(tmp_path, f"--job_endpoint={fake_flink}", f"--flink_master={fake_flink}") == ["--parallelism=2"]


def test_where_beam_cannot_fetch_its_jar_it_is_told_what_to_do(tmp_path, bin_folder, monkeypatch):
    (port,) = free_ports(1)
    url = f"http://localhost:{port}/beam-runners-flink-1.19-job-server-2.77.0.jar"
    monkeypatch.setattr(JavaJarJobServer, "path_to_beam_jar", lambda *_: url)
    cache = f"--jar_cache_dir={tmp_path}"
    with pytest.raises(flink_setup.FlinkError) as told:
        prepared(tmp_path, cache)
    assert str(told.value).startswith(
        f"there is no job server for Flink 1.19, and Beam could not fetch its own: {url}: "
    )
    assert "Build one with deploy/flink/build-job-server.sh" in str(told.value)
    assert "name it with --flink_job_server_jar" in str(told.value)
    # One that was put where Beam keeps its own needs no network.
    (tmp_path / "beam-runners-flink-1.19-job-server-2.77.0.jar").touch()
    assert (
        prepared(tmp_path, cache)[0]
        == f"--flink_job_server_jar={tmp_path}/beam-runners-flink-1.19-job-server-2.77.0.jar"
    )


def test_where_beam_can_fetch_its_jar_it_comes_into_its_cache(tmp_path, bin_folder, monkeypatch):
    name = "beam-runners-flink-1.19-job-server-2.77.0.jar"
    (tmp_path / "maven").mkdir()
    (tmp_path / "maven" / name).write_bytes(b"the jar")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "maven")
    with ThreadingHTTPServer(("localhost", 0), handler) as maven:
        threading.Thread(target=maven.serve_forever, daemon=True).start()
        url = f"http://localhost:{maven.server_port}/{name}"
        monkeypatch.setattr(JavaJarJobServer, "path_to_beam_jar", lambda *_: url)
        cache = tmp_path / "cache"
        assert prepared(tmp_path, f"--jar_cache_dir={cache}")[0] == f"--flink_job_server_jar={cache / name}"
        maven.shutdown()
    assert (cache / name).read_bytes() == b"the jar"


@pytest.mark.parametrize("line", ["restart-strategy:\n  type: none", '"a.b": c', "a/b: c", "a.b:c", "# a: b"])
def test_properties_that_are_no_flat_settings_are_refused(line):
    environment = os.environ | {"FLINK_PROPERTIES": line}
    done = subprocess.run([SCRIPT, "status"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: FLINK_PROPERTIES has the line '")
    assert "write KEY: VALUE, a line for each" in done.stderr


def test_the_command_tells_it_in_one_line_and_leaves_nothing(tmp_path, capfd):
    (port,) = free_ports(1)
    output = tmp_path / "out"
    assert main(["flink", f"--flink_master=localhost:{port}", f"--output={output}"]) == 1
    said = capfd.readouterr().err
    assert said.startswith(f"error: no Flink answers at http://localhost:{port}/overview")
    assert said.count("\n") == 1
    assert not output.exists()


# The job server's keeper.

KEEPER = ROOT / "pipeline" / "flink_job_server.py"


def keeper_command(parent: int, log: Path, *command: str) -> list[str]:
    return [sys.executable, str(KEEPER), str(parent), str(log), *command]


def is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


@linux
def test_a_job_server_ends_with_the_process_that_wants_it(tmp_path):
    id_file, log = tmp_path / "id", tmp_path / "log"
    server = ["bash", "-c", f"echo said; echo $$ > {id_file}.new; mv {id_file}.new {id_file}; exec sleep 100"]
    submitting = "import os, subprocess, sys; subprocess.run([*sys.argv[1:3], str(os.getpid()), *sys.argv[3:]])"
    submitter = subprocess.Popen([sys.executable, "-c", submitting, sys.executable, str(KEEPER), str(log), *server])
    wait_until("the server runs", id_file.exists, 20)
    server_id = int(id_file.read_text())
    assert is_alive(server_id)
    submitter.kill()
    submitter.wait()
    wait_until("the server has ended", lambda: not is_alive(server_id), 20)
    assert log.read_text() == "said\n"


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_server_ends_when_its_keeper_is_told_to(tmp_path, number):
    log = tmp_path / "log"
    keeper = subprocess.Popen(keeper_command(os.getpid(), log, "bash", "-c", "echo said; exec sleep 100"))
    wait_until("the server runs", lambda: log.exists() and log.read_text(), 20)
    time.sleep(0.2)
    keeper.send_signal(number)
    assert keeper.wait(20) != 0


@linux
def test_a_job_servers_temporary_folder_goes_with_it(tmp_path):
    log = tmp_path / "log"
    server = ["bash", "-c", 'echo left >"$0/left"; echo "$0"; exec sleep 100', "{temporary}"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    keeper = subprocess.Popen(keeper_command(os.getpid(), log, *server), env=environment)
    folder = Path(wait_until("the server runs", lambda: log.exists() and log.read_text(), 20).strip())
    assert folder.parent == tmp_path
    assert (folder / "left").exists()
    time.sleep(0.2)
    keeper.terminate()
    keeper.wait(20)
    assert not folder.exists()


def test_a_job_server_that_fails_ends_its_keeper_with_the_same_status(tmp_path):
    log = tmp_path / "log"
    done = subprocess.run(keeper_command(os.getpid(), log, "bash", "-c", "echo why; exit 7"), check=False)
    assert done.returncode == 7
    assert log.read_text() == "why\n"


# The scripts.

MAVEN = """
while [[ $1 != --file ]]; do shift; done
cd "$(dirname "$2")"
for option in "$@"; do case $option in -Dtarget=*) target=${option#-Dtarget=} ;; esac; done
mkdir -p "$target/lib" && touch "$target/lib/a.jar"
echo built >> "$BUILDS"
if [[ -n ${FAIL:-} ]]; then exit 1; fi
touch "$target/beam-runners-flink-1.19-job-server-2.62.0.jar"
"""
"""Makes what our pom has Maven make."""


def script(path: Path, *words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(path), *words],
        env={"HOME": "/nowhere"} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def system(tmp_path) -> Path:
    """A folder of programs without Java, Maven and Go."""
    folder = tmp_path / "system"
    folder.mkdir()
    tools = "bash basename cat cp dirname env find grep ln mkdir mktemp mv readlink realpath rm sed sleep touch"
    for name in tools.split():
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def test_the_job_server_is_built_once_and_again_after_a_build_that_failed(tmp_path, system):
    put_program(system / "mvn", MAVEN)
    builds = tmp_path / "builds"
    environment = {"PATH": str(system), "FLINK_CACHE": "cache", "BUILDS": str(builds)}
    failed = script(BUILD, cwd=tmp_path, FAIL="1", **environment)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "error: Maven could not fetch the job server's libraries; behind a proxy" in failed.stderr
    assert list((tmp_path / "cache").iterdir()) == []
    for _ in range(2):
        done = script(BUILD, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        jar = Path(done.stdout.rstrip("\n"))
        assert jar == tmp_path / "cache" / "job-server" / "beam-runners-flink-1.19-job-server-2.62.0.jar"
        assert jar.is_file()
    assert builds.read_text() == "built\n" * 2
    (tmp_path / "cache" / "job-server" / "built-from").write_text("another pom")
    assert script(BUILD, cwd=tmp_path, **environment).returncode == 0
    assert builds.read_text() == "built\n" * 3
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["job-server"]


def test_without_maven_it_is_told_what_to_install(tmp_path, system):
    done = script(BUILD, PATH=str(system), FLINK_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no Maven (mvn) to build the job server with: install it")


@linux
def test_without_java_go_or_the_environment_it_is_told_what_to_install(tmp_path, system):
    environment = {
        "PATH": str(system),
        "FLINK_CACHE": str(tmp_path / "cache"),
        "FLINK_CLUSTER": str(tmp_path / "cluster"),
        "PYTHON": sys.executable,
    }
    done = script(SCRIPT, "up", **environment)
    assert (done.returncode, done.stderr[: len("error: there is no Java")]) == (1, "error: there is no Java")
    put_program(system / "java", "")
    done = script(SCRIPT, "up", **environment)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no Go, which builds the program that starts the workers")
    put_program(system / "go", "")
    done = script(SCRIPT, "up", **environment | {"PYTHON": "/nowhere/python"})
    assert done.returncode == 1
    assert "error: there is no /nowhere/python" in done.stderr


@linux
def test_taking_down_a_cluster_that_was_never_up_does_no_harm(tmp_path):
    environment = {"PATH": os.environ["PATH"], "FLINK_CLUSTER": str(tmp_path / "cluster"), "PYTHON": sys.executable}
    assert script(SCRIPT, "down", **environment).returncode == 0
    status = script(SCRIPT, "status", **environment)
    assert (status.returncode, status.stdout) == (1, f"no cluster runs in {tmp_path}/cluster\n")
    assert script(SCRIPT, "upp", **environment).returncode == 2


@linux
@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("FLINK_SLOTS", "many", "FLINK_SLOTS=many is no whole number from 1"),
        ("FLINK_TASK_MANAGERS", "0", "FLINK_TASK_MANAGERS=0 is no whole number from 1"),
        ("FLINK_REST_PORT", "8081 ", "FLINK_REST_PORT=8081  is no whole number from 1"),
        ("FLINK_TASK_MANAGER_MEMORY", "4", "FLINK_TASK_MANAGER_MEMORY=4 is no amount of memory: write 4g or 3072m"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tmp_path, setting, value, told):
    environment = {"PATH": os.environ["PATH"], "FLINK_CLUSTER": str(tmp_path / "cluster"), setting: value}
    done = script(SCRIPT, "up", **environment)
    assert (done.returncode, done.stderr) == (1, f"error: {told}\n")
    assert not (tmp_path / "cluster").exists()


def make_cluster(folder: Path, process_id: int | None = None) -> None:
    """Makes a folder as `up` leaves it, with one process or none."""
    (folder / "run").mkdir(parents=True, exist_ok=True)
    (folder / "pids").mkdir()
    (folder / "start-worker.sh").write_text("#!/usr/bin/env bash\n# Becomes a worker of deploy/flink/cluster.sh.\n")
    if process_id is not None:
        (folder / "pids" / "jobmanager.pid").write_text(f"{process_id}\n")


@linux
@pytest.mark.parametrize(
    "settings",
    [
        {"FLINK_CLUSTER": "{}/cache/cluster/"},
        {"FLINK_CLUSTER": "{}//cache/./cluster"},
        {"FLINK_CLUSTER": "cache/cluster"},
        {"FLINK_CLUSTER": "{}/link/cluster"},
        {"FLINK_CACHE": "cache/"},
        {"FLINK_CACHE": "{}/link"},
    ],
    ids=lambda settings: "=".join(*settings.items()),
)
def test_a_cluster_is_found_whatever_leads_to_its_folder(tmp_path, settings):
    (tmp_path / "link").symlink_to("cache")
    folder = tmp_path / "cache" / "cluster"
    (folder / "run").mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"], cwd=folder / "run") as process:
        try:
            make_cluster(folder, process.pid)
            environment = {name: value.format(tmp_path) for name, value in settings.items()}
            environment |= {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "FLINK_REST_PORT": "1"}
            status = script(SCRIPT, "status", cwd=tmp_path, **environment)
            assert status.stdout.splitlines() == [
                f"jobmanager runs (process {process.pid})",
                "TaskManagers at http://localhost:1: no JobManager",
            ]
            assert status.returncode == 0
            assert script(SCRIPT, "down", cwd=tmp_path, **environment).returncode == 0
            assert process.wait(0) == -signal.SIGTERM
        finally:
            process.kill()
    assert [path.name for path in folder.iterdir()] == ["start-worker.sh"]


@linux
@pytest.mark.parametrize("word", ["up", "down", "status"])
@pytest.mark.parametrize("content", ["run/mine", "pids/mine", "conf/config.yaml", "start-worker.sh", ".hidden"])
def test_a_folder_with_other_things_is_no_cluster(tmp_path, system, word, content):
    path = tmp_path / "folder" / content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with subprocess.Popen(["sleep", "60"], cwd=path.parent) as process:
        try:
            # Without Java: should `up` ever go on, it starts nothing.
            environment = {"PATH": str(system), "FLINK_CLUSTER": f"{tmp_path}/folder", "PYTHON": sys.executable}
            done = script(SCRIPT, word, **environment)
            assert (done.returncode, done.stdout) == (1, "")
            assert f"error: FLINK_CLUSTER={tmp_path}/folder holds something else than a cluster" in done.stderr
            assert process.poll() is None
        finally:
            process.kill()
    assert path.read_text() == "mine"
    done = script(SCRIPT, word, **environment | {"FLINK_CLUSTER": str(path)})
    assert (done.returncode, done.stderr) == (1, f"error: FLINK_CLUSTER={path} is not a folder\n")


@linux
@pytest.mark.parametrize(("slots", "off_heap", "memory"), [("2", "256m", "2048m"), ("5", "640m", "2816m")])
def test_a_cluster_is_made_anew_but_what_others_put_beside_it_stays(tmp_path, system, slots, off_heap, memory):
    for tool in ("java", "go", "mvn"):
        put_program(system / tool, "")
    # One Python for the script that says the same to every question: packages, Beam's version, TaskManagers.
    python = system / "python"
    put_program(python, "echo same")
    cache = tmp_path / "cache"
    for name in ("flink-1.19.3/lib", "flink-1.19.3/conf", "boot-same", "worker-python", "job-server/lib"):
        (cache / name).mkdir(parents=True)
    (cache / "flink-1.19.3" / "conf" / "config.yaml").write_text("env:\n  java: {}\n\njobmanager:\n")
    (cache / "worker-python" / "made-from").write_text("same\n")
    (cache / "job-server" / "built-from").write_text((BUILD.parent / "pom.xml").read_text())
    for jar in ("flink-1.19.3/lib/flink.jar", "job-server/job-server.jar", "job-server/lib/beam.jar"):
        (cache / jar).touch()
    folder = tmp_path / "cluster"
    make_cluster(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "lib").mkdir()
    (folder / "lib" / "old.jar").touch()
    for tool in ("chmod", "flock", "tail"):
        (system / tool).symlink_to(str(shutil.which(tool)))
    ports = dict(zip(("FLINK_REST_PORT", "FLINK_RPC_PORT", "FLINK_POOL_PORT"), map(str, free_ports(3)), strict=True))
    environment = {"PATH": str(system), "FLINK_CLUSTER": f"{folder}/", "FLINK_CACHE": "cache", "PYTHON": str(python)}
    content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (cache / "flink-1.19.3.new.killed").mkdir()
    done = script(SCRIPT, "fetch", cwd=tmp_path, **environment | ports)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert content == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not (cache / "flink-1.19.3.new.killed").exists()

    done = script(SCRIPT, "up", cwd=tmp_path, FLINK_SLOTS=slots, **environment | ports)
    # Nothing of it can start here, which comes after.
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the cluster did not come up" in done.stderr
    settings = (folder / "conf" / "config.yaml").read_text().splitlines()
    assert settings[:2] == ["env:", "  java: {}"]
    # As deploy/flink/README.md says: 256 MB, and 128 more for each slot above two.
    assert {
        f"taskmanager.numberOfTaskSlots: {slots}",
        f"taskmanager.memory.framework.off-heap.size: {off_heap}",
        f"taskmanager.memory.process.size: {memory}",
    } <= {*settings}
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["conf", "lib", "log", "notes.txt", "start-worker.sh"]
    assert {path.name: path.readlink() for path in (folder / "lib").iterdir()} == {
        "flink.jar": cache / "flink-1.19.3" / "lib" / "flink.jar",
        "beam.jar": cache / "job-server" / "lib" / "beam.jar",
    }
    # It is still known as a cluster.
    assert script(SCRIPT, "down", **environment).returncode == 0


def test_the_pom_is_xml_that_names_one_flink():
    import xml.etree.ElementTree as ElementTree

    space = {"m": "http://maven.apache.org/POM/4.0.0"}
    pom = ElementTree.parse(ROOT / "deploy" / "flink" / "pom.xml")
    (version,) = pom.findall("m:properties/m:flink.version", space)
    assert f"flink_version={version.text}." in SCRIPT.read_text()
