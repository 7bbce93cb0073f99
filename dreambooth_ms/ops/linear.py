"""Products of matrices, one instance of each operator for all cells; linear layer and embedding table, with the public
parameter names `weight` and `bias`; and activations whose library form is slow or keeps memory on CPU."""

import math
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from dreambooth_ms.ops import ascend
from dreambooth_ms.ops.anywhere import equal_parts, look_up
from dreambooth_ms.ops.graph import after, constant, shared
from dreambooth_ms.runtime.device import Formulation, formulation

times, times_transposed, transposed_times = ops.MatMul(), ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)
"""A B, A B^T and A^T B."""

batch_times, batch_times_transposed = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
batch_transposed_times = ops.BatchMatMul(transpose_a=True)
"""The same of each of a batch."""


class Dense(nn.Cell):
    """y = x W^T + b on the last axis: (..., in) -> (..., out), in the dtype of x whatever the weights are stored in."""

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.has_bias = in_channels, out_channels, has_bias
        self.weight = empty_parameter((out_channels, in_channels))
        if has_bias:
            self.bias = empty_parameter((out_channels,))
        self.product = linear()

    def construct(self, x: Tensor) -> Tensor:
        bias = self.bias.astype(x.dtype) if self.has_bias else None
        y = self.product(ops.reshape(x, (-1, self.in_channels)), self.weight.astype(x.dtype), bias)
        return ops.reshape(y, x.shape[:-1] + (self.out_channels,))


def linear() -> Any:
    """What a `Dense` is without its weights: rows (N, I), weight (O, I), bias (O,) or None -> rows (N, O)."""
    return shared(_Linear) if formulation() is Formulation.CPU else ascend.linear


class _Linear(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.bias_add = shared(BiasAdd)

    def construct(self, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        y_NO = times_transposed(x_NI, weight_OI)
        return y_NO if bias_O is None else self.bias_add(y_NO, bias_O)


bias_add = ops.BiasAdd()


class BiasAdd(nn.Cell):
    """Rows plus a bias: (N, C), (C,) -> (N, C). Its bias gradient is a product, ten times faster than the library's."""

    def construct(self, x_NC: Tensor, bias_C: Tensor) -> Tensor:
        return bias_add(x_NC, bias_C)

    def bprop(self, x_NC: Tensor, bias_C: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return dout, ops.reshape(times(constant(1.0, (1, dout.shape[0])).astype(dout.dtype), dout), (-1,))


class Embedding(nn.Cell):
    """A table of vectors: ids (...,) int32 -> (..., dim)."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.weight = empty_parameter((size, dim))

    def construct(self, ids: Tensor) -> Tensor:
        return look_up(self.weight, ids)


class Gelu(nn.Cell):
    """Exact GELU, x * Phi(x) (Hendrycks and Gimpel, 2016). Keeps only x for the backward pass.

    On CPU `ops.gelu(approximate="none")` and its gradient keep index tables of 12 bytes an element (measured).
    """

    def construct(self, x: Tensor) -> Tensor:
        return x * normal_cdf(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        x = after(x, dout)
        return (dout * gelu_slope(x, normal_cdf(x)),)


class GatedGelu(nn.Cell):
    """(value, gate) in the two halves of the last axis -> value * GELU(gate): (N, 2 D) -> (N, D).

    As GEGLU has it (Shazeer, 2020). Keeps only its input for the backward pass.
    """

    def construct(self, x_NE: Tensor) -> Tensor:
        value_ND, gate_ND = equal_parts(x_NE, 2, 1)
        return value_ND * gate_ND * normal_cdf(gate_ND)

    def bprop(self, x_NE: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        value_ND, gate_ND = equal_parts(after(x_NE, dout), 2, 1)
        cdf_ND = normal_cdf(gate_ND)
        dvalue_ND = dout * gate_ND * cdf_ND
        dgate_ND = dout * value_ND * gelu_slope(gate_ND, cdf_ND)
        return (ops.concat((dvalue_ND, dgate_ND), 1),)


class QuickGelu(nn.Cell):
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.sigmoid(x * 1.702)


class TanhGelu(nn.Cell):
    """GELU's approximation by tanh (Hendrycks and Gimpel, 2016, section 2); (1 + tanh z) / 2 is sigmoid(2 z)."""

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.sigmoid((x + x * x * x * 0.044715) * math.sqrt(8 / math.pi))


def activation(name: str) -> Any:
    """What applies an `act_fn`, "silu" or "gelu"."""
    return shared(Gelu) if name == "gelu" else ops.silu


def normal_cdf(x: Tensor) -> Tensor:
    """Phi(x), the distribution function of the standard normal."""
    return ops.erf(x * math.sqrt(0.5)) * 0.5 + 0.5


def gelu_slope(x: Tensor, cdf: Tensor) -> Tensor:
    """Derivative of x * Phi(x), from x and Phi(x)."""
    return cdf + x * ops.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))


def empty_parameter(shape: tuple[int, ...]) -> Parameter:
    """A float32 parameter of zeros, to be filled from a file or by `models.parameters.initialise`."""
    return Parameter(Tensor(np.zeros(shape, np.float32)))
