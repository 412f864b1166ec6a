"""Reads what a head is trained and judged on: sentences, positive pairs, long documents and STS pairs."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transforms.storage import open_for_reading

PAIR_COLUMNS = (("anchor", "positive"), ("title", "text"))
"""Names that the two columns of a file of pairs may have."""

_MIN_DOCUMENT_CHARS = 200
"""Shorter texts have no halves worth comparing."""


class TrainingTexts(NamedTuple):
    """The texts of a training, each once, and what they are to each other.

    Attributes:
      texts: all of them.
      sentences: (n,) int64, places in `texts` of single texts.
      pairs: (m, 2) int64, places of two texts that mean nearly the same.
      documents: (k, 2) int64, places of the two halves of a long text.
    """

    texts: list[str]
    sentences: np.ndarray
    pairs: np.ndarray
    documents: np.ndarray


class StsPairs(NamedTuple):
    """Sentence pairs that people have scored by their similarity.

    Attributes:
      first: n sentences.
      second: n sentences.
      scores: (n,) float64, higher is more similar.
    """

    first: list[str]
    second: list[str]
    scores: np.ndarray


def read_training_texts(
    sentence_files: Sequence[str],
    pair_files: Sequence[str],
    document_files: Sequence[str],
    max_sentences: int | None,
    max_pairs: int | None,
    max_documents: int | None,
    seed: int,
) -> TrainingTexts:
    """Reads a training's texts, from each file a random sample that depends only on the file and the seed.

    Args:
      sentence_files: text files of a sentence per line, or JSON Lines or Parquet with a field `text`.
      pair_files: JSON Lines or Parquet with the fields of one of `PAIR_COLUMNS`.
      document_files: as `sentence_files`, of long texts.
      max_sentences: the most that are taken from one file of sentences; None for all, as for the next two.
      max_pairs: the most from one file of pairs.
      max_documents: the most from one file of documents.
      seed: of the samples.

    Raises:
      ValueError: a file lacks a column, or nothing is left to train on.
      FileNotFoundError: a file is not there.
    """
    places: dict[str, int] = {}

    def place(text: str) -> int:
        return places.setdefault(text, len(places))

    sentences = [place(text) for file in sentence_files for text in _sample(read_texts(file), max_sentences, seed)]
    pairs = [
        (place(first), place(second))
        for file in pair_files
        for first, second in _sample(read_pairs(file), max_pairs, seed)
    ]
    documents = [
        (place(first), place(second))
        for file in document_files
        for first, second in map(halves, _sample(_long(read_texts(file)), max_documents, seed))
    ]
    if not places:
        raise ValueError("no texts to train on: name files with --sentences, --pairs or --documents")
    return TrainingTexts(
        list(places),
        np.array(sentences, dtype=np.int64),
        np.array(pairs, dtype=np.int64).reshape(-1, 2),
        np.array(documents, dtype=np.int64).reshape(-1, 2),
    )


def read_texts(file: str) -> list[str]:
    """Reads the texts of a file: lines of a text file, or the field `text` of JSON Lines or Parquet; no empty ones."""
    if Path(file).suffix == ".txt":
        with io.TextIOWrapper(_opened(file), encoding="utf-8") as lines:
            texts = lines.read().split("\n")
    else:
        texts = read_columns(file, ("text",))[0]
    return [text for text in texts if text and text.strip()]


def read_pairs(file: str) -> list[tuple[str, str]]:
    """Reads the pairs of a JSON Lines or Parquet file whose columns `PAIR_COLUMNS` name."""
    table = _table(file)
    for columns in PAIR_COLUMNS:
        if set(columns) <= set(table.column_names):
            first, second = (table.column(name).to_pylist() for name in columns)
            return [(a, b) for a, b in zip(first, second, strict=True) if a and a.strip() and b and b.strip()]
    raise ValueError(f"{file} holds the columns {table.column_names}; pairs need {' or '.join(map(str, PAIR_COLUMNS))}")


def read_sts(file: str, split: str) -> StsPairs:
    """Reads the scored sentence pairs of one split.

    Args:
      file: Parquet or JSON Lines with the fields `split`, `score`, `sentence1` and `sentence2`.
      split: `dev`, say.

    Raises:
      ValueError: the file lacks a column, or the split has fewer than two pairs.
    """
    splits, scores, first, second = read_columns(file, ("split", "score", "sentence1", "sentence2"))
    rows = [row for row, name in enumerate(splits) if name == split]
    if len(rows) < 2:
        raise ValueError(f"{file} has {len(rows)} pairs in split {split!r}: its splits are {sorted(set(splits))}")
    return StsPairs(
        [first[row] for row in rows], [second[row] for row in rows], np.array([float(scores[row]) for row in rows])
    )


def read_columns(file: str, columns: Sequence[str]) -> list[list]:
    """Reads columns of a Parquet or JSON Lines file.

    Raises:
      ValueError: the file is of another kind, or lacks a column.
    """
    table = _table(file)
    if missing := [name for name in columns if name not in table.column_names]:
        raise ValueError(f"{file} lacks the columns {missing}: it holds {table.column_names}")
    return [table.column(name).to_pylist() for name in columns]


def halves(text: str) -> tuple[str, str]:
    """Cuts a text in two at the white space after its middle."""
    end = next((i for i in range(len(text) // 2, len(text)) if text[i].isspace()), len(text) // 2)
    return text[:end], text[end:]


def _long(texts: Sequence[str]) -> list[str]:
    return [text for text in texts if len(text) >= _MIN_DOCUMENT_CHARS]


def _sample(items: list, most: int | None, seed: int) -> list:
    """Returns at most so many items, always shuffled, so that a smaller sample is the start of a larger one."""
    return [items[place] for place in np.random.default_rng(seed).permutation(len(items))[:most]]


def _opened(file: str) -> BinaryIO:
    try:
        return open_for_reading(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {file}") from error


def _table(file: str) -> pa.Table:
    suffix = Path(file).suffix
    if suffix == ".parquet":
        with _opened(file) as parquet:
            return pq.read_table(parquet)
    if suffix == ".jsonl":
        with io.TextIOWrapper(_opened(file), encoding="utf-8") as lines:
            return pa.Table.from_pylist([json.loads(line) for line in lines if line.strip()])
    raise ValueError(f"{file}: its name must end in .parquet or .jsonl (or .txt for sentences and documents)")
