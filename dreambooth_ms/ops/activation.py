"""Activations whose library form is slow or keeps memory on CPU."""

import math

from mindspore import Tensor, nn, ops

from dreambooth_ms.ops.anywhere import equal_parts
from dreambooth_ms.ops.graph import after


class Gelu(nn.Cell):
    """Exact GELU, x * Phi(x) (Hendrycks and Gimpel, 2016). Keeps only x for the backward pass.

    On CPU `ops.gelu(approximate="none")` and its gradient keep index tables of 12 bytes an element (measured).
    """

    def construct(self, x: Tensor) -> Tensor:
        return x * _normal_cdf(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        x = after(x, dout)
        return (dout * _gelu_slope(x, _normal_cdf(x)),)


class GatedGelu(nn.Cell):
    """(value, gate) in the two halves of the last axis -> value * GELU(gate): (N, 2 D) -> (N, D).

    As GEGLU has it (Shazeer, 2020). Keeps only its input for the backward pass.
    """

    def construct(self, x_NE: Tensor) -> Tensor:
        value_ND, gate_ND = equal_parts(x_NE, 2, 1)
        return value_ND * gate_ND * _normal_cdf(gate_ND)

    def bprop(self, x_NE: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        value_ND, gate_ND = equal_parts(after(x_NE, dout), 2, 1)
        cdf_ND = _normal_cdf(gate_ND)
        dvalue_ND = dout * gate_ND * cdf_ND
        dgate_ND = dout * value_ND * _gelu_slope(gate_ND, cdf_ND)
        return (ops.concat((dvalue_ND, dgate_ND), 1),)


class QuickGelu(nn.Cell):
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.sigmoid(x * 1.702)


def _normal_cdf(x: Tensor) -> Tensor:
    """Phi(x), the distribution function of the standard normal."""
    return ops.erf(x * math.sqrt(0.5)) * 0.5 + 0.5


def _gelu_slope(x: Tensor, cdf: Tensor) -> Tensor:
    """Derivative of x * Phi(x), from x and Phi(x)."""
    return cdf + x * ops.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
