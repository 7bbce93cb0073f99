"""Layers whose weight is computed anew in each step, from the base's and trained factors: LoHa, LoKr, DoRA, OFT.

What they add is that of `adapters.formulas`, where the sources stand; the factors have the names that they have there.
Shapes: O output channels, I input channels times kernel. A convolution's weight is a matrix here, in the order of this
device's formulation.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from dreambooth_ms.adapters.formulas import NEUMANN_TERMS, skew_basis
from dreambooth_ms.adapters.lora import AdaptedLayer, lora_layer, norms
from dreambooth_ms.formats.naming.update_kinds import DOWN, MAGNITUDE, Shape, rank_of
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


OF_COLUMNS = ("hada_w1_b", "hada_w2_b", "lokr_w2", "lokr_w2_b")
"""Factors whose columns are those of a convolution's weight."""


class Change(nn.Cell):
    """The weight (O, I) float32 of a layer -> what is added to it, over the scale. It is made of the shapes of its
    factors, the scale that those with a rank have, and the side of OFT's blocks."""

    def __init__(self, base: Dense | Conv2d, shapes: Mapping[str, Shape], scale: float, side: int) -> None:
        super().__init__()
        self.has_rank = rank_of(shapes) is not None
        self.scale, self.side = scale if self.has_rank else 1.0, side
        self.rows, self.kernel = base.out_channels, getattr(base, "kernel_size", 1) ** 2
        self.columns = base.in_channels * self.kernel
        self.on_cpu = bool(getattr(base, "stored_layouts", {}))
        self.layouts: dict[str, StoredLayout | None] = {}
        for name, shape in shapes.items():
            setattr(self, name, empty_parameter(shape))
            if self.on_cpu and name in OF_COLUMNS:
                self.layouts[name] = FlatLayout(base.kernel_size)


class HadamardChange(Change):
    """LoHa: (A1 B1) * (A2 B2)."""

    def construct(self, weight_OI: Tensor) -> Tensor:
        return times(self.hada_w1_a, self.hada_w1_b) * times(self.hada_w2_a, self.hada_w2_b)


class KroneckerChange(Change):
    """LoKr: kron(C, D), where D is a product of rank r unless that is no smaller."""

    def construct(self, weight_OI: Tensor) -> Tensor:
        right = times(self.lokr_w2_a, self.lokr_w2_b) if self.has_rank else self.lokr_w2
        product = times(ops.reshape(self.lokr_w1, (-1, 1)), ops.reshape(right, (1, -1)))
        # Taps stand before channels on CPU, after them elsewhere.
        taps, points = (self.kernel, 1) if self.on_cpu else (1, self.kernel)
        product = ops.reshape(product, self.lokr_w1.shape + (right.shape[0], taps, -1, points))
        return ops.reshape(ops.transpose(product, (0, 2, 3, 1, 4, 5)), (self.rows, self.columns))


class DecomposedChange(Change):
    """DoRA: the rows of W + alpha / r * B A at trained norms, less W; their own norms are constants to the gradient."""

    def __init__(self, base: Dense | Conv2d, shapes: Mapping[str, Shape], scale: float, side: int) -> None:
        super().__init__(base, {MAGNITUDE: shapes[MAGNITUDE]}, scale, side)
        self.factors_scale, pair = scale, lora_layer(base, shapes[DOWN][0], 1.0)
        self.lora_A, self.lora_B = pair.lora_A, pair.lora_B
        self.layouts = {name: part.layout for name, part in pair.parts.items()}

    def construct(self, weight_OI: Tensor) -> Tensor:
        up, down = ops.reshape(self.lora_B.weight, (self.rows, -1)), ops.reshape(self.lora_A.weight, (-1, self.columns))
        changed_OI = weight_OI + times(up, down) * self.factors_scale
        share_O = self.dora_scale / ops.stop_gradient(norms(changed_OI))
        return changed_OI * ops.broadcast_to(ops.reshape(share_O, (-1, 1)), changed_OI.shape) - weight_OI


class RotatedChange(Change):
    """OFT: blocks of columns of a linear layer's weight, rotated, less these."""

    def __init__(self, base: Dense | Conv2d, shapes: Mapping[str, Shape], scale: float, side: int) -> None:
        super().__init__(base, shapes, scale, side)
        self.count, self.basis = self.columns // side, _basis(side)

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
