"""`dreambooth-ms train`: config -> records -> latents and embeddings -> batches -> steps -> checkpoints -> adapter."""

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor

from dreambooth_ms.adapters.precision import compute_in
from dreambooth_ms.cli.assemble import embed_prompts, open_base, prompt_tokenizer
from dreambooth_ms.cli.tell import be_quiet, complain, progress, tell
from dreambooth_ms.cli.validation import Validator
from dreambooth_ms.config.load import load_train_config, to_yaml
from dreambooth_ms.config.schema import TrainConfig, memory_size
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.cache import ContentCache, cached_embeddings, cached_posteriors
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, Record, read_records
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule, PredictionType
from dreambooth_ms.errors import ConfigError, DataError
from dreambooth_ms.models.activation_memory import FLOAT32, Settings
from dreambooth_ms.models.segments import Segments
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import VaeEncoder
from dreambooth_ms.ops import compute_dtype
from dreambooth_ms.ops.parallel import SumOverProcesses, collective_operations, serve_as_scheduler
from dreambooth_ms.processes.launch import SCHEDULER, find_launch
from dreambooth_ms.processes.together import ALONE, Processes, run_together
from dreambooth_ms.sampling.class_images import draw_class_images, missing_numbers
from dreambooth_ms.sampling.pipeline import Sampler, SamplingSettings
from dreambooth_ms.training.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    find_latest,
    open_checkpoint,
    restore,
    save_checkpoint,
)
from dreambooth_ms.training.ema import MovingAverage
from dreambooth_ms.training.loop import train
from dreambooth_ms.training.loss_scaling import LossScaler, LossScaling
from dreambooth_ms.training.lr_schedules import learning_rate_factor
from dreambooth_ms.training.memory import (
    OPTIMISER_BYTES,
    Adapter,
    Workload,
    check_memory,
    estimate,
    machine_memory,
)
from dreambooth_ms.training.methods import METHODS, TEXT_ENCODER_TARGETS, Learner, result_of
from dreambooth_ms.training.optimiser_choice import choose_optimiser
from dreambooth_ms.training.recomputation import GivenPrediction
from dreambooth_ms.training.run_folder import seed_of, settle_together, write_config
from dreambooth_ms.training.sharding import ShardedOptimiser
from dreambooth_ms.training.step import AccumulatingTrainStep, DiffusionLoss, TrainStep
from dreambooth_ms.training.stop import stop_requests
from dreambooth_ms.training.trackers import Tracker, draw_loss, read_history
from dreambooth_ms.weights.atomic import check_writable
from dreambooth_ms.weights.model_folder import ModelFolder

INTERRUPTED_STATUS = 130


@dataclass(frozen=True)
class ClassPictures:
    """The pictures of prior preservation: where they are, under which prompt, and how many."""

    folder: Path
    prompt: str
    count: int


def run(argv: Sequence[str]) -> int:
    """Train by a command line, as one of the processes that a launcher started; returns the exit status."""
    launch = find_launch(os.environ)
    if launch and launch.rank == SCHEDULER:
        serve_as_scheduler(launch)
        return 0
    return run_together(launch, lambda processes: run_as_one_of(processes, argv), complain)


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
    folder.latent_shape(data.resolution, data.resolution)  # An impossible --resolution ends here, before any work.
    check_expected_memory(config, folder)

    instances = read_records(Path(data.instance_data_dir), data.instance_prompt, INSTANCE, tell=tell)
    class_pictures = _class_pictures(config)
    total = total_steps(config, max(len(instances), class_pictures.count if class_pictures else 0))
    found = processes.from_first("the run's folder", lambda: _open_folder(config, class_pictures, total))
    if found is None:
        return 0
    checkpoint = Checkpoint(Path(found["checkpoint"]), found["step"]) if found["checkpoint"] else None

    with collective_operations(processes.launch):
        cache = ContentCache(config.output_dir / "cache")
        with processes.first_goes_ahead("the prompts' embeddings"):
            embeddings = _embeddings(folder, cache, [data.instance_prompt, config.prior.class_prompt or "", ""])
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


def _open_folder(config: TrainConfig, class_pictures: "ClassPictures | None", total: int) -> dict[str, Any] | None:
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
    result, steps_taken = result_of(config.method.method, config.output_dir)
    if steps_taken >= total:
        tell(f"{result} is already there, trained for {total} steps; nothing left to do")
        return None
    return {"checkpoint": str(checkpoint.path) if checkpoint else None, "step": checkpoint.step if checkpoint else 0}


def check_same_pictures(processes: Processes, groups: Sequence[Sequence[Record]]) -> None:
    """Raise DataError if another process, perhaps on another machine, found other pictures."""
    digests = [record.digest for group in groups for record in group]
    for rank, others in enumerate(processes.exchange("the list of pictures", digests)):
        if others != digests:
            raise DataError(
                f"rank {rank} found other pictures than rank {processes.rank}; "
                "--instance_data_dir and --class_data_dir must be the same folders on every machine"
            )


def check_expected_memory(config: TrainConfig, folder: ModelFolder) -> None:
    """Say how much memory a step will need; what cannot fit ends here, before any work."""
    run, expected = config.run, estimate(_workload(config, folder))
    tell(str(expected))
    advice = [] if run.gradient_checkpointing else ["--gradient_checkpointing"]
    advice += [f"a --train_batch_size below {run.train_batch_size}"] if run.train_batch_size > 1 else []
    advice += [f"a --resolution below {config.data.resolution}"]
    advice += ["--method lora"] if config.method.method == "full" else []
    limit = memory_size(run.max_device_memory) if run.max_device_memory else machine_memory()
    assert limit is not None, "TrainConfig.check comes first"
    check_memory(expected, limit, f"what needs less: {', '.join(advice)}")


def _workload(config: TrainConfig, folder: ModelFolder) -> Workload:
    method, data, run = config.method, config.data, config.run
    _, height, width_of_latents = folder.latent_shape(data.resolution, data.resolution)
    groups = 2 if config.prior.with_prior_preservation else 1
    texts = [spec for spec in (folder.text_spec, folder.text_spec_2) if spec] if method.train_text_encoder else []
    adapter = Adapter(method.rank, method.lora_target_modules, TEXT_ENCODER_TARGETS)
    optimiser = "adamw_8bit" if config.optimiser.use_8bit_adam else config.optimiser.optimizer.lower()
    width = 2 if config.device.mixed_precision in ("fp16", "bf16") else FLOAT32
    settings = Settings(
        rows=groups * run.train_batch_size,
        latent_height=height,
        latent_width=width_of_latents,
        bytes_of_number=width,
        dropout=method.lora_dropout > 0,
    )
    return Workload(
        unet=folder.unet_spec,
        text_encoders=texts,
        adapter=adapter if method.method == "lora" else None,
        settings=settings,
        recomputed=run.gradient_checkpointing,
        bytes_of_weight=width,
        bytes_of_optimiser=OPTIMISER_BYTES[optimiser],
        copies_of_trained=int(method.use_ema) + int(run.gradient_accumulation_steps > 1),
    )


def total_steps(config: TrainConfig, pictures: int) -> int:
    """Optimiser steps of the run; an epoch goes through so many pictures."""
    return config.run.max_train_steps or config.run.num_train_epochs * -(-pictures // config.rows_per_step)


def draw_missing_class_images(
    processes: Processes,
    config: TrainConfig,
    folder: ModelFolder,
    wanted: ClassPictures,
    embeddings: Mapping[str, PromptText],
) -> UNet2DConditionModel | None:
    """Draw this process's share of the class pictures that are missing; returns the UNet if it was loaded for that."""
    prior = config.prior
    missing = processes.from_first("the class pictures", lambda: missing_numbers(wanted.folder, wanted.count))
    numbers = list(processes.share(missing))
    if not numbers:
        processes.wait_for_all("the class pictures")
        return None
    unet, vae = folder.load_unet(), folder.load_vae()
    batch_size = min(prior.sample_batch_size, len(numbers))
    settings = SamplingSettings("ddim", prior.infer_steps, prior.guidance_scale, batch_size)
    draw_class_images(
        Sampler(unet, vae, folder.scheduler_config, settings),
        wanted.folder,
        numbers,
        wanted.prompt,
        embeddings[wanted.prompt],
        embeddings[""],
        folder.latent_shape(config.data.resolution, config.data.resolution),
        seed_of(config),
        lambda pictures: progress(pictures, desc="class pictures", total=len(numbers), unit="picture"),
    )
    processes.wait_for_all("the class pictures")
    return unet


def encode_pictures(
    processes: Processes,
    config: TrainConfig,
    folder: ModelFolder,
    plan: Plan,
    cache: ContentCache,
    texts: Mapping[str, PromptText],
    done: int,
    total: int,
) -> BatchMaker:
    """Everything the steps done … total need of pictures; the VAE is gone afterwards."""
    data, batches_per_step = config.data, config.run.gradient_accumulation_steps * processes.count
    views = plan.views(done * batches_per_step, total * batches_per_step)
    encode = partial(
        cached_posteriors,
        cache,
        encoder_digest=folder.digest("vae"),
        resolution=data.resolution,
        interpolation=data.image_interpolation_mode,
        load_encoder=lambda: _load_encoder(folder),
        progress=lambda views: progress(views, desc="encoding pictures", unit="picture"),
    )
    if processes.count > 1:
        encode(processes.share(views))
        processes.wait_for_all("the encoded pictures")
    posteriors = encode(views)  # Those of the other processes are in the cache by now.
    gc.collect()
    schedule = NoiseSchedule.from_spec(folder.schedule_spec)
    gamma, kind = config.loss.snr_gamma, prediction_type(config, folder)
    return BatchMaker(
        plan=plan,
        posteriors=posteriors,
        texts=texts,
        schedule=schedule,
        loss_weights=lambda t: schedule.min_snr_weights(t, gamma, kind) if gamma else np.ones(len(t)),
        scaled=folder.vae_spec.scaled,
        group_weights={INSTANCE: 1.0, CLASS: config.prior.prior_loss_weight},
        batches_per_step=batches_per_step,
        noise_offset=config.noise_offset,
        num_size_ids=folder.num_size_ids,
    )


@dataclass(frozen=True)
class Training:
    """What a run trains, with the state that a checkpoint keeps."""

    learner: Learner
    step: TrainStep | AccumulatingTrainStep
    average: MovingAverage | None
    sharded: ShardedOptimiser | None
    """The optimiser, if this process keeps a part of its state."""

    @property
    def state(self) -> list[Parameter]:
        """Trained weights, the optimiser's moments, the running averages, and the state of loss scaling."""
        return self._state_with(self.step.optimiser.moments())

    def whole_state(self) -> list[Parameter]:
        """The same with the moments that other processes keep; all processes must ask for it at the same time."""
        return self._state_with(self.sharded.all_moments()) if self.sharded else self.state

    def _state_with(self, moments: list[Parameter]) -> list[Parameter]:
        averages = self.average.averages if self.average else []
        scaling = self.step.scaler.state() if self.step.scaler else []
        return [*self.learner.trainables, *moments, *averages, *scaling]

    def result_weights(self) -> AbstractContextManager[None]:
        """Inside, the networks hold what the run is judged by: the average, if one is kept."""
        return self.average.in_place_of_weights() if self.average else nullcontext()

    def write_part(self, target: Path, step: int) -> None:
        """Write what was trained into the folder of a checkpoint."""
        with self.result_weights():
            self.learner.write_part(target, step)

    def write_result(self, target: Path, step: int) -> None:
        """Write the result of the run."""
        with self.result_weights():
            self.learner.write_result(target, step)


def train_and_save(
    processes: Processes,
    config: TrainConfig,
    folder: ModelFolder,
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
    trainables, dropout = training.learner.trainables, training.learner.dropout
    tell(f"training {sum(p.size for p in trainables):,} parameters in {len(trainables)} tensors for {total} steps")

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
                _learning_rate(config, total),
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
        tell(f"wrote {result_of(config.method.method, output)[0]}")
    return 0


def set_up_training(
    config: TrainConfig, folder: ModelFolder, unet: UNet2DConditionModel, processes: Processes = ALONE
) -> Training:
    """The method's trainables, with their optimiser and step, as they are before the first step."""
    method = config.method
    text_encoders = folder.load_text_encoders() if method.train_text_encoder else None
    learner = METHODS[method.method](method, folder, unet, text_encoders, seed_of(config))
    compute_in(learner.denoiser, compute_dtype(config.device.mixed_precision))
    sharded = None
    if config.processes.zero_stage > 0 and processes.count > 1:
        make_part = lambda start, stop: choose_optimiser(config, learner.part(start, stop))  # noqa: E731
        sharded = ShardedOptimiser(learner.trainables, make_part, processes)
    optimiser = sharded or choose_optimiser(config, learner)
    step = TrainStep if config.run.gradient_accumulation_steps == 1 else AccumulatingTrainStep
    segments = Segments(unet, text_encoders) if config.run.gradient_checkpointing else None
    denoiser = GivenPrediction() if segments else learner.denoiser
    loss = DiffusionLoss(denoiser, prediction_type(config, folder))
    return Training(
        learner=learner,
        step=step(
            loss,
            learner.trainables,
            optimiser,
            config.optimiser.max_grad_norm,
            SumOverProcesses() if processes.count > 1 else None,
            _scaler(config),
            segments,
        ),
        average=MovingAverage(learner.trainables, method.ema_decay) if method.use_ema else None,
        sharded=sharded,
    )


def _scaler(config: TrainConfig) -> LossScaler | None:
    """float16 alone needs one: bfloat16 has the exponents of float32."""
    if config.device.mixed_precision != "fp16":
        return None
    c = config.loss_scaling
    dynamic = c.loss_scaler_type == "dynamic"
    return LossScaler(LossScaling(c.init_loss_scale, c.loss_scale_factor, c.scale_window, dynamic))


def prediction_type(config: TrainConfig, folder: ModelFolder) -> PredictionType:
    """What the UNet is trained to predict."""
    chosen = config.loss.prediction_type
    return PredictionType(chosen) if chosen else folder.schedule_spec.prediction_type


def _learning_rate(config: TrainConfig, total: int) -> Callable[[int], float]:
    o = config.optimiser
    highest = config.learning_rate * (config.rows_per_step if o.scale_lr else 1)
    return lambda step: (
        highest
        * learning_rate_factor(o.lr_scheduler, step, o.lr_warmup_steps, total, o.lr_num_cycles, o.lr_power, highest)
    )


def _embeddings(folder: ModelFolder, cache: ContentCache, prompts: Sequence[str]) -> dict[str, PromptText]:
    """Prompts by the base's own text encoders, all at once, because each time they are compiled anew."""
    digests = [folder.digest(name) for name in folder.text_encoders]
    key = " ".join([*digests, "zeros"] if folder.zeros_for_empty_prompt else digests)
    return cached_embeddings(cache, prompts, key, lambda missing: embed_prompts(folder, missing))


def _checkpoint_to_resume(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that was asked for; without asking, the newest of a run that was stopped."""
    asked = config.run.resume_from_checkpoint
    if asked not in (None, "latest"):
        return open_checkpoint(Path(asked))
    found = find_latest(config.output_dir)
    if asked == "latest" and found is None:
        tell(f"--resume_from_checkpoint latest: no checkpoint in {config.output_dir}, starting from the beginning")
    return found


def _class_pictures(config: TrainConfig) -> ClassPictures | None:
    prior = config.prior
    if not prior.with_prior_preservation:
        return None
    assert prior.class_data_dir is not None and prior.class_prompt is not None, "TrainConfig.check comes first"
    return ClassPictures(Path(prior.class_data_dir), prior.class_prompt, prior.num_class_images)


def _load_encoder(folder: ModelFolder) -> Callable[[np.ndarray], np.ndarray]:
    encoder = VaeEncoder(folder.load_vae())

    def encode(pictures_B3HW: np.ndarray) -> np.ndarray:
        mean, log_variance = encoder(Tensor(pictures_B3HW))
        return np.concatenate([mean.asnumpy(), log_variance.asnumpy()]).astype(np.float32)

    return encode
