"""The names of Stability's single files: Stable Diffusion 1 and 2 (LDM) and SDXL (SGM).

LDM counts the UNet's blocks through all resolutions: `input_blocks.<n>` holds one residual block (0) and its
transformer (1), or a downsampler (0.op); `output_blocks.<n>` likewise, with the upsampler as the last of its block.
The decoder of the autoencoder counts resolutions from the finest, diffusers from the coarsest.
"""

import re

from dreambooth_ms.formats.naming.slots import Layout, Slot
from dreambooth_ms.models.specs import UNetSpec, VaeSpec

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPENCLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}


def unet_slot(name: str, spec: UNetSpec) -> Slot:
    """The place of a parameter of diffusers' UNet, such as "down_blocks.0.resnets.0.norm1.weight"."""
    layer, _, parameter = name.rpartition(".")
    return Slot(f"{UNET_PREFIX}{_unet_layer(layer, spec)}.{parameter}")


def vae_slot(name: str, spec: VaeSpec) -> Slot:
    """The place of a parameter of diffusers' autoencoder. LDM's attention over pixels is made of 1x1 convolutions."""
    layer, _, parameter = name.rpartition(".")
    is_matrix = ".attentions." in layer and not layer.endswith("group_norm") and parameter == "weight"
    return Slot(f"{VAE_PREFIX}{_vae_layer(layer, spec)}.{parameter}", Layout.CONVOLUTION if is_matrix else Layout.AS_IS)


def openclip_slot(name: str) -> Slot:
    """The place of a parameter of transformers' text tower in OpenCLIP's, whose q, k and v are one matrix."""
    if name == "text_projection.weight":
        return Slot("text_projection", Layout.TRANSPOSED)
    if name in _OPENCLIP_ENDS:
        return Slot(_OPENCLIP_ENDS[name])
    match = _matched(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    index, layer, parameter = match.groups()
    path = f"transformer.resblocks.{index}"
    projection = re.fullmatch(r"self_attn\.([qkv])_proj", layer)
    if projection:
        return Slot(f"{path}.attn.in_proj_{parameter}", block="qkv".index(projection[1]), blocks=3)
    return Slot(f"{path}.{_OPENCLIP_LAYER[layer]}.{parameter}")


def _unet_layer(layer: str, spec: UNetSpec) -> str:
    if layer in _UNET_ENDS:
        return _UNET_ENDS[layer]
    if layer.startswith("mid_block."):
        kind, index, rest = _matched(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", layer).groups()
        place = f"1.{rest}" if kind == "attentions" else f"{2 * int(index)}.{_UNET_RESNET[rest]}"
        return f"middle_block.{place}"
    pattern = r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
    way, level, kind, index, rest = _matched(pattern, layer).groups()
    # A way up has one residual block more in each resolution; on the way down the downsampler fills its place.
    first, last = int(level) * (spec.layers_per_block + 1), spec.layers_per_block
    if way == "down":
        if kind == "downsamplers":
            return f"input_blocks.{1 + first + last}.0.op"
        path = f"input_blocks.{1 + first + int(index)}"
    else:
        if kind == "upsamplers":
            has_attention = tuple(reversed(spec.has_attention))[int(level)]
            return f"output_blocks.{first + last}.{2 if has_attention else 1}.conv"
        path = f"output_blocks.{first + int(index)}"
    return f"{path}.1.{rest}" if kind == "attentions" else f"{path}.0.{_UNET_RESNET[rest]}"


def _vae_layer(layer: str, spec: VaeSpec) -> str:
    if layer in ("quant_conv", "post_quant_conv"):
        return layer
    side, _, inner = layer.partition(".")
    if inner in ("conv_in", "conv_out"):
        return layer
    if inner == "conv_norm_out":
        return f"{side}.norm_out"
    if inner.startswith("mid_block.attentions.0."):
        return f"{side}.mid.attn_1.{_VAE_ATTENTION[inner.removeprefix('mid_block.attentions.0.')]}"
    if inner.startswith("mid_block."):
        index, rest = _matched(r"mid_block\.resnets\.(\d+)\.(.+)", inner).groups()
        return f"{side}.mid.block_{int(index) + 1}.{rest}"
    pattern = r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
    way, level, kind, index, rest = _matched(pattern, inner).groups()
    counted = int(level) if way == "down" else len(spec.block_out_channels) - 1 - int(level)
    if kind == "resnets":
        return f"{side}.{way}.{counted}.block.{index}.{'nin_shortcut' if rest == 'conv_shortcut' else rest}"
    return f"{side}.{way}.{counted}.{way}sample.{rest}"


def _matched(pattern: str, name: str) -> re.Match[str]:
    match = re.fullmatch(pattern, name)
    assert match, f"no parameter of these networks is called {name}"
    return match
