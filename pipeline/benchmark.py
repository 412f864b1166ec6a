"""Measures how fast this machine embeds: bare encoder and whole job, against sentence-transformers at its defaults."""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch

from pipeline import benchmark_incremental
from pipeline.option_types import path_or_url, positive
from pipeline.sample import write_sample
from pipeline.text_table import text_table
from transforms.checkpoint import CheckpointConfig, bert_folder, checkpoint_folder
from transforms.encoder import BertLstmEncoder
from transforms.hardware import DEVICES, DTYPES, describe, resolve_device, resolve_dtype
from transforms.storage import open_for_reading
from transforms.tokenization import SPECIAL_TOKENS_PER_WINDOW

MAX_TOKENS = 256
"""Where texts are cut for all that is measured, special tokens counted: sentence-transformers' limit for this BERT."""


class Measured(NamedTuple):
    """One corpus in one number type.

    Attributes:
      corpus: its name.
      dtype: the encoder's; sentence-transformers always runs in float32.
      texts: how many.
      tokens: real tokens of all texts, special tokens counted.
      reference: tokens/s of sentence-transformers.
      encoder: tokens/s of the bare encoder, tokenizing included.
      job: tokens/s of the whole job, from JSON Lines to a published snapshot, loading the model included.
      padding_ratio: of the job, padded tokens over real ones.
      peak_bytes: the job's process.
    """

    corpus: str
    dtype: str
    texts: int
    tokens: int
    reference: float
    encoder: float
    job: float
    padding_ratio: float
    peak_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--input",
        type=path_or_url,
        action="append",
        metavar="FILE",
        help="a Parquet or JSON Lines file of texts; repeatable; default: the sample corpus",
    )
    parser.add_argument("--text_field", default="text", metavar="NAME", help="field of the text; default text")
    parser.add_argument(
        "--limit",
        type=positive,
        default=4000,
        metavar="TEXTS",
        help="texts taken from each file, evenly spread; default 4000",
    )
    parser.add_argument("--checkpoint", default="default", metavar="NAME", help="the encoder's; default default")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default auto")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        action="append",
        help="of the encoder; repeatable; default float32, and bfloat16 where the device has it natively",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads of all that is measured; default: all"
    )
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="each is measured N times; default 3")
    parser.add_argument(
        "--incremental",
        action="store_true",
        help="measure instead what a second run costs when little changed: 200,000 short documents unless --documents",
    )
    parser.add_argument(
        "--documents",
        type=benchmark_incremental.number_of_documents,
        default=200_000,
        metavar="N",
        help="of the --incremental corpus; default 200000",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table and returns 0."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.incremental:
        benchmark_incremental.run(arguments.documents, arguments.checkpoint, arguments.device, arguments.dtype)
        return 0
    device = resolve_device(arguments.device)
    dtypes = arguments.dtype or list(
        dict.fromkeys(["float32", str(resolve_dtype("auto", device)).removeprefix("torch.")])
    )
    print(
        f"{describe(device)}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}; texts cut at "
        f"{MAX_TOKENS} tokens; median of {arguments.rounds} rounds"
    )
    measured = []
    with tempfile.TemporaryDirectory() as scratch:
        for path in arguments.input or [write_sample(scratch)]:
            texts = read_texts(str(path), arguments.text_field, arguments.limit)
            measured += _measure(Path(path).stem, texts, dtypes, device, arguments, Path(scratch))
    print(_table(measured))
    return 0


def read_texts(path: str, text_field: str, limit: int) -> list[str]:
    """Reads texts from a Parquet or JSON Lines file.

    Args:
      path: the file.
      text_field: the field of the text.
      limit: the most texts; they are spread evenly over the file.

    Raises:
      ValueError: the file is of another kind, or has no such field of text.
    """
    suffix = Path(path).suffix
    if suffix == ".parquet":
        with open_for_reading(path) as file, pq.ParquetFile(file) as parquet:
            if text_field not in parquet.schema_arrow.names:
                raise ValueError(f"{path} has no column {text_field!r}: name the one of the text with --text_field")
            texts = parquet.read([text_field]).column(text_field).to_pylist()
    elif suffix == ".jsonl":
        with io.TextIOWrapper(open_for_reading(path), encoding="utf-8") as lines:
            texts = [json.loads(line).get(text_field) for line in lines]
    else:
        raise ValueError(f"{path}: only .parquet and .jsonl are read here")
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        raise ValueError(f"{path} has no text in {text_field!r}: name the field of the text with --text_field")
    return texts[:: max(1, len(texts) // limit)][:limit]


def _measure(
    corpus: str,
    texts: Sequence[str],
    dtypes: Sequence[str],
    device: torch.device,
    arguments: argparse.Namespace,
    scratch: Path,
) -> list[Measured]:
    source = scratch / f"{corpus}.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts))
    encoders = {dtype: _encoder(arguments.checkpoint, device, dtype) for dtype in dtypes}
    reference = _sentence_transformer(arguments.checkpoint, device)
    tokenizer = encoders[dtypes[0]].tokenizer
    tokens = sum(len(text.token_ids) + SPECIAL_TOKENS_PER_WINDOW for text in tokenizer.tokenize(texts))
    seconds: dict[str, list[float]] = {"reference": []}
    jobs: dict[str, list[dict[str, Any]]] = {dtype: [] for dtype in dtypes}
    _ = reference(texts[:64]), [encoder.encode(texts[:64]) for encoder in encoders.values()]
    # Round by round, so that what else the machine does falls on all alike.
    for _ in range(arguments.rounds):
        seconds["reference"].append(_timed(reference, texts))
        for dtype, encoder in encoders.items():
            seconds.setdefault(dtype, []).append(_timed(encoder.encode, texts))
            jobs[dtype].append(_run_job(source, scratch / "output", dtype, device, arguments))
    return [
        Measured(
            corpus,
            dtype,
            len(texts),
            tokens,
            tokens / statistics.median(seconds["reference"]),
            tokens / statistics.median(seconds[dtype]),
            tokens / statistics.median(job["seconds"] for job in jobs[dtype]),
            jobs[dtype][0]["counts"]["padded_tokens"] / jobs[dtype][0]["counts"]["tokens"],
            max(job["peak_bytes"] for job in jobs[dtype]),
        )
        for dtype in dtypes
    ]


def _encoder(checkpoint: str, device: torch.device, dtype: str) -> BertLstmEncoder:
    max_tokens = MAX_TOKENS - SPECIAL_TOKENS_PER_WINDOW
    return BertLstmEncoder.from_pretrained(checkpoint, max_tokens).on(device, resolve_dtype(dtype, device))


def _sentence_transformer(checkpoint: str, device: torch.device) -> Callable[[Sequence[str]], Any]:
    """Returns the encode function of sentence-transformers at its defaults, with the same BERT and cut."""
    from sentence_transformers import SentenceTransformer

    folder = checkpoint_folder(checkpoint)
    model = SentenceTransformer(str(bert_folder(CheckpointConfig.read(folder).bert, folder)), device=str(device))
    model.max_seq_length = MAX_TOKENS
    return lambda texts: model.encode(list(texts), show_progress_bar=False)


def _timed(function: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> float:
    started = time.perf_counter()
    function(texts)
    return time.perf_counter() - started


def _run_job(
    source: Path, output: Path, dtype: str, device: torch.device, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Runs `embed` in a process of its own; returns its manifest, with the process's peak memory."""
    command = [
        sys.executable, "-m", "pipeline", "embed", f"--input={source}", f"--output={output}", "--full",
        f"--dtype={dtype}", f"--device={device.type}", f"--max_tokens={MAX_TOKENS - SPECIAL_TOKENS_PER_WINDOW}",
        f"--checkpoint={arguments.checkpoint}",
    ]  # fmt: skip
    environment = dict(os.environ)
    if arguments.threads:
        environment["OMP_NUM_THREADS"] = str(arguments.threads)
    with open(source.with_suffix(".log"), "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-2000:]}")
    latest = (output / "LATEST").read_text().strip()
    manifest = json.loads((output / f"snapshot={latest}" / "manifest.json").read_text())
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return manifest | {"peak_bytes": usage.ru_maxrss * unit_bytes}


def _table(measured: Sequence[Measured]) -> str:
    header = "corpus|dtype|texts|tokens|sentence-transformers tok/s|encoder tok/s|ratio|job tok/s|ratio|padding|peak MB"
    rows = [
        [
            one.corpus,
            one.dtype,
            one.texts,
            one.tokens,
            round(one.reference),
            round(one.encoder),
            round(one.encoder / one.reference, 2),
            round(one.job),
            round(one.job / one.reference, 2),
            round(one.padding_ratio, 3),
            round(one.peak_bytes / 1e6),
        ]
        for one in measured
    ]
    return text_table(header.split("|"), rows)
