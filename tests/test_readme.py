"""Every command and every example of README.md: options are known, and what is quick is run as it is written."""

import gzip
import json
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from pipeline import embed, options, sample
from pipeline.__main__ import COMMANDS, RUNNERS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def command_lines() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def arguments(words: list[str]) -> list[str]:
    """Returns what reaches `python -m pipeline`."""
    for start in (["./launch.sh"], ["python", "-m", "pipeline"]):
        if words[: len(start)] == start:
            return words[len(start) :]
    raise AssertionError(f"README.md has a command that is not this project's: {shlex.join(words)}")


@pytest.mark.parametrize("words", [words for words in command_lines() if "test" not in words], ids=shlex.join)
def test_a_command_of_the_readme_is_one_and_knows_its_options(words, monkeypatch):
    called = []
    monkeypatch.setattr(embed, "embed", lambda options: called.append(options) or 0)
    for name in COMMANDS:
        if name != "embed":
            monkeypatch.setattr(import_module(f"pipeline.{name}"), "run", lambda given: called.append(given) or 0)
    assert main(arguments(words)) == 0
    assert len(called) == 1


def test_the_readme_has_the_commands_that_a_newcomer_needs():
    words = {arguments(line)[0] for line in command_lines()}
    assert {"local", "search", "test"} <= words
    assert words - {"test"} <= {*COMMANDS, *RUNNERS}


def test_every_option_that_the_readme_names_is_known(capsys):
    known = {"--help", *options._beam_parser()._option_string_actions}
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        known |= set(re.findall(r"--\w+", capsys.readouterr().out))
    named = set(re.findall(r"(?<![\w-])--\w+", README))
    assert named
    assert named <= known


def test_the_first_minute_goes_as_the_readme_says(tmp_path, monkeypatch, capsys):
    """The same commands on a corpus of one module's docstrings, and on files of the names that the README has."""
    library = tmp_path / "library"
    library.mkdir()
    for module in ("tempfile.py", "textwrap.py", "calendar.py"):
        shutil.copy(sample.library_folder() / module, library)
    (library / "archives.py").write_text(
        'def read_member(path, name):\n    """Read a member of a zip archive and return its bytes."""\n'
    )
    monkeypatch.setattr(sample, "library_folder", lambda: library)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    lines = [{"id": f"d{row}", "text": f"An answer, number {row}", "year": row, "title": "T"} for row in range(5)]
    data = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    (tmp_path / "corpus" / "part.jsonl.gz").write_bytes(data)
    monkeypatch.chdir(tmp_path)

    run = []
    for line in command_lines():
        argv = arguments(line)
        if argv[0] in ("local", "search", "inspect") and not {"--checkpoint", "--diff"} & set(argv):
            capsys.readouterr()
            assert main(argv) == 0, shlex.join(argv)
            run.append((shlex.join(argv), capsys.readouterr().out))
    printed = dict(run)
    assert len(printed) >= 5
    assert "published  snapshot=" in printed["local"]
    assert "archives.read_member" in "".join(printed["search 'read a zip archive'"].splitlines()[:5])
    for folder in ("output", "vectors"):
        assert (tmp_path / folder / "LATEST").is_file()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_an_example_in_python_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[number], f"README.md, example {number}", "exec"), {"__name__": "example"})


def test_every_file_that_the_readme_links_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
