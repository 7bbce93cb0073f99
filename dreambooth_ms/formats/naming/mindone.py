"""The names of mindone's MindSpore checkpoints, as changes to Stability's.

Its SDXL example keeps Stability's names and only calls parameters as MindSpore's layers do: `gamma` and `beta` in a
norm, `embedding_table` in an embedding. Its SD 1 and SD 2 examples wrap the UNet's convolutions in a cell, name the
layers of a residual block, and have a text tower of their own for both versions.
"""

import re
from dataclasses import replace

from dreambooth_ms.formats.naming.slots import Slot
from dreambooth_ms.formats.naming.stability import openclip_slot
from dreambooth_ms.formats.naming.tables import TABLES

SD_TEXT_PREFIX = "cond_stage_model.transformer."


def sdxl_slot(name: str, slot: Slot) -> Slot:
    """The place in mindone's SDXL checkpoint of a parameter that Stability's file has in `slot`."""
    layer, parameter = name.split(".")[-2:]
    names: dict[str, str] = next((names for kind, names in TABLES["mindone"].items() if kind in layer), {})
    return replace(slot, name=re.sub(rf"(?<=\.){parameter}$", names.get(parameter, parameter), slot.name))


def sd_slot(name: str, slot: Slot) -> Slot:
    """The place in mindone's SD 1 or SD 2 checkpoint of a parameter of UNet or autoencoder."""
    slot = sdxl_slot(name, slot)
    path, _, parameter = slot.name.rpartition(".")
    path = re.sub(r"((?:in|out)_layers)\.0$", r"\1_norm", path)
    path = re.sub(r"((?:in|out)_layers)\.[23]$", r"\1_conv", path)
    layer = name.split(".")[-2]
    is_wrapped = name.startswith("unet.") and layer.startswith("conv") and "norm" not in layer
    return replace(slot, name=f"{path}{'.conv' if is_wrapped else ''}.{parameter}")


def sd_text_slot(name: str) -> Slot | None:
    """The place in mindone's SD 1 or SD 2 checkpoint of a parameter of the text tower; None if it has none."""
    inner = name.partition(".")[2]
    if inner == "text_model.embeddings.token_embedding.weight":
        return Slot(f"{SD_TEXT_PREFIX}embedding_table")
    slot = openclip_slot(inner)
    if slot.name in ("text_projection", "logit_scale"):
        return None
    slot = sdxl_slot(name, slot)
    path = slot.name.replace("transformer.", "transformer_layer.").replace("in_proj_", "in_proj.")
    return replace(slot, name=SD_TEXT_PREFIX + path.replace(".mlp.", ".").replace(".attn.", ".attn.attn."))
