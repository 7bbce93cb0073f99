"""The names of Stability's single files: Stable Diffusion 1 and 2 (LDM) and SDXL (SGM).

LDM counts the UNet's blocks through all resolutions: `input_blocks.<n>` holds one residual block (0) and its
transformer (1), or a downsampler (0.op); `output_blocks.<n>` likewise, with the upsampler as the last of its block.
The decoder of the autoencoder counts resolutions from the finest, diffusers from the coarsest.
"""

import re

from dreambooth_ms.formats.naming.slots import Layout, Slot
from dreambooth_ms.formats.naming.tables import TABLES
from dreambooth_ms.models.specs import UNetSpec, VaeSpec

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_NAMES = TABLES["stability"]
_IN_A_BLOCK = re.compile(
    r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_IN_A_TOWER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(?:self_attn\.([qkv])_proj|(.+))\.(weight|bias)")


def unet_slot(name: str, spec: UNetSpec) -> Slot:
    """The place of a parameter of diffusers' UNet, such as "down_blocks.0.resnets.0.norm1.weight"."""
    layer, _, parameter = name.rpartition(".")
    return Slot(f"{UNET_PREFIX}{unet_layer(layer, spec)}.{parameter}")


def unet_layer(layer: str, spec: UNetSpec) -> str:
    """The name of a layer of diffusers' UNet, such as "down_blocks.0.resnets.0.norm1", within LDM's."""
    match = _IN_A_BLOCK.fullmatch(layer)
    if not match:
        return _NAMES["unet"][layer]
    way, level, kind, index, rest = match.groups()
    if kind == "resnets":
        rest = _NAMES["unet_resnets"][rest]
    if way == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{rest}"
    # A way up has one residual block more in each resolution; on the way down the downsampler fills its place.
    last = spec.layers_per_block
    number = int(level) * (last + 1) + (last if kind.endswith("samplers") else int(index))
    if kind == "downsamplers":
        return f"input_blocks.{1 + number}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{number}.{2 if spec.has_attention[-1 - int(level)] else 1}.conv"
    block = f"input_blocks.{1 + number}" if way == "down" else f"output_blocks.{number}"
    return f"{block}.{1 if kind == 'attentions' else 0}.{rest}"


def vae_slot(name: str, spec: VaeSpec) -> Slot:
    """The place of a parameter of diffusers' autoencoder. LDM's attention over pixels is made of 1x1 convolutions."""
    layer, _, parameter = name.rpartition(".")
    is_matrix = ".attentions." in layer and not layer.endswith("group_norm") and parameter == "weight"
    return Slot(f"{VAE_PREFIX}{_vae_layer(layer, spec)}.{parameter}", Layout.CONVOLUTION if is_matrix else Layout.AS_IS)


def openclip_slot(name: str) -> Slot:
    """The place of a parameter of transformers' text tower in OpenCLIP's, whose q, k and v are one matrix."""
    if name == "text_projection.weight":
        return Slot("text_projection", Layout.TRANSPOSED)
    match = _IN_A_TOWER.fullmatch(name)
    if not match:
        return Slot(_NAMES["openclip"][name])
    index, letter, layer, parameter = match.groups()
    path = f"transformer.resblocks.{index}"
    if letter:
        return Slot(f"{path}.attn.in_proj_{parameter}", block="qkv".index(letter), blocks=3)
    return Slot(f"{path}.{_NAMES['openclip_layers'][layer]}.{parameter}")


def _vae_layer(layer: str, spec: VaeSpec) -> str:
    side, _, inner = layer.partition(".")
    match = _IN_A_BLOCK.fullmatch(inner)
    if not match:
        return f"{side}.{_NAMES['vae'].get(inner, inner)}".rstrip(".")
    way, level, kind, index, rest = match.groups()
    if way == "mid":
        place = "mid.attn_1" if kind == "attentions" else f"mid.block_{int(index) + 1}"
    else:
        counted = int(level) if way == "down" else len(spec.block_out_channels) - 1 - int(level)
        place = f"{way}.{counted}." + (f"block.{index}" if kind == "resnets" else f"{way}sample")
    return f"{side}.{place}.{_NAMES['vae'].get(rest, rest)}"
