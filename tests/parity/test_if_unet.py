"""DeepFloyd IF's UNets compute what diffusers' do, whole and with an adapter, and are read from its files."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as Reference
from mindspore import ParameterTuple, Tensor

from dreambooth_ms.adapters.lora import inject_lora, lora_trainables
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.model_config import read_config, read_unet_config, write_unet_config
from dreambooth_ms.models.layout import unet_inputs
from dreambooth_ms.models.parameter_shapes import unet_shapes
from dreambooth_ms.models.unet import Segments, UNet2DConditionModel
from dreambooth_ms.runtime.device import Formulation
from dreambooth_ms.training.step import DiffusionLoss, loss_and_gradients
from dreambooth_ms.weights.bundle import load_strict
from tests.parity.reference import (
    ValueAndGradients,
    disturbed,
    gradients_of,
    normal,
    public_gradients,
    relative_error,
    weights_of,
    worst_gradient_error,
)
from tools.formulation import use_formulation

STAGE_1 = {
    "sample_size": 32,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "in_channels": 3,
    "out_channels": 6,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
    "attention_head_dim": 8,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}
STAGE_2 = STAGE_1 | {
    "in_channels": 6,
    "layers_per_block": (1, 2),
    "class_embed_type": "timestep",
    "mid_block_scale_factor": 1.414,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 32,
}
"""Both as diffusers tests them."""
SWITCHED = STAGE_2 | {
    "encoder_hid_dim": 48,
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.41421,
    "only_cross_attention": True,
}
"""What they leave as it is by default, and a text of another width."""
FORMS = {"stage 1": STAGE_1, "stage 2": STAGE_2, "switched": SWITCHED}

# Float32 sums in another order, through some twenty layers: measured 2e-6.
FORWARD = 1e-4
# The same through twice the layers, with norms of single channels: measured 3e-4, at a bias that one takes away.
GRADIENT = 1e-3
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]


def reference_unet(form):
    torch.manual_seed(0)
    return disturbed(Reference(**form))


def inputs_of(spec):
    """Images are not square, and of two rows no two numbers are the same."""
    rows = {
        "sample": normal(2, spec.in_channels, 8, 12),
        "timestep": np.array([3, 981], np.int32),
        "encoder_hidden_states": normal(2, 7, spec.text_width),
        "class_labels": np.array([250, 40], np.int32),
    }
    return [rows[name] for name in unet_inputs(spec)]


def predicted(reference, latents, timesteps, text, *labels):
    return reference(latents, timesteps, text, *labels).sample


def ours_of(reference):
    network = UNet2DConditionModel(read_unet_config(dict(reference.config)))
    load_strict(network, weights_of(reference), "diffusers")
    return network


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS)
def compared(request):
    """Both networks on the same weights and inputs."""
    reference = reference_unet(request.param)
    network = ours_of(reference)
    inputs, sensitivity = inputs_of(network.spec), normal(2, 6, 8, 12, seed=1)
    at_torch = [torch.tensor(values, requires_grad=values.dtype == np.float32) for values in inputs]
    expected = predicted(reference, *at_torch)
    (expected * torch.tensor(sensitivity)).sum().backward()
    result, (input_gradients, gradients) = ValueAndGradients(network)(*map(Tensor, (sensitivity, *inputs)))
    return SimpleNamespace(
        expected=expected,
        result=result,
        of_inputs=[(input_gradients[i], at_torch[i].grad) for i in (0, 2)],
        gradients=public_gradients(network, gradients),
        expected_gradients=gradients_of(reference),
    )


def test_the_prediction_is_diffusers(compared):
    error = relative_error(compared.result, compared.expected)
    print(f"forward {error:.1e}")
    assert error < FORWARD


def test_all_gradients_are_diffusers(compared):
    errors = [relative_error(*both) for both in compared.of_inputs]
    of_weights, name = worst_gradient_error(compared.gradients, compared.expected_gradients)
    print("gradients of inputs", *(f"{error:.1e}" for error in errors), f"of weights {of_weights:.1e} ({name})")
    assert max(errors) < GRADIENT
    assert of_weights < GRADIENT, name


@pytest.fixture(scope="module")
def adapted():
    """A step with a LoRA of every projection, and diffusers' with the update in its weights.

    Small updates: with three times as large ones torch's own gradients are 3e-4 away from those in float64.
    """
    reference = reference_unet(SWITCHED | {"only_cross_attention": False, "layers_per_block": 1})
    network = ours_of(reference)
    layers, rng = inject_lora(network, 2, 3.0, TARGETS), np.random.default_rng(0)
    weights = dict(reference.named_parameters())
    for name, layer in layers.items():
        down, up = (0.1 * rng.standard_normal(factor.shape, dtype=np.float32) for factor in layer.factors())
        layer.set_factors(down, up)
        weights[f"{name}.weight"].data += 1.5 * torch.tensor(up @ down)
    inputs, target, weight = inputs_of(network.spec), normal(2, 6, 8, 12, seed=1), np.array([1, 0.5], np.float32)
    errors = (predicted(reference, *map(torch.tensor, inputs)) - torch.tensor(target)) ** 2
    loss = (errors.mean((1, 2, 3)) * torch.tensor(weight)).sum()
    loss.backward()
    rows = [Tensor(value) for value in (target, weight, *inputs)]
    trainables, steps = ParameterTuple(lora_trainables(layers)), []
    for segments in (None, Segments(network)):
        (_, own, _), gradients = loss_and_gradients(DiffusionLoss(network), trainables, None, segments)(*rows)
        steps.append([float(own.asnumpy()), *(gradient.asnumpy() for gradient in gradients)])
    return SimpleNamespace(layers=layers, loss=loss.item(), weights=weights, plain=steps[0], recomputed=steps[1])


def test_an_adapter_has_diffusers_gradients(adapted):
    """Of y = (W + s B A) x, dA = s B^T dW and dB = s dW A^T."""
    assert {re.sub(r".*attentions\.\d\.", "", name) for name in adapted.layers} == set(TARGETS)
    assert adapted.plain[0] == pytest.approx(adapted.loss, rel=FORWARD)
    expected = {}
    for name, layer in adapted.layers.items():
        dweight, (down, up) = adapted.weights[f"{name}.weight"].grad.numpy(), layer.factors()
        expected |= {f"{name} A": 1.5 * up.T @ dweight, f"{name} B": 1.5 * dweight @ down.T}
    worst, name = worst_gradient_error(dict(zip(expected, adapted.plain[1:], strict=True)), expected)
    print(f"gradients of the adapter {worst:.1e} ({name})")
    assert worst < GRADIENT, name


def test_with_gradient_checkpointing_the_step_is_the_same(adapted):
    largest = max(np.abs(gradient).max() for gradient in adapted.plain[1:])
    for value, again in zip(adapted.plain, adapted.recomputed, strict=True):
        np.testing.assert_allclose(again, value, rtol=1e-5, atol=5e-6 * largest)


WRONG = {
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1,
    "mid_block_scale_factor": 1,
    "time_embedding_act_fn": None,
    "act_fn": "silu",
    "addition_embed_type_num_heads": 4,
    "num_heads": (4, 4),
}


def test_written_for_ascend_the_prediction_is_diffusers(pynative):
    reference = reference_unet(STAGE_2)
    with use_formulation(Formulation.ASCEND):
        network = ours_of(reference)
        inputs = inputs_of(network.spec)
        with torch.no_grad():
            expected = predicted(reference, *map(torch.tensor, inputs))
        assert relative_error(network(*map(Tensor, inputs)), expected) < FORWARD


def test_each_setting_counts(pynative):
    """With one of them other than the file says, what is predicted from the same weights is something else."""
    reference = reference_unet(SWITCHED)
    network = ours_of(reference)
    inputs = inputs_of(network.spec)
    with torch.no_grad():
        expected = predicted(reference, *map(torch.tensor, inputs))
    assert relative_error(network(*map(Tensor, inputs)), expected) < FORWARD
    for name, value in WRONG.items():
        other = UNet2DConditionModel(replace(network.spec, **{name: value}))
        load_strict(other, weights_of(reference), "diffusers")
        assert relative_error(other(*map(Tensor, inputs)), expected) > 10 * FORWARD, name


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_names_and_shapes_are_diffusers(form):
    """Also with four resolutions, attention at three of them and in the finest, and layers as stage 2 has them."""
    deep = form | {
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": (1, 2, 2, 3),
        "down_block_types": (*STAGE_1["down_block_types"], *STAGE_1["down_block_types"]),
        "up_block_types": (*STAGE_1["up_block_types"], *STAGE_1["up_block_types"]),
    }
    for settings in (form, deep):
        with torch.device("meta"):
            reference = Reference(**settings)
        expected = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
        assert unet_shapes(read_unet_config(dict(reference.config))) == expected


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_configuration_is_read_as_diffusers_and_as_it_was_written(form):
    spec = read_unet_config(dict(Reference(**form).config))
    written = write_unet_config(spec)
    assert read_unet_config(written) == spec
    again = Reference.from_config(written)
    for name, value in form.items():
        own = again.config[name]
        assert (tuple(own) if isinstance(own, list) else own) == value, name


REFUSED = {
    "another activation": ({"act_fn": "mish"}, "act_fn: expected silu or gelu, got 'mish'"),
    "another norm of the text": ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm: expected group_norm"),
    "pictures beside the text": ({"addition_embed_type": "text_image"}, "addition_embed_type: expected null or text_t"),
    "other labels": ({"class_embed_type": "projection"}, "class_embed_type: expected timestep or null, got 'proj"),
    "heads of two widths": ({"attention_head_dim": [8, 16]}, r"attention_head_dim: expected one divisor of \[64\]"),
    "heads that do not fit": (
        {"attention_head_dim": 48},
        r"attention_head_dim: expected one divisor of \[64\], got 48",
    ),
    "SD's middle": ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type is of other blocks"),
    "another way up": ({"up_block_types": list(STAGE_1["down_block_types"])}, "up_block_types: expected a list, each"),
    "another middle": ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention: expected null or"),
    "a middle of its own": (
        {"only_cross_attention": True, "mid_block_only_cross_attention": False},
        "mid_block_only_cross_attention: expected null beside only_cross_attention",
    ),
    "no width": ({"encoder_hid_dim": None, "encoder_hid_dim_type": "text_proj"}, "is given without encoder_hid_dim"),
    "heads of pooling": ({"addition_embed_type_num_heads": 5}, "width of text 32 is not a multiple of addition"),
    "groups": ({"cross_attention_dim": 24}, "cross_attention_dim 24 is not a multiple of groups: 32"),
    "a factor of 0": ({"resnet_out_scale_factor": 0}, "resnet_out_scale_factor or mid_block_scale_factor is 0"),
    "layers": ({"layers_per_block": [1, 2, 3]}, "layers_per_block has 3 entries, block_out_channels 2"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_do_is_refused_in_a_line(change, said, tmp_path):
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in STAGE_1.items()}
    with pytest.raises(WeightError, match=said) as caught:
        read_config(tmp_path / "config.json", config | change, read_unet_config)
    assert "\n" not in str(caught.value)
