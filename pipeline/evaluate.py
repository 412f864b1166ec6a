"""Measures an encoder: similarity of sentences (STS), retrieval, and whether long documents' halves find each other."""

import argparse
import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from pipeline.option_types import UsageError, path_or_url
from pipeline.training_data import StsPairs, halves, read_columns, read_sts, read_texts
from transforms.devices import DEVICES, DTYPES
from transforms.encoder import BertLstmEncoder
from transforms.hardware import resolve_device, resolve_dtype
from transforms.storage import join, open_for_reading

Encode = Callable[[Sequence[str]], np.ndarray]
"""From n texts to (n, width) float32 of unit length."""

_RETRIEVED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--checkpoint", default="default", metavar="NAME", help="shipped name, folder or gs:// (default: %(default)s)"
    )
    measures = parser.add_argument_group("measures (at least one)")
    measures.add_argument(
        "--sts",
        type=path_or_url,
        metavar="FILE",
        help="scored pairs (.parquet or .jsonl: split, score, sentence1, sentence2): Spearman x 100 of the cosines",
    )
    measures.add_argument("--split", default="dev", metavar="NAME", help="of the STS file (default: %(default)s)")
    measures.add_argument(
        "--retrieval",
        type=path_or_url,
        action="append",
        default=[],
        metavar="DIR",
        help="corpus.parquet (doc_id, title, text), queries.parquet (query_id, text) and qrels.tsv (query_id, doc_id, "
        "relevance): nDCG@10 x 100; repeatable",
    )
    measures.add_argument(
        "--documents",
        type=path_or_url,
        metavar="FILE",
        help="long texts (.txt, .jsonl or .parquet with `text`): how often (%%) the other half of a document is the "
        "nearest of all other halves",
    )
    measures.add_argument(
        "--max_documents", type=int, default=200, metavar="N", help="the first N of them (default: %(default)s)"
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="measure also the BERT without a head (mean of its token embeddings, texts cut at one window) and with "
        "an untrained head",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="type BERT computes in (default: %(default)s, bfloat16 where native)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each encoder and measure; returns the exit status.

    Raises:
      UsageError: no measure was asked for.
    """
    if not (arguments.sts or arguments.retrieval or arguments.documents):
        raise UsageError("nothing to measure: give --sts, --retrieval or --documents")
    sts = read_sts(arguments.sts, arguments.split) if arguments.sts else None
    documents = read_texts(arguments.documents)[: arguments.max_documents] if arguments.documents else []
    device = resolve_device(arguments.device)
    encoder = BertLstmEncoder.from_pretrained(arguments.checkpoint).on(device, resolve_dtype(arguments.dtype, device))
    encoders: dict[str, Encode] = {arguments.checkpoint: encoder.encode}
    if arguments.baselines:
        encoders["BERT, mean of tokens"] = lambda texts: mean_pooled(encoder, texts)
        encoders["untrained head"] = _untrained(encoder).encode
    for name, encode in encoders.items():
        if sts is not None:
            print(f"{name}: STS {arguments.split}, Spearman x 100: {sts_spearman(encode, sts):.2f}", flush=True)
        for folder in arguments.retrieval:
            print(f"{name}: {Path(folder).name}, nDCG@10 x 100: {retrieval_ndcg(encode, folder):.2f}", flush=True)
        if documents:
            found = 100 * halves_found(encode, documents)
            print(f"{name}: {len(documents)} documents, other half found: {found:.2f} %", flush=True)
    return 0


def sts_spearman(encode: Encode, pairs: StsPairs) -> float:
    """Returns Spearman's correlation x 100 of the pairs' cosines with people's scores."""
    vectors = encode([*pairs.first, *pairs.second])
    cosines = np.einsum("nd,nd->n", vectors[: len(pairs.first)], vectors[len(pairs.first) :])
    return 100 * spearman(cosines, pairs.scores)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Returns Spearman's rank correlation of two (n,) arrays; equal values share their mean rank."""
    return float(np.corrcoef(_mean_ranks(first), _mean_ranks(second))[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_ranks = np.cumsum(counts)
    return (last_ranks - (counts - 1) / 2)[places]


def retrieval_ndcg(encode: Encode, folder: str) -> float:
    """Returns the mean nDCG@10 x 100 of a folder's queries; gains are the relevances as they are.

    Raises:
      ValueError: a file lacks a column.
    """
    doc_ids, titles, texts = read_columns(join(folder, "corpus.parquet"), ("doc_id", "title", "text"))
    query_ids, queries = read_columns(join(folder, "queries.parquet"), ("query_id", "text"))
    relevances: dict[str, dict[str, float]] = {}
    with io.TextIOWrapper(open_for_reading(join(folder, "qrels.tsv")), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            relevances.setdefault(row["query_id"], {})[row["doc_id"]] = float(row["relevance"])
    documents = encode([f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)])
    cosines = encode(queries) @ documents.T
    scores = []
    for query_id, row in zip(query_ids, cosines, strict=True):
        known = relevances.get(query_id, {})
        best = np.argsort(-row, kind="stable")[:_RETRIEVED]
        scores.append(ndcg([known.get(doc_ids[place], 0.0) for place in best], list(known.values())))
    return 100 * float(np.mean(scores))


def ndcg(gains: Sequence[float], all_gains: Sequence[float]) -> float:
    """Returns the normalised discounted cumulative gain of a ranking.

    Args:
      gains: of the documents found, best first.
      all_gains: of all relevant documents; the best order of them is 1.
    """
    ideal = sorted(all_gains, reverse=True)[:_RETRIEVED]
    best = _discounted(ideal)
    return _discounted(gains) / best if best else 0.0


def _discounted(gains: Sequence[float]) -> float:
    return float(np.sum(np.asarray(gains) / np.log2(np.arange(2, len(gains) + 2))))


def halves_found(encode: Encode, documents: Sequence[str]) -> float:
    """Returns how often a half of a document has its other half nearest, among all other halves."""
    parts = [halves(text) for text in documents]
    vectors = encode([first for first, _ in parts] + [second for _, second in parts])
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    others = np.roll(np.arange(len(vectors)), len(parts))
    return float(np.mean(cosines.argmax(axis=1) == others))


@torch.inference_mode()
def mean_pooled(encoder: BertLstmEncoder, texts: Sequence[str]) -> np.ndarray:
    """Returns the mean of the BERT's token embeddings over each text's first window, as sentence encoders do it.

    Returns:
      (n, width) float32 of unit length.
    """
    content = encoder.tokenizer.window_tokens - 2
    windows = [encoder.tokenizer.windows(text.token_ids[:content])[0] for text in encoder.tokenizer.tokenize(texts)]
    vectors = np.empty((len(texts), encoder.bert.config.hidden_size), dtype=np.float32)
    for indices, token_embeddings, _ in encoder.embed_windows(windows):
        lengths = [len(windows[index]) for index in indices]
        sums = torch.stack([tokens.float().sum(dim=0) for tokens in token_embeddings.split(lengths)])
        vectors[indices] = torch.nn.functional.normalize(sums, dim=-1).cpu().numpy()
    return vectors


def _untrained(encoder: BertLstmEncoder) -> BertLstmEncoder:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_str(encoder.tokenizer.to_json())
    untrained = BertLstmEncoder(
        encoder.bert, tokenizer, None, encoder.pooling, encoder.tokenizer.window_tokens, encoder.max_tokens
    )
    untrained.lstm.to(encoder.device)
    return untrained
