"""Token embeddings of a frozen BERT, computed once and kept on disk, so that every epoch reads them."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from transforms.encoder import BertLstmEncoder

_EMBEDDINGS_FILE = "token_embeddings.float16"
_OFFSETS_FILE = "offsets.npy"
_PROGRESS_FILE = "progress.json"
_TEXTS_PER_CHUNK = 2048
"""Texts that are computed between two notes of progress; an interruption costs as many."""


class TokenEmbeddings:
    """The token embeddings of a list of texts, as a file in memory's stead.

    Args:
      folder: where `compute_token_embeddings` put them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.offsets = np.load(folder / _OFFSETS_FILE)
        flat = np.memmap(folder / _EMBEDDINGS_FILE, dtype=np.float16, mode="r")
        self._embeddings = flat.reshape(self.offsets[-1], -1)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, tokens of each text, special tokens counted."""
        return np.diff(self.offsets)

    def of(self, text: int) -> np.ndarray:
        """Returns a text's token embeddings, (tokens, width) float16."""
        return self._embeddings[self.offsets[text] : self.offsets[text + 1]]


def compute_token_embeddings(encoder: BertLstmEncoder, texts: Sequence[str], folder: Path) -> TokenEmbeddings:
    """Computes the token embeddings of texts, or finds those that an earlier call left.

    They take 2 bytes for each number: 768 bytes a token for a BERT 384 wide.

    Args:
      encoder: its BERT, windows and `max_tokens` are used, on its device and in its type.
      texts: any number of them.
      folder: they are kept in a folder of it, named by all that they depend on; work that was interrupted is
        taken up there.

    Returns:
      Them, in the order of the texts.
    """
    folder = folder / f"token-embeddings-{_key(encoder, texts)}"
    folder.mkdir(parents=True, exist_ok=True)
    progress_file = folder / _PROGRESS_FILE
    done = json.loads(progress_file.read_text(encoding="utf-8"))["texts"] if progress_file.exists() else 0
    token_ids = [text.token_ids for text in encoder.tokenizer.tokenize(texts)]
    windows = [encoder.tokenizer.windows(ids) for ids in token_ids]
    offsets = np.concatenate(([0], np.cumsum([sum(map(len, parts)) for parts in windows]))).astype(np.int64)
    np.save(folder / _OFFSETS_FILE, offsets)
    if done < len(texts):
        shape = (int(offsets[-1]), encoder.bert.config.hidden_size)
        file = folder / _EMBEDDINGS_FILE
        embeddings = np.memmap(file, np.float16, mode="r+" if done else "w+", shape=shape)
        with tqdm(total=shape[0], initial=int(offsets[done]), unit="token", desc="BERT", unit_scale=True) as bar:
            for start in range(done, len(texts), _TEXTS_PER_CHUNK):
                end = min(start + _TEXTS_PER_CHUNK, len(texts))
                _compute(encoder, windows[start:end], offsets[start:end], embeddings)
                embeddings.flush()
                write_whole(progress_file, json.dumps({"texts": end}).encode())
                bar.update(int(offsets[end] - offsets[start]))
    return TokenEmbeddings(folder)


@torch.inference_mode()
def _compute(
    encoder: BertLstmEncoder, windows: Sequence[list[np.ndarray]], offsets: np.ndarray, embeddings: np.memmap
) -> None:
    """Computes the token embeddings of texts, given as windows, and puts them where each text's offset says."""
    flat = [window for parts in windows for window in parts]
    starts = np.concatenate([offset + _starts(parts) for offset, parts in zip(offsets, windows, strict=True)])
    for windows_done, token_embeddings, _ in encoder.embed_windows(flat):
        computed = token_embeddings.to(torch.float16).cpu().numpy()
        start = 0
        for window in windows_done:
            length = len(flat[window])
            embeddings[starts[window] : starts[window] + length] = computed[start : start + length]
            start += length


def _starts(parts: Sequence[np.ndarray]) -> np.ndarray:
    lengths = np.array([len(part) for part in parts])
    return np.cumsum(lengths) - lengths


def _key(encoder: BertLstmEncoder, texts: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{encoder.bert_sha256} {encoder.tokenizer.sha256()} {encoder.dtype}".encode())
    digest.update(f"{encoder.tokenizer.window_tokens} {encoder.max_tokens}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    return digest.hexdigest()[:16]


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file so that an interruption leaves the old one or the new one, never a part."""
    part = file.with_name(file.name + ".part")
    part.write_bytes(content)
    os.replace(part, file)
