"""Knows where a BERT's weights come from, for as long as they are those of that file, and saves them; knows no Beam."""

import hashlib
from contextlib import suppress
from pathlib import Path
from shutil import SameFileError, copyfile
from typing import Any

import torch
from transformers import BertModel

from transforms.checkpoint import BERT_FILE, TOKENIZER_FILE, sha256_of
from transforms.weights import WeightsState, are_those_of_file, serialized


class BertOrigin:
    """The name, file and SHA-256 of a BERT's weights; forgotten once the weights are seen to be others.

    The BERT is given to each call, since an encoder's may be replaced.

    Args:
      bert: as it was loaded.
      name: where it can be loaded from again, if it can.
      file: its weights were loaded from, if they were.
      sha256: of that file, where it is known.

    Attributes:
      name: as given; None once the weights are seen to be others.
    """

    def __init__(self, bert: BertModel, name: str | None, file: Path | None, sha256: str | None = None):
        self.name = name
        self._file = file
        self._sha256 = sha256
        self._state: WeightsState | None = WeightsState(bert)
        self._is_rounded = False

    def sha256(self, bert: BertModel) -> str:
        """Returns the SHA-256 of the file, or of the one that `save` would write where the weights have changed.

        Changes through `weight.data` go unnoticed, see `sha256_of_values`.
        """
        if self._state is None or not self._state.is_of(bert):
            self._forget_if_changed(bert)
        if self._sha256 is None:
            self._sha256 = hashlib.sha256(serialized(bert)).hexdigest() if self._file is None else sha256_of(self._file)
        return self._sha256

    def sha256_of_values(self, bert: BertModel) -> str:
        """As `sha256`, but looks at all weights themselves, unless rounding has made them differ."""
        # Of a BERT with a name but no file there is nothing to compare with: forgetting would cost it its name.
        if not self._is_rounded and (self._file is not None or self.name is None):
            self._forget_if_changed(bert)
        return self.sha256(bert)

    def _forget_if_changed(self, bert: BertModel) -> None:
        """Keeps what is known of the file only if the weights are those of the file, moved or rounded."""
        if self._file is None or not are_those_of_file(bert, self._file):
            self.name = self._file = self._sha256 = None
            self._is_rounded = bert.dtype != torch.float32
        self._state = WeightsState(bert)

    def move(self, bert: BertModel, device: str | torch.device, dtype: torch.dtype) -> None:
        """Moves a BERT to a device and a type; its SHA-256 stays that of the weights before rounding."""
        self.sha256(bert)
        self._state = None  # Else it would hold the old weights.
        self._is_rounded |= (bert.dtype, dtype) != (torch.float32, torch.float32)
        bert.to(device=device, dtype=dtype)
        self._state = WeightsState(bert)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out where the weights are: those of a copy are elsewhere."""
        return self.__dict__ | {"_state": None}

    def follow(self, copy: BertModel) -> None:
        """Takes a copy of the BERT, with the weights that this was last asked about, for the BERT."""
        self._state = WeightsState(copy)

    def save(self, bert: BertModel, tokenizer_json: str, folder: Path) -> None:
        """Writes configuration, tokenizer and weights to a folder, which is made where missing.

        Raises:
          ValueError: only rounded weights are left; nothing is written then.
        """
        if self._file is None and self._is_rounded:
            raise ValueError(
                f"the BERT's weights were rounded, are {bert.dtype} now, and no file has them as they were: save the "
                "encoder before it is rounded"
            )
        folder.mkdir(parents=True, exist_ok=True)
        bert.config.to_json_file(folder / "config.json")
        (folder / TOKENIZER_FILE).write_text(tokenizer_json, encoding="utf-8")
        if self._file is None:
            (folder / BERT_FILE).write_bytes(serialized(bert))
        else:
            # It may hold other tensors too, a pooler say: the same weights keep the same SHA-256.
            with suppress(SameFileError):  # Where the checkpoint is saved to the folder it was loaded from.
                copyfile(self._file, folder / BERT_FILE)
