"""An opened LoRA -> a file or folder in another format."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.adapters.lora_file import METADATA_KEY
from dreambooth_ms.adapters.opened_lora import PEFT_CONFIG, PEFT_WEIGHTS, OpenedLora, lora_path
from dreambooth_ms.atomic import check_free, check_room, new_folder
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.mindspore_ckpt import write_mindspore_ckpt
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import StoredTensor, total_bytes
from dreambooth_ms.formats.folder_layout import write_json
from dreambooth_ms.formats.naming.lora import Factors, name_factors
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.formats.naming.lora_settings import lora_settings

FILE_SUFFIX = ".safetensors"

KOHYA = (LoraFormat.KOHYA, LoraFormat.KOHYA_DIFFUSERS)

_CLASSES = {
    "unet": ("UNet2DConditionModel", "diffusers.models.unets.unet_2d_condition"),
    "text_encoder": ("CLIPTextModel", "transformers.models.clip.modeling_clip"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "transformers.models.clip.modeling_clip"),
}


def write_lora_as(lora: OpenedLora, path: Path, form: LoraFormat, dtype: DType | None = None) -> None:
    """Write a LoRA in a format; it appears whole or not at all.

    Args:
        lora: the LoRA.
        path: a name that is not taken. A folder for PEFT, with one folder per network where there are several; for
            diffusers a folder or a file.
        form: the format.
        dtype: the type of the factors; None keeps it.

    Raises:
        WeightError: the name is taken, the format has no place for a layer, or the place cannot be written to.
    """
    check_free(path)
    own = dtype or lora.dtype
    if form is LoraFormat.PEFT:
        parts = {part: _tensors(lora, form, own, part) for part in lora.parts}
        check_room(path, sum(map(total_bytes, parts.values())))
        with new_folder(path) as folder:
            for part, tensors in parts.items():
                place = folder / part if len(parts) > 1 else folder
                write_safetensors(place / PEFT_WEIGHTS[0], tensors, {"format": "pt"})
                write_json(place / PEFT_CONFIG, _peft_config(part, lora.of_part(part)))
        return
    tensors = _tensors(lora, form, own)
    if form is LoraFormat.MINDONE:
        write_mindspore_ckpt(path, tensors)
    elif path.suffix == FILE_SUFFIX:
        write_safetensors(path, tensors, _metadata(lora, form))
    else:
        check_room(path, total_bytes(tensors))
        with new_folder(path) as folder:
            write_safetensors(lora_path(folder), tensors, _metadata(lora, form))


def _tensors(lora: OpenedLora, form: LoraFormat, dtype: DType, part: str | None = None) -> dict[str, StoredTensor]:
    factors = {name: own for name, own in lora.factors.items() if part in (None, name.partition(".")[0])}
    if form is LoraFormat.MINDONE:
        # Scales are multiplied in, and sums of float16 would lose digits.
        factors = {name: _in_float32(own) for name, own in factors.items()}
    try:
        named = name_factors(form, lora.model, factors)
    except WeightError as error:
        raise WeightError(f"{lora.path}: {error}") from error
    return {name: StoredTensor.of(np.asarray(value)).cast_to(dtype) for name, value in named.items()}


def _in_float32(own: Factors) -> Factors:
    return replace(own, down=own.down.astype(np.float32), up=own.up.astype(np.float32))


def _settings(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """Rank and alpha of a network's layers, as peft keeps them."""
    return lora_settings(
        {name: (own.rank, float(own.rank if own.alpha is None else own.alpha)) for name, own in factors.items()}
    )


def _metadata(lora: OpenedLora, form: LoraFormat) -> dict[str, str]:
    """What stands beside the tensors: of the source what is not about its format, and rank and alpha."""
    kept = {
        name: value
        for name, value in lora.metadata.items()
        if name not in ("format", METADATA_KEY, "ss_network_dim", "ss_network_alpha", "ss_network_module")
    }
    by_part = {part: _settings(lora.of_part(part)) for part in lora.parts}
    if form in KOHYA:
        first = by_part[lora.parts[0]]
        own = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(first["r"]),
            "ss_network_alpha": f"{first['lora_alpha']:g}",
        }
        return kept | own | {"format": "pt"}
    settings = {f"{part}.{key}": value for part, own in by_part.items() for key, value in own.items()}
    return kept | {METADATA_KEY: json.dumps(settings, sort_keys=True), "format": "pt"}


def _peft_config(part: str, factors: Mapping[str, Factors]) -> dict[str, Any]:
    """adapter_config.json of a network."""
    name, module = _CLASSES[part]
    return {
        **_settings(factors),
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "auto_mapping": {"base_model_class": name, "parent_library": module},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
    }
