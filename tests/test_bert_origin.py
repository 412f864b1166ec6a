"""A BERT's name and SHA-256 are those of the file it came from, until its weights are others."""

import copy
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import make_tiny_encoder

from transforms.encoder import BertLstmEncoder


def test_a_checkpoint_of_its_own_bert_can_be_saved_anywhere_but_not_from_rounded_weights(tmp_path, tiny_checkpoint):
    loaded = BertLstmEncoder.from_pretrained(tiny_checkpoint).on("cpu", torch.bfloat16)
    loaded.save_pretrained(tmp_path / "copy")  # The file is copied, not the rounded weights.
    assert BertLstmEncoder.from_pretrained(tmp_path / "copy").fingerprint() == loaded.fingerprint()
    rounded = make_tiny_encoder().on("cpu", torch.bfloat16)
    for _ in range(2):
        with pytest.raises(ValueError, match="save the encoder before it is rounded"):
            rounded.save_pretrained(tmp_path / "rounded")
        assert not (tmp_path / "rounded").exists()
        rounded.on("cpu")  # It brings back the type, not the weights.
    double(rounded.bert.embeddings.word_embeddings.weight)  # Trained on, it is what it is.
    rounded.save_pretrained(tmp_path / "rounded")
    assert BertLstmEncoder.from_pretrained(tmp_path / "rounded").fingerprint() == rounded.fingerprint()


def double(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2)


@pytest.mark.parametrize("change", [double, lambda weight: weight.data.mul_(2)])
@pytest.mark.parametrize("of_folder", [False, True])
def test_a_bert_that_was_changed_is_saved_as_it_is(tmp_path, tiny_checkpoint, change, of_folder):
    if of_folder:
        encoder = BertLstmEncoder.from_bert(f"{tiny_checkpoint}/bert")
    else:
        encoder = BertLstmEncoder.from_pretrained(tiny_checkpoint)
    loaded_sha256 = encoder.bert_sha256
    change(encoder.bert.embeddings.word_embeddings.weight)
    encoder.save_pretrained(tmp_path)
    saved = BertLstmEncoder.from_pretrained(tmp_path)
    np.testing.assert_array_equal(saved.encode(["read the zip"]), encoder.encode(["read the zip"]))
    assert saved.bert_name == "bert"
    assert saved.bert_sha256 == encoder.bert_sha256 != loaded_sha256
    assert saved.fingerprint() == encoder.fingerprint()


def test_a_bert_without_a_file_is_saved_as_it_is_whatever_changed_it(tmp_path):
    encoder = make_tiny_encoder()
    before = encoder.bert_sha256
    encoder.bert.embeddings.word_embeddings.weight.data.mul_(2)
    encoder.save_pretrained(tmp_path)
    assert BertLstmEncoder.from_pretrained(tmp_path).bert_sha256 == encoder.bert_sha256 != before


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_a_copy_keeps_name_and_fingerprint_until_its_own_weights_change(copy_of, tiny_checkpoint):
    loaded = BertLstmEncoder.from_pretrained(tiny_checkpoint)
    for encoder in (loaded.on("cpu", torch.bfloat16).on("cpu"), make_tiny_encoder().on("cpu", torch.bfloat16)):
        copied = copy_of(encoder)
        assert (copied.fingerprint(), copied.bert_name) == (encoder.fingerprint(), encoder.bert_name)
        double(copied.bert.embeddings.word_embeddings.weight)
        assert copied.fingerprint() != encoder.fingerprint()
    double(loaded.bert.embeddings.word_embeddings.weight)
    assert copy_of(loaded).fingerprint() == loaded.fingerprint()


def test_the_fingerprint_follows_every_change_of_the_bert(tiny_checkpoint):
    for encoder in (BertLstmEncoder.from_pretrained(tiny_checkpoint), make_tiny_encoder()):
        fingerprints = [encoder.fingerprint()]
        for _ in range(2):
            double(encoder.bert.embeddings.word_embeddings.weight)
            fingerprints.append(encoder.fingerprint())
        encoder.on("cpu", torch.bfloat16)
        assert encoder.fingerprint() == fingerprints[-1]
        double(encoder.bert.embeddings.word_embeddings.weight)
        fingerprints.append(encoder.fingerprint())
        assert len(set(fingerprints)) == 4


def test_a_bert_that_is_only_moved_or_rounded_stays_what_it_was_loaded_as(tmp_path, tiny_checkpoint):
    loaded = BertLstmEncoder.from_pretrained(tiny_checkpoint)
    fingerprint = loaded.fingerprint()
    loaded.bert.to(torch.bfloat16)
    assert loaded.fingerprint() == fingerprint
    loaded.on("cpu").save_pretrained(tmp_path / "by itself")
    assert loaded.fingerprint() == fingerprint
    loaded.on("cpu", torch.float16).on("cpu").save_pretrained(tmp_path / "rounded")
    for name in ("by itself", "rounded"):
        assert BertLstmEncoder.from_pretrained(tmp_path / name).fingerprint() == fingerprint


def test_a_changed_bert_of_a_package_goes_into_the_checkpoint(tmp_path):
    encoder = BertLstmEncoder.from_pretrained("default")
    encoder.save_pretrained(tmp_path / "same")
    assert not (tmp_path / "same" / "bert").exists()
    double(encoder.bert.encoder.layer[0].output.dense.bias)
    with pytest.raises(ValueError, match="its weights changed since they were loaded: leave include_bert=False out"):
        encoder.save_pretrained(tmp_path / "changed", include_bert=False)
    encoder.save_pretrained(tmp_path / "changed")
    saved = BertLstmEncoder.from_pretrained(tmp_path / "changed")
    assert (saved.bert_name, saved.bert_sha256) == ("bert", encoder.bert_sha256)


def test_a_checkpoint_can_be_saved_to_the_folder_it_was_loaded_from(tmp_path, tiny_checkpoint):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    encoder = BertLstmEncoder.from_pretrained(folder)
    before = encoder.fingerprint()
    encoder.save_pretrained(folder)
    assert BertLstmEncoder.from_pretrained(folder).fingerprint() == before
    double(encoder.bert.embeddings.word_embeddings.weight)
    double(encoder.lstm.bias_hh_l0)
    encoder.save_pretrained(folder)
    assert BertLstmEncoder.from_pretrained(folder).fingerprint() == encoder.fingerprint() != before


def test_a_head_on_a_bert_in_a_folder_takes_it_along(tmp_path, tiny_checkpoint, monkeypatch):
    BertLstmEncoder.from_bert(f"{tiny_checkpoint}/bert").save_pretrained(tmp_path / "head")
    monkeypatch.chdir(tmp_path)
    assert BertLstmEncoder.from_pretrained("head").bert_name == "bert"
