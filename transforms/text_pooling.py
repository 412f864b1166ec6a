"""Takes the token embeddings of whole texts through an LSTM layer, and pools its outputs to a vector for each text."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from transforms.packing import PackedSlots


def pool_texts(lstm: nn.LSTM, pooling: str, packed_token_embeddings: Tensor, slots: PackedSlots) -> Tensor:
    """Runs an LSTM over whole texts and pools its outputs.

    Args:
      lstm: one layer, one direction.
      pooling: `mean` of the LSTM's outputs, or its `last` state.
      packed_token_embeddings: (tokens, width) float32 in the order that `slots` says.
      slots: where each token of each text is; texts sorted by length, longest first.

    Returns:
      (texts, hidden size) float32 of unit length.
    """
    device = packed_token_embeddings.device
    sequence = PackedSequence(packed_token_embeddings, torch.from_numpy(slots.texts_at_step))
    with _exact_cudnn() if device.type == "cuda" else nullcontext():
        outputs, (last_state, _) = lstm(sequence)
    if pooling == "last":
        pooled = last_state[0]
    else:
        ranks = torch.from_numpy(slots.rank_of_slot).to(device)
        lengths = torch.from_numpy(slots.lengths).to(device)
        sums = outputs.data.new_zeros(len(slots.lengths), lstm.hidden_size).index_add(0, ranks, outputs.data)
        pooled = sums / lengths[:, None]
    return nn.functional.normalize(pooled, dim=-1)


def _exact_cudnn() -> AbstractContextManager[None]:
    """Keeps a GPU from rounding the LSTM's float32 to TensorFloat-32, as it would by default."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=True, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)
