"""A running average of the trained weights, which is calmer than the weights of any one step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops

from dreambooth_ms.runtime.compiled_cell import CompiledCell
from dreambooth_ms.training.optimisers import state

_map = ops.HyperMap()


class MovingAverage(CompiledCell):
    """average <- average - (1 - decay) (average - weight) after every step, as in diffusers' EMAModel."""

    title = "the moving average"

    def __init__(self, trainables: Sequence[Parameter], decay: float) -> None:
        super().__init__(auto_prefix=False)
        self.decay, self.trainables = decay, ParameterTuple(trainables)
        self.averages = ParameterTuple([state(f"average.{one.name}", one.asnumpy()) for one in trainables])

    def construct(self, share: Tensor) -> tuple[Tensor, ...]:
        return _map(ops.partial(_blend, share), self.averages, self.trainables)

    def update(self, step: int) -> None:
        """Take in the weights after the step with this number, counted from 1."""
        self(Tensor(np.float32(1 - decay_at(step, self.decay))))

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the trained parameters hold their averages."""
        kept = [parameter.asnumpy().copy() for parameter in self.trainables]
        for parameter, average in zip(self.trainables, self.averages, strict=True):
            parameter.set_data(Tensor(average.asnumpy()))
        try:
            yield
        finally:
            for parameter, value in zip(self.trainables, kept, strict=True):
                parameter.set_data(Tensor(value))


def decay_at(step: int, decay: float) -> float:
    """Decay of the update after a step counted from 1: at first the average follows fast (diffusers' EMAModel)."""
    before = step - 1
    return 0.0 if before <= 0 else min(decay, (1 + before) / (10 + before))


def _blend(share: Tensor, average: Parameter, parameter: Parameter) -> Tensor:
    return ops.assign(average, average - share * (average - parameter))
