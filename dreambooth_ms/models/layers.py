"""Cells of layers (`models.layout`) that networks share."""

from itertools import pairwise
from typing import Any

from mindspore import Tensor, nn

from dreambooth_ms.models.layout import Layer, LayerKind, time_width
from dreambooth_ms.models.specs import UNetSpec, VaeSpec
from dreambooth_ms.ops import Conv2d, Dense, GroupNorm
from dreambooth_ms.ops.layout import add_per_channel, concat_channels, upsample_nearest
from dreambooth_ms.runtime.compiled_cell import CompiledCell


class ResnetBlock2D(nn.Cell):
    """Residual block: image[, skip to concatenate by channels][, SiLU of the time embedding (B, E)] -> image.

    The autoencoder's have no time embedding.
    """

    def __init__(self, layer: Layer, spec: UNetSpec | VaeSpec) -> None:
        super().__init__()
        in_channels, out_channels = layer.in_channels, layer.out_channels
        self.has_skip, self.has_time = layer.kind is LayerKind.SKIP_RESNET, len(layer.reads) > 1
        self.norm1 = GroupNorm(spec.norm_num_groups, in_channels, spec.norm_eps, silu=True)
        self.conv1 = Conv2d(in_channels, out_channels)
        if self.has_time:
            self.time_emb_proj = Dense(time_width(spec), out_channels)
        self.norm2 = GroupNorm(spec.norm_num_groups, out_channels, spec.norm_eps, silu=True)
        self.conv2 = Conv2d(out_channels, out_channels)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.conv_shortcut = Conv2d(in_channels, out_channels, kernel_size=1)

    def construct(self, x: Tensor, *skip_and_temb: Tensor) -> Tensor:
        if self.has_skip:
            x = concat_channels(x, skip_and_temb[0])
        y = self.conv1(self.norm1(x))
        if self.has_time:
            y = add_per_channel(y, self.time_emb_proj(skip_and_temb[-1]))
        y = self.conv2(self.norm2(y))
        if self.has_shortcut:
            x = self.conv_shortcut(x)
        return x + y


class Downsample2D(nn.Cell):
    """Half the height and width, by a convolution of stride 2; the autoencoder's pads below and right only."""

    def __init__(self, layer: Layer, spec: UNetSpec | VaeSpec) -> None:
        super().__init__()
        padding = (0, 1, 0, 1) if isinstance(spec, VaeSpec) else (1, 1, 1, 1)
        self.conv = Conv2d(layer.in_channels, layer.out_channels, stride=2, padding=padding)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Cell):
    """Twice the height and width: nearest neighbour, then a convolution."""

    def __init__(self, layer: Layer, _: object) -> None:
        super().__init__()
        self.upsample = upsample_nearest()
        self.conv = Conv2d(layer.in_channels, layer.out_channels)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(self.upsample(x))


class CellMethod(CompiledCell):
    """A method of a cell as a cell of its own, which shares its layers."""

    def __init__(self, method: Any) -> None:
        super().__init__(auto_prefix=False)
        # By its name: a compiled graph that calls a bound method with *inputs is never freed (measured).
        self.owner, self.method = method.__self__, method.__name__
        self.title = getattr(self.owner, "title", method.__qualname__)

    def construct(self, *inputs: Tensor) -> Tensor:
        return getattr(self.owner, self.method)(*inputs)


def attach(root: nn.Cell, name: str, cell: Any) -> Any:
    """Put a cell at its public name in a network, where lists and blocks on the way are made with their first cell.

    Cells of a list come in order. Returns the cell.
    """
    *path, last = name.split(".")
    for part, child in pairwise((*path, last)):
        if not hasattr(root, part):
            root.insert_child_to_cell(part, nn.CellList() if child.isdigit() else nn.Cell())
        root = getattr(root, part)
    root.insert_child_to_cell(last, cell)
    return cell
