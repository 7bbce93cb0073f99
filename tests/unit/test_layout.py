"""The list of a network's layers: what each reads was made before, and its modules are the network."""

from itertools import pairwise

import pytest

from dreambooth_ms.models.layout import LayerKind, unet_inputs, unet_layout, vae_layout
from dreambooth_ms.models.parameter_shapes import unet_shapes
from tests.small_specs import SMALL
from tests.tiny_model import IF_UNET, SDXL_UNET, UNET

UNETS = [UNET, SDXL_UNET, IF_UNET, *(model.unet for model in SMALL.values())]


@pytest.mark.parametrize("spec", UNETS)
def test_every_value_is_read_after_it_was_made_but_the_prediction(spec):
    layers, num_inputs = unet_layout(spec), len(unet_inputs(spec))
    for number, layer in enumerate(layers):
        assert max(layer.reads) < num_inputs + number
    assert {value for layer in layers for value in layer.reads} == set(range(num_inputs + len(layers) - 1))
    assert layers[-1].kind is LayerKind.UNET_OUTPUT


@pytest.mark.parametrize("spec", UNETS)
def test_every_parameter_belongs_to_one_layer(spec):
    modules = [module for layer in unet_layout(spec) for module in layer.modules]
    for name in unet_shapes(spec):
        assert sum(name.startswith(f"{module}.") for module in modules) == 1, name


@pytest.mark.parametrize("spec", UNETS)
def test_a_skip_has_the_resolution_of_what_it_is_joined_to(spec):
    layers, num_inputs = unet_layout(spec), len(unet_inputs(spec))
    for layer in layers:
        if layer.kind is LayerKind.SKIP_RESNET:
            x, skip = (layers[number - num_inputs] for number in layer.reads[:2])
            assert x.level == skip.level == layer.level
            assert x.out_channels + skip.out_channels == layer.in_channels


def test_the_layers_of_an_autoencoder_are_a_chain():
    for layers in vae_layout(SMALL["sd15"].vae).values():
        assert [layer.reads for layer in layers] == [(i,) for i in range(len(layers))]
        assert all(one.out_channels == other.in_channels for one, other in pairwise(layers))
