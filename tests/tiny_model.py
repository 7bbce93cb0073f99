"""Random Stable Diffusion pipelines of a few thousand weights, in the real folder layout."""

from dataclasses import replace
from pathlib import Path

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec, PredictionType
from dreambooth_ms.models.clip import CLIPModel, CLIPTextModel
from dreambooth_ms.models.specs import ClipSpec, ClipTextSpec, ClipVisionSpec, TransformerSpec, UNetSpec, VaeSpec
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import AutoencoderKL
from dreambooth_ms.weights.initialise import initialise
from dreambooth_ms.weights.model_config import (
    write_clip_config,
    write_text_config,
    write_unet_config,
    write_vae_config,
)
from dreambooth_ms.weights.model_folder import save_index, save_network, write_json
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


def write_random_model(folder: Path, seed: int = 0, prediction_type: str = "epsilon", sd2: bool = False) -> Path:
    """A model folder that trains 32 x 32 pictures in milliseconds; `sd2` gives it SD 2's linear projections."""
    spec = replace(UNET, use_linear_projection=sd2)
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
    save_index(folder, NoiseScheduleSpec(prediction_type=PredictionType(prediction_type)))
    return folder
