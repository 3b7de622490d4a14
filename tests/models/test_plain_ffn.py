"""A plain FFN is a gated one whose up projection is 1."""

import copy

import pytest
import torch

from tests.tiny_hf import make_hf_model, tiny_ids
from turbosparse.errors import ConfigError
from turbosparse.measure.hugging_face import HuggingFaceModel
from turbosparse.models.activations import Activation
from turbosparse.models.gated_ffn import PlainFFN, gated_ffns, replace_ffns
from turbosparse.models.registry import activation_of, swap_activation
from turbosparse.predict.layers import layers_of
from turbosparse.predict.predictors import WeightCopyPredictor


@pytest.mark.parametrize("name", ["relu2", "relu", "gelu_pytorch_tanh"])
def test_it_computes_what_transformers_does(name: str) -> None:
    model = make_hf_model("arcee", hidden_act=name)
    ours = copy.deepcopy(model)
    assert replace_ffns(ours, activation_of(ours), activation_of(ours)) == 2
    assert all(isinstance(ffn, PlainFFN) for ffn in gated_ffns(ours).values())
    assert ours.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        expected = model(tiny_ids()).logits
        torch.testing.assert_close(ours(tiny_ids()).logits, expected)


def test_its_weights_for_predictors() -> None:
    model = make_hf_model("arcee")
    source = HuggingFaceModel(model, None, name="plain")
    assert source.description["gated"] is False
    layer = next(iter(layers_of(source.model, "F16").values()))
    x = torch.randn(5, 32)
    ffn = model.model.layers[0].mlp
    activations = layer.neurons(x).activations
    torch.testing.assert_close(activations, torch.relu(ffn.up_proj(x)).square().detach())
    assert tuple(layer.row_bytes) == (64.0, 0.0, 64.0)
    oracle = WeightCopyPredictor(layer, None)
    active = activations != 0
    assert ((oracle(x) > 0) == active).all()


def test_it_is_not_swapped() -> None:
    with pytest.raises(ConfigError, match=r"expected a model with gated FFNs of type .*, got 'arcee'"):
        swap_activation(make_hf_model("arcee"), Activation(name="drelu"))
