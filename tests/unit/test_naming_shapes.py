"""The public names and shapes that a spec stands for are those of diffusers, of transformers and of our own cells."""

import math
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreambooth_ms.formats.model_config import write_text_config, write_unet_config, write_vae_config
from dreambooth_ms.models import clip, unet, vae
from dreambooth_ms.models.parameter_shapes import clip_text_shapes, model_shapes, unet_shapes, vae_shapes
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.models.specs import (
    CLIP_L_TEXT,
    OPENCLIP_BIGG_TEXT,
    OPENCLIP_H_TEXT,
    SD_15,
    SD_21,
    SDXL_BASE,
    SDXL_REFINER,
    ClipTextSpec,
)
from tests.tiny_model import SDXL_UNET, TEXT, UNET, VAE

# As the published config.json files have it.
ADDED_CONDITIONS = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
SDXL_SETTINGS = ADDED_CONDITIONS | {
    "transformer_layers_per_block": [1, 2, 10],
    "projection_class_embeddings_input_dim": 2816,
}
REFINER_SETTINGS = ADDED_CONDITIONS | {
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}


def shapes_of(module):
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


class TestAgainstTheReferences:
    @pytest.mark.parametrize(
        ("spec", "more", "count", "weights"),
        [
            (SD_15.unet, {}, 686, 859_520_964),
            (SD_21.unet, {}, 686, 865_910_724),
            (SDXL_BASE.unet, SDXL_SETTINGS, 1680, 2_567_463_684),
            (SDXL_REFINER.unet, REFINER_SETTINGS, 1220, 2_259_526_660),
        ],
        ids=["sd15", "sd21", "sdxl", "refiner"],
    )
    def test_a_unet_has_diffusers_parameters(self, spec, more, count, weights):
        with torch.device("meta"):
            module = UNet2DConditionModel.from_config(write_unet_config(spec) | more)
        shapes = unet_shapes(spec)
        assert shapes == shapes_of(module)
        assert (len(shapes), sum(map(math.prod, shapes.values()))) == (count, weights)

    def test_an_autoencoder_has_diffusers_parameters(self):
        with torch.device("meta"):
            module = AutoencoderKL.from_config(write_vae_config(SD_15.vae, 512))
        assert vae_shapes(SD_15.vae) == shapes_of(module)
        assert len(shapes_of(module)) == 248

    @pytest.mark.parametrize(
        ("spec", "count"),
        [(CLIP_L_TEXT, 196), (OPENCLIP_H_TEXT, 372), (OPENCLIP_BIGG_TEXT, 517)],
        ids=["L", "H", "bigG"],
    )
    def test_a_text_encoder_has_transformers_parameters(self, spec, count):
        config = CLIPTextConfig(**write_text_config(spec, spec.projection_dim or 1))
        with torch.device("meta"):
            module = (CLIPTextModelWithProjection if spec.projection_dim else CLIPTextModel)(config)
        assert clip_text_shapes(spec) == shapes_of(module)
        assert len(shapes_of(module)) == count


def test_our_cells_have_the_same_parameters():
    text = ClipTextSpec(transformer=TEXT, vocab_size=30)
    projected = ClipTextSpec(transformer=TEXT, vocab_size=30, projection_dim=7)
    cells = (
        (unet_shapes(UNET), unet.UNet2DConditionModel(UNET)),
        (vae_shapes(VAE), vae.AutoencoderKL(VAE)),
        (clip_text_shapes(text), clip.CLIPTextModel(text)),
        (unet_shapes(SDXL_UNET), unet.UNet2DConditionModel(SDXL_UNET)),
        (clip_text_shapes(projected), clip.CLIPTextModel(projected)),
    )
    for shapes, cell in cells:
        assert shapes == {name: parameter.shape for name, parameter in public_parameters(cell).items()}


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (SD_15, {"unet": 686, "vae": 248, "text_encoder": 196}),
        (SDXL_BASE, {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517}),
        (SDXL_REFINER, {"unet": 1220, "vae": 248, "text_encoder_2": 517}),
    ],
    ids=["sd15", "sdxl", "refiner"],
)
def test_a_model_has_the_parameters_of_its_parts(model, parts):
    assert Counter(name.partition(".")[0] for name in model_shapes(model)) == parts
