"""PackedBert against the model whose weights it has."""

import numpy as np
import pytest
import torch
from conftest import make_tiny_encoder
from transformers import BertConfig, BertModel

from transforms import packed_bert
from transforms.packed_bert import PackedBert

LENGTHS = [64, 9, 9, 9, 3, 2, 17, 9]


def make_bert(seed: int = 0, **config) -> BertModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=64, **(sizes | config)), False).eval()


def some_windows(lengths: list[int]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 50, length) for length in lengths]


def by_the_model(bert: BertModel, windows: list[np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        states = [bert(torch.from_numpy(window)[None]).last_hidden_state[0] for window in windows]
    return torch.cat(states).float().numpy()


def packed(bert: BertModel, windows: list[np.ndarray]) -> np.ndarray:
    return PackedBert(bert)(windows).float().numpy()


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new", "silu"])
def test_it_computes_what_the_model_does(activation, packs, monkeypatch):
    if not packs:  # As a PyTorch without oneDNN.
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    bert = make_bert(hidden_act=activation)
    windows = some_windows(LENGTHS)
    np.testing.assert_allclose(packed(bert, windows), by_the_model(bert, windows), atol=1e-5)


@pytest.mark.parametrize("lengths", [[2], [64], [5] * 7, list(range(2, 64))])
def test_windows_of_any_lengths_are_computed(lengths):
    bert = make_bert(intermediate_size=128, num_attention_heads=2)
    windows = some_windows(lengths)
    np.testing.assert_allclose(packed(bert, windows), by_the_model(bert, windows), atol=1e-5)


def test_a_window_alone_equals_it_among_others():
    bert = make_bert()
    windows = some_windows(LENGTHS)
    alone = np.concatenate([packed(bert, [window]) for window in windows])
    np.testing.assert_allclose(packed(bert, windows), alone, atol=1e-5)


@pytest.mark.parametrize("packs", [True, False])
def test_bfloat16_rounds_no_more_than_the_model_does(packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    bert, windows = make_bert(), some_windows(LENGTHS)
    exact = by_the_model(bert, windows)
    bert.to(torch.bfloat16)
    error = np.abs(packed(bert, windows) - exact).mean()
    assert 0 < error < 1.5 * np.abs(by_the_model(bert, windows) - exact).mean()


@pytest.mark.parametrize(
    "change",
    [
        lambda bert: bert.encoder.layer[0].attention.self.key.weight.mul_(2),
        lambda bert: bert.embeddings.word_embeddings.weight.detach().mul_(2),
        lambda bert: bert.to(torch.bfloat16),
        lambda bert: bert.to(torch.bfloat16).to(torch.float32),
        lambda bert: bert.load_state_dict(make_tiny_encoder(seed=1).bert.state_dict()),
    ],
)
def test_an_encoder_never_uses_weights_that_it_no_longer_has(change):
    encoder = make_tiny_encoder()
    text = "read a zip file"
    before = encoder.encode([text])
    with torch.no_grad():
        change(encoder.bert)
    after = encoder.encode([text])
    assert not np.array_equal(before, after)
    (window,) = encoder.tokenizer.windows(encoder.tokenizer.tokenize([text])[0].token_ids)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(window)[None]).numpy()
    np.testing.assert_allclose(after, expected, atol=1e-6 if encoder.dtype == torch.float32 else 1e-2)


def test_what_is_no_plain_encoder_is_left_to_the_model():
    class Other(BertModel):
        pass

    bert = make_bert()
    assert PackedBert.fits(bert)
    assert not PackedBert.fits(make_bert(is_decoder=True))
    assert not PackedBert.fits(Other(bert.config, False))
    bert.encoder.layer[1].output.dense = torch.nn.Linear(48, 32, device="meta")
    assert not PackedBert.fits(bert)


def test_a_layer_of_another_kind_is_left_to_the_model():
    class Adapted(torch.nn.Linear):
        pass

    bert = make_bert()
    bert.encoder.layer[1].output.dense = Adapted(48, 32)
    assert not PackedBert.fits(bert)


class Adapter(torch.nn.Module):
    """A linear layer with something added, whose own weight tells nothing of that."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base_layer, self.added = base, torch.nn.Linear(base.in_features, base.out_features)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, states):
        return self.base_layer(states) + self.added(states)


def adapt(bert):
    bert.encoder.layer[0].output.dense = Adapter(bert.encoder.layer[0].output.dense)


def hook(bert):
    bert.encoder.layer[0].output.dense.register_forward_hook(lambda module, inputs, output: output * 2)


def hook_before(bert):
    bert.encoder.layer[0].output.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2, inputs[1]))


def activate_otherwise(bert):
    bert.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()


def activate_as_poolers_do(bert):
    bert.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.Tanh()


def replace_forward(bert):
    dense = bert.encoder.layer[0].output.dense
    plain = dense.forward
    dense.forward = lambda states: plain(states) * 2


def leave_bias_out(bert):
    bert.encoder.layer[0].output.dense = torch.nn.Linear(64, 32, bias=False)


@pytest.mark.parametrize(
    "change",
    [adapt, hook, hook_before, activate_otherwise, activate_as_poolers_do, replace_forward, leave_bias_out],
)
def test_parts_that_were_replaced_or_hooked_are_computed(change):
    encoder = make_tiny_encoder()
    before = encoder.encode(["read a zip file"])
    change(encoder.bert)
    (window,) = encoder.tokenizer.windows(encoder.tokenizer.tokenize(["read a zip file"])[0].token_ids)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(window)[None]).numpy()
    np.testing.assert_allclose(encoder.encode(["read a zip file"]), expected, atol=1e-6)
    assert not np.allclose(before, expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_quantized_model_is_left_to_itself():
    encoder = make_tiny_encoder()
    text = "read a zip file"
    exact = encoder.encode([text])
    try:
        encoder.bert = torch.ao.quantization.quantize_dynamic(encoder.bert, {torch.nn.Linear})
    except (AttributeError, RuntimeError) as error:  # This PyTorch, or this CPU, has no such kernels.
        pytest.skip(f"no dynamic quantization here: {error}")
    (window,) = encoder.tokenizer.windows(encoder.tokenizer.tokenize([text])[0].token_ids)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(window)[None]).numpy()
    np.testing.assert_allclose(encoder.encode([text]), expected, atol=1e-6)
    assert not np.array_equal(exact, expected)


def test_a_pooler_does_not_matter():
    bert = BertModel(make_bert().config, add_pooling_layer=True)
    assert PackedBert.fits(bert)


def test_attention_that_would_take_much_memory_is_fused(monkeypatch):
    bert, windows = make_bert().to(torch.bfloat16), some_windows(LENGTHS)
    held = packed(bert, windows)
    monkeypatch.setattr(packed_bert, "_attend_by_products", lambda _: pytest.fail("would hold the scores"))
    monkeypatch.setattr(packed_bert, "_MAX_SCORES_BYTES", 0)
    np.testing.assert_allclose(packed(bert, windows), held, atol=0.1)


def test_equal_lengths_that_follow_each_other_are_one_run():
    assert packed_bert._runs_of_equal_length([4, 4, 2, 4]) == [(2, 4), (1, 2), (1, 4)]
