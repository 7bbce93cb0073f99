"""The loss of the same rows again and again, which says how far a run is where the loss of its steps is but noise."""

import math
from dataclasses import replace
from itertools import chain

from mindspore import Tensor, nn

from dreambooth_ms.cli.training_job import VALIDATION_BATCHES, Training, TrainingJob
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.diffusion import draw_columns
from dreambooth_ms.runtime.compiled_cell import CompiledCell
from dreambooth_ms.training.loop import StepReport
from dreambooth_ms.training.step import DiffusionLoss
from dreambooth_ms.training.stopping import LOSS


class _Loss(CompiledCell):
    """The rows of a batch -> their loss, as a step has it."""

    title = "the validation loss"

    def __init__(self, loss_cell: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.loss_cell = loss_cell

    def construct(self, *batch: Tensor) -> Tensor:
        loss, _ = self.loss_cell(*batch)
        return loss


class MeasureLoss:
    """A hook: after every so many steps and the last one the loss of the rows of `TrainingJob.validation_plan`, by what
    the run is judged by and without dropout. Processes share the batches, and all have the same sum."""

    def __init__(self, job: TrainingJob, training: Training, make_batch: BatchMaker) -> None:
        self._job, self._training, loss = job, training, job.config.loss
        spec, count = job.base.schedule.trained(loss), VALIDATION_BATCHES
        objectives = [draw_columns(spec, loss, part=(number, count)) for number in range(count)]
        makers = [replace(make_batch, plan=job.validation_plan, objective=one) for one in objectives]
        self._batches = [makers[number](number).tensors() for number in job.processes.share(range(count))]
        self._loss = _Loss(DiffusionLoss(training.learner.denoiser, job.extras))

    def __call__(self, report: StepReport) -> StepReport | None:
        """The report with the loss, if it is time; also where the run is to stop, or it would lack it resumed."""
        job = self._job
        if report.step % job.config.stopping.validation_loss_steps and report.step != job.total:
            return None
        with self._training.as_result():
            own = [float(self._loss(*batch).asnumpy()) for batch in self._batches]
        # `fsum` rounds once, so that it is the same in any order.
        losses = math.fsum(chain.from_iterable(job.processes.exchange("the validation loss", own)))
        return replace(report, measured={**report.measured, LOSS: losses / VALIDATION_BATCHES})
