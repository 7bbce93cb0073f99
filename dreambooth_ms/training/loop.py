"""The training loop: from a step's number to its batch, one compiled step, and what is told about it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dreambooth_ms.data.batches import Batch
from dreambooth_ms.errors import DataError
from dreambooth_ms.training.step import TrainStep


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
    step_cell: TrainStep,
    make_batch: Callable[[int], Batch],
    learning_rate: Callable[[int], float],
    done: int,
    stop: int,
) -> Iterator[StepReport]:
    """Take the steps done + 1 … stop, and report each; the caller decides what to log, save and show in between.

    Args:
        step_cell: the compiled step, holding the trainables and the optimiser's state.
        make_batch: the batch of a step counted from 0.
        learning_rate: the rate of a step counted from 0.
        done: steps that were taken before.
        stop: steps that will have been taken at the end.

    Raises:
        DataError: the loss is no number.
    """
    for step in range(done, stop):
        batch, rate = make_batch(step), learning_rate(step)
        scalars = step_cell.optimiser.update_scalars(step + 1, rate)
        loss, errors_B, norm = step_cell(*scalars, *batch.inputs())
        report = StepReport(
            step=step + 1,
            loss=float(loss.asnumpy()),
            group_losses=batch.group_means(errors_B.asnumpy()),
            grad_norm=float(norm.asnumpy()),
            learning_rate=rate,
        )
        if not np.isfinite(report.loss):
            raise DataError(
                f"step {step + 1}: the loss is {report.loss}; resume from a checkpoint with a lower --learning_rate"
            )
        yield report
