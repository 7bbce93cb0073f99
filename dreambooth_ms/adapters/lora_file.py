"""pytorch_lora_weights.safetensors, the file that diffusers and most other tools read and write.

`unet.<layer>.lora.down.weight` is A (r, in), `unet.<layer>.lora.up.weight` is B (out, r), and likewise
`text_encoder.<layer>.lora_linear_layer.down.weight`; rank and alpha stand in the metadata as diffusers writes them
(`lora_adapter_metadata`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.tensor_file import STEP_KEY, read_tensors, write_tensors

FILE_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
# Settings of peft under which the same factors mean another update than ours.
UNSUPPORTED_SETTINGS = ("use_rslora", "use_dora", "alpha_pattern", "lora_bias")

# Ending of a name -> which factor it is: diffusers since 0.22, PEFT, and diffusers' text encoders.
_ENDINGS = {
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
}


_TEXT_ENDINGS = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")

# How diffusers ends the names of each network's factors: down, up.
_WRITTEN_ENDINGS = {
    "unet": (".lora.down.weight", ".lora.up.weight"),
    "text_encoder": _TEXT_ENDINGS,
    "text_encoder_2": _TEXT_ENDINGS,
}


@dataclass(frozen=True)
class LoraWeights:
    """The adapter of one network: per adapted layer the factors A (r, in) and B (out, r)."""

    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    """The endings of the layers' names that were asked for, or the layers' full names."""


def write_lora(folder: Path, networks: Mapping[str, LoraWeights], step: int) -> Path:
    """Write adapters, trained for `step` steps, into a folder, atomically; returns the file's path.

    Args:
        folder: where `pytorch_lora_weights.safetensors` goes.
        networks: the adapters of "unet" and of the text encoders that were trained, "text_encoder", "text_encoder_2".
        step: optimiser steps taken.
    """
    named: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = {}
    for network, adapter in networks.items():
        down, up = _WRITTEN_ENDINGS[network]
        for layer, (factor_a, factor_b) in adapter.factors.items():
            named[f"{network}.{layer}{down}"] = factor_a
            named[f"{network}.{layer}{up}"] = factor_b
        # diffusers 0.39 takes these for peft's LoraConfig and asks for the patterns by name (measured).
        config = {
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "target_modules": sorted(adapter.target_modules),
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_dora": False,
            "use_rslora": False,
            "lora_bias": False,
        }
        settings |= {f"{network}.{key}": value for key, value in config.items()}
    path = folder / FILE_NAME
    write_tensors(path, named, {METADATA_KEY: json.dumps(settings, sort_keys=True), STEP_KEY: str(step)})
    return path


def read_lora(path: Path) -> dict[str, LoraWeights]:
    """Read the adapters, by their networks, from a file, or from the folder that a training wrote.

    Raises:
        WeightError: no such file, not an adapter, an incomplete one, or one for other networks.
    """
    if path.is_dir():
        path = path / FILE_NAME
    tensors, metadata = read_tensors(path)
    halves: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    unknown = []
    for name, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        network, _, rest = name.partition(".")
        if ending is None or network not in _WRITTEN_ENDINGS:
            unknown.append(name)
            continue
        pair = halves.setdefault(network, {}).setdefault(rest.removesuffix(ending), {})
        pair[_ENDINGS[ending]] = tensor.astype(np.float32)
    if unknown or not halves:
        shown = ", ".join(unknown[:3]) or "nothing"
        raise WeightError(f"{path}: not a LoRA of UNet and text encoder in diffusers' naming; it holds {shown}")
    settings = _settings(metadata)
    return {network: _adapter(path, network, layers, settings) for network, layers in halves.items()}


def _adapter(
    path: Path, network: str, layers: Mapping[str, Mapping[str, np.ndarray]], settings: Mapping[str, Any]
) -> LoraWeights:
    incomplete = [layer for layer, pair in layers.items() if len(pair) < 2]
    if incomplete:
        raise WeightError(f"{path}: {len(incomplete)} layers lack one of their two factors, such as {incomplete[0]}")
    factors = {layer: (pair["A"], pair["B"]) for layer, pair in layers.items()}
    ranks = {factor_a.shape[0] for factor_a, _ in factors.values()}
    if len(ranks) > 1:
        raise WeightError(f"{path}: layers of different ranks {sorted(ranks)} are not supported yet")
    refused = [key for key in UNSUPPORTED_SETTINGS if settings.get(f"{network}.{key}")]
    if refused:
        raise WeightError(f"{path}: trained with {', '.join(refused)}, which is not supported yet")
    rank = ranks.pop()
    alpha = settings.get(f"{network}.lora_alpha")
    return LoraWeights(factors, rank, float(rank if alpha is None else alpha), tuple(factors))


def _settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers' metadata says about an adapter; empty if there is none."""
    try:
        settings = json.loads(metadata[METADATA_KEY])
    except (KeyError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
