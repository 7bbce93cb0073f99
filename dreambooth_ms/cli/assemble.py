"""What several commands put together in the same way: base, adapters, embeddings, sampler."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dreambooth_ms.adapters.lora import LoraDense, inject_lora, linear_layers
from dreambooth_ms.config.schema import DeviceConfig, WeightsConfig
from dreambooth_ms.data.text import PromptTokenizer, encode_prompts
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.ops import set_up_device
from dreambooth_ms.weights.hub import find_model
from dreambooth_ms.weights.lora_file import LoraFile, read_lora
from dreambooth_ms.weights.model_folder import ModelFolder, open_model_folder


def open_base(
    device: DeviceConfig, name_or_path: str, revision: str | None = None, variant: str | None = None
) -> ModelFolder:
    """Set up the device and open the base model."""
    set_up_device(device.device_target, device.ms_mode)
    return open_model_folder(find_model(name_or_path, revision), variant)


def load_adapted_unet(folder: ModelFolder, weights: WeightsConfig) -> tuple[UNet2DConditionModel, dict[str, LoraDense]]:
    """The UNet with the adapters of a command line on it, and its adapted layers."""
    adapters = [read_lora(Path(path)) for path in weights.lora]
    unet = folder.load_unet()
    if not adapters:
        return unet, {}
    adapter = _sum_of(adapters)
    if not adapter.factors.keys() <= linear_layers(unet).keys():
        raise WeightError(f"{', '.join(weights.lora)}: was trained on another base than {folder.path}")
    layers = inject_lora(unet, adapter.rank, adapter.alpha, adapter.target_modules)
    for name, layer in layers.items():
        layer.set_factors(*adapter.factors[name])
        layer.set_scale(weights.lora_scale)
    return unet, layers


def embed_prompts(folder: ModelFolder, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Embeddings of these prompts and of the empty one; the text encoder is gone afterwards."""
    return encode_prompts(PromptTokenizer(folder.tokenizer_path), folder.load_text_encoder(), [*prompts, ""])


def tell(line: str) -> None:
    """Print a line about what goes on to stderr, which leaves stdout to results."""
    print(line, file=sys.stderr)


def _sum_of(adapters: Sequence[LoraFile]) -> LoraFile:
    """One adapter whose update is the sum of all: their factors side by side, each with its own scale in its A."""
    layers = {name for adapter in adapters for name in adapter.factors}
    rank = sum(adapter.rank for adapter in adapters)
    factors = {}
    for name in layers:
        halves = [
            (adapter.factors[name][0] * (adapter.alpha / adapter.rank), adapter.factors[name][1])
            for adapter in adapters
            if name in adapter.factors
        ]
        factor_a = np.concatenate([half for half, _ in halves])
        factor_b = np.concatenate([half for _, half in halves], axis=1)
        filler = rank - len(factor_a)
        factors[name] = (np.pad(factor_a, ((0, filler), (0, 0))), np.pad(factor_b, ((0, 0), (0, filler))))
    return LoraFile(factors, rank, float(rank), True)
