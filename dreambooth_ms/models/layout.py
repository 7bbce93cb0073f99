"""The topology of the UNet, from its spec alone: its layers, the size of each, and what each reads.

It is written here and nowhere else: the network, its segments, the shapes of its parameters and the estimate of memory
iterate this list. What another family has in place of a layer is another kind of layer.

Values are numbered in the order of their making: first the inputs, then the result of one layer after the other.
"""

from dataclasses import dataclass
from enum import Enum

from dreambooth_ms.models.specs import UNetSpec


class LayerKind(Enum):
    """What a layer computes. The order of what it reads is the order of its cell's inputs."""

    CONV_IN = "noisy latents -> image"
    TIME_EMBEDDING = "timesteps and what is added to them -> time embedding"
    TEXT = "text as it is given -> text as the transformers read it"
    RESNET = "image, time embedding -> image"
    SKIP_RESNET = "image, skip, time embedding -> image; the first two are joined by channels"
    TRANSFORMER = "image, text -> image"
    TRANSFORMER_ENTRANCE = "image -> tokens"
    TRANSFORMER_BLOCK = "tokens, text -> tokens"
    TRANSFORMER_EXIT = "tokens, the image of the entrance -> image"
    DOWNSAMPLER = "image -> image of half the height and width"
    UPSAMPLER = "image -> image of twice the height and width"
    CONV_OUT = "image -> prediction"


@dataclass(frozen=True)
class Layer:
    """A part of the network that has one result."""

    kind: LayerKind
    name: str
    """Public name of the module that it is, or, of a layer that is several modules of one, of that one; "": the root."""
    modules: tuple[str, ...]
    """Public names of the modules that hold its parameters; no two layers have one in common."""
    level: int
    """The resolution of its result, 0 for that of the latents; each further one is half as high and wide."""
    in_channels: int
    """Of the images that it reads together."""
    out_channels: int
    reads: tuple[int, ...]
    """Numbers of values."""


def unet_inputs(spec: UNetSpec) -> tuple[str, ...]:
    """What a UNet takes, in order, by diffusers' names."""
    names = ("sample", "timestep", "encoder_hidden_states")
    return (*names, "text_embeds", "time_ids") if spec.addition_embed_type == "text_time" else names


def unet_layout(spec: UNetSpec) -> tuple[Layer, ...]:
    """The layers of a UNet in the order in which they are computed; the last one's result is the prediction."""
    walk, levels = _Walk(spec), len(spec.block_out_channels)
    skips = [walk.x]
    for level in range(levels):
        block = f"down_blocks.{level}"
        for i in range(spec.layers_per_block):
            walk.step(block, i, level)
            skips.append(walk.x)
        if level < levels - 1:
            walk.resample(LayerKind.DOWNSAMPLER, f"{block}.downsamplers.0", level + 1)
            skips.append(walk.x)
    walk.resnet("mid_block.resnets.0", levels - 1)
    walk.transformer("mid_block.attentions.0", levels - 1)
    walk.resnet("mid_block.resnets.1", levels - 1)
    for index, level in enumerate(reversed(range(levels))):
        block = f"up_blocks.{index}"
        for i in range(spec.layers_per_block + 1):
            walk.step(block, i, level, skips.pop())
        if level > 0:
            walk.resample(LayerKind.UPSAMPLER, f"{block}.upsamplers.0", level - 1)
    modules = ("conv_norm_out", "conv_out")
    walk.add(LayerKind.CONV_OUT, "", 0, spec.out_channels, (walk.x,), modules=modules)
    return tuple(walk.layers)


class _Walk:
    """From the finest resolution to the coarsest and back, with the number `x` of the image so far."""

    def __init__(self, spec: UNetSpec) -> None:
        self.spec = spec
        self.layers: list[Layer] = []
        self.num_inputs = len(unet_inputs(spec))
        sample, timestep, text, *added = range(self.num_inputs)
        width = spec.block_out_channels[0]
        self.x = self.add(LayerKind.CONV_IN, "", 0, width, (sample,), modules=("conv_in",))
        modules = ("time_embedding", "add_embedding") if added else ("time_embedding",)
        self.time = self.add(LayerKind.TIME_EMBEDDING, "", 0, time_width(spec), (), timestep, *added, modules=modules)
        self.text = self.add(LayerKind.TEXT, "", 0, spec.cross_attention_dim, (), text, modules=())

    def add(
        self,
        kind: LayerKind,
        name: str,
        level: int,
        out_channels: int,
        images: tuple[int, ...],
        *others: int,
        modules: tuple[str, ...] | None = None,
    ) -> int:
        """Append a layer, which is one module if none is named; returns the number of its result."""
        in_channels = sum(self._channels(image) for image in images)
        modules = (name,) if modules is None else modules
        self.layers.append(Layer(kind, name, modules, level, in_channels, out_channels, (*images, *others)))
        return self.num_inputs + len(self.layers) - 1

    def step(self, block: str, i: int, level: int, skip: int | None = None) -> None:
        """A residual block and, where the resolution has them, a transformer."""
        self.resnet(f"{block}.resnets.{i}", level, skip)
        if self.spec.has_attention[level]:
            self.transformer(f"{block}.attentions.{i}", level)

    def resnet(self, name: str, level: int, skip: int | None = None) -> None:
        """A residual block."""
        kind, images = LayerKind.RESNET, (self.x,)
        if skip is not None:
            kind, images = LayerKind.SKIP_RESNET, (self.x, skip)
        self.x = self.add(kind, name, level, self.spec.block_out_channels[level], images, self.time)

    def transformer(self, name: str, level: int) -> None:
        """A transformer of one block is one layer; of a deep one, as SDXL's are, each block is."""
        width, depth, x = self.spec.block_out_channels[level], self.spec.transformer_layers(level), self.x
        if depth == 1:
            self.x = self.add(LayerKind.TRANSFORMER, name, level, width, (x,), self.text)
            return
        modules = (f"{name}.norm", f"{name}.proj_in")
        tokens = self.add(LayerKind.TRANSFORMER_ENTRANCE, name, level, width, (x,), modules=modules)
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            tokens = self.add(LayerKind.TRANSFORMER_BLOCK, block, level, width, (tokens,), self.text)
        modules = (f"{name}.proj_out",)
        self.x = self.add(LayerKind.TRANSFORMER_EXIT, name, level, width, (tokens,), x, modules=modules)

    def resample(self, kind: LayerKind, name: str, level: int) -> None:
        """The way to another resolution."""
        self.x = self.add(kind, name, level, self._channels(self.x), (self.x,))

    def _channels(self, image: int) -> int:
        made_by = image - self.num_inputs
        return self.layers[made_by].out_channels if made_by >= 0 else self.spec.in_channels


def time_width(spec: UNetSpec) -> int:
    """Width of the time embedding."""
    return 4 * spec.block_out_channels[0]
