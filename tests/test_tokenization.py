from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from transforms.tokenization import WindowTokenizer, groups_by_length, padded_batches

lengths = st.lists(st.integers(1, 40), max_size=60)


def make_tokenizer(window_tokens: int = 8, max_tokens: int = 100) -> WindowTokenizer:
    return WindowTokenizer(tiny_tokenizer(), window_tokens, max_tokens)


def test_tokens_are_the_tokenizers_own_without_special_tokens():
    (tokenized,) = make_tokenizer().tokenize(["Read the zip file"])
    assert tokenized.token_ids.tolist() == tiny_tokenizer().encode("read the zip file", add_special_tokens=False).ids
    assert tokenized.token_ids.dtype == np.int32
    assert not tokenized.truncated


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\x00"])
def test_a_text_of_nothing_has_no_tokens_and_one_window(text):
    tokenizer = make_tokenizer()
    (tokenized,) = tokenizer.tokenize([text])
    assert len(tokenized.token_ids) == 0
    (window,) = tokenizer.windows(tokenized.token_ids)
    assert window.tolist() == [tokenizer.cls_id, tokenizer.sep_id]


def test_special_tokens_written_in_a_text_are_text():
    tokenizer = make_tokenizer()
    (tokenized,) = tokenizer.tokenize(["a [SEP] b"])
    assert tokenizer.sep_id not in tokenized.token_ids


@pytest.mark.parametrize(("words", "truncated"), [(99, False), (100, False), (101, True), (5000, True)])
def test_texts_are_cut_at_max_tokens_and_marked(words, truncated):
    (tokenized,) = make_tokenizer(max_tokens=100).tokenize(["the " * words])
    assert len(tokenized.token_ids) == min(words, 100)
    assert tokenized.truncated is truncated


@given(st.text(alphabet="ab.é\u3000\u4e2d\u00a0 \n", max_size=300), st.integers(1, 30))
def test_a_long_text_tokenized_by_prefix_has_the_tokens_of_the_whole(text, max_tokens):
    (tokenized,) = make_tokenizer(max_tokens=max_tokens).tokenize([text])
    whole = tiny_tokenizer().encode(text, add_special_tokens=False).ids
    assert tokenized.token_ids.tolist() == whole[:max_tokens]
    assert tokenized.truncated == (len(whole) > max_tokens)


def test_words_with_huge_gaps_between_them_are_all_found():
    (tokenized,) = make_tokenizer(max_tokens=3).tokenize(["the" + " " * 10_000 + "file" + " " * 10_000 + "zip"])
    assert len(tokenized.token_ids) == 3
    assert not tokenized.truncated


def test_text_without_white_space_is_tokenized_no_further_than_needed():
    seen = []
    tokenizer = make_tokenizer(max_tokens=10)
    encode = tokenizer._tokenizer.encode_batch_fast
    tokenizer._tokenizer = SimpleNamespace(encode_batch_fast=lambda texts, **_: seen.extend(texts) or encode(texts))
    (tokenized,) = tokenizer.tokenize(["\u4e2d" * 1_000_000])
    assert tokenized.truncated
    assert len(seen[0]) < 1000


@given(st.integers(0, 100), st.integers(3, 20))
def test_windows_hold_each_token_once_and_are_of_like_length(count, window_tokens):
    tokenizer = make_tokenizer(window_tokens)
    token_ids = np.arange(1000, 1000 + count)
    windows = tokenizer.windows(token_ids)
    assert np.concatenate([window[1:-1] for window in windows]).tolist() == token_ids.tolist()
    assert all(window[0] == tokenizer.cls_id and window[-1] == tokenizer.sep_id for window in windows)
    sizes = [len(window) for window in windows]
    assert max(sizes) <= window_tokens
    assert max(sizes) - min(sizes) <= 1


@given(lengths, st.integers(1, 200), st.integers(0, 60))
def test_batches_hold_each_window_once_within_area_and_padding(sizes, max_batch_tokens, max_padding_tokens):
    windows = [np.full(size, index + 1) for index, size in enumerate(sizes)]
    batches = list(padded_batches(windows, max_batch_tokens, max_padding_tokens, pad_id=0))
    assert sorted(index for batch in batches for index in batch.window_indices) == list(range(len(sizes)))
    for batch in batches:
        area = batch.input_ids.size
        assert area <= max_batch_tokens or len(batch.input_ids) == 1
        assert area - sum(sizes[index] for index in batch.window_indices) <= max_padding_tokens
        mask = np.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        for row, index in enumerate(batch.window_indices):
            assert batch.input_ids[row][mask[row] == 1].tolist() == windows[index].tolist()
            assert (batch.input_ids[row][mask[row] == 0] == 0).all()


@given(lengths, st.integers(1, 100))
def test_groups_hold_each_text_once_within_their_sum(sizes, max_tokens):
    groups = [group.tolist() for group in groups_by_length(np.array(sizes, dtype=np.int64), max_tokens)]
    assert sorted(place for group in groups for place in group) == list(range(len(sizes)))
    for group in groups:
        assert sum(sizes[place] for place in group) <= max_tokens or len(group) == 1
    in_order = [sizes[place] for group in groups for place in group]
    assert in_order == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((2, 10), "window_tokens must be above 2, not 2"), ((8, 0), "max_tokens must be at least 1, not 0")],
)
def test_limits_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowTokenizer(tiny_tokenizer(), *arguments)


def test_a_tokenizer_without_special_tokens_is_refused():
    with pytest.raises(ValueError, match=r"no \[CLS\] token"):
        WindowTokenizer(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), 8, 10)


def test_batches_of_no_area_are_refused():
    with pytest.raises(ValueError, match="max_batch_tokens must be at least 1, not 0"):
        list(padded_batches([np.ones(3)], 0, 0, 0))
