"""Many tensors as a few long vectors, for optimisers that have no fused kernel.

On CPU each operation of a step costs about as much as the arithmetic of a small tensor (docs/performance.md), and
such an optimiser has some thirty of them. So they are for vectors into which small tensors are joined; a large tensor
is a vector by itself, and vectors wait for each other, so that only one exists at a time.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from dreambooth_ms.ops import part
from dreambooth_ms.ops.graph import constant
from dreambooth_ms.training.optimisers import Optimiser

LENGTH = 1 << 22
"""Tensors are joined up to about so many numbers (16 MiB in float32)."""
MOST_VECTORS = 128
"""Of larger models vectors are longer, since each adds to the graph; tensors above the length come on top."""


class FlatVector(nn.Cell):
    """Parameters start … stop - 1 of an optimiser as one vector (N,). Each begins at a multiple of `block`."""

    def __init__(self, optimiser: Optimiser, start: int, stop: int, block: int = 1) -> None:
        super().__init__(auto_prefix=False)
        parameters = optimiser.parameters[start:stop]
        self.start, self.stop, self.parameters, self.block = start, stop, ParameterTuple(parameters), block
        self.rate_factor, self.decay_factor = optimiser.rate_factors[start], optimiser.decay_factors[start]
        lengths = [-(-parameter.size // block) * block for parameter in parameters]
        self.offsets = tuple(int(end) - length for end, length in zip(np.cumsum(lengths), lengths, strict=True))
        self.length = sum(lengths)

    def join(self, tensors: tuple[Tensor, ...], earlier: Tensor) -> Tensor:
        """Tensors of the parameters' shapes -> (N,), but not before `earlier` has been computed."""
        rows = _map(ops.partial(_row, self.block, earlier), tensors)
        return ops.concat(rows) if len(rows) > 1 else rows[0]

    def read(self, gradients: tuple[Tensor, ...], earlier: Tensor) -> tuple[Tensor, Tensor]:
        """Of the optimiser's gradients those of these parameters, and the parameters' present values."""
        return self.join(gradients[self.start : self.stop], earlier), self.join(self.parameters, earlier)

    def write(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Set the parameters."""
        return _map(ops.partial(_write, vector), self.offsets, self.parameters)


def group_by_length(parameters: Sequence[Parameter], kinds: Sequence[object]) -> list[tuple[int, int]]:
    """Start and stop of the parameters that are joined: neighbours of one kind, up to about `LENGTH` numbers."""
    length = max(LENGTH, sum(parameter.size for parameter in parameters) // MOST_VECTORS)
    slices, start = [], 0
    for _, neighbours in groupby(range(len(parameters)), key=lambda index: kinds[index]):
        total = 0
        for index in neighbours:
            if index > start and (total == 0 or total + parameters[index].size > length):
                slices.append((start, index))
                start, total = index, 0
            total += parameters[index].size
    return [*slices, (start, len(parameters))]


class VectorOptimiser(Optimiser):
    """An optimiser whose parameters and state are in vectors of a kind: (optimiser, start, stop, number) -> vector."""

    kind: Callable[..., FlatVector]

    def make_moments(self, parameters: Sequence[Parameter]) -> None:
        slices = group_by_length(parameters, list(zip(self.rate_factors, self.decay_factors, strict=True)))
        vectors = [type(self).kind(self, *bounds, number) for number, bounds in enumerate(slices)]
        self.vectors = nn.CellList(vectors, auto_prefix=False)


_map = ops.HyperMap()


def _row(block, earlier, tensor):
    row = ops.reshape(ops.depend(tensor, earlier), (-1,))
    missing = -row.shape[0] % block
    return ops.concat((row, constant(0.0, (missing,)))) if missing else row


def _write(vector, offset, parameter):
    own = part(vector, offset, ops.size(parameter))
    return ops.assign(parameter, ops.reshape(own, parameter.shape))
