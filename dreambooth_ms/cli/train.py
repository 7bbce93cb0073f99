"""`dreambooth-ms train`: config -> records -> latents and embeddings -> batches -> steps -> checkpoints -> adapter."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth_ms.atomic import check_writable
from dreambooth_ms.cli.assemble import open_base, prompt_tokenizer
from dreambooth_ms.cli.output import be_quiet, complain, progress, tell
from dreambooth_ms.cli.training_memory import check_expected_memory
from dreambooth_ms.cli.training_pictures import (
    ClassPictures,
    check_same_pictures,
    class_pictures_of,
    draw_missing_class_images,
    embed_all,
    encode_pictures,
)
from dreambooth_ms.cli.training_setup import learning_rate_of, set_up_training
from dreambooth_ms.cli.validation import Validator
from dreambooth_ms.config.load import load_train_config, to_yaml
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.cache import ContentCache
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, read_records
from dreambooth_ms.errors import INTERRUPTED_STATUS, ConfigError
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.processes.group import Processes, run_in_group
from dreambooth_ms.processes.launch import SCHEDULER, find_launch
from dreambooth_ms.runtime.collective import collective_operations, serve_as_scheduler
from dreambooth_ms.sampling.class_images import missing_numbers
from dreambooth_ms.training.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    find_latest,
    open_checkpoint,
    restore,
    save_checkpoint,
)
from dreambooth_ms.training.loop import train
from dreambooth_ms.training.results import result_of
from dreambooth_ms.training.run_folder import seed_of, settle_together, write_config
from dreambooth_ms.training.stop import stop_requests
from dreambooth_ms.training.trackers import Tracker, draw_loss, read_history
from dreambooth_ms.weights.bundle import ModelBundle


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
    config = settle_together(processes, load_train_config(argv, tell))
    model, data = config.model, config.data
    with processes.first_goes_ahead("the base model"):
        folder = open_base(
            config.device,
            model.pretrained_model_name_or_path,
            model.revision,
            model.variant,
            model.pretrained_vae_model_name_or_path,
        )
    # An impossible --resolution, or a base that cannot be trained, ends here, before any work.
    folder.latent_shape(data.resolution, data.resolution)
    folder.trained_schedule()
    check_expected_memory(config, folder, processes)

    instances = read_records(Path(data.instance_data_dir), data.instance_prompt, INSTANCE, tell=tell)
    class_pictures = class_pictures_of(config)
    total = total_steps(config, max(len(instances), class_pictures.count if class_pictures else 0))
    found = processes.from_first("the run's folder", lambda: _open_folder(config, class_pictures, total))
    if found is None:
        return 0
    checkpoint = Checkpoint(Path(found["checkpoint"]), found["step"]) if found["checkpoint"] else None

    with collective_operations(processes.launch):
        cache = ContentCache(config.output_dir / "cache")
        with processes.first_goes_ahead("the prompts' embeddings"):
            embeddings = embed_all(folder, cache, [data.instance_prompt, config.prior.class_prompt or "", ""])
        unet, groups = None, [instances]
        if class_pictures:
            unet = draw_missing_class_images(processes, config, folder, class_pictures, embeddings)
            groups.append(
                read_records(class_pictures.folder, class_pictures.prompt, CLASS, tell, at_most=class_pictures.count)
            )
        check_same_pictures(processes, groups)
        framing = Framing(data.resolution, data.center_crop, data.random_flip)
        plan = Plan(tuple(groups), config.run.train_batch_size, framing, seed_of(config))
        texts = prompt_tokenizer(folder).texts(list(embeddings)) if config.method.train_text_encoder else embeddings
        done = checkpoint.step if checkpoint else 0
        batches = encode_pictures(processes, config, folder, plan, cache, texts, done, total)
        return train_and_save(processes, config, folder, unet or folder.load_unet(), batches, checkpoint, total)


def _open_folder(config: TrainConfig, class_pictures: ClassPictures | None, total: int) -> dict[str, Any] | None:
    """Make the run's folder ready; gives the checkpoint to go on from, or None if nothing is left to do."""
    checkpoint = _checkpoint_to_resume(config)
    if checkpoint and checkpoint.step > total:
        raise ConfigError(
            f"{checkpoint.path}: {checkpoint.step} steps are done, the run would end after {total}; "
            "raise --max_train_steps, or choose another --output_dir"
        )
    if class_pictures and missing_numbers(class_pictures.folder, class_pictures.count):
        check_writable(class_pictures.folder)
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


def total_steps(config: TrainConfig, pictures: int) -> int:
    """Optimiser steps of the run; an epoch goes through so many pictures."""
    return config.run.max_train_steps or config.run.num_train_epochs * -(-pictures // config.rows_per_step)


def train_and_save(
    processes: Processes,
    config: TrainConfig,
    folder: ModelBundle,
    unet: UNet2DConditionModel,
    batches: BatchMaker,
    checkpoint: Checkpoint | None,
    total: int,
) -> int:
    """Train what the method trains, save, and show; returns the exit status."""
    run, output = config.run, config.output_dir
    training = set_up_training(config, folder, unet, processes)
    done = 0
    if checkpoint:
        restore(checkpoint, training.state, training.sharded.shapes() if training.sharded else {})
        done = checkpoint.step
        tell(f"resuming from {checkpoint.path}")
    shows_pictures = config.validation.validation_prompt and processes.is_first
    validator = Validator(config, folder, unet, training.learner) if shows_pictures else None
    parameters, dropout = training.learner.parameters, training.learner.dropout
    tell(f"training {sum(p.size for p in parameters):,} parameters in {len(parameters)} tensors for {total} steps")

    def save_part(step: int) -> None:
        state = training.whole_state()
        if processes.is_first:
            write_part, keep = partial(training.write_part, step=step), run.checkpoints_total_limit
            save_checkpoint(output, step, state, to_yaml(config), write_part, keep)
        processes.wait_for_all("the checkpoint")

    def show_pictures(step: int) -> None:
        if validator and tracker:
            with training.result_weights():
                tracker.log_pictures(step, "validation", validator.draw(step))
        processes.wait_for_all("the validation pictures")

    tracker = Tracker(output, run.logging_dir, done) if processes.is_first else None
    try:
        with progress(total=total, initial=done, desc="training", unit="step") as bar, stop_requests() as stop:
            steps = train(
                training.step,
                batches,
                run.gradient_accumulation_steps,
                learning_rate_of(config, total),
                done,
                total,
                dropout.begin_batch if dropout else None,
                processes,
                lambda: stop.asked,
            )
            for report in steps:
                if training.average and not report.is_skipped:
                    training.average.update(report.updates)
                if tracker:
                    tracker.log(report)
                shown: dict[str, object] = {group: f"{value:.4f}" for group, value in report.group_losses.items()}
                bar.set_postfix(shown | ({"skipped": report.skipped_steps} if report.skipped_steps else {}))
                bar.update()
                if report.step % run.checkpointing_steps == 0 or report.stop_asked:
                    save_part(report.step)
                if report.stop_asked:
                    saved = checkpoint_folder(output, report.step)
                    tell(f"stopped; saved {saved}. Run the same command again to go on")
                    return INTERRUPTED_STATUS
                if config.validation.validation_prompt and report.step % config.validation.validation_steps == 0:
                    show_pictures(report.step)
    finally:
        if tracker:
            tracker.close()
    if processes.is_first:
        training.write_result(output, total)
        draw_loss(read_history(output), output / "loss.png")
        tell(f"wrote {output / training.learner.result}")
    return 0
