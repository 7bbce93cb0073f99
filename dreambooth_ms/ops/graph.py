"""What cells say to MindSpore's compiler: which cells are one, what comes after what, what is constant."""

from functools import cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.runtime.device import Formulation, formulation


def shared(kind: type[nn.Cell], *arguments: object) -> Any:
    """The one cell of this kind with these arguments and formulation; for cells that hold no parameters.

    MindSpore parses and differentiates a cell once per instance, so that equal cells compile sooner when they are one:
    the LoRA step of the embedded base 23 s, and 31 s before (measured).
    """
    return _shared(formulation(), kind, *arguments)


@cache
def _shared(formulation: Formulation, kind: type[nn.Cell], *arguments: object) -> nn.Cell:
    return kind(*arguments)


def after(x: Tensor, earlier: Tensor | tuple[Tensor, ...]) -> Tensor:
    """x, for use only once `earlier` has been computed. Not for a parameter itself: it would be copied (measured).

    On CPU MindSpore runs an operation as soon as its inputs are there, and computes once what is written twice
    (measured). So what an own backward pass computes again must start from inputs after `dout`, or it is computed in
    the forward pass and kept; and slices must come after each other, or all of them exist at once.
    """
    return ops.depend(x, earlier)


def select(values: tuple[Any, ...], numbers: tuple[int, ...]) -> tuple[Any, ...]:
    """The values with these numbers.

    A loop within a loop of a graph must be such a function of its own: the compiler calls what comes after a loop from
    its last round, each round from the one before, and gives up at 1000 calls (measured).
    """
    selected = ()
    for number in numbers:
        selected = selected + (values[number],)
    return selected


def set_between_runs(parameter: Parameter, value: np.generic | np.ndarray) -> None:
    """Set numbers that change from run to run of a graph, by an operation.

    After `set_data` MindSpore looks at all weights again, 5 ms in a small UNet's step (measured).
    """
    ops.assign(parameter, Tensor(value))


@constexpr
def constant(value: float, shape: tuple[int, ...]) -> Tensor:
    """A constant of the graph, float32; `ops.ones` is an operation of every step."""
    return Tensor(np.full(shape, value), ms.float32)


@constexpr
def interchanged(outer: int, inner: int) -> Tensor:
    """The order of rows, int32, that turns rows of (outer, inner) into rows of (inner, outer)."""
    return Tensor(np.arange(outer * inner).reshape(outer, inner).T.reshape(-1), ms.int32)


@constexpr
def on_ascend() -> bool:
    """Whether a graph is compiled in the Ascend formulation."""
    return formulation() is Formulation.ASCEND
