"""Single files under our names are read by diffusers' own converters: exactly the public names, shapes and values.

The specs have every name of the published models, so the key sets are the real ones; only the widths are small.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils

from dreambooth_ms.formats.model_config import write_unet_config, write_vae_config
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.models.specs import Family
from tests.parity.reference import normal
from tests.small_specs import SMALL


@pytest.fixture(params=SMALL)
def model(request):
    return SMALL[request.param]


@pytest.fixture
def values(model):
    """Public name -> random array, for everything the single file holds."""
    shapes = naming_of(Format.STABILITY, model).shapes
    return {name: np.asarray(normal(*shape, seed=seed)) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def checkpoint(model, values):
    """The single file as torch would load it."""
    plan = naming_of(Format.STABILITY, model).write_plan(list(values))
    return {
        stored: torch.tensor(assembly.build([values[piece] for piece in assembly.pieces]))
        for stored, assembly in plan.tensors.items()
    }


def of_part(values, part):
    return {name.removeprefix(f"{part}."): value for name, value in values.items() if name.startswith(f"{part}.")}


def assert_same(converted, expected):
    assert converted.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(converted[name].numpy(), value), name


def test_the_unet_has_the_name_by_which_diffusers_tells_the_family(model, checkpoint):
    kinds = {Family.SD1: "v1", Family.SD2: "v2", Family.SDXL: "xl_base", Family.SDXL_REFINER: "xl_refiner"}
    # SD 2 is recognised by the width of its text, which is small here.
    marks = {kind: single_file_utils.CHECKPOINT_KEY_NAMES[kind] in checkpoint for kind in kinds.values()}
    assert marks[kinds[model.family]]
    assert marks["xl_base"] == (model.family is Family.SDXL)


def test_the_unet(model, values, checkpoint):
    config = write_unet_config(model.unet) | {"addition_embed_type": model.unet.addition_embed_type}
    converted = single_file_utils.convert_ldm_unet_checkpoint(dict(checkpoint), config)
    assert_same(converted, of_part(values, "unet"))


def test_the_averages_of_the_unet(model, values, checkpoint):
    naming = naming_of(Format.STABILITY, model)
    averages = {naming.averages[name].name: 2 * torch.tensor(values[name]) for name in naming.averages}
    config = write_unet_config(model.unet) | {"addition_embed_type": model.unet.addition_embed_type}
    converted = single_file_utils.convert_ldm_unet_checkpoint({**checkpoint, **averages}, config, extract_ema=True)
    assert_same(converted, {name: 2 * value for name, value in of_part(values, "unet").items()})


def test_the_autoencoder(model, values, checkpoint):
    converted = single_file_utils.convert_ldm_vae_checkpoint(dict(checkpoint), write_vae_config(model.vae, 8))
    assert_same(converted, of_part(values, "vae"))


def test_the_text_encoders(model, values, checkpoint):
    encoders = {part for part in ("text_encoder", "text_encoder_2") if getattr(model, part)}
    openclip = {
        Family.SD2: ("text_encoder", "cond_stage_model.model."),
        Family.SDXL: ("text_encoder_2", "conditioner.embedders.1.model."),
        Family.SDXL_REFINER: ("text_encoder_2", "conditioner.embedders.0.model."),
    }
    if model.family in openclip:
        part, prefix = openclip[model.family]
        encoders.remove(part)
        tower = SimpleNamespace(config=SimpleNamespace(hidden_size=getattr(model, part).transformer.hidden_size))
        expected = of_part(values, part)
        if model.family is not Family.SD2:
            # diffusers cuts q, k and v by the side of the projection that is its input here.
            assert expected["text_projection.weight"].shape[1] == tower.config.hidden_size
        unused = {name.removeprefix(f"{part}.") for name in naming_of(Format.STABILITY, model).optional}
        converted = single_file_utils.convert_open_clip_checkpoint(tower, dict(checkpoint), prefix)
        assert_same(converted, {name: value for name, value in expected.items() if name not in unused})
    for part in encoders:
        assert_same(single_file_utils.convert_ldm_clip_checkpoint(dict(checkpoint)), of_part(values, part))
