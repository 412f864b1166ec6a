import json
from collections import Counter

import pytest

from pipeline import sample
from pipeline.__main__ import main
from transforms import storage

pytest_plugins = ["gcs_emulator"]

SOURCES = {
    "zipped.py": '''
"""Reads archives."""

class Archive:
    """An archive.

    It has members.
    """

    def read(self):
        """Return a member's bytes."""

        def decode():
            """Decode them."""

    async def close(self):
        """Close it."""

    @property
    def silent(self):
        return None

if True:
    def opened():
        """Open a file."""
else:
    def opened():
        """Open a file, on another system."""

match 1:
    case 1:
        try:
            pass
        except ValueError:
            class Failure(Exception):
                """A failure."""

def blank():
    """   """
''',
    "package/__init__.py": '"""A package."""',
    "package/inner.py": '"""A module with an old escape: \\d and an ü."""',
    "package/no_docstring.py": "raise SystemExit('this must not run')",
    "package/test/test_inner.py": '"""A test."""',
    "site-packages/other.py": '"""Somebody else\'s."""',
    "config-3.11/script.py": '"""No module."""',
    "a-script.py": '"""No module either."""',
}

EXPECTED = [
    ("package", "A package.", "package", "module"),
    ("package.inner", "A module with an old escape: \\d and an ü.", "package.inner", "module"),
    ("zipped", "Reads archives.", "zipped", "module"),
    ("zipped.Archive", "An archive.\n\nIt has members.", "zipped", "class"),
    ("zipped.Archive.read", "Return a member's bytes.", "zipped", "method"),
    ("zipped.Archive.read.decode", "Decode them.", "zipped", "function"),
    ("zipped.Archive.close", "Close it.", "zipped", "method"),
    ("zipped.opened", "Open a file.", "zipped", "function"),
    ("zipped.opened#2", "Open a file, on another system.", "zipped", "function"),
    ("zipped.Failure", "A failure.", "zipped", "class"),
]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small library in the place of Python's own."""
    folder = tmp_path / "library"
    for name, source in SOURCES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    monkeypatch.setattr(sample, "library_folder", lambda: folder)
    return folder


@pytest.mark.filterwarnings("error")
def test_docstrings_come_whole_in_order_and_with_unique_ids(library):
    assert [tuple(record[field] for field in sample.FIELDS) for record in sample.docstrings(library)] == EXPECTED


def test_the_file_holds_the_docstrings_as_json_lines(library, tmp_path):
    path = sample.write_sample(tmp_path / "new" / "cache")
    lines = path.read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == list(sample.docstrings(library))
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_there_is_taken_as_it_is(library, tmp_path):
    path = sample.write_sample(tmp_path / "cache")
    path.write_text("kept")
    assert sample.write_sample(tmp_path / "cache") == path
    assert path.read_text() == "kept"


def test_nothing_is_left_of_a_file_that_could_not_be_finished(library, tmp_path):
    (library / "zzz.py").write_text("def")
    with pytest.raises(SyntaxError, match=r"zzz\.py"):
        sample.write_sample(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_python_without_sources_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "library_folder", lambda: tmp_path / "python311.zip")
    with pytest.raises(FileNotFoundError, match=r"no docstrings in .*python311\.zip.*--input"):
        sample.write_sample(tmp_path / "cache")


def test_the_command_replaces_a_file_and_says_what_it_wrote(library, tmp_path, capsys):
    path = tmp_path / "corpus.jsonl"
    path.write_text("old")
    assert main(["sample", "--output", str(path)]) == 0
    assert [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()] == [
        id for id, *_ in EXPECTED
    ]
    assert str(path) in capsys.readouterr().out


def test_the_command_replaces_an_object_on_gs(library, gcs_bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = f"{gcs_bucket}/corpora/sample.jsonl"
    storage.create_exclusively(url, b"old")
    assert main(["sample", "--output", url]) == 0
    lines = storage.open_for_reading(url).read().splitlines()
    assert [json.loads(line) for line in lines] == list(sample.docstrings(library))
    assert not (tmp_path / "gs:").exists()


@pytest.mark.parametrize("output", ["s3://bucket/file", "gs://bucket", "gs://bucket/folder/", "gs:/bucket/file", ""])
def test_a_place_that_no_file_can_be_written_to_is_refused(output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(["sample", f"--output={output}"])
    assert refused.value.code == 2
    assert f"argument --output: {output!r} is neither a file of this machine nor gs://" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_this_pythons_library_is_a_corpus():
    records = list(sample.docstrings(sample.library_folder()))
    by_id = {record["id"]: record for record in records}
    assert len(by_id) == len(records)
    assert len({record["text"] for record in records}) > 5000
    assert set(Counter(record["kind"] for record in records)) == {"module", "class", "function", "method"}
    assert "file" in by_id["zipfile"]["text"]
    assert by_id["zipfile.ZipFile.read"]["kind"] == "method"
    for record in records:
        assert record["text"].strip()
        record["text"].encode("utf-8")  # A lone surrogate could not be written, and not be embedded.
