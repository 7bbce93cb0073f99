"""The training loop: the rate and the batches of a step, the compiled step, its report, and the hooks."""

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from types import FrameType
from typing import TypeAlias

import numpy as np
from mindspore import Tensor

from dreambooth_ms.data.batches import Batch
from dreambooth_ms.errors import DataError
from dreambooth_ms.processes.group import ALONE, Processes
from dreambooth_ms.training.step import AccumulatingTrainStep, TrainStep


@dataclass(frozen=True)
class StepReport:
    """What is reported of one step."""

    step: int
    """Steps done, this one included."""
    loss: float
    """The sum that was minimised."""
    concept_losses: dict[str, float]
    """Mean squared error of the rows by concept, unweighted."""
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
    measured: Mapping[str, float] = field(default_factory=dict)
    """What hooks measured after the step, by name."""
    ended: str = ""
    """Why the run is over after this step, before its last one; empty: it is not."""

    @property
    def updates(self) -> int:
        """Steps that changed the weights: what schedules count."""
        return self.step - self.skipped_steps


Hook: TypeAlias = Callable[[StepReport], StepReport | None]
"""What is called with the report of each step; what it gives in its place, the hooks after it are called with."""

OVERFLOWS = 30
"""After so many skipped steps in a row, a lower scale is not what helps."""


def train(
    step_cell: TrainStep | AccumulatingTrainStep,
    make_batch: Callable[[int], Batch],
    batches_per_step: int,
    learning_rate: Callable[[int], float],
    steps: range,
    hooks: Sequence[Hook] = (),
    begin_batch: Callable[[int], object] | None = None,
    processes: Processes = ALONE,
    stop_asked: Callable[[], bool] = lambda: False,
) -> StepReport | None:
    """Take steps, and call every hook with the report of each; returns that of the step after which it was to stop, or
    was over. Raises DataError if the loss is NaN or infinite; with loss scaling, in many steps in a row.

    Args:
        make_batch: the batch with a number counted from 0 over the whole run.
        batches_per_step: batches of this process whose gradients are added up to one step.
        learning_rate: the rate of an update counted from 0; steps that are skipped are none.
        steps: which to take, counted from 0.
        begin_batch: called with the number of each batch before it is computed.
        processes: those that take each step together; its batches are dealt out to them, and each reports the whole.
        stop_asked: whether this process was asked to stop; the step's hooks are still called.
    """
    scaler, overflows, of_all = step_cell.scaler, 0, batches_per_step * processes.count
    compiled: set[tuple[int, ...]] = set()
    for step in steps:
        batches = {number: make_batch(number) for number in processes.share(range(step * of_all, (step + 1) * of_all))}
        skipped_before, scale = (scaler.skipped_steps, scaler.value) if scaler else (0, None)
        rate = learning_rate(step - skipped_before)
        step_cell.optimiser.prepare(step - skipped_before + 1, rate)
        first = next(iter(batches.values()))
        if processes.count > 1 and first.target.shape not in compiled:
            # MindSpore's reduction on CPU waits half a minute for the others (measured); compiling takes longer.
            step_cell.compile_for(first.tensors())
            processes.wait_for_all("the compilation of a step")
            compiled.add(first.target.shape)
        loss, errors, norm = step_cell.take(_begun(batches, begin_batch))
        skipped_steps = scaler.skipped_steps if scaler else 0
        names = chain.from_iterable(batch.concepts for batch in batches.values())
        values = chain.from_iterable(errors_B.asnumpy().tolist() for errors_B in errors)
        mine = [float(loss.asnumpy()), list(zip(names, values, strict=True)), stop_asked()]
        losses, rows, stops = zip(*processes.exchange(f"step {step + 1}", mine), strict=True)
        report = StepReport(
            step=step + 1,
            loss=sum(losses),
            concept_losses=concept_means(chain.from_iterable(rows)),
            grad_norm=float(norm.asnumpy()),
            learning_rate=rate,
            stop_asked=any(stops),
            is_skipped=skipped_steps > skipped_before,
            skipped_steps=skipped_steps,
            loss_scale=scale,
        )
        overflows = overflows + 1 if report.is_skipped else 0
        check_finite(report, overflows)
        for hook in hooks:
            report = hook(report) or report
        if report.stop_asked or report.ended:
            return report
    return None


def _begun(batches: Mapping[int, Batch], begin_batch: Callable[[int], object] | None) -> Iterator[tuple[Tensor, ...]]:
    """Each batch as the step takes it, begun when the step comes to it."""
    for number, batch in batches.items():
        if begin_batch:
            begin_batch(number)
        yield batch.tensors()


def check_finite(report: StepReport, overflows: int) -> None:
    """Raise DataError where going on is of no use; `overflows`: steps skipped in a row, this one included."""
    if overflows < OVERFLOWS and (report.is_skipped or np.isfinite(report.loss)):
        return
    found = f"step {report.step}: the loss is {report.loss}"
    if overflows == OVERFLOWS:
        found = (
            f"step {report.step}: {OVERFLOWS} steps in a row were skipped, since gradients were NaN or infinite (loss "
            f"{report.loss}, scale {report.loss_scale:g})"
        )
    anew = ["start anew with --mixed_precision no"] if report.loss_scale else []
    if report.updates <= (not report.is_skipped):
        remedy = " or ".join([*anew, "take another base"])
        raise DataError(f"{found}, before anything was learned: it comes from the base, not from the rate; {remedy}")
    raise DataError(f"{found}; {', or '.join(['resume from a checkpoint with a lower --learning_rate', *anew])}")


def concept_means(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean of the rows' errors by concept, unweighted."""
    errors: dict[str, list[float]] = {}
    for name, error in rows:
        errors.setdefault(name, []).append(error)
    return {name: float(np.mean(own)) for name, own in errors.items()}


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM are noted, so that a step is finished first; a second one raises KeyboardInterrupt.
    Yields whether the program was asked to stop."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    # MindSpore answers Ctrl-C inside a graph with a SIGTERM to its own process, so both mean the same.
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
