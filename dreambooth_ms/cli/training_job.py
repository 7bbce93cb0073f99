"""A training: what a command asks for, with all that follows from it, found once; and what the run trains."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from mindspore import Parameter

from dreambooth_ms.adapters.precision import compute_in
from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.load import to_yaml
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.batches import Batch, BatchMaker
from dreambooth_ms.data.pictures import Size
from dreambooth_ms.data.plan import Framing, Plan, View, least_losing, sizes_of
from dreambooth_ms.data.records import INSTANCE, Concept, Source
from dreambooth_ms.models.unet import Segments, UNet2DConditionModel
from dreambooth_ms.ops.graph import set_between_runs
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.runtime.collective import SumOverProcesses
from dreambooth_ms.runtime.device import compute_dtype
from dreambooth_ms.training.checkpoint import Checkpoint, checkpoint_folder, open_checkpoint, restore, save_checkpoint
from dreambooth_ms.training.content import Content, content_of
from dreambooth_ms.training.loop import StepReport
from dreambooth_ms.training.methods import METHODS, choose_optimiser
from dreambooth_ms.training.optimisers import ShardedOptimiser, learning_rate_factor
from dreambooth_ms.training.preservation import BaseAnswers, Penalty
from dreambooth_ms.training.run_metadata import run_metadata
from dreambooth_ms.training.step import AccumulatingTrainStep, DiffusionLoss, LossScaler, MovingAverage, TrainStep
from dreambooth_ms.training.stopping import Measured, best_step
from dreambooth_ms.weights.bundle import ModelBundle

VALIDATION_BATCHES, VALIDATION_ROWS = 4, 4
"""Batches of the validation loss, and the rows of each: whatever a step has, so that it is the same to the bit."""


@dataclass(frozen=True)
class TrainingJob:
    """A run's configuration and base, how long it is, and how far."""

    processes: Processes
    config: TrainConfig
    base: ModelBundle
    sources: tuple[Source, ...] = ()
    """Of its concepts, the subjects first."""
    concepts: Sequence[Concept] = ()
    """The subjects, and the classes as far as they are there already."""
    held_out: tuple[Concept, ...] = ()
    """The subject again, with photographs that are not trained on, if there are such."""
    base_digests: Mapping[str, str] = field(default_factory=dict)
    """By the networks' names."""
    checkpoint: Checkpoint | None = None
    """What the run goes on from."""

    @property
    def subjects(self) -> list[Concept]:
        """The concepts that are no classes."""
        return [one for one in self.concepts if one.group == INSTANCE]

    @property
    def content(self) -> Content:
        """What the run learns from, and is validated on."""
        return content_of(self.base_digests, [*self.concepts, *self.held_out], self.sources)

    @cached_property
    def pictures(self) -> int:
        """Of a pass: of all subjects with their repeats; or of their classes, yet to be generated or not, if more."""
        held, totals = {one.name: len(one.records) for one in self.concepts}, Counter[str]()
        for one in self.sources:
            pictures = one.generated.num_class_images if one.generated else held.get(one.concept.name, 0)
            totals[one.concept.group] += math.ceil(pictures * one.concept.repeats)
        return max(totals.values(), default=0)

    @property
    def epoch(self) -> int:
        """Optimiser steps of a pass over the pictures."""
        return -(-self.pictures // self.config.rows_per_step)

    @property
    def total(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.run.max_train_steps or self.config.run.num_train_epochs * self.epoch

    @property
    def steps_of_words(self) -> int:
        """After so many optimiser steps new words stay as they are."""
        # As the decimal fraction that was written: 0.29 * 100 is less than 29.
        return math.floor(Fraction(str(self.config.words.train_text_encoder_ti_frac or 1)) * self.total)

    @property
    def masked(self) -> bool:
        """Whether some rows have masks."""
        return self.config.augments or any(source.masked for source in self.sources)

    @property
    def extras(self) -> tuple[str, ...]:
        """What rows have for the comparison with their target, see `training.step.WeightedError`."""
        return ("mask",) * self.masked + ("huber_c",) * (self.config.loss.loss_type != "l2")

    @property
    def trained_base(self) -> ModelBundle:
        """The base as it is denoised after the training: the variance that IF predicts does not follow it."""
        fixed = {"variance_type": "fixed_small"} if self.base.predicts_variance else {}
        return self.base.with_schedule({**self.config.loss.changes, **fixed})

    @property
    def done(self) -> int:
        """Steps that were taken before."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def seed(self) -> int:
        """Names all random draws of the run."""
        assert self.config.run.seed is not None, "agree_on_config comes first"
        return self.config.run.seed

    @property
    def batches_per_step(self) -> int:
        """Of all processes."""
        return self.config.run.gradient_accumulation_steps * self.processes.count

    @property
    def validation_interval(self) -> int:
        """Optimiser steps from one validation to the next."""
        wanted = self.config.validation
        return (wanted.validation_epochs or 0) * self.epoch or wanted.validation_steps

    def learning_rate(self, update: int) -> float:
        """The learning rate of an update, counted from 0."""
        o = self.config.optimiser
        highest = self.config.learning_rate * (self.config.rows_per_step if o.scale_lr else 1)
        return highest * learning_rate_factor(o, update, self.total, highest)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Those that pictures are trained at, by those of the subjects."""
        data = self.config.data
        if not data.use_aspect_ratio_bucket:
            return ((data.resolution, data.resolution),)
        pictures = [record.size for one in self.subjects for record in one.records]
        sizes = sizes_of(data.resolution, self.base.side_multiple)
        return tuple(least_losing(sizes, pictures, data.max_buckets) if data.max_buckets else sizes)

    @cached_property
    def plan(self) -> Plan:
        """The rows of the run."""
        data, rows = self.config.data, self.config.run.train_batch_size
        framing = Framing(self.sizes, data.center_crop, data.random_flip, self.config.augments, self.base.inpaints)
        return Plan(tuple(self.concepts), rows, framing, self.seed, self.batches_per_step)

    @cached_property
    def validation_plan(self) -> Plan:
        """The rows of the validation loss, with draws of their own: pictures cropped in the middle, prompts as they are
        written."""
        own = [replace(one, name=f"validation {one.name}", wording=None) for one in self.held_out or self.subjects]
        framing = replace(self.plan.framing, center_crop=True, random_flip=False, augments=False)
        return Plan(tuple(own), VALIDATION_ROWS, framing, self.seed)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What its LoRA says of it to other programs."""
        return run_metadata(self.config, self.trained_base, self.sources, self.concepts)

    def views(self) -> Iterator[View]:
        """What is encoded of each row of the rest of the run; one after the other, since a long run has millions."""
        batches = range(self.done * self.batches_per_step, self.total * self.batches_per_step)
        parts = [(self.plan, batches)]
        if self.config.stopping.validation_loss:
            parts.append((self.validation_plan, range(VALIDATION_BATCHES)))
        return (one for plan, own in parts for batch in own for row in plan.rows(batch) for one in row.view.encoded)


class Training:
    """What a run trains: the method's trainables, optimiser and step, as new or as the run's checkpoint has them."""

    def __init__(self, job: TrainingJob, unet: UNet2DConditionModel) -> None:
        self.job = job
        config, processes, method = job.config, job.processes, job.config.method
        text_encoders = job.base.load_text_encoders() if config.encodes_text else None
        more = {"of_run": lambda: job.metadata} if method.method == "lora" else {}
        self.learner = METHODS[method.method](method, job.trained_base, unet, text_encoders, job.seed, **more)
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
        prior, form = config.prior, config.prior.prior_preservation
        self.answers = BaseAnswers(self.learner.denoiser, self.learner.layers) if form == "base_output" else None
        # Each batch has its part, so that a step has the penalty once.
        penalty = Penalty(prior.base_l2_weight / job.batches_per_step, self.learner) if form == "base_l2" else None
        step = TrainStep(
            DiffusionLoss(self.learner.denoiser, job.extras),
            parameters,
            self.sharded or choose_optimiser(config, trainables),
            config.optimiser.max_grad_norm,
            SumOverProcesses() if processes.count > 1 else None,
            scaler,
            Segments(unet, text_encoders) if config.run.gradient_checkpointing else None,
            penalty,
        )
        accumulates = config.run.gradient_accumulation_steps > 1
        self.step: TrainStep | AccumulatingTrainStep = AccumulatingTrainStep(step) if accumulates else step
        self.average = MovingAverage(parameters, method.ema_decay) if method.use_ema else None
        if job.checkpoint:
            restore(job.checkpoint, self.state(), self.sharded.shapes() if self.sharded else {})
        self.measured: list[Measured] = list(job.checkpoint.measured) if job.checkpoint else []
        rows = text_encoders.new_rows().values() if text_encoders and job.steps_of_words < job.total else ()
        self.kept_words = [(one, one.asnumpy().copy()) for one in rows]

    def batches(self, make_batch: BatchMaker) -> Callable[[int], Batch]:
        """What steps take; with --prior_preservation base_output the base's answers are targets."""
        preserved = {one.concept.name for one in self.job.sources if one.concept.drawn_as}
        return self.answers.as_targets(make_batch, preserved) if self.answers else make_batch

    def state(self, of_all: bool = False) -> list[Parameter]:
        """Trained weights, the optimiser's moments, the running averages, and the state of loss scaling; `of_all` with
        those moments that other processes keep, for which all must ask at the same time."""
        moments = self.sharded.all_moments() if self.sharded and of_all else self.step.optimiser.moments()
        averages = self.average.averages if self.average else []
        scaling = self.step.scaler.state() if self.step.scaler else []
        return [*self.learner.parameters, *self.learner.kept, *moments, *averages, *scaling]

    @contextmanager
    def as_result(self) -> Iterator[None]:
        """Inside, the networks are what the run is judged by: with the average, if one is kept, and without dropout."""
        average, dropout = self.average, self.learner.dropout
        weights = average.in_place_of_weights() if average else nullcontext()
        with weights, dropout.off() if dropout else nullcontext():
            yield

    def keep_words(self, report: StepReport) -> None:
        """A hook: once new words were trained for their share of the run, put them back as they were then. Their
        gradients still count in the clip, as in diffusers, which sets their learning rate to 0."""
        if report.step == self.job.steps_of_words:
            self.kept_words = [(one, one.asnumpy().copy()) for one, _ in self.kept_words]
        for one, value in self.kept_words if report.step > self.job.steps_of_words else ():
            set_between_runs(one, value)

    def update_average(self, report: StepReport) -> None:
        """A hook: take the weights after a step into the average, if one is kept."""
        if self.average and not report.is_skipped:
            self.average.update(report.updates)

    def note(self, report: StepReport) -> None:
        """A hook: keep what was measured, which checkpoints hold and a resumed run knows."""
        if report.measured:
            self.measured.append({"step": report.step, **report.measured})

    def save(self, report: StepReport) -> None:
        """A hook: save the run after every so many steps, and when it is asked to stop or over early; with --keep_best
        after its last step, too."""
        job, run, step = self.job, self.job.config.run, report.step
        ends = report.stop_asked or report.ended or (step == job.total and job.config.stopping.keep_best)
        if step % run.checkpointing_steps and not ends:
            return
        state, keep = self.state(of_all=True), run.checkpoints_total_limit
        if job.processes.is_first:
            config, best = to_yaml(job.config), best_step(job.config, self.measured, step)
            written = job.config.output_dir, step, state, config, self._write_part
            save_checkpoint(*written, keep, job.content, self.measured, spared=best)
        job.processes.wait_for_all("the checkpoint")

    def write_result(self, step: int) -> None:
        """Write the result of a run whose last step this was, or of the best one; called by the first process."""
        output, best = self.job.config.output_dir, best_step(self.job.config, self.measured, step)
        if best != step:
            tell(f"the best is step {best}; what the last one left is in {checkpoint_folder(output, step)}")
            elsewhere = self.sharded.shapes() if self.sharded else {}
            restore(open_checkpoint(checkpoint_folder(output, best)), self.state(), elsewhere)
        with self.as_result():
            self.learner.write_result(output, best)

    def _write_part(self, target: Path, step: int) -> None:
        """Write what was trained into the folder of a checkpoint."""
        with self.as_result():
            self.learner.write_part(target, step)
