"""What a run trains: the method's trainables with their optimiser and step, and what a checkpoint keeps of them."""

import math
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path

from mindspore import Parameter

from dreambooth_ms.adapters.precision import compute_in
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.models.unet import Segments, UNet2DConditionModel
from dreambooth_ms.ops.graph import set_between_runs
from dreambooth_ms.runtime.collective import SumOverProcesses
from dreambooth_ms.runtime.device import compute_dtype
from dreambooth_ms.training.checkpoint import restore
from dreambooth_ms.training.loop import StepReport
from dreambooth_ms.training.methods import METHODS, choose_optimiser
from dreambooth_ms.training.optimisers import ShardedOptimiser
from dreambooth_ms.training.step import AccumulatingTrainStep, DiffusionLoss, LossScaler, MovingAverage, TrainStep


class Training:
    """What a run trains: the method's trainables, with their optimiser and step, as new or as the run's checkpoint has
    them."""

    def __init__(self, job: TrainingJob, unet: UNet2DConditionModel) -> None:
        config, processes, method = job.config, job.processes, job.config.method
        text_encoders = job.base.load_text_encoders() if config.encodes_text else None
        self.learner = METHODS[method.method](method, job.base, unet, text_encoders, job.seed)
        parameters, trainables = self.learner.parameters, self.learner.trainables
        compute_in(self.learner.denoiser, compute_dtype(config.device.mixed_precision))
        # The optimiser, if this process keeps a part of its state.
        self.sharded: ShardedOptimiser | None = None
        if config.processes.zero_stage > 0 and processes.count > 1:
            self.sharded = ShardedOptimiser(
                parameters, lambda i, j: choose_optimiser(config, trainables[i:j]), processes
            )
        # bfloat16 has the exponents of float32.
        scaler = LossScaler(config.loss_scaling) if config.device.mixed_precision == "fp16" else None
        step = TrainStep(
            DiffusionLoss(self.learner.denoiser, job.masked),
            parameters,
            self.sharded or choose_optimiser(config, trainables),
            config.optimiser.max_grad_norm,
            SumOverProcesses() if processes.count > 1 else None,
            scaler,
            Segments(unet, text_encoders) if config.run.gradient_checkpointing else None,
        )
        accumulates = config.run.gradient_accumulation_steps > 1
        self.step: TrainStep | AccumulatingTrainStep = AccumulatingTrainStep(step) if accumulates else step
        self.average = MovingAverage(parameters, method.ema_decay) if method.use_ema else None
        if job.checkpoint:
            restore(job.checkpoint, self.state(), self.sharded.shapes() if self.sharded else {})
        share = config.words.train_text_encoder_ti_frac
        # As a decimal fraction: 0.29 * 100 is less than 29.
        self.steps_of_words = math.floor(Fraction(str(1.0 if share is None else share)) * job.total)
        rows = text_encoders.new_rows().values() if text_encoders and share is not None else ()
        self.kept_words = [(one, one.asnumpy().copy()) for one in rows]

    def state(self, of_all: bool = False) -> list[Parameter]:
        """Trained weights, the optimiser's moments, the running averages, and the state of loss scaling.

        With those moments that other processes keep if it is `of_all`, for which all must ask at the same time.
        """
        moments = self.sharded.all_moments() if self.sharded and of_all else self.step.optimiser.moments()
        averages = self.average.averages if self.average else []
        scaling = self.step.scaler.state() if self.step.scaler else []
        return [*self.learner.parameters, *moments, *averages, *scaling]

    def result_weights(self) -> AbstractContextManager[None]:
        """Inside, the networks hold what the run is judged by: the average, if one is kept."""
        return self.average.in_place_of_weights() if self.average else nullcontext()

    def keep_words(self, report: StepReport) -> None:
        """A hook: once new words were trained for their share of the run, put them back as they were then.

        Until the end their gradients count in the clip, as in diffusers, which sets their learning rate to 0.
        """
        if report.step <= self.steps_of_words:
            self.kept_words = [(one, one.asnumpy().copy()) for one, _ in self.kept_words]
            return
        for one, value in self.kept_words:
            set_between_runs(one, value)

    def update_average(self, report: StepReport) -> None:
        """A hook: take the weights after a step into the average, if one is kept."""
        if self.average and not report.is_skipped:
            self.average.update(report.updates)

    def write_part(self, target: Path, step: int) -> None:
        """Write what was trained into the folder of a checkpoint."""
        with self.result_weights():
            self.learner.write_part(target, step)

    def write_result(self, target: Path, step: int) -> None:
        """Write the result of the run."""
        with self.result_weights():
            self.learner.write_result(target, step)
