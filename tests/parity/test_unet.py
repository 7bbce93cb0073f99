"""The UNet computes what diffusers' does on the same weights, forward and backward, in both execution modes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mindspore import Tensor

from dreambooth_ms.formats.model_config import read_unet_config
from dreambooth_ms.models.specs import SD_15_UNET, SD_21_UNET
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.weights.bundle import load_strict
from tests.parity.reference import (
    REFINER_FORM,
    SD_1_FORM,
    SD_2_FORM,
    SDXL_FORM,
    ValueAndGradients,
    gradients_of,
    normal,
    public_gradients,
    relative_error,
    small_unet,
    weights_of,
    worst_gradient_error,
)

# Float32 sums in another order, through some thirty layers: measured below 1e-6.
FORWARD = 1e-5
# The same through twice the layers; weights of small gradient are the worst: measured 1e-5.
GRADIENT = 1e-4
# The same kernels in the same order: measured equal to the last bit.
MODES_FORWARD = 1e-6
# Where several gradients of one value meet, the modes add them in another order: measured 2e-6.
MODES_GRADIENT = 2e-5


@pytest.fixture(scope="module", params=[SD_1_FORM, SD_2_FORM, SDXL_FORM], ids=["sd1", "sd2", "sdxl"])
def compared(request):
    """Both networks on the same weights and inputs; latents are not square, so that no axis passes for another."""
    reference = small_unet(request.param)
    latents, text, sensitivity = normal(2, 4, 16, 24), normal(2, 7, 24), normal(2, 4, 16, 24, seed=1)
    timesteps = np.array([3, 981], np.int32)
    added = added_conditions(reference.config.projection_class_embeddings_input_dim)
    latents_torch, text_torch, *added_torch = (
        torch.tensor(values, requires_grad=True) for values in (latents, text, *added)
    )
    added_torch = dict(zip(("text_embeds", "time_ids"), added_torch, strict=False))
    expected = reference(
        latents_torch, torch.tensor(timesteps), text_torch, added_cond_kwargs=added_torch or None
    ).sample
    (expected * torch.tensor(sensitivity)).sum().backward()

    network = UNet2DConditionModel(read_unet_config(dict(reference.config)))
    load_strict(network, weights_of(reference), "diffusers")
    inputs = tuple(map(Tensor, (sensitivity, latents, timesteps, text, *added)))
    result, (input_gradients, gradients) = ValueAndGradients(network)(*inputs)
    return SimpleNamespace(
        expected=expected,
        expected_input_gradients=(latents_torch.grad, text_torch.grad, *(one.grad for one in added_torch.values())),
        expected_gradients=gradients_of(reference),
        network=network,
        inputs=inputs,
        result=result,
        input_gradients=(input_gradients[0], *input_gradients[2:]),
        gradients=public_gradients(network, gradients),
    )


def added_conditions(width):
    """Pooled text, and sizes of which no two are the same, so that one in a wrong place would show."""
    if width is None:
        return ()
    sizes = np.array([[1024, 768, 0, 17, 512, 640], [600, 431, 88, 0, 333, 256]], np.float32)
    return normal(2, 20), sizes[:, : (width - 20) // 8]


def test_the_prediction_is_diffusers(compared):
    error = relative_error(compared.result, compared.expected)
    print(f"forward {error:.1e}")
    assert error < FORWARD


def test_the_gradients_of_all_inputs_are_diffusers(compared):
    errors = [
        relative_error(ours, reference)
        for ours, reference in zip(compared.input_gradients, compared.expected_input_gradients, strict=True)
    ]
    print("gradients of inputs", *(f"{error:.1e}" for error in errors))
    assert max(errors) < GRADIENT


def test_the_gradient_of_every_weight_is_diffusers(compared):
    error, name = worst_gradient_error(compared.gradients, compared.expected_gradients)
    print(f"gradients of weights {error:.1e} ({name})")
    assert error < GRADIENT, name


@pytest.mark.parametrize("compared", [SD_1_FORM], ids=["sd1"], indirect=True)
def test_pynative_computes_what_the_graph_computes(compared, pynative):
    result, (input_gradients, gradients) = ValueAndGradients(compared.network)(*compared.inputs)
    gradients = public_gradients(compared.network, gradients)
    forward = relative_error(result, compared.result)
    backward = max(
        relative_error(input_gradients[0], compared.input_gradients[0]),
        relative_error(input_gradients[2], compared.input_gradients[1]),
        worst_gradient_error(gradients, compared.gradients)[0],
    )
    print(f"PyNative against graph: forward {forward:.1e}, gradients {backward:.1e}")
    assert forward < MODES_FORWARD
    assert backward < MODES_GRADIENT


def test_the_refiner_is_diffusers_too(pynative):
    reference = small_unet(REFINER_FORM)
    network = UNet2DConditionModel(read_unet_config(dict(reference.config)))
    load_strict(network, weights_of(reference), "diffusers")
    text, (pooled, sizes) = normal(2, 7, 24), added_conditions(20 + 5 * 8)
    inputs = normal(2, 4, 16, 24), np.array([3, 981], np.int32), text, pooled, sizes
    assert network.spec.num_add_time_ids(20) == sizes.shape[1] == 5
    latents, timesteps, *conditions = map(torch.tensor, inputs)
    with torch.no_grad():
        added = {"text_embeds": conditions[1], "time_ids": conditions[2]}
        expected = reference(latents, timesteps, conditions[0], added_cond_kwargs=added).sample
    error = relative_error(network(*map(Tensor, inputs)), expected)
    print(f"refiner, forward {error:.1e}")
    assert error < FORWARD


@pytest.mark.parametrize(("form", "spec"), [(SD_1_FORM, SD_15_UNET), (SD_2_FORM, SD_21_UNET)], ids=["sd1", "sd2"])
def test_at_the_published_depth_every_weight_has_its_public_name_and_shape(form, spec):
    """Four resolutions of two layers, as published, with a fortieth of the channels; nothing is compiled."""
    attention = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    reference = small_unet(
        form
        | {
            "block_out_channels": tuple(channels // 40 for channels in spec.block_out_channels),
            "down_block_types": (attention[0],) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + (attention[1],) * 3,
            "attention_head_dim": (1, 2, 4, 4),
        },
        layers_per_block=2,
    )
    read = read_unet_config(dict(reference.config))
    assert (read.has_attention, read.layers_per_block) == (spec.has_attention, spec.layers_per_block)
    load_strict(UNet2DConditionModel(read), weights_of(reference), "diffusers")
