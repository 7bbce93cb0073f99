"""Normalisation in float32. Shapes: B batch, P pixels, C channels, G groups."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr
from mindspore.ops.auto_generate import LayerNormGrad, SiLUGrad

from dreambooth_ms.ops import ascend, linear
from dreambooth_ms.ops.anywhere import mean
from dreambooth_ms.ops.graph import after, constant, shared
from dreambooth_ms.ops.layout import members, over_pixels
from dreambooth_ms.ops.linear import bias_add, empty_parameter, times, times_transposed
from dreambooth_ms.runtime.device import Formulation, formulation

Triple = tuple[Tensor, Tensor, Tensor]
"""A normalised tensor and its two statistics, or gradients of input, weight and bias."""


class LayerNorm(nn.Cell):
    """Layer normalisation (Ba et al., 2016) of the last axis: (..., C) -> (..., C)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels = channels
        self.weight, self.bias = empty_parameter((channels,)), empty_parameter((channels,))
        self.eps, self.normalise = eps, shared(_NormaliseRows, eps)
        self.on_ascend = ascend.layer_norm if formulation() is Formulation.ASCEND else None

    def construct(self, x: Tensor) -> Tensor:
        x_NC = ops.reshape(x, (-1, self.channels)).astype(ms.float32)
        if self.on_ascend is None:
            y_NC, _, _ = self.normalise(x_NC, self.weight, self.bias)
        else:
            y_NC = self.on_ascend(x_NC, self.weight, self.bias, self.eps)
        return ops.reshape(y_NC, x.shape).astype(x.dtype)


class RmsNorm(nn.Cell):
    """Division by the root mean square (Zhang and Sennrich, 2019) of the last axis, and a scale: (..., C) -> (..., C),
    in `compute_dtype`."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps, self.compute_dtype = empty_parameter((channels,)), eps, ms.float32

    def construct(self, x: Tensor) -> Tensor:
        x_NC = ops.reshape(x, (-1, x.shape[-1])).astype(ms.float32)
        rms_N1 = ops.rsqrt(mean(x_NC * x_NC, (1,), True) + self.eps)
        y_NC = x_NC * _over_columns(rms_N1, x_NC.shape[1]) * ops.broadcast_to(self.weight, x_NC.shape)
        return ops.reshape(y_NC, x.shape).astype(self.compute_dtype)


MAX_SMALL_ROWS = 1 << 15
"""Up to so many numbers the library's backward kernel, one operation, is about as fast as the dozen that stand for it
(measured, docs/performance.md)."""


class _NormaliseRows(nn.Cell):
    """(N, C) -> (N, C), with mean and variance as (N, 1), as it is fast on CPU."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
        self.norm_grad = LayerNormGrad(begin_norm_axis=-1, begin_params_axis=-1)
        # The kernel reads it, and 1e-12 without it; there is no argument for it (measured).
        self.norm_grad.add_prim_attr("epsilon", eps)

    def construct(self, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor) -> Triple:
        return self.norm(x_NC, weight_C, bias_C)

    def bprop(self, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, out: Triple, dout: Triple) -> Triple:
        rows, channels = x_NC.shape
        dy_NC = dout[0]
        x_NC, mean_N1, variance_N1 = after(x_NC, dy_NC), after(out[1], dy_NC), after(out[2], dy_NC)
        if rows * channels <= MAX_SMALL_ROWS:
            return self.norm_grad(x_NC, dy_NC, variance_N1, mean_N1, weight_C)
        weight_1C = after(ops.reshape(weight_C, (1, channels)), dy_NC)
        rstd_NC = _over_columns(ops.rsqrt(variance_N1 + self.eps), channels)
        xhat_NC = (x_NC - _over_columns(mean_N1, channels)) * rstd_NC
        dy_xhat_NC = dy_NC * xhat_NC
        # Row means weighted by the scale are products with (C, 1); sums over the rows are products with (1, N).
        weight_C1 = ops.reshape(weight_1C, (channels, 1)) * (1 / channels)
        mean_dxhat_NC = _over_columns(times(dy_NC, weight_C1), channels)
        mean_dxhat_xhat_NC = _over_columns(times(dy_xhat_NC, weight_C1), channels)
        dxhat_NC = dy_NC * times(constant(1.0, (rows, 1)), weight_1C)
        dx_NC = (dxhat_NC - mean_dxhat_NC - xhat_NC * mean_dxhat_xhat_NC) * rstd_NC
        ones_1N = constant(1.0, (1, rows))
        dweight_C = ops.reshape(times(ones_1N, dy_xhat_NC), (channels,))
        dbias_C = ops.reshape(times(ones_1N, dy_NC), (channels,))
        return dx_NC, dweight_C, dbias_C


# A product with ones gives the same bits as `broadcast_to` in a fifth of the time: with that the gradient of 2048 rows
# of 320 takes 6.3 ms, and 1.6 ms without (measured).


def _over_columns(x_N1: Tensor, channels: int) -> Tensor:
    """(N, 1) -> (N, C)."""
    return times(x_N1, constant(1.0, (1, channels)))


class GroupNorm(nn.Cell):
    """Group normalisation (Wu and He, 2018) of an image, in this device's formulation, and `act_fn` after it, if any.

    The two are one cell because a backward pass of both needs only their input. On CPU sums over pixels are matrix
    products, and nothing is transposed; on Ascend it is the device's operator.
    """

    def __init__(self, num_groups: int, channels: int, eps: float, act_fn: str = "") -> None:
        super().__init__()
        self.num_groups, self.channels, self.eps = num_groups, channels, eps
        self.act = linear.activation(act_fn) if act_fn else None
        self.weight, self.bias = empty_parameter((channels,)), empty_parameter((channels,))
        self.channels_last = formulation() is Formulation.CPU
        self.normalise = shared(_NormaliseGroups, num_groups, channels, eps, act_fn)

    def construct(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x_NC = ops.reshape(x, (-1, self.channels)).astype(ms.float32)
            y_NC, _, _ = self.normalise(x_NC, self.weight, self.bias, x.shape[0])
            return ops.reshape(y_NC, x.shape).astype(x.dtype)
        y = ops.group_norm(x.astype(ms.float32), self.num_groups, self.weight, self.bias, self.eps)
        return (y if self.act is None else self.act(y)).astype(x.dtype)


class TokenGroupNorm(GroupNorm):
    """The same of tokens, (B, S, C)."""

    def construct(self, x_BSC: Tensor) -> Tensor:
        if self.channels_last:
            return super().construct(x_BSC)
        return ops.transpose(super().construct(ops.transpose(x_BSC, (0, 2, 1))), (0, 2, 1))


class _NormaliseGroups(nn.Cell):
    """(N, C) of the N = B * P pixels of all images -> (N, C), with mean and reciprocal standard deviation as (B, C).

    Its own backward pass keeps the input and the two statistics, and writes the norm's gradient as
    dx = a * dy + b * (x - mean) + c with a, b, c per row and channel.

    Where an operation costs as much as the arithmetic of a small tensor (docs/performance.md), their number counts: a
    sum over pixels, and its way back to them, are one product each.
    """

    def __init__(self, num_groups: int, channels: int, eps: float, act_fn: str) -> None:
        super().__init__()
        self.num_groups, self.channels, self.eps, self.act_fn = num_groups, channels, eps, act_fn
        self.silu_grad = SiLUGrad()

    def construct(self, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, batch: int) -> Triple:
        pixels = x_NC.shape[0] // batch
        mean_BC = self._group_mean(self._pixel_sum(x_NC, batch), pixels)
        centred_NC = x_NC - over_pixels(mean_BC, pixels)
        variance_BC = self._group_mean(self._pixel_sum(centred_NC * centred_NC, batch), pixels)
        rstd_BC = ops.rsqrt(variance_BC + self.eps)
        # Broadcasting keeps an index table on CPU, but of (B, C) it is small.
        scale_NC = over_pixels(rstd_BC * weight_C, pixels)
        y_NC = bias_add(centred_NC * scale_NC, bias_C)
        if self.act_fn == "silu":
            y_NC = ops.silu(y_NC)
        if self.act_fn == "gelu":
            y_NC = y_NC * linear.normal_cdf(y_NC)
        return y_NC, mean_BC, rstd_BC

    def bprop(
        self, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, batch: int, out: Triple, dout: Triple
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        pixels = x_NC.shape[0] // batch
        dy_NC = dout[0]
        x_NC, mean_BC, rstd_BC = after(x_NC, dy_NC), after(out[1], dy_NC), after(out[2], dy_NC)
        centred_NC = x_NC - over_pixels(mean_BC, pixels)
        scale_NC = over_pixels(rstd_BC * weight_C, pixels)
        if self.act_fn == "silu":
            dy_NC = self.silu_grad(dy_NC, bias_add(centred_NC * scale_NC, bias_C))
        if self.act_fn == "gelu":
            y_NC = bias_add(centred_NC * scale_NC, bias_C)
            dy_NC = dy_NC * linear.gelu_slope(y_NC, linear.normal_cdf(y_NC))
        dbias_BC = self._pixel_sum(dy_NC, batch)
        dweight_BC = self._pixel_sum(dy_NC * centred_NC, batch) * rstd_BC
        mean_dy_BC = self._group_mean(dbias_BC * weight_C, pixels)
        mean_dy_xhat_BC = self._group_mean(dweight_BC * weight_C, pixels)
        slope_NC = over_pixels(rstd_BC * rstd_BC * mean_dy_xhat_BC, pixels)
        dx_NC = dy_NC * scale_NC - centred_NC * slope_NC - over_pixels(rstd_BC * mean_dy_BC, pixels)
        return dx_NC, dweight_BC.sum(0), dbias_BC.sum(0), 0

    def _pixel_sum(self, x_NC: Tensor, batch: int) -> Tensor:
        """(N, C) -> (B, C)."""
        return times(members(batch, x_NC.shape[0]), x_NC)

    def _group_mean(self, sums_BC: Tensor, pixels: int) -> Tensor:
        """Mean over a group from the sums over pixels of its channels, for each of its channels."""
        count = pixels * (self.channels // self.num_groups)
        if self.channels <= MAX_FOLDED:
            return times(sums_BC, _same_group(self.channels, self.num_groups, count))
        sums_BG = times_transposed(sums_BC, members(self.num_groups, self.channels))
        return times(sums_BG * (1 / count), members(self.num_groups, self.channels))


MAX_FOLDED = 512
"""Up to so many channels the two products of a mean over groups are one, with a constant of C * C numbers."""


@constexpr
def _same_group(channels: int, num_groups: int, count: int) -> Tensor:
    """(C, C): 1 / count where two channels are in one group."""
    width = channels // num_groups
    return Tensor(np.kron(np.eye(num_groups), np.ones((width, width))) / count, ms.float32)
