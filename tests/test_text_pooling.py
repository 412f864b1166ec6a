"""Token embeddings of whole texts, pooled by an LSTM."""

import numpy as np
import pytest
import torch
from torch import nn

from transforms.packing import packed_slots
from transforms.text_pooling import _exact_cudnn, pool_texts

LENGTHS = [5, 3, 3, 1]
WIDTH = 8


@pytest.fixture
def lstm() -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(WIDTH, 16)


def packed(texts: list[torch.Tensor]) -> torch.Tensor:
    """Lays texts out as torch itself does."""
    return nn.utils.rnn.pack_sequence(texts).data


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_each_text_is_pooled_as_if_alone(lstm, pooling):
    texts = [torch.randn(length, WIDTH) for length in LENGTHS]
    with torch.no_grad():
        pooled = pool_texts(lstm, pooling, packed(texts), packed_slots(np.array(LENGTHS)))
        outputs = [lstm(text)[0] for text in texts]
    expected = torch.stack([output.mean(dim=0) if pooling == "mean" else output[-1] for output in outputs])
    torch.testing.assert_close(pooled, nn.functional.normalize(expected, dim=1))


def test_what_a_text_is_pooled_from_gets_its_gradient(lstm):
    tokens = packed([torch.randn(length, WIDTH) for length in LENGTHS]).requires_grad_()
    pool_texts(lstm, "mean", tokens, packed_slots(np.array(LENGTHS)))[2].sum().backward()
    slots = packed_slots(np.array(LENGTHS))
    touched = tokens.grad.abs().sum(dim=1).nonzero().flatten()
    np.testing.assert_array_equal(touched, slots.of_text(2))


def test_a_gpus_settings_stay_as_they_are():
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = torch.backends.cudnn.allow_tf32 = True
    try:
        with _exact_cudnn():
            assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (True, True)
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = before


def test_on_a_cpu_no_settings_of_the_process_are_touched_meanwhile(lstm):
    """Encoders in other threads would set them back in another order, and leave them changed."""
    cudnn = torch.backends.cudnn
    settings, during = (lambda: (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)), []
    lstm.register_forward_hook(lambda *_: during.append(settings()))
    pool_texts(lstm, "mean", torch.randn(sum(LENGTHS), WIDTH), packed_slots(np.array(LENGTHS)))
    assert during == [settings()]
