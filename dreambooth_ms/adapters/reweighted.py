"""Layers whose weight is computed anew in each step, from the base's and trained factors: LoHa, LoKr, DoRA, OFT.

What they add is that of `adapters.formulas`, where the sources stand; the factors have the names that they have there.
Shapes: O output channels, I input channels times kernel, r rank, b side of a block. A convolution's weight is taken in
two dimensions, in the order of this device's formulation.
"""

from functools import cache
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from dreambooth_ms.adapters.formulas import NEUMANN_TERMS, factorised, skew_basis
from dreambooth_ms.adapters.lora import AdaptedLayer, lora_layer, norms
from dreambooth_ms.models.parameters import PublicParameter
from dreambooth_ms.ops import Conv2d, Dense, total
from dreambooth_ms.ops.layout import FlatLayout, StoredLayout
from dreambooth_ms.ops.linear import batch_times, batch_times_transposed, empty_parameter, times


class ReweightedLayer(AdaptedLayer):
    """A linear layer or convolution by W + scale * change(W), in the dtype of x."""

    def __init__(self, base: Dense | Conv2d, change: "Change", alpha: float) -> None:
        super().__init__(base, alpha, change.scale)
        self.change, self.is_convolution = change, isinstance(base, Conv2d)
        self.stored_layouts = getattr(base, "stored_layouts", {})
        self.product: Any = base.convolve if isinstance(base, Conv2d) else base.product

    @property
    def parts(self) -> dict[str, PublicParameter]:
        """The factors of the change."""
        layouts = self.change.layouts
        return {n: PublicParameter(own, layouts.get(n)) for n, own in self.change.parameters_and_names()}

    def squared_change(self) -> Tensor:
        change_OI = self.change(self._weight()) * self.lora_scale
        return total(change_OI * change_OI)

    def _weight(self) -> Tensor:
        return ops.reshape(self.weight.astype(ms.float32), (self.out_channels, -1))

    def construct(self, x: Tensor) -> Tensor:
        weight_OI = self._weight()
        changed_OI = weight_OI + self.change(weight_OI) * self.lora_scale
        weight = ops.reshape(changed_OI, self.weight.shape).astype(x.dtype)
        bias = self.bias.astype(x.dtype) if self.has_bias else None
        if self.is_convolution:
            return self.product(x, weight, bias)
        y = self.product(ops.reshape(x, (-1, self.in_channels)), weight, bias)
        return ops.reshape(y, x.shape[:-1] + (self.out_channels,))


class Change(nn.Cell):
    """The weight (O, I) float32 of a layer -> what is added to it, over the scale.

    `size` is LoKr's factor, or the side of OFT's blocks.
    """

    def __init__(self, base: Dense | Conv2d, rank: int, alpha: float, size: int) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.rows, self.kernel = base.out_channels, getattr(base, "kernel_size", 1) ** 2
        self.columns = base.in_channels * self.kernel
        on_cpu = bool(getattr(base, "stored_layouts", {}))
        # Where factors stand in a convolution, and their columns are those of its weight.
        self.flat = FlatLayout(base.kernel_size) if on_cpu else None
        self.layouts: dict[str, StoredLayout | None] = {}


class HadamardChange(Change):
    """LoHa: (A1 B1) * (A2 B2)."""

    def __init__(self, base: Dense | Conv2d, rank: int, alpha: float, size: int) -> None:
        super().__init__(base, rank, alpha, size)
        self.hada_w1_a, self.hada_w2_a = (empty_parameter((self.rows, rank)) for _ in range(2))
        self.hada_w1_b, self.hada_w2_b = (empty_parameter((rank, self.columns)) for _ in range(2))
        self.layouts = {"hada_w1_b": self.flat, "hada_w2_b": self.flat}

    def construct(self, weight_OI: Tensor) -> Tensor:
        return times(self.hada_w1_a, self.hada_w1_b) * times(self.hada_w2_a, self.hada_w2_b)


class KroneckerChange(Change):
    """LoKr: kron(C, D), where D is a product of rank r unless that is no smaller."""

    def __init__(self, base: Dense | Conv2d, rank: int, alpha: float, size: int) -> None:
        super().__init__(base, rank, alpha, size)
        (self.a, self.c), (self.b, self.d) = (factorised(n, size) for n in (self.rows, base.in_channels))
        self.on_cpu = self.flat is not None
        self.lokr_w1 = empty_parameter((self.a, self.b))
        self.is_whole = rank >= max(self.c, self.d) / 2
        if self.is_whole:
            self.scale = 1.0
            self.lokr_w2 = empty_parameter((self.c, self.d * self.kernel))
            self.layouts = {"lokr_w2": self.flat}
        else:
            self.lokr_w2_a = empty_parameter((self.c, rank))
            self.lokr_w2_b = empty_parameter((rank, self.d * self.kernel))
            self.layouts = {"lokr_w2_b": self.flat}

    def construct(self, weight_OI: Tensor) -> Tensor:
        right = self.lokr_w2 if self.is_whole else times(self.lokr_w2_a, self.lokr_w2_b)
        product = times(ops.reshape(self.lokr_w1, (-1, 1)), ops.reshape(right, (1, -1)))
        # Taps stand before channels on CPU, after them elsewhere.
        taps, points = (self.kernel, 1) if self.on_cpu else (1, self.kernel)
        product = ops.reshape(product, (self.a, self.b, self.c, taps, self.d, points))
        return ops.reshape(ops.transpose(product, (0, 2, 3, 1, 4, 5)), (self.rows, self.columns))


class DecomposedChange(Change):
    """DoRA: the rows of W + alpha / r * B A at trained norms, less W; their own norms are constants to the gradient."""

    def __init__(self, base: Dense | Conv2d, rank: int, alpha: float, size: int) -> None:
        super().__init__(base, rank, alpha, size)
        self.factors_scale, self.scale = self.scale, 1.0
        pair = lora_layer(base, rank, alpha)
        self.lora_A, self.lora_B = pair.lora_A, pair.lora_B
        self.dora_scale = empty_parameter((self.rows,))
        self.layouts = {name: part.layout for name, part in pair.parts.items()}

    def construct(self, weight_OI: Tensor) -> Tensor:
        up, down = ops.reshape(self.lora_B.weight, (self.rows, -1)), ops.reshape(self.lora_A.weight, (-1, self.columns))
        changed_OI = weight_OI + times(up, down) * self.factors_scale
        share_O = self.dora_scale / ops.stop_gradient(norms(changed_OI))
        return changed_OI * ops.broadcast_to(ops.reshape(share_O, (-1, 1)), changed_OI.shape) - weight_OI


class RotatedChange(Change):
    """OFT: blocks of columns of a linear layer's weight, rotated, less these."""

    def __init__(self, base: Dense | Conv2d, rank: int, alpha: float, size: int) -> None:
        super().__init__(base, rank, alpha, size)
        self.scale, self.side, self.count = 1.0, size, self.columns // size
        self.oft_R = empty_parameter((self.count, size * (size - 1) // 2))
        self.basis = _basis(size)

    def construct(self, weight_OI: Tensor) -> Tensor:
        skew = ops.reshape(times(self.oft_R, self.basis), (self.count, self.side, self.side))
        power, rotation = skew, skew * 2.0
        for _ in range(NEUMANN_TERMS - 3):
            power = batch_times(power, skew)
            rotation = rotation + power * 2.0
        rotation = rotation + batch_times(power, skew)
        # Without the 1 of the series, since the weight itself is taken off.
        blocks = ops.transpose(ops.reshape(weight_OI, (-1, self.count, self.side)), (1, 0, 2))
        change = batch_times_transposed(blocks, rotation)
        return ops.reshape(ops.transpose(change, (1, 0, 2)), weight_OI.shape)


@cache
def _basis(side: int) -> Tensor:
    """One for all layers, since it is large."""
    return Tensor(skew_basis(side))


CHANGES: dict[str, type[Change]] = {
    "dora": DecomposedChange,
    "loha": HadamardChange,
    "lokr": KroneckerChange,
    "oft": RotatedChange,
}
"""By the kind of adapter."""
