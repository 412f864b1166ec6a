"""The training loop of a head: batches, learning rate, validation, and a state from which it can go on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.distillation import (
    contrastive_loss,
    encode_token_embeddings,
    projecting_lstm,
    similarity_loss,
    teacher_vector,
)
from pipeline.token_embeddings import TokenEmbeddings, write_whole
from pipeline.training_data import TrainingTexts
from transforms.encoder import BertLstmEncoder

_STARTING_TEXTS = 20_000
"""Texts that decide the projection which training starts from."""

_WARM_UP_FRACTION = 0.03
"""Of the steps, those in which the learning rate rises; afterwards it falls along a cosine."""

_CLIPPED_NORM = 1.0


class Settings(NamedTuple):
    """How a head is trained.

    Attributes:
      epochs: how often each text is seen.
      seed: of the starting weights and the order of the texts.
      learning_rate: the highest.
      contrastive_weight: of the contrastive loss of pairs and documents, beside the similarity loss.
      sentences_per_batch: texts in a step of sentences.
      pairs_per_batch: pairs in a step of pairs.
      documents_per_batch: documents in a step of documents.
    """

    epochs: int = 3
    seed: int = 1
    learning_rate: float = 1e-3
    contrastive_weight: float = 0.01
    sentences_per_batch: int = 256
    pairs_per_batch: int = 128
    documents_per_batch: int = 16


class Batch(NamedTuple):
    """What one step learns from.

    Attributes:
      kind: `sentences`, `pairs` or `documents`.
      places: places in the list of texts: (n,) of sentences, (n, 2) of partners.
    """

    kind: str
    places: np.ndarray


def check_enough_texts(texts: TrainingTexts, settings: Settings) -> None:
    """Raises ValueError where the texts of no kind fill a batch, with the options that make batches smaller."""
    found = {kind: len(getattr(texts, kind)) for kind in ("sentences", "pairs", "documents")}
    sizes = {kind: getattr(settings, f"{kind}_per_batch") for kind in found}
    if all(found[kind] < sizes[kind] for kind in found):
        few = ", ".join(f"{found[kind]} {kind} for --{kind}_per_batch {sizes[kind]}" for kind in found if found[kind])
        raise ValueError(f"too few texts to fill one batch: {few or 'none'}; give more texts, or smaller batches")


class Training:
    """Trains an encoder's LSTM on token embeddings that are known.

    What it ends with depends on the settings, the texts and the machine's arithmetic alone: a training that goes on
    from its state ends with the weights of one that was never interrupted.

    Args:
      encoder: its LSTM is replaced by one that starts as a projection, and that is trained.
      texts: what to train on.
      embeddings: their token embeddings.
      settings: how.
      state_file: where the state is kept meanwhile.
      validate: gives the encoder's score as it is, higher is better; the weights of the best epoch are kept, those
        of the start among them. Without it, the weights of the last epoch.

    Raises:
      ValueError: the texts do not fill one batch of any kind.
    """

    def __init__(
        self,
        encoder: BertLstmEncoder,
        texts: TrainingTexts,
        embeddings: TokenEmbeddings,
        settings: Settings,
        state_file: Path,
        validate: Callable[[], float] | None = None,
    ):
        self._encoder = encoder
        self._texts = texts
        self._embeddings = embeddings
        self._settings = settings
        self._state_file = state_file
        self._validate = validate
        check_enough_texts(texts, settings)
        self.steps_per_epoch = len(self._batches(epoch=0))
        starting = np.random.default_rng(settings.seed).permutation(len(texts.texts))[:_STARTING_TEXTS]
        encoder.lstm = projecting_lstm([embeddings.of(text) for text in starting], encoder.pooling, settings.seed)
        encoder.lstm.to(encoder.device)
        self._optimizer = torch.optim.AdamW(encoder.lstm.parameters(), lr=settings.learning_rate)
        self.step = 0
        self.losses: list[float] = []
        self.scores: list[float] = []
        self._best_weights: dict[str, Tensor] = {}

    def run(self, save_every_steps: int, stop_after_steps: int | None = None) -> None:
        """Trains to the end, shows the progress, and leaves the encoder with the weights to keep.

        Args:
          save_every_steps: how often the state is written.
          stop_after_steps: ends early, as an interruption would; None to train to the end.
        """
        total = self._settings.epochs * self.steps_per_epoch
        if self.step == 0 and not self.scores:
            self._end_epoch()
        with tqdm(total=total, initial=self.step, desc="LSTM", unit="step") as bar:
            batches, batches_epoch = [], -1
            while self.step < total:
                if self.step == stop_after_steps:
                    return
                epoch, place = divmod(self.step, self.steps_per_epoch)
                if epoch != batches_epoch:
                    batches, batches_epoch = self._batches(epoch), epoch
                self.losses.append(self._learn(batches[place], total))
                self.step += 1
                bar.update()
                if place + 1 == self.steps_per_epoch:
                    self._end_epoch()
                    bar.set_postfix(loss=f"{np.mean(self.losses[-self.steps_per_epoch :]):.4g}", scores=self._shown())
                if self.step % save_every_steps == 0 or place + 1 == self.steps_per_epoch:
                    self.save_state()
        self._encoder.lstm.load_state_dict(self._best_weights)

    def _shown(self) -> str:
        return " ".join(f"{score:.2f}" for score in self.scores)

    def _end_epoch(self) -> None:
        if self._validate is not None:
            self.scores.append(self._validate())
        if self._validate is None or self.scores[-1] == max(self.scores):
            weights = self._encoder.lstm.state_dict()
            self._best_weights = {name: weight.detach().cpu().clone() for name, weight in weights.items()}

    def _batches(self, epoch: int) -> list[Batch]:
        """Returns an epoch's batches, each text once, in an order that depends only on seed and epoch."""
        random = np.random.default_rng((self._settings.seed, epoch))
        batches = []
        for kind in ("sentences", "pairs", "documents"):
            places = getattr(self._texts, kind)
            size = getattr(self._settings, f"{kind}_per_batch")
            shuffled = places[random.permutation(len(places))]
            # A small rest has too few others to compare with.
            batches += [Batch(kind, shuffled[i : i + size]) for i in range(0, len(places) - size + 1, size)]
        return [batches[i] for i in random.permutation(len(batches))]

    def _learn(self, batch: Batch, total_steps: int) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * _rate(self.step, total_steps)
        loss = self._loss(batch)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {self.step}: train with a smaller --learning_rate")
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._encoder.lstm.parameters(), _CLIPPED_NORM)
        self._optimizer.step()
        return loss.item()

    def _loss(self, batch: Batch) -> Tensor:
        tokens = [self._embeddings.of(place) for place in batch.places.T.flat]
        partners = len(batch.places) if batch.places.ndim == 2 else 0
        if batch.kind == "documents":
            tokens += [
                np.concatenate((first, second))
                for first, second in zip(tokens[:partners], tokens[partners:], strict=True)
            ]
        vectors = encode_token_embeddings(self._encoder, tokens)
        teacher = torch.from_numpy(np.stack([teacher_vector(each) for each in tokens])).to(vectors.device)
        loss = similarity_loss(vectors, teacher)
        if partners:
            contrast = contrastive_loss(vectors[:partners], vectors[partners : 2 * partners])
            loss = loss + self._settings.contrastive_weight * contrast
        return loss

    # State.

    def save_state(self) -> None:
        """Writes everything needed to go on, whole or not at all."""
        tensors = {f"lstm.{name}": weight for name, weight in self._encoder.lstm.state_dict().items()}
        tensors |= {f"best.{name}": weight for name, weight in self._best_weights.items()}
        for index, values in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        progress = {"key": self._key(), "step": self.step, "losses": self.losses, "scores": self.scores}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(self._state_file, safetensors.torch.save(tensors, {"progress": json.dumps(progress)}))

    def load_state(self) -> None:
        """Goes back to the state that was written last.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it belongs to another training.
        """
        if not self._state_file.is_file():
            raise FileNotFoundError(f"no training to resume: there is no {self._state_file}")
        with safetensors.safe_open(self._state_file, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        if progress["key"] != self._key():
            raise ValueError(
                f"{self._state_file} belongs to another training, {progress['key']}, this one is {self._key()}: give "
                "the same options and texts, or another --work_folder"
            )
        parts: dict[str, dict[str, Tensor]] = {"lstm": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self._encoder.lstm.load_state_dict(parts["lstm"])
        self._best_weights = parts["best"]
        state = self._optimizer.state_dict()
        for name, tensor in parts["optimizer"].items():
            index, _, value = name.partition(".")
            state["state"].setdefault(int(index), {})[value] = tensor
        self._optimizer.load_state_dict(state)
        self.step, self.losses, self.scores = progress["step"], progress["losses"], progress["scores"]

    def _key(self) -> str:
        """What must be the same for one training to go on from the state of another."""
        return json.dumps([*self._settings, self._encoder.pooling, self._embeddings.folder.name])


def _rate(step: int, total_steps: int) -> float:
    """Returns the learning rate of a step as a fraction of the highest: a short rise, then along a cosine to 0."""
    rising = max(1, round(_WARM_UP_FRACTION * total_steps))
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / (total_steps - rising))) / 2
