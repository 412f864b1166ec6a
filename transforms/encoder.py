"""BertLstmEncoder: a text through BERT, one LSTM layer and pooling to a vector of 256 numbers; knows no Beam."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel

from transforms.bert_origin import BertOrigin
from transforms.checkpoint import BERT_SUBFOLDER, CONFIG_FILE, LSTM_FILE, POOLINGS, CheckpointConfig, checkpoint_folder
from transforms.fingerprint import fingerprint
from transforms.packing import PackedSlots, packed_slots
from transforms.schema import EMBEDDING_DIM
from transforms.streams import Streams, streams
from transforms.text_pooling import pool_texts
from transforms.tokenization import WindowTokenizer, groups_by_length
from transforms.weights import check_vocabulary, load_bert, load_lstm, serialized
from transforms.window_embedder import MAX_BATCH_TOKENS, EmbeddedWindows, WindowEmbedder

DEFAULT_MAX_TOKENS = 8192
DEFAULT_WINDOW_TOKENS = 512

_BATCHES_PER_GROUP = {"cpu": 4, "cuda": 16}
"""BERT batches whose token embeddings are held at most, so that the LSTM steps through many texts together."""

_GROUPS_PER_STREAM = 4
"""Of few texts groups are made smaller, down to a batch, so that streams end at about the same time."""


class EncodedTexts(NamedTuple):
    """What a list of texts was encoded to.

    Attributes:
      vectors: (n, 256) float32, unit length where finite.
      padded_tokens: (n,) int64, the area of the padded batches each text took up; its sum over the number of tokens
        is the padding ratio.
      window_tokens: (n,) int64, the tokens given to BERT, special tokens counted.
    """

    vectors: np.ndarray
    padded_tokens: np.ndarray
    window_tokens: np.ndarray


class BertLstmEncoder(nn.Module):
    """Encodes texts of any length as 256 numbers of unit length.

    A text's tokens go through BERT in windows; the windows' contextual token embeddings, laid end to end, go
    through one LSTM layer; its outputs are pooled and L2-normalised. So the LSTM carries context past BERT's window.

    `on(device, dtype)` moves it, not `to`: that would round the LSTM too, which takes float32 alone.

    Args:
      bert: any Hugging Face BertModel.
      tokenizer: the BERT's WordPiece tokenizer.
      lstm: one layer, one direction, from the BERT's width to 256; a new one, randomly initialised, where None.
      pooling: `mean` of the LSTM's outputs, or its `last` state.
      window_tokens: longest window given to BERT, special tokens counted; cut to the BERT's positions.
      max_tokens: the most tokens of a text that are encoded, special tokens not counted.
      bert_name: where the BERT comes from, if it can be loaded from there again.
      bert_file: the file its weights were loaded from, if they were.

    Raises:
      ValueError: the parts do not fit each other.
    """

    def __init__(
        self,
        bert: BertModel,
        tokenizer: Tokenizer,
        lstm: nn.LSTM | None = None,
        pooling: str = "mean",
        window_tokens: int = DEFAULT_WINDOW_TOKENS,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        bert_name: str | None = None,
        bert_file: Path | None = None,
    ):
        super().__init__()
        width = bert.config.hidden_size
        lstm = nn.LSTM(width, EMBEDDING_DIM) if lstm is None else lstm
        if (lstm.input_size, lstm.hidden_size, lstm.num_layers, lstm.bidirectional, lstm.proj_size) != (
            width,
            EMBEDDING_DIM,
            1,
            False,
            0,
        ):
            raise ValueError(f"the LSTM must be one plain layer from {width} to {EMBEDDING_DIM}, not {lstm}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is none of {', '.join(POOLINGS)}")
        check_vocabulary(tokenizer, bert.config)
        self.bert = bert
        self.lstm = lstm
        self.pooling = pooling
        self.tokenizer = WindowTokenizer(tokenizer, min(window_tokens, bert.config.max_position_embeddings), max_tokens)
        self._origin = BertOrigin(bert, bert_name, bert_file)
        self._window_embedder = WindowEmbedder(self.tokenizer.pad_id)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device its weights are on."""
        return self.bert.embeddings.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type BERT computes in; the LSTM and the pooling always compute in float32."""
        return self.bert.embeddings.word_embeddings.weight.dtype

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text that are encoded."""
        return self.tokenizer.max_tokens

    def on(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> "BertLstmEncoder":
        """Moves the encoder to a device, and BERT to a type; returns itself.

        The LSTM stays in float32: over thousands of steps its state would gather the rounding of a smaller type.
        """
        if any((weight.device, weight.dtype) != (torch.device(device), dtype) for weight in self.bert.parameters()):
            self._window_embedder.forget_weights()
            self._origin.move(self.bert, device, dtype)
        self.lstm.to(device=device, dtype=torch.float32)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Lets a copy know whether the weights have changed since they were loaded: its own lie elsewhere."""
        self._origin.sha256(self.bert)
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Lets what is known of the BERT's weights hold for the copy's."""
        super().__setstate__(state)
        self._origin.follow(self.bert)

    # Model.

    def token_embeddings(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns BERT's contextual token embeddings.

        Args:
          input_ids: (windows, length) int64.
          attention_mask: (windows, length), 1 for tokens; None where nothing is padded.

        Returns:
          (windows, length, width) in `dtype`.
        """
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, windows_per_text: Sequence[int] | None = None
    ) -> Tensor:
        """Encodes padded windows.

        Args:
          input_ids: (windows, length) int64, from [CLS] to [SEP], padded on the right.
          attention_mask: (windows, length), 1 for tokens; None where nothing is padded.
          windows_per_text: how many successive windows make up each text; one where None.

        Returns:
          (texts, 256) float32 of unit length, differentiable.
        """
        token_embeddings = self.token_embeddings(input_ids, attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        window_lengths = mask.sum(dim=1).cpu().numpy()
        counts = np.ones(len(input_ids), dtype=np.int64) if windows_per_text is None else np.asarray(windows_per_text)
        if counts.sum() != len(input_ids) or (counts < 1).any():
            raise ValueError(f"windows_per_text {counts.tolist()} does not divide up {len(input_ids)} windows")
        lengths = np.add.reduceat(window_lengths, np.cumsum(counts) - counts)
        order = np.argsort(-lengths, kind="stable")
        slots = packed_slots(lengths[order])
        # Token i of the text at rank r goes to slots[r][i].
        rank_of_text = np.empty_like(order)
        rank_of_text[order] = np.arange(len(order))
        flat_slots = np.concatenate([slots.of_text(rank) for rank in rank_of_text])
        tokens = token_embeddings[mask.bool()].float()
        packed = torch.empty_like(tokens).index_copy(0, torch.from_numpy(flat_slots).to(tokens.device), tokens)
        return self.pool(packed, slots)[torch.from_numpy(rank_of_text).to(tokens.device)]

    def pool(self, packed_token_embeddings: Tensor, slots: PackedSlots) -> Tensor:
        """Runs the LSTM over whole texts and pools its outputs.

        Args:
          packed_token_embeddings: (tokens, width) float32 in the order that `slots` says.
          slots: where each token of each text is; texts sorted by length, longest first.

        Returns:
          (texts, 256) float32 of unit length.
        """
        return pool_texts(self.lstm, self.pooling, packed_token_embeddings, slots)

    # Texts.

    @torch.inference_mode()
    def encode(self, texts: Iterable[str], max_batch_tokens: int | None = None) -> np.ndarray:
        """Encodes texts of any length; what lies past `max_tokens` is not seen.

        On a CPU the weights are laid out anew where they have changed since the last call. Changes through
        `weight.data` go unnoticed, and old and new weights would be mixed: make them within `torch.no_grad()` instead,
        or call `on` after them.

        Args:
          texts: any number of strings; the empty one is encoded as [CLS][SEP].
          max_batch_tokens: padded area of a BERT batch, at least 1; by device where None.

        Returns:
          (n, 256) float32 of unit length, in the order of the texts.

        Raises:
          TypeError: `texts` is one text.
          ValueError: a text holds a lone surrogate, which is no character; the message says which text. Or
            `max_batch_tokens` is below 1.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one text")
        texts = list(texts)
        for index, text in enumerate(texts):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"text {index} holds a lone surrogate, {text[error.start]!r} at {error.start}, which is no "
                    "character: mend or leave out this text"
                ) from error
        return self.encode_tokens([text.token_ids for text in self.tokenizer.tokenize(texts)], max_batch_tokens).vectors

    @torch.inference_mode()
    def encode_tokens(self, token_ids: Sequence[np.ndarray], max_batch_tokens: int | None = None) -> EncodedTexts:
        """Encodes tokenized texts; a text alone gives the same vector as in any batch, up to rounding.

        On a CPU each core encodes a group of texts by itself, where there are enough of them. Changes of weights
        through `weight.data` go unnoticed there, as in `encode`.

        Args:
          token_ids: each (num_tokens,), without special tokens.
          max_batch_tokens: padded area of a BERT batch, at least 1; by device where None.

        Raises:
          ValueError: `max_batch_tokens` is below 1.
        """
        budget = self._budget(max_batch_tokens)
        windows = [self.tokenizer.windows(ids) for ids in token_ids]
        lengths = np.array([sum(map(len, parts)) for parts in windows], dtype=np.int64)
        vectors = np.empty((len(windows), EMBEDDING_DIM), dtype=np.float32)
        padded_tokens = np.zeros(len(windows), dtype=np.int64)

        def encode_group(texts: np.ndarray) -> None:
            group = [windows[text] for text in texts]
            vectors[texts], padded_tokens[texts] = self._encode_group(group, lengths[texts], budget)

        side_by_side = self.streams()
        groups = self.groups(lengths, max_batch_tokens)
        if side_by_side is not None and len(groups) >= side_by_side.count:
            side_by_side.for_each(encode_group, groups)
        else:
            for group in groups:
                encode_group(group)
        return EncodedTexts(vectors, padded_tokens, lengths)

    def groups(self, lengths: np.ndarray, max_batch_tokens: int | None = None) -> list[np.ndarray]:
        """Divides texts into groups that are encoded one by one.

        Args:
          lengths: (n,) int64, tokens of each text.
          max_batch_tokens: padded area of a BERT batch; by device where None.

        Returns:
          (k,) int64 places of texts for each group, longest first.
        """
        budget = self._budget(max_batch_tokens)
        max_tokens = budget * _BATCHES_PER_GROUP[self.device.type]
        side_by_side = self.streams()
        if side_by_side is not None:
            fair_share = int(lengths.sum()) // (side_by_side.count * _GROUPS_PER_STREAM)
            max_tokens = max(budget, min(max_tokens, fair_share))
        return list(groups_by_length(lengths, max_tokens))

    def _budget(self, max_batch_tokens: int | None) -> int:
        if max_batch_tokens is None:
            return MAX_BATCH_TOKENS[self.device.type]
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}: give at least 1, or None")
        return max_batch_tokens

    def streams(self) -> Streams | None:
        """Returns the threads that groups are divided among; None where one group is computed at a time."""
        return streams() if self.device.type == "cpu" else None

    @torch.inference_mode()
    def _encode_group(
        self, texts: list[list[np.ndarray]], lengths: np.ndarray, budget: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts that are sorted by length, longest first; returns vectors and padded tokens of each."""
        slots = packed_slots(lengths)
        windows, text_of_window, slots_of_window = [], [], []
        for rank, parts in enumerate(texts):
            text_slots = slots.of_text(rank)
            start = 0
            for part in parts:
                windows.append(part)
                text_of_window.append(rank)
                slots_of_window.append(text_slots[start : start + len(part)])
                start += len(part)
        width = self.bert.config.hidden_size
        packed = torch.empty(int(lengths.sum()), width, dtype=torch.float32, device=self.device)
        padded_tokens = np.zeros(len(texts), dtype=np.int64)
        for embedded in self.embed_windows(windows, budget):
            target = np.concatenate([slots_of_window[index] for index in embedded.window_indices])
            packed[torch.from_numpy(target).to(self.device)] = embedded.token_embeddings.float()
            np.add.at(padded_tokens, np.array(text_of_window)[embedded.window_indices], embedded.padded_tokens)
        return self.pool(packed, slots).cpu().numpy(), padded_tokens

    def embed_windows(
        self, windows: Sequence[np.ndarray], max_batch_tokens: int | None = None
    ) -> Iterator[EmbeddedWindows]:
        """Sorts windows by length and takes them through BERT, on a GPU in padded batches, on a CPU without padding.

        Args:
          windows: each (length,) int64, from [CLS] to [SEP].
          max_batch_tokens: the most tokens, padding counted, that go through BERT at once; by device where None.

        Returns:
          The longest windows first, so that memory peaks at the start; together each window once.
        """
        return self._window_embedder.embed(self.bert, windows, self._budget(max_batch_tokens))

    # Checkpoints.

    @property
    def bert_name(self) -> str | None:
        """Where the BERT can be loaded from; None without a name, or once its weights are seen to have changed."""
        return self._origin.name

    @property
    def bert_sha256(self) -> str:
        """SHA-256 of the BERT's `model.safetensors`: as loaded or, if its weights changed, as it would be saved.

        Changes through `weight.data` are noticed only by `save_pretrained`, which compares the weights themselves.
        """
        return self._origin.sha256(self.bert)

    @property
    def lstm_sha256(self) -> str:
        """SHA-256 of the LSTM's weights as `save_pretrained` would write them."""
        return hashlib.sha256(serialized(self.lstm)).hexdigest()

    def fingerprint(self) -> str:
        """Returns the SHA-256 over everything a vector's meaning depends on; see `transforms.fingerprint`."""
        return fingerprint(self.bert.config, self.bert_sha256, self.lstm_sha256, self.tokenizer, self.pooling)

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path = "default", max_tokens: int | None = None) -> "BertLstmEncoder":
        """Loads a checkpoint on the CPU in float32.

        Args:
          checkpoint: a shipped checkpoint's name, a folder, or a gs:// folder.
          max_tokens: in place of the checkpoint's own.

        Raises:
          FileNotFoundError: the checkpoint or its BERT is not there.
          ValueError: a file is not what the checkpoint was made with.
        """
        folder = checkpoint_folder(str(checkpoint))
        config = CheckpointConfig.read(folder)
        bert, tokenizer, bert_file = load_bert(config.bert, folder, config.bert_sha256)
        lstm = load_lstm(folder, config, bert.config.hidden_size)
        encoder = cls(
            bert,
            tokenizer,
            lstm,
            config.pooling,
            config.window_tokens,
            config.max_tokens if max_tokens is None else max_tokens,
        )
        encoder._origin = BertOrigin(bert, config.bert, bert_file, config.bert_sha256)
        return encoder

    @classmethod
    def from_bert(
        cls,
        bert_name: str,
        pooling: str = "mean",
        window_tokens: int = DEFAULT_WINDOW_TOKENS,
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> "BertLstmEncoder":
        """Puts a new, randomly initialised LSTM on a pre-trained BERT.

        Args:
          bert_name: package, folder, gs:// folder or hub name of the BERT.
          pooling: as in the constructor.
          window_tokens: as in the constructor.
          max_tokens: as in the constructor.
        """
        bert, tokenizer, bert_file = load_bert(bert_name)
        return cls(bert, tokenizer, None, pooling, window_tokens, max_tokens, bert_name, bert_file)

    def save_pretrained(self, folder: str | Path, include_bert: bool | None = None) -> None:
        """Writes a checkpoint that `from_pretrained` reads.

        Args:
          folder: local or gs://, made where missing.
          include_bert: whether the BERT is saved too; where None, only if it has no name, or that of a folder on this
            machine, or if its weights changed since they were loaded.

        Raises:
          ValueError: the BERT is to be saved, but only its rounded weights are left; or it is not to be saved, but
            there is no other place to load it from.
        """
        bert_sha256 = self._origin.sha256_of_values(self.bert)
        if include_bert is False and self.bert_name is None:
            raise ValueError(
                "the BERT has no name to load it by, or its weights changed since they were loaded: leave "
                "include_bert=False out, so that it is saved too"
            )
        if include_bert is None:
            include_bert = self.bert_name in (None, BERT_SUBFOLDER) or Path(str(self.bert_name)).is_dir()
        from transforms.storage import folder_to_fill  # Only now: Google's libraries take a while to import.

        with folder_to_fill(str(folder), last=CONFIG_FILE) as to_fill:
            if include_bert:
                self._origin.save(self.bert, self.tokenizer.to_json(), to_fill / BERT_SUBFOLDER)
            # Not before: where the BERT cannot be saved, nothing is written.
            to_fill.mkdir(parents=True, exist_ok=True)
            (to_fill / LSTM_FILE).write_bytes(serialized(self.lstm))
            CheckpointConfig(
                bert=BERT_SUBFOLDER if include_bert else str(self.bert_name),
                bert_sha256=bert_sha256,
                lstm_sha256=self.lstm_sha256,
                pooling=self.pooling,
                window_tokens=self.tokenizer.window_tokens,
                max_tokens=self.max_tokens,
            ).write(to_fill)
