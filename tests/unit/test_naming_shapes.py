"""The public names and shapes that a spec stands for are those of diffusers, of transformers and of our own cells."""

import math
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.deprecated.alt_diffusion import RobertaSeriesModelWithTransformation
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import RobertaSeriesConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from dreambooth_ms.config.train import MethodConfig
from dreambooth_ms.formats.model_config import (
    write_text_config,
    write_unet_config,
    write_vae_config,
)
from dreambooth_ms.models import clip, unet, vae
from dreambooth_ms.models.parameter_shapes import model_shapes, text_shapes, unet_shapes, vae_shapes
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
    RobertaSpec,
    T5Spec,
    TransformerSpec,
    UNetSpec,
)
from dreambooth_ms.training.memory import ranks_of
from tests.tiny_model import SDXL_UNET, TEXT, UNET, VAE, write_roberta_config

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
        assert text_shapes(spec) == shapes_of(module)
        assert len(shapes_of(module)) == count

    @pytest.mark.parametrize(
        ("channels", "text", "weights", "of_lora"),
        [
            ((192, 384, 576, 768), 768, 371_605_830, 649_728),
            ((320, 640, 960, 1280), 1280, 935_365_830, 1_082_880),
            ((704, 1408, 2112, 2816), 2816, 4_304_695_110, 2_382_336),
        ],
        ids=["M", "L", "XL"],
    )
    def test_ifs_first_stages_have_diffusers_parameters(self, channels, text, weights, of_lora):
        """M's and L's channels are not certain: what counts is that they agree."""
        spec = UNetSpec(
            block_out_channels=channels,
            has_attention=(False, True, True, True),
            num_heads=tuple(width // 64 for width in channels),
            cross_attention_dim=text,
            layers_per_block=3,
            in_channels=3,
            out_channels=6,
            addition_embed_type="text",
            encoder_hid_dim=4096,
            simple_blocks=True,
            act_fn="gelu",
            resnet_time_scale_shift="scale_shift",
            cross_attention_norm="group_norm",
        )
        with torch.device("meta"):
            module = UNet2DConditionModel.from_config(write_unet_config(spec))
        shapes = unet_shapes(spec)
        assert shapes == shapes_of(module)
        assert sum(map(math.prod, shapes.values())) == weights
        ranks = ranks_of(shapes, 4, MethodConfig().targets_in_if(reads_pixels=True))
        assert (sum(ranks.values()), 2 * len(ranks)) == (of_lora, 264)

    def test_t5_has_transformers_parameters(self):
        spec = T5Spec(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        with torch.device("meta"):
            module = T5EncoderModel(T5Config(**vars(spec), feed_forward_proj="gated-gelu"))
        shapes = text_shapes(spec)
        assert shapes == shapes_of(module)
        assert sum(map(math.prod, shapes.values())) == 4_762_310_656

    @pytest.mark.parametrize(("pre", "weights"), [(False, 559_628_032), (True, 560_417_280)], ids=["m9", "m18"])
    def test_xlm_r_has_diffusers_parameters(self, pre, weights):
        tower = TransformerSpec(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            hidden_act="gelu",
        )
        own = {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1, "project_dim": 768}
        spec = RobertaSpec(transformer=tower, **own, has_pre_transformation=pre)
        with torch.device("meta"):
            module = RobertaSeriesModelWithTransformation(RobertaSeriesConfig(**write_roberta_config(spec)))
        known = {name: shape for name, shape in shapes_of(module).items() if ".pooler." not in name}
        shapes = text_shapes(spec)
        assert shapes == known
        assert sum(map(math.prod, shapes.values())) == weights


def test_our_cells_have_the_same_parameters():
    text = ClipTextSpec(transformer=TEXT, vocab_size=30)
    projected = ClipTextSpec(transformer=TEXT, vocab_size=30, projection_dim=7)
    cells = (
        (unet_shapes(UNET), unet.UNet2DConditionModel(UNET)),
        (vae_shapes(VAE), vae.AutoencoderKL(VAE)),
        (text_shapes(text), clip.CLIPTextModel(text)),
        (unet_shapes(SDXL_UNET), unet.UNet2DConditionModel(SDXL_UNET)),
        (text_shapes(projected), clip.CLIPTextModel(projected)),
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
