"""Random Stable Diffusion pipelines of a few thousand weights, in the real folder layout."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import sentencepiece

from dreambooth_ms.diffusion import NoiseScheduleSpec
from dreambooth_ms.formats.folder_layout import write_json
from dreambooth_ms.formats.model_config import (
    config_of,
    pipeline_configs,
    write_text_config,
    write_unet_config,
    write_vae_config,
)
from dreambooth_ms.models.clip import CLIPModel, CLIPTextModel
from dreambooth_ms.models.parameters import initialise
from dreambooth_ms.models.roberta import RobertaSeriesModelWithTransformation
from dreambooth_ms.models.specs import (
    SD_15,
    ClipSpec,
    ClipTextSpec,
    ClipVisionSpec,
    RobertaSpec,
    T5Spec,
    TransformerSpec,
    UNetSpec,
    VaeSpec,
    at_level,
)
from dreambooth_ms.models.t5 import T5EncoderModel
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

IF_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.95,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.5,
    "steps_offset": 0,
    "thresholding": True,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "variance_type": "learned_range",
}
"""As the folders of its first stage have it."""


def of_levels(unet: UNetSpec, levels: int) -> UNetSpec:
    """The UNet with its two resolutions; or with the one that has transformers alone, half the time to compile; or, of
    no level, with one that has a transformer in the middle alone, half of that."""
    if levels == 2:
        return unet
    kept = unet.has_attention.index(True)
    return replace(
        unet,
        block_out_channels=(unet.block_out_channels[0],),
        has_attention=(levels == 1,),
        num_heads=(unet.num_heads[kept],),
        transformer_layers_per_block=at_level(unet.transformer_layers_per_block, kept),
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


SENTENCES = [
    "a photo of a dog on the beach",
    "a photo of a cat in a bucket",
    "une photo d'un chien sur la plage",
    "ein Foto von einem Hund am Strand",
    "一只狗在海滩上的照片",
    "The quick brown fox jumps over the lazy dog, twice!",
]
"""What small tokenizers of sentencepiece learn from."""
SENTENCEPIECE = {
    "t5": ("spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    "xlm-r": ("sentencepiece.bpe.model", {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}),
}
"""The file of each, and what it keeps at which id of sentencepiece."""


def write_sentencepiece(folder: Path, form: str) -> int:
    """A tokenizer of T5 or XLM-R; gives how many ids there may be."""
    (name, ids), model = SENTENCEPIECE[form], io.BytesIO()
    sizes = {"vocab_size": 90, "hard_vocab_limit": False, "minloglevel": 2}
    sentences = iter(SENTENCES * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **sizes, **ids)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(model.getvalue())
    write_json(folder / "tokenizer_config.json", {"model_max_length": 512})
    return 210


def write_t5_config(spec: T5Spec) -> dict[str, Any]:
    """The inverse of `read_t5_config`."""
    return config_of("t5", spec, architectures=["T5EncoderModel"])


def write_roberta_config(spec: RobertaSpec) -> dict[str, Any]:
    """The inverse of `read_roberta_config`."""
    config = config_of("roberta", spec, architectures=["RobertaSeriesModelWithTransformation"])
    return vars(config.pop("transformer")) | config


def write_random_if(folder: Path, seed: int = 0, second: bool = False, levels: int = 2, **unet: Any) -> Path:
    """A model folder of DeepFloyd IF: a first stage of 32 x 32 pixels, or a second one of 64 x 64."""
    own: dict[str, Any] = {} if second else {"in_channels": 3, "class_embed_type": None}
    own |= {"layers_per_block": (1,)} if levels < 2 else {}
    spec = replace(of_levels(IF_UNET, levels), **{"sample_size": 64 if second else 32} | own | unet)
    vocabulary = write_sentencepiece(folder / "tokenizer", "t5")
    text = T5Spec(vocab_size=vocabulary, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    parts = (
        ("unet", UNet2DConditionModel(spec), write_unet_config(spec)),
        ("text_encoder", T5EncoderModel(text), write_t5_config(text)),
    )
    for part, network, config in parts:
        initialise(network, seed)
        save_network(folder, part, network, config)
    schedulers = {"scheduler": {**IF_SCHEDULER, "sample_max_value": 1.0 if second else 1.5}}
    schedulers |= {"image_noising_scheduler": IF_SCHEDULER | {"variance_type": "fixed_small"}} if second else {}
    for name, config in schedulers.items():
        write_json(folder / name / "scheduler_config.json", config)
    index = {"_class_name": "IFSuperResolutionPipeline" if second else "IFPipeline", "_diffusers_version": "0.39.0"}
    index |= {name: ["diffusers", "DDPMScheduler"] for name in schedulers}
    index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "requires_safety_checker": False}
    absent = {name: [None, None] for name in ("safety_checker", "feature_extractor", "watermarker")}
    write_json(folder / "model_index.json", index | absent)
    return folder


def write_random_alt(folder: Path, seed: int = 0, levels: int = 2, **settings: Any) -> Path:
    """A model folder of AltDiffusion, in the sizes of `write_random_model`; `settings` are of its text encoder."""
    write_random_model(folder, seed, levels=levels)
    shutil.rmtree(folder / "tokenizer")
    shutil.rmtree(folder / "text_encoder")
    sizes = {"max_position_embeddings": 100, "type_vocab_size": 1, "project_dim": TEXT.hidden_size}
    sizes["vocab_size"] = write_sentencepiece(folder / "tokenizer", "xlm-r")
    text = RobertaSpec(transformer=replace(TEXT, num_hidden_layers=2, hidden_act="gelu"), **sizes | settings)
    network = RobertaSeriesModelWithTransformation(text)
    initialise(network, seed)
    save_network(folder, "text_encoder", network, write_roberta_config(text))
    index = json.loads((folder / "model_index.json").read_text())
    own = {
        "_class_name": "AltDiffusionPipeline",
        "text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"],
        "tokenizer": ["transformers", "XLMRobertaTokenizer"],
    }
    write_json(folder / "model_index.json", index | own)
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
