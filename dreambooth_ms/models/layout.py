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
    SKIP_RESNET = "image, skip, time embedding -> image; the first two are concatenated by channels"
    PIXEL_ATTENTION = "image -> image, by attention of all pixels"
    TRANSFORMER = "image, text -> image"
    TRANSFORMER_INPUT = "image -> tokens"
    TRANSFORMER_BLOCK = "tokens, text -> tokens"
    TRANSFORMER_OUTPUT = "tokens, the image that they came from -> image"
    UNET_INPUT = "noisy latents -> image"
    TIME_EMBEDDING = "timesteps, what is added to them -> time embedding"
    TEXT = "text -> text in the dtype of the transformers"
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
    names = ("sample", "timestep", "encoder_hidden_states")
    return (*names, "text_embeds", "time_ids") if spec.addition_embed_type == "text_time" else names


def time_width(spec: UNetSpec) -> int:
    """Width of the time embedding."""
    return 4 * spec.block_out_channels[0]


def unet_layout(spec: UNetSpec) -> tuple[Layer, ...]:
    """The layers of a UNet in the order in which they are computed; the last one's result is the prediction."""
    walk = _UNetWalk(spec)
    skips = [walk.x, *walk.go_down()]
    walk.cross_middle()
    walk.go_up(skips)
    walk.add(LayerKind.UNET_OUTPUT, "", 0, spec.out_channels, parts=("conv_norm_out", "conv_out"))
    return tuple(walk.layers)


def vae_layout(spec: VaeSpec) -> dict[str, tuple[Layer, ...]]:
    """The layers of "encoder" and "decoder", each of which reads the one before; names are within either."""
    encoder, decoder = _Walk(spec, 1, spec.in_channels), _Walk(spec, 1, spec.latent_channels)
    encoder.add(LayerKind.CONV, "conv_in", 0, spec.block_out_channels[0])
    encoder.go_down()
    decoder.add(LayerKind.CONV, "conv_in", decoder.coarsest, spec.block_out_channels[-1])
    encoder.cross_middle()
    decoder.cross_middle()
    decoder.go_up([])
    for walk, level, result in ((encoder, encoder.coarsest, 2 * spec.latent_channels), (decoder, 0, spec.in_channels)):
        walk.add(LayerKind.NORM, "conv_norm_out", level)
        walk.add(LayerKind.CONV, "conv_out", level, result)
    return {"encoder": tuple(encoder.layers), "decoder": tuple(decoder.layers)}


class _Walk:
    """The way of an image through layers, with its number `x` so far; the first input is the image.

    A step is a residual block; in the middle there is attention between two.
    """

    def __init__(self, spec: UNetSpec | VaeSpec, num_inputs: int, channels: int) -> None:
        self.layers: list[Layer] = []
        self.spec, self.coarsest = spec, len(spec.block_out_channels) - 1
        self.num_inputs, self.x, self.channels = num_inputs, 0, {0: channels}

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

    def go_down(self) -> list[int]:
        """To the coarsest level; returns the number of each result on the way."""
        results = []
        for level in range(self.coarsest + 1):
            results += [self.step(f"down_blocks.{level}", i, level) for i in range(self.spec.layers_per_block)]
            if level < self.coarsest:
                results.append(self.add(LayerKind.DOWNSAMPLER, f"down_blocks.{level}.downsamplers.0", level + 1))
        return results

    def cross_middle(self) -> None:
        self.resnet("mid_block.resnets.0", self.coarsest)
        self.attention("mid_block.attentions.0", self.coarsest)
        self.resnet("mid_block.resnets.1", self.coarsest)

    def go_up(self, skips: list[int]) -> None:
        """To the finest level; each step takes the last skip, if there are any."""
        for block, level in enumerate(range(self.coarsest, -1, -1)):
            for i in range(self.spec.layers_per_block + 1):
                self.step(f"up_blocks.{block}", i, level, *(skips.pop() for _ in skips[-1:]))
            if level > 0:
                self.add(LayerKind.UPSAMPLER, f"up_blocks.{block}.upsamplers.0", level - 1)

    def step(self, block: str, i: int, level: int, *skip: int) -> int:
        return self.resnet(f"{block}.resnets.{i}", level)

    def resnet(self, name: str, level: int) -> int:
        return self.add(LayerKind.RESNET, name, level, self.spec.block_out_channels[level])

    def attention(self, name: str, level: int) -> int:
        return self.add(LayerKind.PIXEL_ATTENTION, name, level)


class _UNetWalk(_Walk):
    """The same with a time embedding and a text, from which residual blocks and transformers read."""

    def __init__(self, spec: UNetSpec) -> None:
        _, timestep, text, *added = range(len(unet_inputs(spec)))
        super().__init__(spec, len(unet_inputs(spec)), spec.in_channels)
        finest, context = spec.block_out_channels[0], spec.cross_attention_dim
        self.add(LayerKind.UNET_INPUT, "conv_in", 0, finest)
        parts = ("time_embedding", "add_embedding") if added else ("time_embedding",)
        time = Layer(LayerKind.TIME_EMBEDDING, "", 0, finest, time_width(spec), (timestep, *added), parts)
        self.layers += [time, Layer(LayerKind.TEXT, "", 0, context, context, (text,))]
        self.time, self.text = self.x + 1, self.x + 2

    def step(self, block: str, i: int, level: int, *skip: int) -> int:
        """Through a residual block and, where the resolution has them, a transformer."""
        x = self.resnet(f"{block}.resnets.{i}", level, *skip)
        return self.attention(f"{block}.attentions.{i}", level) if self.spec.has_attention[level] else x

    def resnet(self, name: str, level: int, *skip: int) -> int:
        kind = LayerKind.SKIP_RESNET if skip else LayerKind.RESNET
        return self.add(kind, name, level, self.spec.block_out_channels[level], skip, (self.time,))

    def attention(self, name: str, level: int) -> int:
        """One of a single block is a layer; in a deep one, as SDXL has them, each block is."""
        depth, image = self.spec.transformer_layers(level), self.x
        if depth == 1:
            return self.add(LayerKind.TRANSFORMER, name, level, others=(self.text,))
        self.add(LayerKind.TRANSFORMER_INPUT, name, level, parts=("norm", "proj_in"))
        for i in range(depth):
            self.add(LayerKind.TRANSFORMER_BLOCK, f"{name}.transformer_blocks.{i}", level, others=(self.text,))
        return self.add(LayerKind.TRANSFORMER_OUTPUT, name, level, others=(image,), parts=("proj_out",))
