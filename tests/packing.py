"""A fixture that tells what Beam packs for its workers."""

from pathlib import Path

import pytest
from apache_beam.runners.portability.stager import Stager


@pytest.fixture
def packed(monkeypatch) -> list[Path]:
    """The setup.py of each package that Beam has built, which it builds all the same."""
    build, found = Stager._build_setup_package, []

    def build_and_tell(setup_file, *arguments):
        found.append(Path(setup_file))
        return build(setup_file, *arguments)

    monkeypatch.setattr(Stager, "_build_setup_package", staticmethod(build_and_tell))
    return found
