"""`dreambooth-ms train`: config -> concepts -> latents and embeddings -> batches -> steps -> checkpoints -> adapter."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth_ms.atomic import check_writable
from dreambooth_ms.cli.base_flags import check_base
from dreambooth_ms.cli.best import MeasureFidelity, measuring_clip
from dreambooth_ms.cli.check import describe_concepts, in_short
from dreambooth_ms.cli.device import open_base, set_up
from dreambooth_ms.cli.output import be_quiet, complain, progress, tell
from dreambooth_ms.cli.push import push, repository_for
from dreambooth_ms.cli.training_concepts import check_words, numbers_to_come, read_concepts, sources_of, starting_words
from dreambooth_ms.cli.training_job import Training, TrainingJob
from dreambooth_ms.cli.training_needs import StepTimes, check_expected_disk, check_expected_memory, warn_of_little
from dreambooth_ms.cli.training_pictures import prepare_training
from dreambooth_ms.cli.validation import ShowValidation, with_prompts_read
from dreambooth_ms.cli.validation_loss import MeasureLoss, read_held_out
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.data_set import with_folder_of_data_set
from dreambooth_ms.errors import INTERRUPTED_STATUS, ConfigError, count_of
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.processes.group import Processes, run_in_group
from dreambooth_ms.processes.launch import SCHEDULER, find_launch
from dreambooth_ms.runtime.collective import collective_operations, serve_as_scheduler
from dreambooth_ms.sampling.picture_file import class_picture_name
from dreambooth_ms.training.checkpoint import Checkpoint, checkpoint_folder, result_of
from dreambooth_ms.training.content import base_digests
from dreambooth_ms.training.history import History, draw_loss, profiled, read_history
from dreambooth_ms.training.loop import Hook, StepReport, stop_requests, train
from dreambooth_ms.training.methods import readers_of
from dreambooth_ms.training.run_folder import agree_on_config, check_data, check_method, checkpoint_of, write_config
from dreambooth_ms.training.run_lock import only_run_in
from dreambooth_ms.training.stopping import Measured, best_step, end_when_settled, settled
from dreambooth_ms.training.trackers import Trackers, installed_trackers


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
    wanted = with_prompts_read(load(TrainConfig, argv, tell))
    if processes.is_first:
        installed_trackers(wanted.run.report_to)  # One that is not ends here.
    # A run keeps the precision that it began with.
    config = agree_on_config(processes, replace(wanted, device=set_up(wanted.device)))
    sources_of(config, lambda note: None)  # A list that is wrong ends here, before anything is fetched.
    repository: str | None = None
    if config.publishing.push_to_hub:
        own = config.output_dir, config.publishing
        repository = processes.from_first("the repository on the hub", lambda: repository_for(*own))
    with processes.first_goes_ahead("the base model"):
        base = open_base(config.model).with_clip_skip(config.method.clip_skip)
        clip = measuring_clip(config, base)
    check_base(config, base)
    base = base.with_words(starting_words(config, base))
    # An impossible --resolution, or a base that cannot be trained, ends here, before any work.
    base.latent_shape(config.data.resolution, config.data.resolution)
    base.schedule.trained(config.loss)
    check_expected_memory(config, base, processes)

    with processes.first_goes_ahead("the data set"):
        sources = sources_of(with_folder_of_data_set(config))
    job = TrainingJob(processes, config, base, sources, read_concepts(sources))
    job = replace(job, held_out=read_held_out(job))
    check_words(job)
    if processes.is_first:
        for one in describe_concepts(job):
            tell(in_short(one) + (" (`dreambooth-ms check` names them)" if one["odd"] else ""))
    with ExitStack() as stack:
        status, found = 0, processes.from_first("the run's folder", lambda: _open_folder(stack, job))
        if found is not None:
            digests, kept = found
            stack.enter_context(collective_operations(processes.launch))
            checkpoint = Checkpoint(Path(kept[0]), *kept[1:]) if kept else None
            job = replace(job, base_digests=digests, checkpoint=checkpoint)
            status = train_and_save(*prepare_training(job), clip)
        if repository and status == 0 and processes.is_first:
            push(config.output_dir, config.publishing, repository)
    return status


def _open_folder(stack: ExitStack, job: TrainingJob) -> list[Any] | None:
    """Find what would go wrong, then make the run's folder ready, which is this run's own until the stack ends.

    Gives the base's digests and the checkpoint to go on from, as JSON; None if nothing is left to do.
    """
    config, output, total = job.config, job.config.output_dir, job.total
    checkpoint = checkpoint_of(config, tell)
    if checkpoint and checkpoint.step > total:
        raise ConfigError(
            f"{checkpoint.path}: {count_of(checkpoint.step, 'step')} done, the run would end after {total}; "
            "raise --max_train_steps, or choose another --output_dir"
        )
    if checkpoint:
        check_method(config, checkpoint)
    check_writable(output)
    digests, missing = base_digests(job.base), numbers_to_come(job.sources)
    to_come = {one.concept.name: map(class_picture_name, missing.get(str(one.folder), ())) for one in job.sources}
    job = replace(job, base_digests=digests, checkpoint=checkpoint)
    check_data(config, checkpoint, job.content, to_come, tell)
    for folder, numbers in missing.items():
        if numbers:
            check_writable(Path(folder))
    result = result_of(output)
    finished = result if result and result.steps >= total else None
    measured = checkpoint.measured if checkpoint else ()
    over = job.done >= total or settled(config.stopping, measured)
    if over and result and result.steps == best_step(config, measured, job.done):
        finished, total = result, job.done
    if not finished:
        if config.run.profile and config.run.profile >= total - job.done:
            left = count_of(total - job.done, "step")
            raise ConfigError(
                f"--profile {config.run.profile}: expected less than the {left} to take; the first is left out"
            )
        check_expected_disk(job)
    stack.enter_context(only_run_in(output, tell))
    write_config(config)
    if finished:
        tell(f"{finished.path} is already there, trained for {count_of(total, 'step')}; nothing left to do")
        return None
    warn_of_little(job)
    return [digests, checkpoint and (str(checkpoint.path), checkpoint.step, checkpoint.content, checkpoint.measured)]


def train_and_save(job: TrainingJob, unet: UNet2DConditionModel, batches: BatchMaker, clip: Path | None = None) -> int:
    """Train what the method trains, save, and show; returns the exit status."""
    config, processes, output = job.config, job.processes, job.config.output_dir
    training = Training(job, unet)
    if job.checkpoint:
        tell(f"resuming from {job.checkpoint.path}")
    parameters, dropout = training.learner.parameters, training.learner.dropout
    size, tensors = sum(parameter.size for parameter in parameters), count_of(len(parameters), "tensor")
    tell(f"training {count_of(size, 'parameter')} in {tensors} for {count_of(job.total, 'step')}")

    ended = settled(config.stopping, training.measured)
    end = job.done if ended else job.total
    with ExitStack() as stack:
        trackers = None
        if processes.is_first:
            history = stack.enter_context(closing(History(output, job.done)))
            trackers = stack.enter_context(closing(Trackers(config, job.done, history.reached, tell)))
        hooks: list[Hook] = [training.keep_words, training.update_average]
        if config.stopping.validation_loss:
            hooks.append(MeasureLoss(job, training, batches))
        if config.stopping.early_stop:
            hooks.append(partial(end_when_settled, config.stopping, training.measured))
        if clip:
            hooks.append(MeasureFidelity(job, unet, training, clip))
        hooks.append(training.note)
        if trackers:
            hooks += [history.log, trackers.log]
            hooks.append(stack.enter_context(closing(StepTimes(config, job.base))).measure)
        bar = progress(total=job.total, initial=job.done, desc="training", unit="step")
        hooks.append(partial(_show_step, stack.enter_context(bar), training.measured))
        hooks.append(training.save)
        if config.validation.validation_prompt:
            hooks.append(ShowValidation(job, unet, training, trackers))
        if trackers and config.run.profile:
            hooks.append(stack.enter_context(profiled(output / "profile", config.run.profile)))
        stop_asked = stack.enter_context(stop_requests())
        last = train(
            training.step,
            training.batches(batches),
            config.run.gradient_accumulation_steps,
            job.learning_rate,
            range(job.done, end),
            hooks,
            dropout.begin_batch if dropout else None,
            processes,
            stop_asked,
        )
    if last and not last.ended:
        tell(f"stopped; saved {checkpoint_folder(output, last.step)}. Run the same command again to go on")
        return INTERRUPTED_STATUS
    step, ended = (last.step, last.ended) if last else (end, ended)
    if ended:
        tell(f"over after {count_of(step, 'step')}: {ended}")
    if processes.is_first:
        training.write_result(step)
        draw_loss(read_history(output), output / "loss.png")
        tell(f"wrote {output / training.learner.result}")
        if config.method.method == "lora" and "ss_base_model_version" in job.metadata:
            tell(readers_of(config.method, output))
    return 0


def _show_step(bar: Any, measured: Sequence[Measured], report: StepReport) -> None:
    """A hook: move tqdm's bar by a step, and show its losses, and what was measured last."""
    values = {**report.concept_losses, **(measured[-1] if measured else {})}
    shown: dict[str, object] = {name: f"{value:.4f}" for name, value in values.items() if name != "step"}
    bar.set_postfix(shown | ({"skipped": report.skipped_steps} if report.skipped_steps else {}))
    bar.update()
