"""launch.sh, with a stand-in for uv: what is installed is not the point here, when and how it is."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("bash", "cat", "dirname", "env", "mkdir", "mv", "rm", "sleep", "tr")

# Makes a .venv whose program says how it was called, and whose checks can fail.
UV = f"""#!/usr/bin/env bash
echo "$1 in $PWD index=${{UV_DEFAULT_INDEX:-}} extra=${{UV_INDEX:-}} cert=${{SSL_CERT_FILE:-}}: $*" >>"$LOG"
[[ -z ${{FAIL:-}} || $1 != "$FAIL" ]] || exit 1
venv=$(dirname "$LOG")/.venv
case $1 in
  venv)
    mkdir "$venv" || exit 1
    mkdir "$venv/bin"
    printf '#!/usr/bin/env bash\\nexec "{sys.executable}" "$@"\\n' >"$venv/bin/python"
    cat >"$venv/bin/embed-corpus" <<'END'
#!/usr/bin/env bash
exec "{sys.executable}" -c 'import json, os, sys
python = {{name: value for name, value in os.environ.items() if name.startswith("PYTHON")}}
print(json.dumps({{"cwd": os.getcwd(), "python": python, "argv": sys.argv}}))
sys.exit(7)' "$@"
END
    for name in ruff mypy pytest; do
      printf '#!/usr/bin/env bash\\necho "check in $PWD: %s $*"\\n[[ ${{FAIL:-}} != %s ]]\\n' $name $name \\
        >"$venv/bin/$name"
    done
    chmod +x "$venv/bin/"*
    ;;
  pip)
    touch "$venv/half-made"
    until [[ -z ${{INSTALLS_WITH:-}} || -e $INSTALLS_WITH ]]; do sleep 0.1; done
    rm "$venv/half-made"
    ;;
esac
"""

# A Python whose pip and venv can be missing, and whose pip installs the stand-in for uv.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-c "*"sys.version_info >= (3, 10)"*) echo "$0" ;;
  "-m pip config get "*) [[ -n ${{HAS_PIP:-}} && $5 == global.index-url ]] && echo https://index.from.pip.conf/simple ;;
  "-m pip "*)
    [[ -n ${{HAS_PIP:-}} ]] || exit 1
    [[ $3 == install ]] || exit 0
    [[ "$PIP_USER$PIP_REQUIRE_VIRTUALENV" == 00 ]] || exit 1
    while [[ $1 != --target ]]; do shift; done
    mkdir -p "$2/bin"
    cp "$STAND_IN" "$2/bin/uv"
    ;;
  "-m venv "*)
    [[ -n ${{HAS_VENV:-}} ]] || exit 1
    mkdir -p "$3/bin"
    printf '#!/usr/bin/env bash\\nHAS_PIP=1 "%s" "$@"\\n' "$0" >"$3/bin/python"
    chmod +x "$3/bin/python"
    ;;
  *) exec "{sys.executable}" "$@" ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of what launch.sh reads, in a folder with a space, on a machine that has no more than it is given."""

    def __init__(self, folder: Path):
        self.machine = folder / "machine"
        self.root = folder / "a clone"
        self.elsewhere = folder / "else where"
        self.root.mkdir()
        self.elsewhere.mkdir()
        for name in ("launch.sh", "setup.py", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        self.bin = self.machine / "bin"
        self.bin.mkdir(parents=True)
        for tool in (*TOOLS, "chmod", "cp", "touch"):
            os.symlink(str(shutil.which(tool)), self.bin / tool)
        self.add_program("python3", PYTHON)
        self.add_program("uv", UV)
        self.environment = {"PATH": str(self.bin), "HOME": str(self.machine)}

    @property
    def log(self) -> Path:
        """Where the stand-in for uv writes what it was called for."""
        return self.root / "log"

    def add_program(self, name: str, text: str) -> Path:
        return executable(self.bin / name, text)

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.root / "launch.sh", *words],
            cwd=self.elsewhere,
            env=self.environment | {"LOG": str(self.log)} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(*words, **environment)
        stdout, stderr = process.communicate(timeout=240)
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    def uv_calls(self) -> list[str]:
        """What uv was called for since the last time this was asked, without its version."""
        if not self.log.exists():
            return []
        lines = [line for line in self.log.read_text().splitlines() if not line.startswith("--version")]
        self.log.unlink()
        return lines

    def set_ups(self) -> int:
        """How many environments were made since the last time this was asked."""
        return sum(line.startswith("venv") for line in self.uv_calls())


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path.resolve())


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_usage_needs_no_set_up(checkout, words):
    result = checkout.call(*words)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: ./launch.sh WORD [OPTIONS]")
    assert checkout.uv_calls() == []


def test_a_word_and_its_options_reach_the_pipeline_as_they_were_given(checkout):
    result = checkout.call("local", "--input", "a b/*.txt", "", "--x=$y", PYTHONDONTWRITEBYTECODE="1")
    # In the caller's folder, so that relative paths mean what they say; whose own modules are not imported. What Python
    # compiles is kept.
    assert json.loads(result.stdout) == {
        "cwd": str(checkout.elsewhere),
        "python": {"PYTHONSAFEPATH": "1"},
        "argv": ["-c", "local", "--input", "a b/*.txt", "", "--x=$y"],
    }
    assert result.returncode == 7


def test_a_package_of_the_same_name_where_the_caller_stands_is_not_imported(tmp_path):
    """Nor on Python 3.10, which does not know PYTHONSAFEPATH."""
    for name in ("pipeline", "transforms"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('this is another package')")
    program = Path(sys.executable).with_name("embed-corpus")
    if not program.exists():
        pytest.skip("the package is not installed in this environment")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run([program, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: ")


def test_the_first_call_installs_the_tested_versions_in_the_checkout(checkout):
    checkout.call("local")
    venv, install = checkout.uv_calls()
    assert f"in {checkout.root} " in venv
    assert venv.endswith(f"{checkout.root}/.venv")
    assert f"in {checkout.root} " in install
    assert install.endswith(f"{checkout.root}/.venv/bin/python --constraint constraints.txt --editable .[test]")


def test_later_calls_set_nothing_up(checkout):
    checkout.call("local")
    assert checkout.set_ups() == 1
    result = checkout.call("local")
    assert (result.returncode, result.stderr) == (7, "")
    assert checkout.uv_calls() == []


@pytest.mark.parametrize("name", ["setup.py", "pyproject.toml", "constraints.txt"])
def test_a_changed_recipe_sets_up_anew(checkout, name):
    checkout.call("local")
    with open(checkout.root / name, "a") as file:
        file.write("# changed\n")
    checkout.call("local")
    assert checkout.set_ups() == 2


def test_a_checkout_that_was_moved_sets_up_anew(checkout):
    checkout.call("local")
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert checkout.call("local").returncode == 7
    assert checkout.set_ups() == 2


def test_a_virtual_environment_whose_python_is_gone_is_made_anew(checkout):
    checkout.call("local")
    python = checkout.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python")
    assert checkout.call("local").returncode == 7
    assert checkout.set_ups() == 2


@pytest.mark.parametrize("only_the_shell", [False, True])
def test_a_set_up_that_was_killed_is_repaired_by_the_next_call(checkout, only_the_shell):
    go_on = checkout.machine / "go-on"
    process = checkout.start("local", INSTALLS_WITH=str(go_on))
    half_made = checkout.root / ".venv" / "half-made"
    wait_until(half_made.exists)
    if only_the_shell:  # What it started goes on and ends its work; the next call waits for that.
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    following = checkout.start("local")
    if only_the_shell:
        assert following.stderr.readline().startswith("Waiting for another set-up")
    go_on.touch()
    following.communicate(timeout=240)
    assert following.returncode == 7
    assert not half_made.exists()
    assert checkout.set_ups() == (1 if only_the_shell else 2)


def test_two_calls_at_once_set_up_once(checkout):
    go_on = checkout.machine / "go-on"
    processes = [checkout.start("local", INSTALLS_WITH=str(go_on)) for _ in range(3)]
    # Two of them find that the third has begun.
    began = [process.stderr.readline().partition(" ")[0] for process in processes if process.stderr]
    assert sorted(began) == ["Setting", "Waiting", "Waiting"]
    go_on.touch()
    assert [process.communicate()[0] != "" for process in processes] == [True] * 3
    assert [process.returncode for process in processes] == [7] * 3
    assert checkout.set_ups() == 1


@pytest.mark.parametrize("step", ["venv", "pip"])
def test_a_set_up_that_failed_runs_nothing_and_is_tried_again(checkout, step):
    result = checkout.call("local", FAIL=step)
    assert result.returncode == 1
    assert result.stdout == ""
    assert checkout.call("local").returncode == 7
    assert checkout.set_ups() == 2


def test_names_of_python_that_do_not_run_are_passed_over(checkout):
    checkout.add_program("python3.13", "#!/usr/bin/env bash\necho 'not switched on' >&2\nexit 127\n")
    checkout.add_program("python3.12", "#!/usr/bin/env bash\nexit 1\n")
    assert checkout.call("local").returncode == 7
    assert f"--python {checkout.bin}/python3 " in checkout.uv_calls()[0]


def test_no_python_is_a_clear_error(checkout):
    (checkout.bin / "python3").unlink()
    result = checkout.call("local")
    assert result.returncode == 1
    assert result.stderr.startswith("error: no Python 3.10 or later was found: install one")
    assert checkout.uv_calls() == []


@pytest.mark.parametrize("python", ["/nonexistent/python", "cat"])
def test_a_chosen_python_that_will_not_do_is_a_clear_error(checkout, python):
    checkout.call("local")
    result = checkout.call("local", PYTHON=python)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"error: PYTHON={python} is no Python 3.10 or later\n"


def test_the_chosen_python_is_used_and_kept(checkout):
    other = checkout.add_program("another python", PYTHON.replace('*) exec "', '*) OTHER=1 exec "'))
    assert checkout.call("local", PYTHON=str(other)).returncode == 7
    assert checkout.call("local", PYTHON=str(other)).returncode == 7
    assert checkout.call("local").returncode == 7  # Whichever Python it was made of.
    assert checkout.set_ups() == 1


def test_another_chosen_python_sets_up_anew(checkout):
    checkout.call("local")
    other = f"""#!/usr/bin/env bash
if [[ $1 == -E ]]; then echo '(3, 99, 0) /other'; else exec "{sys.executable}" "$@"; fi
"""
    checkout.call("local", PYTHON=str(checkout.add_program("other", other)))
    assert checkout.set_ups() == 2


@pytest.mark.parametrize("has", ["HAS_PIP", "HAS_VENV"])
def test_uv_is_fetched_where_there_is_none_and_kept_in_the_checkout(checkout, has):
    (checkout.bin / "uv").unlink()
    stand_in = executable(checkout.machine / "stand-in", UV)
    settings = {has: "1", "STAND_IN": str(stand_in), "PIP_USER": "1", "PIP_REQUIRE_VIRTUALENV": "1"}
    before = set(checkout.machine.rglob("*"))
    result = checkout.call("local", **settings)
    assert result.returncode == 7, result.stderr
    assert set(checkout.machine.rglob("*")) == before
    assert sorted(path.name.startswith("uv-") for path in (checkout.root / ".cache").iterdir()) == [False, True]
    (checkout.root / ".venv" / "set-up-from").unlink()
    assert checkout.call("local").returncode == 7  # With neither pip nor venv: the uv is there.


def test_no_way_to_fetch_uv_is_a_clear_error(checkout):
    (checkout.bin / "uv").unlink()
    result = checkout.call("local")
    assert result.returncode == 1
    assert "has neither pip nor venv, and there is no uv: install one of them" in result.stderr


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "index= extra= cert=:"),
        ({"HAS_PIP": "1"}, "index=https://index.from.pip.conf/simple extra= cert=:"),
        ({"PIP_INDEX_URL": "https://a/b", "HAS_PIP": "1"}, "index=https://a/b extra= cert=:"),
        ({"PIP_EXTRA_INDEX_URL": "https://a", "PIP_CERT": "/c.pem"}, "index= extra=https://a cert=/c.pem:"),
        ({"PIP_INDEX_URL": "https://a", "UV_DEFAULT_INDEX": "https://uv"}, "index=https://uv extra= cert=:"),
        ({"PIP_INDEX_URL": "https://a", "UV_INDEX_URL": "https://uv"}, "index= extra= cert=:"),
        ({"PIP_CERT": "/c.pem", "SSL_CERT_FILE": "/uv.pem"}, "index= extra= cert=/uv.pem:"),
    ],
)
def test_a_private_index_set_for_pip_counts_for_uv_unless_uv_has_its_own(checkout, settings, expected):
    assert checkout.call("local", **settings).returncode == 7
    assert all(expected in line for line in checkout.uv_calls())


def checks(checkout, *options):
    where = f"check in {checkout.root}: "
    return [where + line for line in ("ruff check ", "ruff format --check ", "mypy ")] + [
        f"{where}pytest {' '.join(options)}"
    ]


def test_test_runs_every_check(checkout):
    result = checkout.call("test", "-k", "some thing")
    assert result.returncode == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("check in")]
    assert [line.strip() for line in lines] == [line.strip() for line in checks(checkout, "-k", "some thing")]


def test_without_options_two_processes_run_the_tests(checkout):
    lines = checkout.call("test").stdout.splitlines()
    expected = f"check in {checkout.root}: pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder"
    assert [line.strip() for line in lines if ": pytest" in line] == [expected]


@pytest.mark.parametrize("failing", ["ruff", "mypy", "pytest"])
def test_test_fails_with_any_check_but_runs_them_all(checkout, failing):
    checkout.call("local")
    result = checkout.call("test", FAIL=failing)
    assert result.returncode == 1
    assert result.stdout.count("check in") == 4


def test_ci_runs_the_test_command_of_the_readme():
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "./launch.sh test </dev/null" in commands
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert os.access(ROOT / "launch.sh", os.X_OK)


def test_ci_fails_where_tests_would_be_skipped(tmp_path):
    for name in ("bash", "dirname"):
        os.symlink(str(shutil.which(name)), tmp_path / name)
    executable(tmp_path / "java", "#!/bin/sh\n")
    done = subprocess.run([ROOT / ".ci" / "run"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    told = "error: without mvn some tests would be skipped: install it\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", told)


@pytest.mark.parametrize("is_link", [False, True])
def test_an_activated_environment_is_made_anew_from_the_python_it_was_made_with(checkout, tmp_path, is_link):
    venv = checkout.root / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "real" if is_link else venv], check=True)
    if is_link:
        venv.symlink_to(tmp_path / "real")
    done = checkout.call("local", PATH=f"{venv}/bin:{checkout.bin}")
    assert done.returncode == 7, done.stderr
    (call,) = [line for line in checkout.uv_calls() if line.startswith("venv ")]
    made_with = call.partition(" --python ")[2].removesuffix(f" {venv}")
    assert Path(made_with).exists()
    assert not {venv, tmp_path / "real"} & set(Path(made_with).parents)
