"""The training loop: from a step's number to its batch, one compiled step, and what is told about it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from dreambooth_ms.data.batches import Batch
from dreambooth_ms.errors import DataError
from dreambooth_ms.processes.group import ALONE, Processes
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
    stop_asked: bool = False
    """Whether the run was asked to stop, by a signal to any of its processes."""
    is_skipped: bool = False
    """Whether the scaled gradients overflowed, so that the step changed nothing but the scale of the loss."""
    skipped_steps: int = 0
    """Steps that were skipped so far, this one included."""
    loss_scale: float | None = None
    """What the loss was multiplied by in the backward pass; None in float32."""

    @property
    def updates(self) -> int:
        """Steps that changed the weights: what schedules count."""
        return self.step - self.skipped_steps


OVERFLOWS = 30
"""After so many skipped steps in a row, a lower scale is not what helps."""


def train(
    step_cell: TrainStep | AccumulatingTrainStep,
    make_batch: Callable[[int], Batch],
    batches_per_step: int,
    learning_rate: Callable[[int], float],
    done: int,
    stop: int,
    begin_batch: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Iterator[StepReport]:
    """Take the steps done + 1 … stop, and report each; the caller decides what to log, save and show in between.

    Several processes take each step together: its batches are dealt out to them in turn, and each reports the whole.

    Args:
        step_cell: the compiled step, holding the trainables and the optimiser's state.
        make_batch: the batch with a number counted from 0 over the whole run.
        batches_per_step: batches of this process whose gradients are added up to one step.
        learning_rate: the rate of an update counted from 0; steps that are skipped are none.
        done: steps that were taken before.
        stop: steps that will have been taken at the end.
        begin_batch: told the number of each batch before it is computed.
        processes: those that train together.
        stop_asked: whether this process was asked to stop.

    Raises:
        DataError: the loss is no number; with loss scaling, in many steps in a row.
    """
    scaler = step_cell.scaler
    overflows = 0

    def tensors(numbers: Sequence[int], batches: Sequence[Batch]) -> Iterator[tuple[Tensor, ...]]:
        for number, batch in zip(numbers, batches, strict=True):
            if begin_batch:
                begin_batch(number)
            yield batch.tensors()

    of_all = batches_per_step * processes.count
    for step in range(done, stop):
        numbers = range(step * of_all + processes.rank, (step + 1) * of_all, processes.count)
        batches = [make_batch(number) for number in numbers]
        skipped_before, scale = (scaler.skipped_steps, scaler.value) if scaler else (0, None)
        updates = step - skipped_before
        rate = learning_rate(updates)
        step_cell.optimiser.prepare(updates + 1, rate)
        if step == done and processes.count > 1:
            # MindSpore's reduction on CPU waits half a minute for the others (measured); compiling takes longer.
            step_cell.compile_for(batches[0].tensors())
            processes.wait_for_all("the first step")
        loss, errors, norm = step_cell.take(tensors(numbers, batches))
        skipped_steps = scaler.skipped_steps if scaler else 0
        rows = [
            (group, float(error))
            for batch, errors_B in zip(batches, errors, strict=True)
            for group, error in zip(batch.concepts, errors_B.asnumpy(), strict=True)
        ]
        everywhere = processes.exchange(f"step {step + 1}", [float(loss.asnumpy()), rows, stop_asked()])
        report = StepReport(
            step=step + 1,
            loss=sum(loss for loss, _, _ in everywhere),
            group_losses=group_means([row for _, rows, _ in everywhere for row in rows]),
            grad_norm=float(norm.asnumpy()),
            learning_rate=rate,
            stop_asked=any(asked for _, _, asked in everywhere),
            is_skipped=skipped_steps > skipped_before,
            skipped_steps=skipped_steps,
            loss_scale=scale,
        )
        overflows = overflows + 1 if report.is_skipped else 0
        if overflows == OVERFLOWS or not (report.is_skipped or np.isfinite(report.loss)):
            raise DataError(_no_number(report))
        yield report


def _no_number(report: StepReport) -> str:
    if report.is_skipped:
        return (
            f"step {report.step}: {OVERFLOWS} steps in a row were skipped, since gradients were no numbers (loss "
            f"{report.loss}, scale {report.loss_scale:g}); resume from a checkpoint with a lower --learning_rate, or "
            "start anew with --mixed_precision no"
        )
    return f"step {report.step}: the loss is {report.loss}; resume from a checkpoint with a lower --learning_rate"


def group_means(rows: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Mean of the rows' errors by group, unweighted."""
    return {
        group: float(np.mean([error for of, error in rows if of == group]))
        for group in dict.fromkeys(group for group, _ in rows)
    }
