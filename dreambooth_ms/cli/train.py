"""`dreambooth-ms train`: config -> concepts -> latents and embeddings -> batches -> steps -> checkpoints -> adapter."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth_ms.atomic import check_writable
from dreambooth_ms.cli.base import open_base
from dreambooth_ms.cli.output import be_quiet, complain, progress, tell
from dreambooth_ms.cli.training_job import TrainingJob, total_steps
from dreambooth_ms.cli.training_memory import check_expected_memory
from dreambooth_ms.cli.training_pictures import prepare_training
from dreambooth_ms.cli.training_setup import set_up_training
from dreambooth_ms.cli.validation import ShowValidation
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.records import INSTANCE, read_concept
from dreambooth_ms.errors import INTERRUPTED_STATUS, ConfigError
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.processes.group import Processes, run_in_group
from dreambooth_ms.processes.launch import SCHEDULER, find_launch
from dreambooth_ms.runtime.collective import collective_operations, serve_as_scheduler
from dreambooth_ms.sampling.picture_file import missing_numbers
from dreambooth_ms.training.checkpoint import (
    Checkpoint,
    SaveCheckpoints,
    checkpoint_folder,
    find_latest,
    open_checkpoint,
)
from dreambooth_ms.training.loop import StepReport, train
from dreambooth_ms.training.results import result_of
from dreambooth_ms.training.run_folder import agree_on_config, write_config
from dreambooth_ms.training.stop import stop_requests
from dreambooth_ms.training.trackers import Tracker, draw_loss, read_history


def run(argv: Sequence[str]) -> int:
    """Train by a command line, as one of the processes that a launcher started; returns the exit status."""
    launch = find_launch(os.environ)
    if launch and launch.rank == SCHEDULER:
        serve_as_scheduler(launch)
        return 0
    return run_in_group(launch, lambda processes: run_as_one_of(processes, argv), complain)


def run_as_one_of(processes: Processes, argv: Sequence[str]) -> int:
    """What each process of the run does. All have the same pictures and weights; each has its own rows of a step."""
    if not processes.is_first:
        be_quiet()
    config = agree_on_config(processes, load(TrainConfig, argv, tell))
    model, data = config.model, config.data
    with processes.first_goes_ahead("the base model"):
        base = open_base(config.device, model, model.revision, model.variant)
    # An impossible --resolution, or a base that cannot be trained, ends here, before any work.
    base.latent_shape(data.resolution, data.resolution)
    base.schedule.trained(config.loss.prediction_type)
    check_expected_memory(config, base, processes)

    subject = read_concept(INSTANCE, Path(data.instance_data_dir), data.instance_prompt, tell)
    class_pictures = config.prior.num_class_images if config.prior.folder else 0
    total = total_steps(config, max(len(subject.records), class_pictures))
    found = processes.from_first("the run's folder", lambda: _open_folder(config, total))
    if found is None:
        return 0
    checkpoint = Checkpoint(Path(found["checkpoint"]), found["step"]) if found["checkpoint"] else None
    job = TrainingJob(processes, config, base, total, checkpoint)
    with collective_operations(processes.launch):
        return train_and_save(job, *prepare_training(job, [subject]))


def _open_folder(config: TrainConfig, total: int) -> dict[str, Any] | None:
    """Make the run's folder ready; gives the checkpoint to go on from, or None if nothing is left to do."""
    checkpoint = _checkpoint_to_resume(config)
    if checkpoint and checkpoint.step > total:
        raise ConfigError(
            f"{checkpoint.path}: {checkpoint.step} steps are done, the run would end after {total}; "
            "raise --max_train_steps, or choose another --output_dir"
        )
    prior = config.prior
    if prior.folder and missing_numbers(prior.folder, prior.num_class_images):
        check_writable(prior.folder)
    write_config(config)
    result = result_of(config.output_dir)
    if result and result.steps >= total:
        tell(f"{result.path} is already there, trained for {total} steps; nothing left to do")
        return None
    return {"checkpoint": str(checkpoint.path) if checkpoint else None, "step": checkpoint.step if checkpoint else 0}


def _checkpoint_to_resume(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that was asked for; without asking, the newest of a run that was stopped."""
    asked = config.run.resume_from_checkpoint
    if asked not in (None, "latest"):
        return open_checkpoint(Path(asked))
    found = find_latest(config.output_dir)
    if asked == "latest" and found is None:
        tell(f"--resume_from_checkpoint latest: no checkpoint in {config.output_dir}, starting from the beginning")
    return found


def train_and_save(job: TrainingJob, unet: UNet2DConditionModel, batches: BatchMaker) -> int:
    """Train what the method trains, save, and show; returns the exit status."""
    config, processes, output = job.config, job.processes, job.config.output_dir
    training = set_up_training(job, unet)
    if job.checkpoint:
        training.restore(job.checkpoint)
        tell(f"resuming from {job.checkpoint.path}")
    parameters, dropout = training.learner.parameters, training.learner.dropout
    tell(f"training {sum(p.size for p in parameters):,} parameters in {len(parameters)} tensors for {job.total} steps")

    with ExitStack() as stack:
        tracker = Tracker(output, config.run.logging_dir, job.done) if processes.is_first else None
        hooks: list[Callable[[StepReport], object]] = [training.update_average]
        if tracker:
            hooks.append(stack.enter_context(closing(tracker)).log)
        bar = progress(total=job.total, initial=job.done, desc="training", unit="step")
        hooks.append(partial(_show_step, stack.enter_context(bar)))
        hooks.append(SaveCheckpoints(config, lambda: training.state(of_all=True), training.write_part, processes))
        if config.validation.validation_prompt:
            hooks.append(ShowValidation(job, unet, training, tracker))
        stop_asked = stack.enter_context(stop_requests())
        stopped = train(
            training.step,
            batches,
            config.run.gradient_accumulation_steps,
            job.learning_rate,
            range(job.done, job.total),
            hooks,
            dropout.begin_batch if dropout else None,
            processes,
            stop_asked,
        )
    if stopped:
        tell(f"stopped; saved {checkpoint_folder(output, stopped.step)}. Run the same command again to go on")
        return INTERRUPTED_STATUS
    if processes.is_first:
        training.write_result(output, job.total)
        draw_loss(read_history(output), output / "loss.png")
        tell(f"wrote {output / training.learner.result}")
    return 0


def _show_step(bar: Any, report: StepReport) -> None:
    """A hook: move tqdm's bar by a step, and show its losses."""
    shown: dict[str, object] = {name: f"{value:.4f}" for name, value in report.concept_losses.items()}
    bar.set_postfix(shown | ({"skipped": report.skipped_steps} if report.skipped_steps else {}))
    bar.update()
