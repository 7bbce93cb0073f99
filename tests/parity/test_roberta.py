"""The text encoder of AltDiffusion computes what diffusers' does on the same weights."""

import mindspore as ms
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.alt_diffusion import RobertaSeriesModelWithTransformation as Reference
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import RobertaSeriesConfig
from mindspore import Tensor

from dreambooth_ms.adapters.lora import inject_lora
from dreambooth_ms.adapters.precision import compute_in
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.model_config import read_config, read_roberta_config
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.models.roberta import RobertaSeriesModelWithTransformation
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.runtime.device import Formulation
from dreambooth_ms.weights.bundle import load_strict
from tests.parity.reference import (
    ValueAndGradients,
    normal,
    public_gradients,
    relative_error,
    small_roberta,
    weights_of,
    worst_gradient_error,
)
from tests.tiny_model import write_roberta_config
from tools.formulation import use_formulation

# Float32 sums in another order, through three layers: measured below 1e-6.
FORWARD = 1e-5
GRADIENT = 1e-4
UNREAD = ("roberta.pooler.dense.weight", "roberta.pooler.dense.bias")

IDS = np.random.default_rng(0).integers(3, 60, (2, 14)).astype(np.int32)
IDS[:, 0], IDS[1, 13] = 0, 2
IDS[0, 9:] = [2, 1, 1, 1, 1]
"""The first text is filled up by token 1."""
TARGETS = ["query", "key", "value", "attention.output.dense"]


def ours(reference):
    network = RobertaSeriesModelWithTransformation(read_roberta_config(reference.config.to_dict()))
    load_strict(network, weights_of(reference), "diffusers", ignore_unexpected=UNREAD)
    return network


def states_of(reference, masked):
    mask = torch.tensor(IDS != 1).long() if masked else torch.ones(IDS.shape).long()
    # The pre-transformation asks for a dictionary, and only by this.
    return reference(torch.tensor(IDS).long(), mask, return_dict=True).projection_state


@pytest.mark.parametrize(
    ("masked", "pre"), [(True, False), (False, False), (True, True)], ids=["masked", "all tokens", "m18, masked"]
)
def test_states_and_gradients_are_diffusers(masked, pre):
    reference = small_roberta(use_attention_mask=masked, has_pre_transformation=pre)
    sensitivity = normal(2, 14, 24)
    expected = states_of(reference, masked)
    (expected * torch.tensor(sensitivity)).sum().backward()

    network = ours(reference)
    result, gradients = ValueAndGradients(network, of_inputs=False)(Tensor(sensitivity), Tensor(IDS))
    forward, found = relative_error(result, expected), public_gradients(network, gradients)
    # PyTorch leaves out the gradient of what fills up, which nothing trains either.
    for table in ("word", "position"):
        found[f"roberta.embeddings.{table}_embeddings.weight"][1] = 0
    known = {name: one.grad.numpy() for name, one in reference.named_parameters() if one.grad is not None}
    unread = set(weights_of(reference)) - set(known) - set(UNREAD)
    assert unread == {name for name in found if not network.is_read(name, 0)}
    assert len(unread) == (18 if pre else 0)
    assert not any(found.pop(name).any() for name in unread)
    backward, name = worst_gradient_error(found, known)
    print(f"XLM-R: forward {forward:.1e}, gradients {backward:.1e} ({name})")
    assert forward < FORWARD
    assert backward < GRADIENT, name
    with torch.no_grad():
        assert relative_error(result, states_of(reference, not masked)) > 1e-3, "the mask makes no difference here"


def test_the_other_formulation_gives_the_same(pynative):
    reference = small_roberta()
    with use_formulation(Formulation.ASCEND), torch.no_grad():
        assert relative_error(ours(reference)(Tensor(IDS)), states_of(reference, True)) < FORWARD


def test_it_is_a_reader_of_the_toolkit_and_computes_in_float16(pynative):
    reference = small_roberta()
    with torch.no_grad():
        expected = states_of(reference, True)
    network = ours(reference)
    reader = TextEncoders({"text_encoder": network}).with_clip_skip(0)
    (states,) = reader(Tensor(IDS))
    assert relative_error(states, expected) < FORWARD
    network.add_words(normal(1, 32))
    (extended,) = reader(Tensor(IDS))
    assert np.array_equal(extended.asnumpy(), states.asnumpy())
    assert reader.new_rows()["text_encoder"].shape == (1, 32)
    (other,) = reader(Tensor(np.where(IDS[1, 4] == IDS, 60, IDS)))
    assert relative_error(other, expected) > 1e-2

    layers = inject_lora(network, 2, 2.0, TARGETS)
    assert len(layers) == 3 * 4
    assert "roberta.encoder.layer.2.attention.output.dense" in layers
    compute_in(reader, ms.float16)
    (half,) = reader(Tensor(IDS))
    error = relative_error(half, expected)
    print(f"XLM-R in float16: {error:.1e}")
    assert 1e-6 < error < 5e-3


def test_the_configuration_comes_back_and_is_diffusers():
    reference = small_roberta(has_pre_transformation=True, use_attention_mask=False)
    spec = read_roberta_config(reference.config.to_dict())
    assert (spec.has_pre_transformation, spec.use_attention_mask, spec.project_dim) == (True, False, 24)
    assert read_roberta_config(write_roberta_config(spec)) == spec
    names = {name for name, _ in Reference(RobertaSeriesConfig(**write_roberta_config(spec))).named_parameters()}
    assert names - set(UNREAD) == set(public_parameters(RobertaSeriesModelWithTransformation(spec)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act: expected gelu, got 'relu'"),
        ({"project_dim": ...}, "'project_dim' is missing"),
        ({"layer_norm_eps": ...}, "'layer_norm_eps' is missing"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: expected absolute"),
        ({"max_position_embeddings": 4}, "max_position_embeddings 4 leaves no room for a text"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
    ],
)
def test_another_model_is_refused(tmp_path, change, message):
    config = small_roberta().config.to_dict() | change
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(WeightError, match=message):
        read_config(tmp_path / "config.json", config, read_roberta_config)


@pytest.mark.real
def test_a_layer_of_the_published_width_is_diffusers():
    """12.6 M parameters, and a table of 60 tokens."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 16}
    reference = small_roberta(**sizes, project_dim=768)
    with torch.no_grad():
        error = relative_error(ours(reference)(Tensor(IDS)), states_of(reference, True))
    print(f"a layer of XLM-R large: {error:.1e}")
    assert error < FORWARD
