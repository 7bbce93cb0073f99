"""The topology of UNet and autoencoder, from their specs alone: the layers, the size of each, and what each reads.

It stands here and nowhere else: networks, segments, parameter shapes and the estimate of memory iterate these lists.
What another family has in place of a layer is another kind of layer.

Values are numbered in the order of their making: first the inputs, then the result of one layer after the other.
"""

from dataclasses import dataclass
from enum import Enum

from dreambooth_ms.models.specs import UNetSpec, VaeSpec, at_level


class LayerKind(Enum):
    """What a layer computes, from values in the order in which it reads them."""

    CONV = "image -> image"
    NORM = "image -> its group norm, after a SiLU"
    DOWNSAMPLER = "image -> image of half the height and width"
    UPSAMPLER = "image -> image of twice the height and width"
    RESNET = "image[, time embedding] -> image"
    SKIP_RESNET = "image, skip, time embedding -> image; the first two are concatenated by channels"
    RESNET_DOWNSAMPLER = "image, time embedding -> image of half the height and width"
    RESNET_UPSAMPLER = "image, time embedding -> image of twice the height and width"
    PIXEL_ATTENTION = "image -> image, by attention of all pixels"
    TEXT_AND_PIXEL_ATTENTION = "image, text -> image, by one attention of all pixels to both"
    TRANSFORMER = "image, text -> image"
    TRANSFORMER_INPUT = "image -> tokens"
    TRANSFORMER_BLOCK = "tokens, text -> tokens"
    TRANSFORMER_OUTPUT = "tokens, the image that they came from -> image"
    UNET_INPUT = "noisy latents -> image"
    TIME_EMBEDDING = "timesteps, what is added to them -> time embedding"
    TEXT = "text -> text in the dtype and width of the transformers"
    UNET_OUTPUT = "image -> prediction"


@dataclass(frozen=True)
class Layer:
    """A part of a network that has one result."""

    kind: LayerKind
    name: str
    """Public name of its module; "" is the root."""
    level: int
    """The resolution of its result: 0 is the network's own, each further one half as high and wide."""
    in_channels: int
    """Of all images that it reads by channels: with a skip, the sum."""
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
    names = ("sample", "timestep", "encoder_hidden_states", *("class_labels",) * (spec.class_embed_type == "timestep"))
    return (*names, "text_embeds", "time_ids") if spec.addition_embed_type == "text_time" else names


def time_width(spec: UNetSpec) -> int:
    """Width of the time embedding."""
    return spec.time_embedding_dim or 4 * spec.block_out_channels[0]


def unet_layout(spec: UNetSpec) -> tuple[Layer, ...]:
    """The layers of a UNet in the order in which they are computed; the last one's result is the prediction."""
    _, timestep, text, *added = range(len(unet_inputs(spec)))
    width, context = spec.block_out_channels[0], spec.cross_attention_dim
    walk = _Walk(spec, len(unet_inputs(spec)), spec.in_channels)
    x = walk.add(LayerKind.UNET_INPUT, "conv_in", 0, width)
    others = {"class_embedding": spec.class_embed_type, "add_embedding": spec.addition_embed_type}
    parts = ("time_embedding", *(name for name, kind in others.items() if kind))
    reads = (timestep, *added, *(text,) * (spec.addition_embed_type == "text"))
    time = Layer(LayerKind.TIME_EMBEDDING, "", 0, width, time_width(spec), reads, parts)
    projection = ("encoder_hid_proj",) if spec.encoder_hid_dim else ()
    walk.layers += [time, Layer(LayerKind.TEXT, "", 0, spec.text_width, context, (text,), projection)]
    walk.time, walk.text = (x + 1,), (x + 2,)
    skips = [x, *walk.down()]
    walk.middle()
    walk.up(skips)
    walk.add(LayerKind.UNET_OUTPUT, "", 0, spec.out_channels, parts=("conv_norm_out", "conv_out"))
    return tuple(walk.layers)


def vae_layout(spec: VaeSpec) -> dict[str, tuple[Layer, ...]]:
    """The layers of "encoder" and "decoder", each of which reads the one before; names are within either."""
    encoder, decoder = _Walk(spec, 1, spec.in_channels), _Walk(spec, 1, spec.latent_channels)
    encoder.add(LayerKind.CONV, "conv_in", 0, spec.block_out_channels[0])
    encoder.down()
    decoder.add(LayerKind.CONV, "conv_in", decoder.coarsest, spec.block_out_channels[-1])
    encoder.middle()
    decoder.middle()
    decoder.up([])
    for walk, level, result in ((encoder, encoder.coarsest, 2 * spec.latent_channels), (decoder, 0, spec.in_channels)):
        walk.add(LayerKind.NORM, "conv_norm_out", level)
        walk.add(LayerKind.CONV, "conv_out", level, result)
    return {"encoder": tuple(encoder.layers), "decoder": tuple(decoder.layers)}


class _Walk:
    """The way of an image through layers, with its number `x` so far; the first input is the image."""

    def __init__(self, spec: UNetSpec | VaeSpec, num_inputs: int, channels: int) -> None:
        self.spec, self.coarsest, self.num_inputs = spec, len(spec.block_out_channels) - 1, num_inputs
        self.layers: list[Layer] = []
        self.x, self.channels = 0, {0: channels}
        # What a UNet's residual blocks and transformers read as well.
        self.time: tuple[int, ...] = ()
        self.text: tuple[int, ...] = ()

    def add(
        self,
        kind: LayerKind,
        name: str,
        level: int,
        out_channels: int | None = None,
        skips: tuple[int, ...] = (),
        others: tuple[int, ...] = (),
        parts: tuple[str, ...] = (),
    ) -> int:
        """Through a layer that reads the image, skips, and other values; returns the new `x`."""
        channels = sum(self.channels[image] for image in (self.x, *skips))
        out = out_channels or self.channels[self.x]
        self.layers.append(Layer(kind, name, level, channels, out, (self.x, *skips, *others), parts))
        self.x = self.num_inputs + len(self.layers) - 1
        self.channels[self.x] = out
        return self.x

    def down(self) -> list[int]:
        """To the coarsest level; returns the number of each result on the way."""
        results, depths = [], self.spec.layers_per_block
        for level in range(self.coarsest + 1):
            results += [self.step(f"down_blocks.{level}", i, level) for i in range(at_level(depths, level))]
            if level < self.coarsest:
                results.append(self.sampler(LayerKind.DOWNSAMPLER, f"down_blocks.{level}.downsamplers.0", level + 1))
        return results

    def middle(self) -> None:
        self.resnet("mid_block.resnets.0", self.coarsest)
        self.attention("mid_block.attentions.0", self.coarsest)
        self.resnet("mid_block.resnets.1", self.coarsest)

    def up(self, skips: list[int]) -> None:
        """To the finest level; each step takes the last skip, if there are any."""
        for block, level in enumerate(reversed(range(self.coarsest + 1))):
            for i in range(at_level(self.spec.layers_per_block, level) + 1):
                self.step(f"up_blocks.{block}", i, level, *([skips.pop()] if skips else []))
            if level > 0:
                self.sampler(LayerKind.UPSAMPLER, f"up_blocks.{block}.upsamplers.0", level - 1)

    def sampler(self, kind: LayerKind, name: str, level: int) -> int:
        """To another resolution, by a residual block where they do that."""
        kind, others = (LayerKind[f"RESNET_{kind.name}"], self.time) if self.spec.simple_blocks else (kind, ())
        return self.add(kind, name, level, others=others)

    def step(self, block: str, i: int, level: int, *skip: int) -> int:
        """Through a residual block and, where a UNet's resolution has them, a transformer."""
        self.resnet(f"{block}.resnets.{i}", level, *skip)
        if isinstance(self.spec, UNetSpec) and self.spec.has_attention[level]:
            self.attention(f"{block}.attentions.{i}", level)
        return self.x

    def resnet(self, name: str, level: int, *skip: int) -> None:
        kind = LayerKind.SKIP_RESNET if skip else LayerKind.RESNET
        self.add(kind, name, level, self.spec.block_out_channels[level], skip, self.time)

    def attention(self, name: str, level: int) -> None:
        """A transformer of a single block is a layer; in a deep one, as SDXL has them, each block is."""
        if isinstance(self.spec, VaeSpec):
            self.add(LayerKind.PIXEL_ATTENTION, name, level)
        elif self.spec.simple_blocks:
            self.add(LayerKind.TEXT_AND_PIXEL_ATTENTION, name, level, others=self.text)
        elif (depth := at_level(self.spec.transformer_layers_per_block, level)) == 1:
            self.add(LayerKind.TRANSFORMER, name, level, others=self.text)
        else:
            image = self.x
            self.add(LayerKind.TRANSFORMER_INPUT, name, level, parts=("norm", "proj_in"))
            for i in range(depth):
                self.add(LayerKind.TRANSFORMER_BLOCK, f"{name}.transformer_blocks.{i}", level, others=self.text)
            self.add(LayerKind.TRANSFORMER_OUTPUT, name, level, others=(image,), parts=("proj_out",))
