"""What a manifest must say."""

import copy

import pytest
from snapshot_helper import embedding, prepare

from transforms.manifest import COUNT_KEYS, ENCODER_KEYS, MANIFEST_KEYS, SHARD_KEYS, check_manifest
from transforms.schema import Rejected

ROWS = [embedding(f"d{i}") for i in range(6)]
REJECTED = [Rejected("a.txt", 7, "", "empty_text", "nothing but spaces", "   ")]


@pytest.fixture
def manifest(tmp_path):
    return prepare(str(tmp_path), ROWS, rejected=REJECTED).manifest


def test_a_complete_manifest_passes_and_may_hold_more(manifest):
    check_manifest(manifest)
    manifest["note"] = "of a later release"
    manifest["counts"]["texts_encoded"] = 5
    check_manifest(manifest)


@pytest.mark.parametrize("key", MANIFEST_KEYS)
def test_each_key_is_needed(manifest, key):
    del manifest[key]
    with pytest.raises(ValueError, match=key):
        check_manifest(manifest)


@pytest.mark.parametrize(
    ("part", "key"),
    [*(("encoder", key) for key in ENCODER_KEYS), *(("counts", key) for key in COUNT_KEYS)],
)
def test_each_key_of_its_parts_is_needed(manifest, part, key):
    del manifest[part][key]
    with pytest.raises(ValueError, match=f"{part} lacks {key}"):
        check_manifest(manifest)


@pytest.mark.parametrize("key", SHARD_KEYS)
def test_each_key_of_a_shard_is_needed(manifest, key):
    del manifest["shards"][1][key]
    with pytest.raises(ValueError, match=f"shards lacks {key}"):
        check_manifest(manifest)


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(ValueError, match="not a JSON object"):
        check_manifest(value)


def edited(manifest, path, value):
    changed = copy.deepcopy(manifest)
    *parents, last = path
    target = changed
    for key in parents:
        target = target[key]
    target[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 2, "format is 2, not 1: another release"),
        (["format"], "1", "format is '1', not 1"),
        (["previous"], 3, "previous is 3"),
        (["seconds"], True, "seconds is True"),
        (["encoder", "max_tokens"], "8192", "encoder: max_tokens is '8192'"),
        (["counts", "read"], 7.0, "counts: read is 7.0"),
        (["counts", "deleted"], -1, "deleted is -1"),
        (["counts", "read"], 8, "read is 8, but embedded, reused and rejected together are 7"),
        (["counts", "recovered"], 1, "recovered is 1, but reused only 0"),
        (["rejected_by_reason"], {}, "rejected_by_reason is 0, but rejected together are 1"),
        (["rejected_by_reason"], {"empty_text": "1"}, "rejected_by_reason: empty_text is '1'"),
        (["shards", 1, "rows"], 3, "the shards' rows is 7, but embedded and reused together are 6"),
        (["shards", 1, "rows"], 0, "is not a file of this folder with rows in it"),
        (["shards", 1, "file"], "../other/a.parquet", "is not a file of this folder"),
        (["shards", 1, "file"], "embeddings-00000-of-00002.parquet", "a file is named twice"),
        (["shards", 1], "a.parquet", "shards is not a JSON object"),
    ],
)
def test_values_that_cannot_be_are_refused(manifest, path, value, message):
    check_manifest(manifest)
    with pytest.raises(ValueError, match=message):
        check_manifest(edited(manifest, path, value))
