"""pytorch_lora_weights.safetensors, the file that diffusers and most other tools read and write.

`unet.<layer>.lora.down.weight` is A (r, in), `unet.<layer>.lora.up.weight` is B (out, r); rank and alpha stand in the
metadata as diffusers writes them (`lora_adapter_metadata`).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.weights.tensor_file import read_tensors, write_tensors

FILE_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
# Settings of peft under which the same factors mean another update than ours.
UNSUPPORTED_SETTINGS = ("use_rslora", "use_dora", "alpha_pattern", "lora_bias")
STEP_KEY = "dreambooth_ms_step"

# Ending of a name -> which factor it is: diffusers since 0.22, PEFT, and diffusers' text encoders.
_ENDINGS = {
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
}


@dataclass(frozen=True)
class LoraFile:
    """An adapter as a file holds it: per adapted layer the factors A (r, in) and B (out, r)."""

    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    rank: int
    alpha: float
    alpha_is_stated: bool
    """False: the file names no alpha, and it was taken to equal the rank."""

    @property
    def target_modules(self) -> list[str]:
        """The adapted layers' full names."""
        return list(self.factors)


def write_lora(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray, np.ndarray]],
    rank: int,
    alpha: float,
    target_modules: Iterable[str],
    step: int,
) -> Path:
    """Write the adapter of a UNet, trained for `step` steps, into a folder, atomically; returns the file's path."""
    named = {}
    for layer, factor_a, factor_b in tensors:
        named[f"unet.{layer}.lora.down.weight"] = factor_a
        named[f"unet.{layer}.lora.up.weight"] = factor_b
    # diffusers 0.39 takes these for peft's LoraConfig and asks for the patterns by name (measured).
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(target_modules),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
        "lora_bias": False,
    }
    metadata = json.dumps({f"unet.{key}": value for key, value in settings.items()}, sort_keys=True)
    path = folder / FILE_NAME
    write_tensors(path, named, {METADATA_KEY: metadata, STEP_KEY: str(step)})
    return path


def steps_taken(path: Path) -> int:
    """Steps that an adapter of ours was trained for; 0 if the file does not say."""
    return int(read_tensors(path)[1].get(STEP_KEY, 0))


def read_lora(path: Path) -> LoraFile:
    """Read the adapter of a UNet from a file, or from the folder that a training wrote.

    Raises:
        WeightError: no such file, not an adapter, an incomplete one, or one for other networks than the UNet.
    """
    if path.is_dir():
        path = path / FILE_NAME
    tensors, metadata = read_tensors(path)
    halves: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for name, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        if ending is None or not name.startswith("unet."):
            unknown.append(name)
            continue
        layer = name.removeprefix("unet.").removesuffix(ending)
        halves.setdefault(layer, {})[_ENDINGS[ending]] = tensor.astype(np.float32)
    if unknown or not halves:
        shown = ", ".join(unknown[:3]) or "nothing"
        raise WeightError(f"{path}: not a LoRA of the UNet in diffusers' naming; it holds {shown}")
    incomplete = [layer for layer, factors in halves.items() if len(factors) < 2]
    if incomplete:
        raise WeightError(f"{path}: {len(incomplete)} layers lack one of their two factors, such as {incomplete[0]}")
    factors = {layer: (pair["A"], pair["B"]) for layer, pair in halves.items()}
    ranks = {factor_a.shape[0] for factor_a, _ in factors.values()}
    if len(ranks) > 1:
        raise WeightError(f"{path}: layers of different ranks {sorted(ranks)} are not supported yet")
    rank = ranks.pop()
    settings = _settings(metadata)
    refused = [key for key in UNSUPPORTED_SETTINGS if settings.get(f"unet.{key}")]
    if refused:
        raise WeightError(f"{path}: trained with {', '.join(refused)}, which is not supported yet")
    alpha = settings.get("unet.lora_alpha")
    return LoraFile(factors, rank, float(rank if alpha is None else alpha), alpha is not None)


def _settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers' metadata says about an adapter; empty if there is none."""
    try:
        settings = json.loads(metadata[METADATA_KEY])
    except (KeyError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
