"""What several commands put together in the same way: base, adapters, embeddings, sampler."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dreambooth_ms.adapters.attach import AttachedAdapters, attach
from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.adapters.precision import compute_in
from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.shared import DeviceConfig, WeightsConfig
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.text import PromptTokenizer, encode_prompts
from dreambooth_ms.models.clip import TextEncoders
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.runtime.device import compute_dtype, set_up_device
from dreambooth_ms.weights.bundle import ModelBundle, open_bundle
from dreambooth_ms.weights.hub import find_model


def open_base(
    device: DeviceConfig,
    name_or_path: str,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
) -> ModelBundle:
    """Set up the device and open the base model, with the autoencoder of another one if `vae` names it."""
    set_up_device(device.device_target, device.ms_mode)
    compute_dtype(device.mixed_precision)  # What the device cannot compute in ends here.
    other_vae = find_model(vae) if vae else None
    folder = open_bundle(find_model(name_or_path, revision, variant), variant, other_vae)
    for note in folder.notes:
        tell(f"{folder.path}: {note}")
    return folder


@dataclass(frozen=True)
class AdaptedModel:
    """A base with adapters on it."""

    unet: UNet2DConditionModel
    adapters: AttachedAdapters
    """Those of the UNet."""
    embeddings: dict[str, PromptText]
    """The prompts asked for and the empty one, as the adapted text encoders encode them."""
    base_embeddings: dict[str, PromptText]
    """The same without the adapters."""


def load_adapted(
    folder: ModelBundle, weights: WeightsConfig, prompts: Sequence[str], mixed_precision: str | None = None
) -> AdaptedModel:
    """The base with the adapters of a command line; the text encoders, which compute in float32, are gone afterwards.

    Raises:
        WeightError: an adapter was trained on another base.
    """
    models = [folder.opened().spec]
    adapters = [open_adapter(Path(path), models, folder.path).adapter for path in weights.lora]
    encoders, unet = folder.load_text_encoders(), folder.load_unet()
    base_embeddings = encode(folder, encoders, prompts)
    attach(encoders.networks(), adapters).set_scales(weights.lora_scale)
    attached = attach({"unet": unet}, adapters)
    attached.set_scales(weights.lora_scale)
    adapts_text = any(adapter.parts.keys() - {"unet"} for adapter in adapters)
    # Once compiled, the encoders would go on without their adapters.
    adapted = encoders.with_clip_skip(0)
    embeddings = encode(folder, adapted, prompts) if adapts_text else base_embeddings
    compute_in(unet, compute_dtype(mixed_precision))
    return AdaptedModel(unet, attached, embeddings, base_embeddings)


def prompt_tokenizer(folder: ModelBundle) -> PromptTokenizer:
    """The tokenizers of a base."""
    pooled = folder.text_spec_2
    return PromptTokenizer(*folder.tokenizer_paths, pooled_at=pooled.eos_token_id if pooled else None)


def encode(folder: ModelBundle, encoders: TextEncoders, prompts: Sequence[str]) -> dict[str, PromptText]:
    """These prompts, and the empty one as it stands for "no negative prompt": with most SDXL models that is zeros."""
    encoded = encode_prompts(prompt_tokenizer(folder), encoders, [*prompts, ""])
    if folder.zeros_for_empty_prompt:
        encoded[""] = PromptText(*map(np.zeros_like, encoded[""]))
    return encoded


def embed_prompts(folder: ModelBundle, prompts: Sequence[str]) -> dict[str, PromptText]:
    """`encode` by the base's own text encoders, which are gone afterwards."""
    return encode(folder, folder.load_text_encoders(), prompts)
