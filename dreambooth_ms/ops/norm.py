"""Normalisation in float32. Shapes: B batch, P pixels, C channels, G groups."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.ops.backend import Formulation, after, formulation, ones, shared
from dreambooth_ms.ops.linear import empty_parameter


def group_norm(num_groups: int, channels: int, eps: float, silu: bool = False) -> nn.Cell:
    """Group normalisation (Wu and He, 2018) of an image, in this device's formulation; with `silu`, and SiLU after it.

    The two are one cell because a backward pass of both needs their input alone.
    """
    cell = ChannelsLastGroupNorm if formulation() is Formulation.CPU else ChannelsFirstGroupNorm
    return cell(num_groups, channels, eps, silu)


class LayerNorm(nn.Cell):
    """Layer normalisation (Ba et al., 2016) of the last axis: (..., C) -> (..., C)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels = channels
        self.weight, self.bias = empty_parameter((channels,)), empty_parameter((channels,))
        self.normalise = shared(_NormaliseRows, eps)

    def construct(self, x: Tensor) -> Tensor:
        x_NC = ops.reshape(x, (-1, self.channels)).astype(ms.float32)
        y_NC, _, _ = self.normalise(x_NC, self.weight, self.bias)
        return ops.reshape(y_NC, x.shape).astype(x.dtype)


class _NormaliseRows(nn.Cell):
    """(N, C) -> (N, C), with mean and variance as (N, 1). The library's backward kernel is about 5 times slower."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
        self.matmul = ops.MatMul()

    def construct(self, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm(x_NC, weight_C, bias_C)

    def bprop(
        self,
        x_NC: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        out: tuple[Tensor, Tensor, Tensor],
        dout: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, channels = x_NC.shape
        dy_NC = dout[0]
        x_NC, mean_N1, variance_N1 = after(x_NC, dy_NC), after(out[1], dy_NC), after(out[2], dy_NC)
        weight_1C = after(ops.reshape(weight_C, (1, channels)), dy_NC)
        rstd_NC = ops.broadcast_to(ops.rsqrt(variance_N1 + self.eps), x_NC.shape)
        xhat_NC = (x_NC - ops.broadcast_to(mean_N1, x_NC.shape)) * rstd_NC
        dy_xhat_NC = dy_NC * xhat_NC
        # Row means weighted by the scale are products with (C, 1); sums over the rows are products with (1, N).
        weight_C1 = ops.reshape(weight_1C, (channels, 1)) * (1 / channels)
        mean_dxhat_NC = ops.broadcast_to(self.matmul(dy_NC, weight_C1), x_NC.shape)
        mean_dxhat_xhat_NC = ops.broadcast_to(self.matmul(dy_xhat_NC, weight_C1), x_NC.shape)
        dxhat_NC = dy_NC * ops.broadcast_to(weight_1C, x_NC.shape)
        dx_NC = (dxhat_NC - mean_dxhat_NC - xhat_NC * mean_dxhat_xhat_NC) * rstd_NC
        ones_1N = ones((1, rows))
        dweight_C = ops.reshape(self.matmul(ones_1N, dy_xhat_NC), (channels,))
        dbias_C = ops.reshape(self.matmul(ones_1N, dy_NC), (channels,))
        return dx_NC, dweight_C, dbias_C


class ChannelsFirstGroupNorm(nn.Cell):
    """(B, C, H, W) -> (B, C, H, W) by the device's operator."""

    def __init__(self, num_groups: int, channels: int, eps: float, silu: bool = False) -> None:
        super().__init__()
        self.num_groups, self.eps, self.silu = num_groups, eps, silu
        self.weight, self.bias = empty_parameter((channels,)), empty_parameter((channels,))

    def construct(self, x_BCHW: Tensor) -> Tensor:
        y = ops.group_norm(x_BCHW.astype(ms.float32), self.num_groups, self.weight, self.bias, self.eps)
        if self.silu:
            y = ops.silu(y)
        return y.astype(x_BCHW.dtype)


class ChannelsLastGroupNorm(nn.Cell):
    """(B, H, W, C) -> (B, H, W, C). Sums over pixels are matrix products; nothing is transposed."""

    def __init__(self, num_groups: int, channels: int, eps: float, silu: bool = False) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight, self.bias = empty_parameter((channels,)), empty_parameter((channels,))
        self.normalise = shared(_NormaliseGroups, num_groups, channels, eps, silu)

    def construct(self, x_BHWC: Tensor) -> Tensor:
        batch, height, width, channels = x_BHWC.shape
        x_BPC = ops.reshape(x_BHWC, (batch, height * width, channels)).astype(ms.float32)
        y_BPC, _, _ = self.normalise(x_BPC, self.weight, self.bias)
        return ops.reshape(y_BPC, x_BHWC.shape).astype(x_BHWC.dtype)


class _NormaliseGroups(nn.Cell):
    """(B, P, C) -> (B, P, C), with mean and reciprocal standard deviation as (B, C).

    Its own backward pass keeps the input and the two statistics, and writes the norm's gradient as
    dx = a * dy + b * (x - mean) + c with a, b, c per row and channel.
    """

    def __init__(self, num_groups: int, channels: int, eps: float, silu: bool) -> None:
        super().__init__()
        self.num_groups, self.channels, self.eps, self.silu = num_groups, channels, eps, silu
        self.matmul, self.bmm = ops.MatMul(), ops.BatchMatMul()
        self.times_transposed = ops.MatMul(transpose_b=True)
        self.bias_add = ops.BiasAdd()

    def construct(self, x_BPC: Tensor, weight_C: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, pixels, channels = x_BPC.shape
        count = pixels * (channels // self.num_groups)
        mean_BC = self._group_sum(self._pixel_sum(x_BPC)) * (1 / count)
        centred_BPC = x_BPC - _over_pixels(mean_BC, pixels)
        variance_BC = self._group_sum(self._pixel_sum(centred_BPC * centred_BPC)) * (1 / count)
        rstd_BC = ops.rsqrt(variance_BC + self.eps)
        y_BPC = self._scaled_and_shifted(centred_BPC, rstd_BC, weight_C, bias_C)
        if self.silu:
            y_BPC = y_BPC * ops.sigmoid(y_BPC)
        return y_BPC, mean_BC, rstd_BC

    def bprop(
        self,
        x_BPC: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        out: tuple[Tensor, Tensor, Tensor],
        dout: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, pixels, channels = x_BPC.shape
        count = pixels * (channels // self.num_groups)
        dy_BPC = dout[0]
        x_BPC, mean_BC, rstd_BC = after(x_BPC, dy_BPC), after(out[1], dy_BPC), after(out[2], dy_BPC)
        centred_BPC = x_BPC - _over_pixels(mean_BC, pixels)
        if self.silu:
            y_BPC = self._scaled_and_shifted(centred_BPC, rstd_BC, weight_C, bias_C)
            share_BPC = ops.sigmoid(y_BPC)
            dy_BPC = dy_BPC * share_BPC * (y_BPC * (1 - share_BPC) + 1)
        weight_BC = _over_batch(weight_C, batch)
        dbias_BC = self._pixel_sum(dy_BPC)
        dweight_BC = self._pixel_sum(dy_BPC * centred_BPC) * rstd_BC
        mean_dy_BC = self._group_sum(weight_BC * dbias_BC) * (1 / count)
        mean_dy_xhat_BC = self._group_sum(weight_BC * dweight_BC) * (1 / count)
        slope_BC = rstd_BC * rstd_BC * mean_dy_xhat_BC
        dx_BPC = (
            dy_BPC * _over_pixels(rstd_BC * weight_BC, pixels)
            - centred_BPC * _over_pixels(slope_BC, pixels)
            - _over_pixels(rstd_BC * mean_dy_BC, pixels)
        )
        return dx_BPC, dweight_BC.sum(0), dbias_BC.sum(0)

    def _scaled_and_shifted(self, centred_BPC: Tensor, rstd_BC: Tensor, weight_C: Tensor, bias_C: Tensor) -> Tensor:
        batch, pixels, channels = centred_BPC.shape
        scale_BC = rstd_BC * _over_batch(weight_C, batch)
        scaled_NC = ops.reshape(centred_BPC * _over_pixels(scale_BC, pixels), (-1, channels))
        return ops.reshape(self.bias_add(scaled_NC, bias_C), centred_BPC.shape)

    def _pixel_sum(self, x_BPC: Tensor) -> Tensor:
        batch, pixels, channels = x_BPC.shape
        return ops.reshape(self.bmm(ones((batch, 1, pixels)), x_BPC), (batch, channels))

    def _group_sum(self, x_BC: Tensor) -> Tensor:
        """Sum over the channels of a group, given back to each of its channels."""
        membership = _membership(self.channels, self.num_groups)
        return self.times_transposed(self.matmul(x_BC, membership), membership)


def _over_pixels(x_BC: Tensor, pixels: int) -> Tensor:
    batch, channels = x_BC.shape
    return ops.broadcast_to(ops.reshape(x_BC, (batch, 1, channels)), (batch, pixels, channels))


def _over_batch(x_C: Tensor, batch: int) -> Tensor:
    return ops.broadcast_to(ops.reshape(x_C, (1, -1)), (batch, x_C.shape[0]))


@constexpr
def _membership(channels: int, num_groups: int) -> Tensor:
    """(C, G): 1 where the channel belongs to the group."""
    return Tensor(np.kron(np.eye(num_groups), np.ones((channels // num_groups, 1))), ms.float32)
