"""The training loop: from a step's number to its batch, one compiled step, and what is told about it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from dreambooth_ms.data.batches import Batch
from dreambooth_ms.errors import DataError
from dreambooth_ms.training.step import AccumulatingTrainStep, TrainStep


@dataclass(frozen=True)
class StepReport:
    """What one step tells."""

    step: int
    """Steps done, this one included."""
    loss: float
    """The sum that was minimised."""
    group_losses: dict[str, float]
    """Mean squared error by group of rows, unweighted."""
    grad_norm: float
    """Global norm of the gradients before the clip."""
    learning_rate: float


def train(
    step_cell: TrainStep | AccumulatingTrainStep,
    make_batch: Callable[[int], Batch],
    batches_per_step: int,
    learning_rate: Callable[[int], float],
    done: int,
    stop: int,
    compiling: AbstractContextManager[None] | None = None,
    begin_batch: Callable[[int], None] | None = None,
) -> Iterator[StepReport]:
    """Take the steps done + 1 … stop, and report each; the caller decides what to log, save and show in between.

    Args:
        step_cell: the compiled step, holding the trainables and the optimiser's state.
        make_batch: the batch with a number counted from 0 over the whole run.
        batches_per_step: batches whose gradients are added up to one step.
        learning_rate: the rate of a step counted from 0.
        done: steps that were taken before.
        stop: steps that will have been taken at the end.
        compiling: entered for the first step, in which the step cell is compiled.
        begin_batch: told the number of each batch before it is computed.

    Raises:
        DataError: the loss is no number.
    """

    def inputs(first: int, batches: list[Batch]) -> Iterator[tuple[Tensor, ...]]:
        for number, batch in enumerate(batches, first):
            if begin_batch:
                begin_batch(number)
            yield batch.inputs()

    for step in range(done, stop):
        first = step * batches_per_step
        batches = [make_batch(first + part) for part in range(batches_per_step)]
        rate = learning_rate(step)
        scalars = step_cell.optimiser.update_scalars(step + 1, rate)
        with compiling if compiling and step == done else nullcontext():
            loss, errors, norm = step_cell.take(scalars, inputs(first, batches))
        report = StepReport(
            step=step + 1,
            loss=float(loss.asnumpy()),
            group_losses=group_means(batches, np.concatenate([errors_B.asnumpy() for errors_B in errors])),
            grad_norm=float(norm.asnumpy()),
            learning_rate=rate,
        )
        if not np.isfinite(report.loss):
            raise DataError(
                f"step {step + 1}: the loss is {report.loss}; resume from a checkpoint with a lower --learning_rate"
            )
        yield report


def group_means(batches: Sequence[Batch], errors: np.ndarray) -> dict[str, float]:
    """Mean of the rows' errors by group, unweighted."""
    groups = [group for batch in batches for group in batch.groups]
    return {
        group: float(np.mean([error for error, of in zip(errors, groups, strict=True) if of == group]))
        for group in dict.fromkeys(groups)
    }
