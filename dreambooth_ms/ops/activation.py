"""Activations whose library form is slow or keeps memory on CPU."""

import math

from mindspore import Tensor, nn, ops


class Gelu(nn.Cell):
    """Exact GELU, x * Phi(x) (Hendrycks and Gimpel, 2016). Keeps x alone for the backward pass.

    On CPU `ops.gelu(approximate="none")` and its gradient keep index tables of 12 bytes an element (measured).
    """

    def construct(self, x: Tensor) -> Tensor:
        return x * (ops.erf(x * math.sqrt(0.5)) * 0.5 + 0.5)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        cdf = ops.erf(x * math.sqrt(0.5)) * 0.5 + 0.5
        pdf = ops.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
        return (dout * (cdf + x * pdf),)


class QuickGelu(nn.Cell):
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.sigmoid(x * 1.702)
