"""Dropout of the inputs of adapters, as a function of (seed, batch, layer, position)."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.ops import bitwise_and, exclusive_or
from dreambooth_ms.ops.graph import after, set_between_runs
from dreambooth_ms.randomness import generator


class DropoutState(nn.Cell):
    """What the dropouts of all layers share: how much they drop, and the number that their draws depend on.

    Parameters, because a compiled graph would not see changed attributes.
    """

    def __init__(self, rate: float, seed: int) -> None:
        super().__init__(auto_prefix=False)
        self._rate, self._seed = rate, seed
        self.rate = Parameter(Tensor(np.float32(rate)), name="dropout_rate", requires_grad=False)
        self.draw = Parameter(Tensor(np.int32(0)), name="dropout_draw", requires_grad=False)

    def begin_batch(self, number: int) -> None:
        """From here on the layers draw what belongs to the batch with this number."""
        draw = generator(self._seed, "lora dropout", number).integers(2**31, dtype=np.int32)
        set_between_runs(self.draw, np.int32(draw))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, nothing is dropped, as in sampling."""
        self.rate.set_data(Tensor(np.float32(0)))
        try:
            yield
        finally:
            self.rate.set_data(Tensor(np.float32(self._rate)))


class Dropout(nn.Cell):
    """Drop each input with probability `rate` and scale up the others (Srivastava et al., 2014): (N, I) -> (N, I).

    What is dropped is a hash of (draw, layer, position): the library's operators keep a state of their own, which a
    resumed run would not have. The hash is lowbias32 (Wellons, 2018) in wrapping 32-bit integers.
    """

    def __init__(self, state: DropoutState, layer: str) -> None:
        super().__init__(auto_prefix=False)
        self.rate, self.draw, self.layer = state.rate, state.draw, zlib.crc32(layer.encode())

    def construct(self, x_NI: Tensor) -> Tensor:
        state = _positions(x_NI.shape[0] * x_NI.shape[1], self.layer)
        # After the input, so that a backward pass that computes it again does not keep the forward pass's.
        draw = after(self.draw, x_NI)
        state = _mixed(exclusive_or(state, ops.broadcast_to(draw, state.shape)))
        uniform = bitwise_and(state, 0x7FFFFF).astype(ms.float32) * (1 / 2**23)
        rate = ops.broadcast_to(self.rate, uniform.shape)
        factor = (uniform >= rate).astype(ms.float32) / (1.0 - rate)
        return x_NI * ops.stop_gradient(ops.reshape(factor, x_NI.shape))


def _mixed(state: Tensor) -> Tensor:
    for shift, multiplier in ((16, 0x7FEB352D), (15, -0x7B935975), (16, 1)):
        low = ops.bitwise_right_shift(state, shift)
        low = bitwise_and(low, (1 << (32 - shift)) - 1)
        state = exclusive_or(state, low) * multiplier
    return state


@constexpr
def _positions(count: int, layer: int) -> Tensor:
    """A number of its own for each position of each layer."""
    numbers = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(layer)
    return Tensor(numbers.astype(np.int32), ms.int32)
