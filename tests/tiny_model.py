"""Random Stable Diffusion pipelines of a few thousand weights, in the real folder layout."""

import json
from dataclasses import replace
from pathlib import Path

from dreambooth_ms.diffusion import NoiseScheduleSpec
from dreambooth_ms.formats.folder_layout import write_json
from dreambooth_ms.formats.model_config import pipeline_configs, write_text_config, write_unet_config, write_vae_config
from dreambooth_ms.models.clip import CLIPModel, CLIPTextModel
from dreambooth_ms.models.parameters import initialise
from dreambooth_ms.models.specs import SD_15, ClipSpec, ClipTextSpec, ClipVisionSpec, TransformerSpec, UNetSpec, VaeSpec
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import AutoencoderKL
from dreambooth_ms.models.vit import ViTModel
from dreambooth_ms.weights.bundle import save_network
from tools.tiny_base.clip_config import write_clip_config
from tools.tiny_base.tokenizer import write_tokenizer

UNET = UNetSpec(
    block_out_channels=(16, 32),
    has_attention=(True, False),
    num_heads=(2, 2),
    cross_attention_dim=24,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=16,
)
VAE = VaeSpec(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
TEXT = TransformerSpec(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)


# SDXL in the same size: the finest resolution has no transformers, so what it says of their depth is not used.
SDXL_TEXT = replace(TEXT, num_hidden_layers=2)
SDXL_TEXT_2 = TransformerSpec(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu"
)
POOLED = 20
SDXL_UNET = replace(
    UNET,
    has_attention=(False, True),
    cross_attention_dim=SDXL_TEXT.hidden_size + SDXL_TEXT_2.hidden_size,
    use_linear_projection=True,
    transformer_layers_per_block=(2, 1),
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=POOLED + 6 * 8,
)
REFINER_UNET = replace(
    SDXL_UNET,
    cross_attention_dim=SDXL_TEXT_2.hidden_size,
    projection_class_embeddings_input_dim=POOLED + 5 * 8,
)
# DeepFloyd IF's second stage, in the same size.
IF_UNET = replace(
    UNET,
    in_channels=6,
    out_channels=6,
    block_out_channels=(16, 32),
    has_attention=(False, True),
    num_heads=(2, 4),
    cross_attention_dim=32,
    layers_per_block=(1, 2),
    addition_embed_type="text",
    addition_embed_type_num_heads=2,
    class_embed_type="timestep",
    encoder_hid_dim=24,
    time_embedding_dim=40,
    time_embedding_act_fn="gelu",
    simple_blocks=True,
    act_fn="gelu",
    resnet_time_scale_shift="scale_shift",
    resnet_skip_time_act=True,
    resnet_out_scale_factor=1.414,
    mid_block_scale_factor=1.414,
    cross_attention_norm="group_norm",
)


def of_levels(unet: UNetSpec, levels: int) -> UNetSpec:
    """The UNet with its two resolutions, or with the one that has transformers alone: half the time to compile."""
    if levels == 2:
        return unet
    kept = unet.has_attention.index(True)
    return replace(
        unet,
        block_out_channels=(unet.block_out_channels[0],),
        has_attention=(True,),
        num_heads=(unet.num_heads[kept],),
        transformer_layers_per_block=unet.transformer_layers(kept),
    )


def write_pipeline(folder: Path, schedule: NoiseScheduleSpec, in_channels: int = 4) -> None:
    """What makes saved networks a pipeline of Stable Diffusion 1, for inpainting if its UNet takes 9 channels."""
    model = replace(SD_15, unet=replace(SD_15.unet, in_channels=in_channels))
    for name, content in pipeline_configs(model, ("unet", "vae", "text_encoder"), schedule).items():
        write_json(folder / name, content)


def write_random_sdxl(
    folder: Path, seed: int = 0, refiner: bool = False, levels: int = 2, in_channels: int = 4
) -> Path:
    """A model folder of SDXL, or of its refiner, whose second tokenizer fills short prompts with another token."""
    words = ["a", "photo", "of", "star"]
    vocabulary = write_tokenizer(folder / "tokenizer_2", words)
    settings = folder / "tokenizer_2" / "tokenizer_config.json", folder / "tokenizer_2" / "special_tokens_map.json"
    for file in settings:
        write_json(file, json.loads(file.read_text()) | {"pad_token": "!"})
    words_of_text = {"vocab_size": vocabulary, "eos_token_id": vocabulary - 1}
    text, text_2 = (
        ClipTextSpec(transformer=SDXL_TEXT, **words_of_text),
        ClipTextSpec(transformer=SDXL_TEXT_2, projection_dim=POOLED, **words_of_text),
    )
    unet, vae = of_levels(REFINER_UNET if refiner else SDXL_UNET, levels), replace(VAE, scaling_factor=0.13025)
    unet = replace(unet, in_channels=in_channels)
    parts = [
        ("unet", UNet2DConditionModel(unet), write_unet_config(unet)),
        ("vae", AutoencoderKL(vae), write_vae_config(vae, 32)),
        ("text_encoder_2", CLIPTextModel(text_2), write_text_config(text_2, POOLED)),
    ]
    if not refiner:
        write_tokenizer(folder / "tokenizer", words)
        parts.append(("text_encoder", CLIPTextModel(text), write_text_config(text, SDXL_TEXT.hidden_size)))
    for part, network, config in parts:
        initialise(network, seed)
        save_network(folder, part, network, config)
    write_pipeline(folder, NoiseScheduleSpec())
    present, absent = ["transformers", "CLIPTextModel"], [None, None]
    pipelines = {4: "StableDiffusionXLPipeline", 9: "StableDiffusionXLInpaintPipeline"}
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else pipelines[in_channels],
            "force_zeros_for_empty_prompt": not refiner,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": absent if refiner else present,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": absent if refiner else ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        | ({"requires_aesthetics_score": True} if refiner else {}),
    )
    return folder


def write_random_model(
    folder: Path,
    seed: int = 0,
    prediction_type: str = "epsilon",
    sd2: bool = False,
    levels: int = 2,
    in_channels: int = 4,
) -> Path:
    """A model folder that trains 32 x 32 pictures in milliseconds; `sd2` gives it SD 2's linear projections, and 9
    channels make it one for inpainting."""
    spec = of_levels(replace(UNET, use_linear_projection=sd2, in_channels=in_channels), levels)
    vocabulary = write_tokenizer(folder / "tokenizer", ["a", "photo", "of", "star"])
    text = ClipTextSpec(transformer=TEXT, vocab_size=vocabulary, eos_token_id=vocabulary - 1)
    clip = ClipSpec(
        text=text,
        vision=ClipVisionSpec(transformer=TEXT, image_size=32, patch_size=16),
        projection_dim=TEXT.hidden_size,
    )
    parts = (
        ("unet", UNet2DConditionModel(spec), write_unet_config(spec)),
        ("vae", AutoencoderKL(VAE), write_vae_config(VAE, 32)),
        ("text_encoder", CLIPTextModel(text), write_text_config(text, TEXT.hidden_size)),
        ("clip", CLIPModel(clip), write_clip_config(clip)),
    )
    for part, network, config in parts:
        initialise(network, seed)
        save_network(folder, part, network, config)
    preprocessing = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    write_json(folder / "clip" / "preprocessor_config.json", preprocessing)
    write_pipeline(folder, NoiseScheduleSpec(prediction_type=prediction_type), in_channels)
    return folder


def write_random_dino(home: Path, seed: int = 0) -> Path:
    """The folder `encoder` with a vision transformer as DINO's, for pictures of 28 pixels."""
    spec = ClipVisionSpec(
        transformer=replace(TEXT, hidden_act="gelu", layer_norm_eps=1e-12), image_size=28, patch_size=7
    )
    network, sizes = ViTModel(spec), {"image_size": spec.image_size, "patch_size": spec.patch_size}
    initialise(network, seed)
    save_network(home, "encoder", network, {"model_type": "vit", **vars(spec.transformer), **sizes})
    write_json(home / "encoder" / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    return home / "encoder"
