"""What several commands put together in the same way: base, adapters, embeddings, sampler."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dreambooth_ms.adapters.lora import Adapted, load_lora
from dreambooth_ms.cli.tell import tell as tell
from dreambooth_ms.config.schema import DeviceConfig, WeightsConfig
from dreambooth_ms.data.text import PromptTokenizer, encode_prompts
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.ops import set_up_device
from dreambooth_ms.weights.hub import find_model
from dreambooth_ms.weights.model_folder import ModelFolder, open_model_folder
from dreambooth_ms.weights.opened_lora import read_adapters


def open_base(
    device: DeviceConfig, name_or_path: str, revision: str | None = None, variant: str | None = None
) -> ModelFolder:
    """Set up the device and open the base model."""
    set_up_device(device.device_target, device.ms_mode)
    folder = open_model_folder(find_model(name_or_path, revision), variant)
    for note in folder.notes:
        tell(f"{folder.path}: {note}")
    return folder


@dataclass(frozen=True)
class AdaptedModel:
    """A base with adapters on it."""

    unet: UNet2DConditionModel
    layers: list[Adapted]
    """The UNet's adapted layers."""
    embeddings: dict[str, np.ndarray]
    """Prompt -> embedding of the adapted text encoder, for the prompts asked for and the empty one."""
    base_embeddings: dict[str, np.ndarray]
    """The same without the adapters."""


def load_adapted(folder: ModelFolder, weights: WeightsConfig, prompts: Sequence[str]) -> AdaptedModel:
    """The base with the adapters of a command line; the text encoder is gone afterwards.

    Raises:
        WeightError: an adapter was trained on another base.
    """
    files = [read_adapters(Path(path), lambda: folder.opened().spec) for path in weights.lora]
    tokenizer, encoder, unet = PromptTokenizer(folder.tokenizer_path), folder.load_text_encoder(), folder.load_unet()
    base_embeddings = encode_prompts(tokenizer, encoder, [*prompts, ""])
    try:
        layers = load_lora(unet, [file["unet"] for file in files if "unet" in file], weights.lora_scale)
        text_layers = load_lora(
            encoder, [file["text_encoder"] for file in files if "text_encoder" in file], weights.lora_scale
        )
    except WeightError as error:
        raise WeightError(f"{', '.join(weights.lora)}: {error}; this one is {folder.path}") from error
    embeddings = encode_prompts(tokenizer, encoder, [*prompts, ""]) if text_layers else base_embeddings
    return AdaptedModel(unet, list(layers.values()), embeddings, base_embeddings)


def embed_prompts(folder: ModelFolder, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Embeddings of these prompts and of the empty one; the text encoder is gone afterwards."""
    return encode_prompts(PromptTokenizer(folder.tokenizer_path), folder.load_text_encoder(), [*prompts, ""])
