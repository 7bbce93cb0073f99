"""The loss of the same rows again and again, which says how far a run is where the loss of its steps is but noise."""

import math
from dataclasses import replace
from itertools import chain
from pathlib import Path

from dreambooth_ms.cli.output import tell
from dreambooth_ms.cli.training_job import VALIDATION_BATCHES, Training, TrainingJob
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.records import Concept
from dreambooth_ms.diffusion import draw_columns
from dreambooth_ms.errors import DataError, Tell, show_names
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.training.loop import StepReport
from dreambooth_ms.training.step import DiffusionLoss
from dreambooth_ms.training.stopping import LOSS


def read_held_out(job: TrainingJob, tell: Tell = tell) -> tuple[Concept, ...]:
    """The subject with the photographs of --held_out_data_dir, if that is given. Raises DataError if there are too few,
    damaged ones, or some that are trained on."""
    folder = job.config.stopping.held_out_data_dir
    if not folder or not job.subjects:
        return ()
    source = replace(job.sources[0], folder=Path(folder), masked=False)
    records, trained = source.records(tell), {one.digest for one in job.subjects[0].records}
    if twice := [one.path.name for one in records if one.digest in trained]:
        raise DataError(f"--held_out_data_dir {folder}: {show_names(twice)} trained on, too; keep them in one folder")
    if len(records) < 2:
        # It would say as much of its background as of the subject.
        raise DataError(f"--held_out_data_dir {folder}: 1 photograph, expected two or more; put another there")
    return (replace(source.concept, name="held out", records=records),)


class MeasureLoss:
    """A hook: after every so many steps, and the last, the loss of the rows of `TrainingJob.validation_plan`, by what
    the run is judged by and without dropout. Processes share the batches, and all have the same sum."""

    def __init__(self, job: TrainingJob, training: Training, make_batch: BatchMaker) -> None:
        self._job, self._training, loss = job, training, job.config.loss
        spec, self._batches = job.base.schedule.trained(loss), []
        for number in job.processes.share(range(VALIDATION_BATCHES)):
            objective = draw_columns(spec, loss, part=(number, VALIDATION_BATCHES))
            maker = replace(make_batch, plan=job.validation_plan, objective=objective)
            self._batches.append(maker(number).tensors())
        self._loss = CellMethod(DiffusionLoss(training.learner.denoiser, job.extras).construct)

    def __call__(self, report: StepReport) -> StepReport | None:
        """The report with the loss, if it is time; also where the run is to stop, or it would lack it resumed."""
        job = self._job
        if report.step % job.config.stopping.validation_loss_steps and report.step != job.total:
            return None
        with self._training.as_result():
            own = [float(self._loss(*batch)[0].asnumpy()) for batch in self._batches]
        # `fsum` rounds once, so that it is the same in any order.
        losses = math.fsum(chain.from_iterable(job.processes.exchange("the validation loss", own)))
        return replace(report, measured={**report.measured, LOSS: losses / VALIDATION_BATCHES})
