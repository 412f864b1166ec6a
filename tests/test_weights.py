"""Which files are taken for the weights of a BERT, and which are refused before they are read."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from transforms.weights import load_bert

QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def bert(tmp_path, tiny_checkpoint) -> Path:
    """A folder of the tiny BERT, which the test may change."""
    return Path(shutil.copytree(Path(tiny_checkpoint) / "bert", tmp_path / "bert"))


def store(bert: Path, weights: dict[str, torch.Tensor]) -> None:
    path = bert / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | weights, path)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantized_weights_are_refused_by_name(bert, dtype, name):
    store(bert, {QUERY: torch.ones(32, 32).to(dtype), f"{QUERY}_scale": torch.ones(32)})
    with pytest.raises(ValueError, match=rf"{bert}/model\.safetensors holds {QUERY} as {name}, which is none of F64,"):
        load_bert(str(bert))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_of_any_width_are_read_beside_integers_that_are_no_weights(bert, dtype):
    weight = torch.linspace(-1, 1, 32 * 32, dtype=torch.float64).reshape(32, 32).to(dtype)
    store(bert, {QUERY: weight, "embeddings.position_ids": torch.arange(64)})  # As older BERTs have them.
    loaded = load_bert(str(bert))[0].state_dict()
    assert torch.equal(loaded[QUERY], weight.float())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_a_config_that_says_quantized_is_refused(bert):
    path = bert / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match=r"config\.json has a quantization_config: quantized weights are not read"):
        load_bert(str(bert))
