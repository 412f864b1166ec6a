"""What Beam packs for its workers is a copy of this checkout, all that a package is made from."""

from pathlib import Path

import pytest

from pipeline.dataflow import setup_file
from pipeline.own_sources import packed_from_a_copy

ROOT = Path(__file__).parent.parent
OWN = f"--setup_file={setup_file()}"


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_copy_has_all_that_is_packed_and_goes_when_the_job_has_ended():
    with packed_from_a_copy(["--runner=flink", OWN, "--parallelism=2"]) as options:
        assert (options[0], options[2]) == ("--runner=flink", "--parallelism=2")
        copied = Path(options[1].removeprefix("--setup_file="))
        assert copied.name == "setup.py"
        assert ROOT not in copied.parents
        files = files_of(copied.parent)
    assert not copied.parent.exists()
    for name in ("pipeline", "transforms"):
        expected = {f"{name}/{path}": data for path, data in files_of(ROOT / name).items()}
        assert {path: data for path, data in files.items() if path.startswith(f"{name}/")} == expected
    others = {path for path in files if "/" not in path}
    assert others == {"setup.py", "pyproject.toml", "README.md", "LICENSE"}


def test_two_jobs_at_once_have_copies_of_their_own():
    with packed_from_a_copy([OWN]) as one, packed_from_a_copy([OWN]) as other:
        assert one != other


def test_a_copy_of_a_job_that_fails_goes_too():
    with pytest.raises(OSError, match="no cluster"), packed_from_a_copy([OWN]) as options:
        raise OSError("no cluster")
    assert not Path(options[0].removeprefix("--setup_file=")).exists()


@pytest.mark.parametrize("options", [[], ["--setup_file=own/setup.py"], ["--extra_package=embed_corpus-0.1.0.tar.gz"]])
def test_what_a_person_has_chosen_stands(options):
    with packed_from_a_copy(options) as given:
        assert given == tuple(options)


def test_what_is_installed_has_nothing_to_copy(monkeypatch):
    monkeypatch.setattr("pipeline.own_sources.setup_file", lambda: None)
    with packed_from_a_copy([OWN]) as given:
        assert given == (OWN,)
