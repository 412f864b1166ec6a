"""A run that finds nothing changed: what counts as a change, and what `--skip_unchanged` does then."""

import json
import os
import time
from pathlib import Path

import pytest
from apache_beam.io.filesystem import FileMetadata, MatchResult
from apache_beam.io.gcp.gcsfilesystem import GCSFileSystem
from embed_runs import PUBLISHED, embed, latest

from pipeline.embed import plan
from pipeline.options import parse
from transforms import storage
from transforms.input_digest import input_digest
from transforms.snapshots import list_published, work_folder

pytest_plugins = ["gcs_emulator"]

LONG_AGO = 1_700_000_000.0


def write(path: Path, texts: dict[str, str], modified_seconds: float = LONG_AGO) -> Path:
    path.write_text("".join(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in texts.items()))
    os.utime(path, (modified_seconds, modified_seconds))
    return path


def test_a_run_never_reads_what_runs_wrote(tmp_path, tiny_checkpoint, monkeypatch):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "1", "text": "read"}\n{"id": "2"}\n')
    os.utime(corpus, (LONG_AGO, LONG_AGO))
    monkeypatch.chdir(tmp_path)
    options = ["--input=**/*.json*", f"--checkpoint={tiny_checkpoint}", "--max_rejected_fraction=0.5"]
    for count in (1, 2):
        assert embed(*options, "--skip_unchanged", "--full", output="out") == PUBLISHED
        assert len(list_published("out")) == count
        assert latest("out").manifest["counts"]["read"] == 2
    assert embed(*options, "--skip_unchanged", output="out") == PUBLISHED
    assert len(list_published("out")) == 2


def test_files_and_settings_decide_the_digest(tmp_path):
    write(tmp_path / "a.jsonl", {"1": "one"})
    pattern = str(tmp_path / "*.jsonl")

    def digest(**settings) -> str | None:
        return input_digest([pattern], {"encoder": "e"} | settings, time.time())

    first = digest()
    assert first == digest()
    assert first is not None
    digests = [first, digest(encoder="other")]
    write(tmp_path / "a.jsonl", {"1": "two"}, LONG_AGO + 1)  # As long as it was.
    digests.append(digest())
    write(tmp_path / "a.jsonl", {"1": "longer"}, LONG_AGO + 1)
    digests.append(digest())
    write(tmp_path / "b.jsonl", {"2": "two"})
    digests.append(digest())
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    digests.append(digest())
    assert len(set(digests)) == len(digests)


def test_a_file_written_just_now_has_no_digest_yet(tmp_path):
    """It may be written once more in the same moment, at the same size."""
    path = write(tmp_path / "a.jsonl", {"1": "one"}, LONG_AGO)
    assert input_digest([str(path)], {}, LONG_AGO + 5) is None
    assert input_digest([str(path)], {}, LONG_AGO + 15) is not None


def test_remote_files_have_a_digest_too(gcs_bucket):
    before = time.time()
    storage.create_exclusively(f"{gcs_bucket}/a.txt", b"one\n")
    patterns = [f"{gcs_bucket}/*.txt"]
    later = time.time() + 60
    first = input_digest(patterns, {}, later)
    assert first is not None
    assert first == input_digest(patterns, {}, later)
    assert input_digest(patterns, {}, before) is None
    storage.create_exclusively(f"{gcs_bucket}/b.txt", b"two\n")
    assert input_digest(patterns, {}, later) != first


def test_a_remote_file_whose_name_has_brackets_has_a_digest_of_its_own(gcs_bucket):
    """As a glob its name matches another file."""
    storage.create_exclusively(f"{gcs_bucket}/a1.txt", b"other\n")
    storage.create_exclusively(f"{gcs_bucket}/a[1].txt", b"one\n")
    later = time.time() + 60
    digests = [input_digest([f"{gcs_bucket}/{name}"], {}, later) for name in ("a[1].txt", "a1.txt", "*.txt")]
    assert None not in digests
    assert len(set(digests)) == len(digests)


def test_a_remote_file_without_a_time_has_no_digest(monkeypatch):
    found = [FileMetadata("gs://b/x", 1, LONG_AGO), FileMetadata("gs://b/y", 1)]
    monkeypatch.setattr(GCSFileSystem, "exists", lambda *_: False)
    for listed, has_digest in ((found[:1], True), (found, False)):
        monkeypatch.setattr(GCSFileSystem, "match", lambda *_, listed=listed: [MatchResult("gs://b/*", listed)])
        assert (input_digest(["gs://b/*"], {}, time.time()) is not None) is has_digest


def test_a_run_that_finds_nothing_changed_ends_without_a_snapshot(tmp_path, tiny_checkpoint, capfd):
    source, output = write(tmp_path / "a.jsonl", {"1": "read a file", "2": "a zip archive"}), tmp_path / "out"
    options = [f"--input={source}", f"--checkpoint={tiny_checkpoint}", "--skip_unchanged"]
    assert embed(*options, output=output) == PUBLISHED
    (first,) = list_published(str(output))
    capfd.readouterr()

    assert embed(*options, output=output) == PUBLISHED
    assert capfd.readouterr().out == (
        f"nothing changed since the last snapshot in {output}: there is nothing to publish\n"
    )
    assert list_published(str(output)) == [first]
    assert [name for name in os.listdir(output) if name.startswith("snapshot=")] == [f"snapshot={first}"]

    for changed in ([*options, "--max_tokens=7"], [*options, "--full"], options[:2]):
        before = len(list_published(str(output)))
        assert embed(*changed, output=output) == PUBLISHED
        assert len(list_published(str(output))) == before + 1

    # The last of these runs was without the option, and left nothing to compare with.
    assert latest(output).manifest["input_digest"] is None
    assert embed(*options, output=output) == PUBLISHED
    write(source, {"1": "read a file", "2": "a tar archive"}, LONG_AGO + 60)
    assert embed(*options, output=output) == PUBLISHED
    assert latest(output).manifest["counts"]["texts_encoded"] == 1


@pytest.mark.parametrize(
    "changed",
    ["--input_format=text", "--text_field=title", "--id_field=", "--keep_fields=title", "--max_document_bytes=999",
     "--rows_per_shard=7", "--compression=none", "--max_rejected_fraction=0.5", "--keep_snapshots=3", "--max_tokens=7"],
)  # fmt: skip
def test_an_option_that_changed_is_a_change(tmp_path, tiny_checkpoint, changed):
    source = tmp_path / "a.jsonl"
    source.write_text('{"id": "1", "text": "read a file", "title": "read"}\n')
    os.utime(source, (LONG_AGO, LONG_AGO))

    def is_planned(*more: str) -> bool:
        options = [f"--input={source}", f"--output={tmp_path}", f"--checkpoint={tiny_checkpoint}", "--skip_unchanged"]
        return plan(parse([*options, "--device=cpu", "--dtype=float32", *more])) is not None

    options = [f"--input={source}", f"--checkpoint={tiny_checkpoint}", "--skip_unchanged"]
    assert embed(*options, output=tmp_path) == PUBLISHED
    assert not is_planned()
    assert is_planned(changed)


def test_work_that_a_crashed_run_left_is_taken_up_though_nothing_changed(tmp_path, tiny_checkpoint):
    source = write(tmp_path / "a.jsonl", {"1": "read a file"})
    options = [f"--input={source}", f"--checkpoint={tiny_checkpoint}", "--skip_unchanged"]
    assert embed(*options, output=tmp_path / "out") == PUBLISHED
    (first,) = list_published(str(tmp_path / "out"))
    left = Path(work_folder(str(tmp_path / "out"), "20260101T000000Z"))
    left.mkdir(parents=True)
    (left / "vectors-torn.parquet").write_bytes(b"PAR1")
    assert embed(*options, output=tmp_path / "out") == PUBLISHED
    assert len(list_published(str(tmp_path / "out"))) == 2
    assert not left.exists()
    assert first != latest(tmp_path / "out").name


def test_a_templates_launch_must_start_a_job(capsys):
    argv = "--runner=dataflow --project=my-project-123 --region=r --temp_location=gs://bucket/t --output=gs://bucket/o".split()
    with pytest.raises(SystemExit):
        parse([*argv, "--input=gs://bucket/a.txt", "--template_location=gs://bucket/job", "--skip_unchanged"])
    assert "--skip_unchanged has no place in a template's launch" in capsys.readouterr().err
