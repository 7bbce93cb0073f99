"""ZeRO stage 1 (Rajbhandari et al., 2020, section 5.1): each process keeps the optimiser's state of its own part.

Every process has all parameters and, after the reduction, all gradients. It updates its part, and takes the others'
updated parts from them.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from mindspore import Parameter, Tensor, nn

from dreambooth_ms.processes.group import Processes
from dreambooth_ms.runtime.collective import ShareParts, from_process
from dreambooth_ms.training.optimisers import Optimiser


def part_bounds(sizes: Sequence[int], count: int) -> list[int]:
    """Where the parts begin, and the end: `count` runs of neighbours, about equal in size, all of them in order."""
    ends = np.cumsum(sizes)
    inner = [int(np.argmin(np.abs(ends - ends[-1] * part / count))) + 1 for part in range(1, count)]
    return [0, *np.maximum.accumulate(inner).tolist(), len(sizes)] if inner else [0, len(sizes)]


class ShardedOptimiser(nn.Cell):
    """An optimiser of all trainables, of whose state this process keeps a part.

    Args:
        trainables: all of them, the same on every process.
        make: the optimiser of trainables start … stop - 1; its state stands by itself for each of them.
        processes: those that train together.
    """

    def __init__(
        self, trainables: Sequence[Parameter], make: Callable[[int, int], Optimiser], processes: Processes
    ) -> None:
        super().__init__(auto_prefix=False)
        bounds = part_bounds([parameter.size for parameter in trainables], processes.count)
        self.start, self.stop = bounds[processes.rank], bounds[processes.rank + 1]
        self.own = make(self.start, self.stop)
        parts = [list(trainables[start:stop]) for start, stop in pairwise(bounds)]
        self.share_parts = ShareParts(parts, processes.rank)
        # Not a parameter, which the cell would list; only what each process keeps.
        self._kept = processes.exchange(
            "the optimiser's state", [[m.name, list(m.shape), str(m.dtype)] for m in self.own.moments()]
        )

    def construct(self, gradients: tuple[Tensor, ...], proceed: Tensor | None) -> tuple[Tensor, ...]:
        return self.share_parts(self.own(gradients[self.start : self.stop], proceed))

    def prepare(self, step: int, learning_rate: float) -> None:
        """Set the numbers of the step that is taken next."""
        self.own.prepare(step, learning_rate)

    def moments(self) -> list[Parameter]:
        """This process's part of the state."""
        return self.own.moments()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the state of all processes."""
        return {name: tuple(shape) for kept in self._kept for name, shape, _ in kept}

    def all_moments(self) -> list[Parameter]:
        """The whole state; all processes must ask at the same time."""
        held = {moment.name: moment for moment in self.own.moments()}
        return [
            Parameter(from_process(rank, held.get(name), tuple(shape), dtype), name=name)
            for rank, kept in enumerate(self._kept)
            for name, shape, dtype in kept
        ]
