"""Fixtures that several test files share: a tiny encoder, a checkpoint of it, and the same runs on a slow machine."""

import math
import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel

from pipeline import progress_line
from transforms import known_vectors
from transforms.encoder import BertLstmEncoder

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the a of to and in is it read write file zip archive text lines words red green blue fast slow".split()
PIECES = [chr(letter) for letter in range(ord("a"), ord("z") + 1)] + list("0123456789.,!?'-")
VOCABULARY = [*SPECIAL_TOKENS, *WORDS, *(piece for piece in PIECES if piece not in WORDS), *(f"##{p}" for p in PIECES)]


# The models are tiny: more threads than one only wait for each other.
torch.set_num_threads(1)

# The servers of the tests are on this machine: no proxy leads to them.
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "localhost,127.0.0.1"]))


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        # They take as long as half of the others: one process begins with them, and the other does the rest.
        items.sort(key=lambda item: "cluster" not in item.fixturenames)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(autouse=True)
def no_clock():
    """Leaves out what a run does only when it takes long, so that it does the same on a machine that is busy.

    That is to say how far it is, and to save its work on the way. Tests of these set the times themselves.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress_line, "_LOG_INTERVAL_SECONDS", 1e6)
        patch.setattr(known_vectors, "_MIN_INTERVAL_SECONDS", math.inf)
        patch.setattr(known_vectors, "_MAX_INTERVAL_SECONDS", math.inf)
        yield


def tiny_tokenizer() -> Tokenizer:
    """A WordPiece tokenizer as BERT's, of some words and all letters, digits and common punctuation."""
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def make_tiny_encoder(seed: int = 0, **arguments) -> BertLstmEncoder:
    """An encoder with a random BERT of 2 layers, 32 wide, 64 positions; `arguments` go to BertLstmEncoder."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return BertLstmEncoder(BertModel(config, add_pooling_layer=False), tiny_tokenizer(), **arguments)


@pytest.fixture
def tiny_encoder() -> BertLstmEncoder:
    """A new tiny encoder for each test, so that a test may change it."""
    return make_tiny_encoder()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> str:
    """The folder of a checkpoint of the tiny encoder; tests only read it."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make_tiny_encoder().save_pretrained(folder)
    return str(folder)
