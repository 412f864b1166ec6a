"""A copy of this checkout for Beam to pack: packing leaves files beside setup.py while it lasts."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.dataflow import setup_file

_PACKED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "pipeline", "transforms")


@contextmanager
def packed_from_a_copy(beam_options: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Gives Beam's options with a copy's setup.py in place of this checkout's.

    Two jobs that were started from one checkout at once would take each other's files away, and a checkout may be one
    that nobody may write to.
    """
    own = setup_file()
    if own is None or f"--setup_file={own}" not in beam_options:
        yield tuple(beam_options)
        return
    with tempfile.TemporaryDirectory(prefix="embed-corpus-", ignore_cleanup_errors=True) as folder:
        for path in (Path(own).parent / name for name in _PACKED):
            if path.is_dir():
                shutil.copytree(path, Path(folder) / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.exists():  # An image has no more than it needs.
                shutil.copy(path, folder)
        copied = f"--setup_file={Path(folder) / Path(own).name}"
        yield tuple(copied if option == f"--setup_file={own}" else option for option in beam_options)
