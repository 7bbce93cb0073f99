"""The topology of UNet and autoencoder, from their specs alone: the layers, the size of each, and what each reads.

It stands here and nowhere else: networks, segments, parameter shapes and the estimate of memory iterate these lists.
What another family has in place of a layer is another kind of layer.

Values are numbered in the order of their making: first the inputs, then the result of one layer after the other.
"""

from dataclasses import dataclass
from enum import Enum

from dreambooth_ms.models.specs import UNetSpec, VaeSpec


class LayerKind(Enum):
    """What a layer computes, from values in the order in which it reads them."""

    CONV = "image -> image"
    NORM = "image -> its group norm, after a SiLU"
    DOWNSAMPLER = "image -> image of half the height and width"
    UPSAMPLER = "image -> image of twice the height and width"
    RESNET = "image[, time embedding] -> image"
    SKIP_RESNET = "image, skip, time embedding -> image; the first two are joined by channels"
    PIXEL_ATTENTION = "image -> image, by attention of all pixels"
    TRANSFORMER = "image, text -> image"
    TRANSFORMER_ENTRANCE = "image -> tokens"
    TRANSFORMER_BLOCK = "tokens, text -> tokens"
    TRANSFORMER_EXIT = "tokens, the image of the entrance -> image"
    UNET_ENTRANCE = "noisy latents -> image"
    TIME_EMBEDDING = "timesteps, what is added to them -> time embedding"
    TEXT = "text as it is given -> text as the transformers read it"
    UNET_EXIT = "image -> prediction"


@dataclass(frozen=True)
class Layer:
    """A part of a network that has one result."""

    kind: LayerKind
    name: str
    """Public name of its module; "" is the root."""
    level: int
    """The resolution of its result: 0 is the network's own, each further one half as high and wide."""
    in_channels: int
    """Of the images that it joins."""
    out_channels: int
    reads: tuple[int, ...]
    """Numbers of values."""
    parts: tuple[str, ...] = ()
    """The modules within its module that it is, if it is not all of it."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Public names of the modules that hold its parameters; no two layers have one in common."""
        path = f"{self.name}." if self.name else ""
        return tuple(path + part for part in self.parts) or (self.name,) * bool(self.name)


def unet_inputs(spec: UNetSpec) -> tuple[str, ...]:
    """What a UNet takes, in order, by diffusers' names."""
    names = ("sample", "timestep", "encoder_hidden_states")
    return (*names, "text_embeds", "time_ids") if spec.addition_embed_type == "text_time" else names


def time_width(spec: UNetSpec) -> int:
    """Width of the time embedding."""
    return 4 * spec.block_out_channels[0]


def unet_layout(spec: UNetSpec) -> tuple[Layer, ...]:
    """The layers of a UNet in the order in which they are computed; the last one's result is the prediction."""
    walk, levels = _UNetWalk(spec), len(spec.block_out_channels)
    skips = [walk.x]
    for level in range(levels):
        skips += [walk.step(f"down_blocks.{level}", i, level) for i in range(spec.layers_per_block)]
        if level < levels - 1:
            skips.append(walk.go(LayerKind.DOWNSAMPLER, f"down_blocks.{level}.downsamplers.0", level + 1))
    walk.resnet("mid_block.resnets.0", levels - 1)
    walk.transformer("mid_block.attentions.0", levels - 1)
    walk.resnet("mid_block.resnets.1", levels - 1)
    for index, level in enumerate(reversed(range(levels))):
        for i in range(spec.layers_per_block + 1):
            walk.step(f"up_blocks.{index}", i, level, skips.pop())
        if level > 0:
            walk.go(LayerKind.UPSAMPLER, f"up_blocks.{index}.upsamplers.0", level - 1)
    walk.go(LayerKind.UNET_EXIT, "", 0, spec.out_channels, parts=("conv_norm_out", "conv_out"))
    return tuple(walk.layers)


def vae_layout(spec: VaeSpec) -> dict[str, tuple[Layer, ...]]:
    """The layers of "encoder" and "decoder", each of which reads the one before; names are within either."""
    channels, levels = spec.block_out_channels, len(spec.block_out_channels)
    encoder, decoder = _Walk(1, spec.in_channels), _Walk(1, spec.latent_channels)
    encoder.go(LayerKind.CONV, "conv_in", 0, channels[0])
    for level in range(levels):
        for i in range(spec.layers_per_block):
            encoder.go(LayerKind.RESNET, f"down_blocks.{level}.resnets.{i}", level, channels[level])
        if level < levels - 1:
            encoder.go(LayerKind.DOWNSAMPLER, f"down_blocks.{level}.downsamplers.0", level + 1)
    decoder.go(LayerKind.CONV, "conv_in", levels - 1, channels[-1])
    for walk in (encoder, decoder):
        walk.go(LayerKind.RESNET, "mid_block.resnets.0", levels - 1)
        walk.go(LayerKind.PIXEL_ATTENTION, "mid_block.attentions.0", levels - 1)
        walk.go(LayerKind.RESNET, "mid_block.resnets.1", levels - 1)
    for index, level in enumerate(reversed(range(levels))):
        for i in range(spec.layers_per_block + 1):
            decoder.go(LayerKind.RESNET, f"up_blocks.{index}.resnets.{i}", level, channels[level])
        if level > 0:
            decoder.go(LayerKind.UPSAMPLER, f"up_blocks.{index}.upsamplers.0", level - 1)
    for walk, level, result in ((encoder, levels - 1, 2 * spec.latent_channels), (decoder, 0, spec.in_channels)):
        walk.go(LayerKind.NORM, "conv_norm_out", level)
        walk.go(LayerKind.CONV, "conv_out", level, result)
    return {"encoder": tuple(encoder.layers), "decoder": tuple(decoder.layers)}


class _Walk:
    """The way of an image through layers, with its number `x` so far; the first input is the image."""

    def __init__(self, num_inputs: int, channels: int) -> None:
        self.layers: list[Layer] = []
        self.num_inputs, self.x, self.channels = num_inputs, 0, {0: channels}

    def add(self, layer: Layer) -> int:
        """Append a layer; returns the number of its result."""
        self.layers.append(layer)
        return self.num_inputs + len(self.layers) - 1

    def go(
        self,
        kind: LayerKind,
        name: str,
        level: int,
        out_channels: int | None = None,
        joins: tuple[int, ...] = (),
        beside: tuple[int, ...] = (),
        parts: tuple[str, ...] = (),
    ) -> int:
        """Through a layer that reads the image, images that are joined to it, and other values; returns the new `x`."""
        channels = sum(self.channels[image] for image in (self.x, *joins))
        out = out_channels or self.channels[self.x]
        self.x = self.add(Layer(kind, name, level, channels, out, (self.x, *joins, *beside), parts))
        self.channels[self.x] = out
        return self.x


class _UNetWalk(_Walk):
    def __init__(self, spec: UNetSpec) -> None:
        _, timestep, text, *added = range(len(unet_inputs(spec)))
        super().__init__(len(unet_inputs(spec)), spec.in_channels)
        self.spec, finest, context = spec, spec.block_out_channels[0], spec.cross_attention_dim
        self.go(LayerKind.UNET_ENTRANCE, "conv_in", 0, finest)
        parts = ("time_embedding", "add_embedding") if added else ("time_embedding",)
        time = Layer(LayerKind.TIME_EMBEDDING, "", 0, finest, time_width(spec), (timestep, *added), parts)
        self.time, self.text = self.add(time), self.add(Layer(LayerKind.TEXT, "", 0, context, context, (text,)))

    def step(self, block: str, i: int, level: int, *skip: int) -> int:
        """Through a residual block and, where the resolution has them, a transformer."""
        self.resnet(f"{block}.resnets.{i}", level, *skip)
        return self.transformer(f"{block}.attentions.{i}", level) if self.spec.has_attention[level] else self.x

    def resnet(self, name: str, level: int, *skip: int) -> None:
        kind = LayerKind.SKIP_RESNET if skip else LayerKind.RESNET
        self.go(kind, name, level, self.spec.block_out_channels[level], skip, (self.time,))

    def transformer(self, name: str, level: int) -> int:
        """One of a single block is a layer; in a deep one, as SDXL has them, each block is."""
        depth, image = self.spec.transformer_layers(level), self.x
        if depth == 1:
            return self.go(LayerKind.TRANSFORMER, name, level, beside=(self.text,))
        self.go(LayerKind.TRANSFORMER_ENTRANCE, name, level, parts=("norm", "proj_in"))
        for i in range(depth):
            self.go(LayerKind.TRANSFORMER_BLOCK, f"{name}.transformer_blocks.{i}", level, beside=(self.text,))
        return self.go(LayerKind.TRANSFORMER_EXIT, name, level, beside=(image,), parts=("proj_out",))
