import os
import re
import sys
from pathlib import Path

import pytest
from apache_beam.io.filesystem import BeamIOError, FileMetadata, MatchResult
from apache_beam.io.gcp.gcsfilesystem import GCSFileSystem

from transforms import storage
from transforms.files import InputFile, ListedFile, list_files, match_files, open_file

pytest_plugins = ["gcs_emulator"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("a.txt", "b.txt", "c.jsonl", "sub/a.txt", "sub/deep/d.txt", "x[1].txt", "x1.txt", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.txt", ["a.txt"]),
        ("?.txt", ["a.txt", "b.txt"]),
        ("*.jsonl", ["c.jsonl"]),
        ("./*.jsonl", ["c.jsonl"]),
        ("sub/../*.jsonl", ["c.jsonl"]),
        ("*/*.txt", ["sub/a.txt"]),
        ("s?b/de*/*.txt", ["sub/deep/d.txt"]),
        ("**/d.txt", ["sub/deep/d.txt"]),
        ("**/a.txt", ["a.txt", "sub/a.txt"]),
        ("**/*.jsonl", ["c.jsonl"]),
        ("**/**/a.txt", ["a.txt", "sub/a.txt"]),
        ("s*/**/*.txt", ["sub/a.txt", "sub/deep/d.txt"]),
        ("sub/**/deep/**/d.txt", ["sub/deep/d.txt"]),
        ("**/sub/*.txt", ["sub/a.txt"]),
        ("s*/**.txt", ["sub/a.txt", "sub/deep/d.txt"]),
        ("sub/", ["sub/a.txt"]),
        ("[ab].txt", ["a.txt", "b.txt"]),
        ("x[1].txt", ["x[1].txt"]),
        ("x[0-9].txt", ["x1.txt"]),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_globs_match(folder, pattern, expected, absolute):
    pattern = f"{folder}/{pattern}" if absolute else pattern
    assert match_files(pattern) == [InputFile(str(folder / name), len(name)) for name in expected]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.txt", ["in/a.txt", "in/ab.txt", "in/sub/a.txt", "in/sub/deep/a.txt"]),
        ("**/**/a.txt", ["in/a.txt", "in/sub/a.txt", "in/sub/deep/a.txt"]),
        ("in/**/a.txt", ["in/a.txt", "in/sub/a.txt", "in/sub/deep/a.txt"]),
        ("in/**/deep/**/a.txt", ["in/sub/deep/a.txt"]),
        ("in/sub**/a.txt", ["in/sub/a.txt", "in/sub/deep/a.txt"]),
    ],
)
def test_globs_match_the_same_on_gs(gcs_bucket, pattern, expected):
    for name in ("in/a.txt", "in/ab.txt", "in/sub/a.txt", "in/sub/deep/a.txt"):
        storage.create_exclusively(f"{gcs_bucket}/{name}", b"x")
    files = match_files(f"{gcs_bucket}/{pattern}")
    assert files == [InputFile(f"{gcs_bucket}/{name}", 1) for name in expected]
    assert match_files(f"{gcs_bucket}/{pattern}", limit=1) == files[:1]


def test_links_to_folders_are_followed_except_across_folders(folder):
    (folder / "link").symlink_to(folder / "sub")
    (folder / "sub" / "up").symlink_to(folder)
    assert [file.path for file in match_files("*/a.txt")] == [f"{folder}/link/a.txt", f"{folder}/sub/a.txt"]
    assert [file.path for file in match_files("sub/**.txt")] == [f"{folder}/sub/a.txt", f"{folder}/sub/deep/d.txt"]


def test_a_folder_that_may_not_be_read_is_an_error_only_where_files_may_match_in_it(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [file.path for file in match_files("sub/*.txt")] == [f"{folder}/sub/a.txt"]
    assert [file.path for file in match_files("sub/[a-c]*")] == [f"{folder}/sub/a.txt"]
    for pattern in ("sub/*/*.txt", "**.txt"):
        with pytest.raises(PermissionError, match="sub/deep"):
            match_files(pattern)


def test_fewer_files_are_listed_when_asked(folder):
    assert len(match_files("**.txt")) == 7
    assert len(match_files("**.txt", limit=3)) == 3


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("none.txt", FileNotFoundError, "no file matches {folder}/none.txt"),
        ("none*.txt", FileNotFoundError, r"no file matches {folder}/none\*.txt"),
        ("none/*.txt", FileNotFoundError, r"no file matches {folder}/none/\*.txt"),
        ("sub", IsADirectoryError, r"{folder}/sub is a folder: write {folder}/sub/\* for the files in it"),
        ("pipe", OSError, "{folder}/pipe is no regular file"),
        ("p*", OSError, "{folder}/pipe is no regular file"),
        ("broken*", FileNotFoundError, "No such file or directory: '{folder}/broken'"),
        ("broken", FileNotFoundError, "No such file or directory: '{folder}/broken'"),
        ("abc://x/y", ValueError, "abc://x/y: files cannot be read from abc://: .* or install Beam's extra for s3://,"),
        ("bad-*", ValueError, r"bad-\\udcff.txt' is not UTF-8: rename it"),
    ],
)
def test_patterns_that_match_nothing_usable_are_errors_that_name_them(folder, pattern, error, message):
    os.mkfifo(folder / "pipe")
    (folder / "broken").symlink_to(folder / "gone")
    with open(os.fsencode(folder / "bad-") + b"\xff.txt", "w"):
        pass
    with pytest.raises(error, match=message.format(folder=folder)):
        match_files(pattern)


@pytest.mark.parametrize(
    ("pattern", "module", "extra"),
    [("s3://b/*", "boto3", "aws"), ("azfs://a/b/*", "azure.storage.blob", "azure"), ("hdfs://h/*", "hdfs", "hadoop")],
)
def test_storage_whose_package_is_missing_is_refused_with_what_to_install(monkeypatch, pattern, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # Its import fails, as if it was not installed.
    told = rf"{re.escape(pattern)}: reading .* a package .*{module}.* install 'apache-beam\[{extra}\]'`, on the workers"
    with pytest.raises(ValueError, match=told):
        match_files(pattern)


def test_why_remote_files_cannot_be_listed_is_told_without_what_beam_puts_around_it(monkeypatch):
    details = {"gs://b/x": BeamIOError("Exists operation failed", {"gs://b/x": OSError("403 no access to b")})}

    def refuse(*_):
        raise BeamIOError("Match operation failed", details)

    monkeypatch.setattr(GCSFileSystem, "match", refuse)
    with pytest.raises(OSError, match=r"^cannot list gs://b/x: 403 no access to b$"):
        match_files("gs://b/x")


OWN = (
    "LATEST",
    "snapshot=20261123T180000Z/rejected-00000-of-00001.jsonl",
    "snapshot=20261123T180000Z/.parts/a.jsonl",
    ".work/run=20261123T180000Z/a.jsonl",
    ".work/claims/20261123T180000Z.json",
)
NOT_OWN = ("a.jsonl", "LATEST.jsonl", "snapshot=2026/a.jsonl", "sub/.work/a.jsonl", "sub/LATEST")


def test_what_runs_wrote_to_the_output_folder_is_never_listed(tmp_path, monkeypatch):
    output = tmp_path / "out"
    for name in (*OWN, *NOT_OWN):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
    (tmp_path / "link").symlink_to(output)
    inputs = sorted(f"{output}/{name}" for name in NOT_OWN)
    monkeypatch.chdir(tmp_path)
    for named in (str(output), f"{output}/", str(tmp_path / "link")):
        assert [file.path for file in match_files("out/**", output=named)] == inputs
        assert [file.path for file in match_files("out/**", limit=2, output=named)] == inputs[:2]
        assert [file.path for file in match_files("link/*/*.jsonl", output=named)] == [
            f"{tmp_path}/link/snapshot=2026/a.jsonl"
        ]
        told = rf"no file matches {output}/snapshot=2\*Z/\* but those that runs wrote to the output folder {named}, "
        with pytest.raises(FileNotFoundError, match=told):
            match_files("out/snapshot=2*Z/*", output=named)
        with pytest.raises(FileNotFoundError, match="but those that runs wrote"):
            match_files(f"out/{OWN[1]}", output=named)
    with pytest.raises(FileNotFoundError, match=rf"no file matches {output}/none\*$"):
        match_files("out/none*", output=str(output))
    assert len(match_files("out/**", output=str(tmp_path / "other"))) == len(OWN) + len(NOT_OWN)


def test_what_runs_wrote_to_the_output_folder_is_never_listed_on_gs(gcs_bucket):
    output = f"{gcs_bucket}/out"
    for name in (*OWN, *NOT_OWN):
        storage.create_exclusively(f"{output}/{name}", b"{}")
    inputs = sorted(f"{output}/{name}" for name in NOT_OWN)
    for pattern in ("out/**", "**"):
        assert [file.path for file in match_files(f"{gcs_bucket}/{pattern}", output=output)] == inputs
    # The first that the storage lists is none of them.
    assert len(match_files(f"{gcs_bucket}/**", limit=1, output=output)) == 1
    with pytest.raises(FileNotFoundError, match=f"but those that runs wrote to the output folder {output}, "):
        match_files(f"{output}/snapshot=2*Z/*", output=output)


def test_the_time_of_last_writing_is_listed(folder):
    os.utime("a.txt", (1, 1_700_000_000.5))
    path = str(folder / "a.txt")
    for pattern in ("a.txt", "a*.txt"):
        assert list_files(pattern) == [ListedFile(InputFile(path, 5), 1_700_000_000.5)]


def test_a_time_that_storage_does_not_tell_is_none(monkeypatch):
    found = [FileMetadata("gs://b/y", 2, 5.5), FileMetadata("gs://b/x", 1)]
    monkeypatch.setattr(GCSFileSystem, "match", lambda *_: [MatchResult("gs://b/*", found)])
    monkeypatch.setattr(GCSFileSystem, "exists", lambda *_: False)
    assert list_files("gs://b/*") == [
        ListedFile(InputFile("gs://b/x", 1), None),
        ListedFile(InputFile("gs://b/y", 2), 5.5),
    ]


def test_files_are_not_decompressed(folder):
    (folder / "a.gz").write_bytes(b"not gz")
    file = open_file(str(folder / "a.gz"))
    assert list(file.chunks()) == [b"not gz"]
    assert (file.seek(4), file.read(), file.tell()) == (4, b"gz", 6)
    file.close()
    assert file.closed


def test_chunks_are_bounded_and_may_be_fewer(folder):
    (folder / "big").write_bytes(bytes(5 << 20))
    assert [len(chunk) for chunk in open_file("big").chunks()] == [1 << 20] * 5
    assert [len(chunk) for chunk in open_file("big").chunks((1 << 20) + 1)] == [1 << 20, 1]


def test_a_file_shorter_than_it_should_be_is_an_error_that_names_it(folder):
    with pytest.raises(OSError, match=r"a\.txt became 5 bytes shorter"):
        list(open_file("a.txt").chunks(10))


def test_a_file_that_vanished_is_an_error_that_names_it(folder):
    with pytest.raises(OSError, match=r"cannot open none\.txt: .*No such file"):
        open_file("none.txt")


def test_a_failing_read_is_an_error_that_names_the_file(folder):
    file = open_file("a.txt")
    file.close()
    assert file.error is None
    with pytest.raises(OSError, match=r"cannot read a\.txt: read of closed file"):
        file.read()
    assert "a.txt" in str(file.error)
