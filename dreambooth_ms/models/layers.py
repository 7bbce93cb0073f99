"""Cells of layers (`models.layout`) that networks share. Shapes: x an image, temb_BE a time embedding."""

from itertools import pairwise
from typing import Any

from mindspore import Tensor, nn

from dreambooth_ms.models.layout import Layer, time_width
from dreambooth_ms.models.specs import UNetSpec, VaeSpec
from dreambooth_ms.ops import AddPerChannel, ConcatChannels, Dense, Padding, UpsampleNearest, conv2d, group_norm, shared


class ResnetBlock2D(nn.Cell):
    """Residual block: image with I channels, SiLU of the time embedding (B, E) -> image with O channels.

    One that reads an image alone (the autoencoder's) has no time embedding.
    """

    def __init__(self, layer: Layer, spec: UNetSpec | VaeSpec) -> None:
        super().__init__()
        in_channels, out_channels = layer.in_channels, layer.out_channels
        self.norm1 = group_norm(spec.norm_num_groups, in_channels, spec.norm_eps, silu=True)
        self.conv1 = conv2d(in_channels, out_channels)
        self.has_time = len(layer.reads) > 1
        if self.has_time:
            self.time_emb_proj = Dense(time_width(spec), out_channels)
            self.add_per_channel = shared(AddPerChannel)
        self.norm2 = group_norm(spec.norm_num_groups, out_channels, spec.norm_eps, silu=True)
        self.conv2 = conv2d(out_channels, out_channels)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.conv_shortcut = conv2d(in_channels, out_channels, kernel_size=1)

    def construct(self, x: Tensor, temb_BE: Tensor | None = None) -> Tensor:
        return self.with_residual(x, temb_BE)

    def with_residual(self, x: Tensor, temb_BE: Tensor | None) -> Tensor:
        """The block itself, for blocks whose input is made of several."""
        y = self.conv1(self.norm1(x))
        if self.has_time:
            y = self.add_per_channel(y, self.time_emb_proj(temb_BE))
        y = self.conv2(self.norm2(y))
        if self.has_shortcut:
            x = self.conv_shortcut(x)
        return x + y


class SkipResnetBlock2D(ResnetBlock2D):
    """The same on the way up: image, the skip that is joined to it by channels, time embedding -> image."""

    def __init__(self, layer: Layer, spec: UNetSpec) -> None:
        super().__init__(layer, spec)
        self.concat = shared(ConcatChannels)

    def construct(self, x: Tensor, skip: Tensor, temb_BE: Tensor) -> Tensor:
        return self.with_residual(self.concat(x, skip), temb_BE)


class Downsample2D(nn.Cell):
    """Half the height and width, by a convolution of stride 2."""

    def __init__(self, layer: Layer, _: object, padding: Padding = (1, 1, 1, 1)) -> None:
        super().__init__()
        self.conv = conv2d(layer.in_channels, layer.out_channels, stride=2, padding=padding)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Cell):
    """Twice the height and width: nearest neighbour, then a convolution."""

    def __init__(self, layer: Layer, _: object) -> None:
        super().__init__()
        self.upsample = shared(UpsampleNearest)
        self.conv = conv2d(layer.in_channels, layer.out_channels)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(self.upsample(x))


class NoOp(nn.Cell):
    """Stands where the public module tree has a layer without parameters, so that the names agree."""

    def construct(self, x: Tensor) -> Tensor:
        return x


class CellMethod(nn.Cell):
    """A method of a cell as a cell of its own, which shares its layers."""

    def __init__(self, method: Any) -> None:
        super().__init__(auto_prefix=False)
        self.owner, self.method = method.__self__, method

    def construct(self, *inputs: Tensor) -> Tensor:
        return self.method(*inputs)


def attach(root: nn.Cell, name: str, cell: Any) -> Any:
    """Put a cell at its public name in a network, where lists and blocks on the way are made with their first cell.

    Cells of a list come in order. Returns the cell.
    """
    *path, last = name.split(".")
    for part, child in pairwise((*path, last)):
        if not hasattr(root, part):
            _insert(root, part, nn.CellList() if child.isdigit() else nn.Cell())
        root = getattr(root, part)
    _insert(root, last, cell)
    return cell


def _insert(parent: nn.Cell, name: str, cell: nn.Cell) -> None:
    if isinstance(parent, nn.CellList):
        parent.append(cell)
    else:
        setattr(parent, name, cell)
