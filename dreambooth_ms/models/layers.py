"""Blocks that the UNet and the autoencoder share. Shapes: x an image with C channels, temb_BE a time embedding."""

from mindspore import Tensor, nn

from dreambooth_ms.ops import AddPerChannel, Dense, UpsampleNearest, conv2d, group_norm, shared


class ResnetBlock2D(nn.Cell):
    """Residual block: image with I channels, SiLU of the time embedding (B, E) -> image with O channels.

    Without `temb_dim` (the autoencoder) the embedding is ignored.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_groups: int, eps: float, temb_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(num_groups, in_channels, eps, silu=True)
        self.conv1 = conv2d(in_channels, out_channels)
        self.has_time = temb_dim is not None
        if temb_dim is not None:
            self.time_emb_proj = Dense(temb_dim, out_channels)
            self.add_per_channel = shared(AddPerChannel)
        self.norm2 = group_norm(num_groups, out_channels, eps, silu=True)
        self.conv2 = conv2d(out_channels, out_channels)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.conv_shortcut = conv2d(in_channels, out_channels, kernel_size=1)

    def construct(self, x: Tensor, temb_BE: Tensor | None = None) -> Tensor:
        y = self.conv1(self.norm1(x))
        if self.has_time:
            y = self.add_per_channel(y, self.time_emb_proj(temb_BE))
        y = self.conv2(self.norm2(y))
        if self.has_shortcut:
            x = self.conv_shortcut(x)
        return x + y


class Downsample2D(nn.Cell):
    """Half the height and width, by a convolution of stride 2."""

    def __init__(self, channels: int, padding: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv = conv2d(channels, channels, stride=2, padding=padding)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Cell):
    """Twice the height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample = shared(UpsampleNearest)
        self.conv = conv2d(channels, channels)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(self.upsample(x))


class NoOp(nn.Cell):
    """Stands where the public module tree has a layer without parameters, so that the names agree."""

    def construct(self, x: Tensor) -> Tensor:
        return x
