"""`dreambooth-ms train`: config -> records -> latents and embeddings -> batches -> steps -> checkpoints -> adapter."""

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor
from tqdm import tqdm

from dreambooth_ms.cli.assemble import embed_prompts, open_base, prompt_tokenizer
from dreambooth_ms.cli.tell import tell
from dreambooth_ms.cli.validation import Validator
from dreambooth_ms.config.load import load_train_config, to_yaml
from dreambooth_ms.config.schema import TrainConfig
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.cache import ContentCache, cached_embeddings, cached_posteriors
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, read_records
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule, PredictionType
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import VaeEncoder
from dreambooth_ms.ops import compile_cache
from dreambooth_ms.sampling.class_images import draw_class_images, missing_numbers
from dreambooth_ms.sampling.pipeline import Sampler, SamplingSettings
from dreambooth_ms.training.checkpoint import Checkpoint, find_latest, open_checkpoint, restore, save_checkpoint
from dreambooth_ms.training.ema import MovingAverage
from dreambooth_ms.training.loop import train
from dreambooth_ms.training.lr_schedules import learning_rate_factor
from dreambooth_ms.training.methods import METHODS, Learner, result_of
from dreambooth_ms.training.optimisers import AdamW, AdamWHyperparameters
from dreambooth_ms.training.run_folder import seed_of, settle_config, write_config
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
    """Train by a command line; returns the exit status."""
    config = settle_config(load_train_config(argv))
    model, data = config.model, config.data
    folder = open_base(
        config.device,
        model.pretrained_model_name_or_path,
        model.revision,
        model.variant,
        model.pretrained_vae_model_name_or_path,
    )
    folder.latent_shape(data.resolution, data.resolution)  # An impossible --resolution ends here, before any work.

    instances = read_records(Path(data.instance_data_dir), data.instance_prompt, INSTANCE, tell=tell)
    checkpoint, class_pictures = _checkpoint_to_resume(config), _class_pictures(config)
    total = total_steps(config, max(len(instances), class_pictures.count if class_pictures else 0))
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
        return 0

    cache = ContentCache(config.output_dir / "cache")
    embeddings = _embeddings(folder, cache, [data.instance_prompt, config.prior.class_prompt or "", ""])
    unet, groups = None, [instances]
    if class_pictures:
        unet = draw_missing_class_images(config, folder, class_pictures, embeddings)
        groups.append(
            read_records(class_pictures.folder, class_pictures.prompt, CLASS, tell, at_most=class_pictures.count)
        )
    framing = Framing(data.resolution, data.center_crop, data.random_flip)
    plan = Plan(tuple(groups), config.run.train_batch_size, framing, seed_of(config))
    texts = prompt_tokenizer(folder).texts(list(embeddings)) if config.method.train_text_encoder else embeddings
    batches = encode_pictures(config, folder, plan, cache, texts, checkpoint.step if checkpoint else 0, total)
    return train_and_save(config, folder, unet or folder.load_unet(), batches, checkpoint, total)


def total_steps(config: TrainConfig, pictures: int) -> int:
    """Optimiser steps of the run; an epoch goes through so many pictures."""
    run = config.run
    rows_of_step = run.train_batch_size * run.gradient_accumulation_steps
    return run.max_train_steps or run.num_train_epochs * -(-pictures // rows_of_step)


def draw_missing_class_images(
    config: TrainConfig, folder: ModelFolder, wanted: ClassPictures, embeddings: Mapping[str, PromptText]
) -> UNet2DConditionModel | None:
    """Draw the class pictures that are missing; returns the UNet if it was loaded for that."""
    prior = config.prior
    numbers = missing_numbers(wanted.folder, wanted.count)
    if not numbers:
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
        lambda pictures: tqdm(pictures, desc="class pictures", total=len(numbers), unit="picture"),
    )
    return unet


def encode_pictures(
    config: TrainConfig,
    folder: ModelFolder,
    plan: Plan,
    cache: ContentCache,
    texts: Mapping[str, PromptText],
    done: int,
    total: int,
) -> BatchMaker:
    """Everything the steps done … total need of pictures; the VAE is gone afterwards."""
    data, batches_per_step = config.data, config.run.gradient_accumulation_steps
    posteriors = cached_posteriors(
        cache,
        plan.views(done * batches_per_step, total * batches_per_step),
        folder.digest("vae"),
        data.resolution,
        data.image_interpolation_mode,
        lambda: _load_encoder(folder),
        lambda views: tqdm(views, desc="encoding pictures", unit="picture") if views else views,
    )
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

    @property
    def state(self) -> list[Parameter]:
        """Trained weights, the optimiser's moments and the running averages."""
        averages = self.average.averages if self.average else []
        return [*self.learner.trainables, *self.step.optimiser.moments(), *averages]

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
    config: TrainConfig,
    folder: ModelFolder,
    unet: UNet2DConditionModel,
    batches: BatchMaker,
    checkpoint: Checkpoint | None,
    total: int,
) -> int:
    """Train what the method trains, save, and show; returns the exit status."""
    run, output = config.run, config.output_dir
    training = set_up_training(config, folder, unet)
    done = 0
    if checkpoint:
        restore(checkpoint, training.state)
        done = checkpoint.step
        tell(f"resuming from {checkpoint.path}")
    validator = Validator(config, folder, unet, training.learner) if config.validation.validation_prompt else None
    trainables, dropout = training.learner.trainables, training.learner.dropout
    tell(f"training {sum(p.size for p in trainables):,} parameters in {len(trainables)} tensors for {total} steps")

    steps = train(
        training.step,
        batches,
        run.gradient_accumulation_steps,
        _learning_rate(config, total),
        done,
        total,
        _compile_cache(config, folder, batches),
        dropout.begin_batch if dropout else None,
    )
    tracker = Tracker(output, run.logging_dir, done)
    try:
        with tqdm(total=total, initial=done, desc="training", unit="step") as bar, stop_requests() as stop:
            for report in steps:
                if training.average:
                    training.average.update(report.step)
                tracker.log(report)
                bar.set_postfix({group: f"{value:.4f}" for group, value in report.group_losses.items()})
                bar.update()
                if report.step % run.checkpointing_steps == 0 or stop.asked:
                    write_part = partial(training.write_part, step=report.step)
                    keep = run.checkpoints_total_limit
                    saved = save_checkpoint(output, report.step, training.state, to_yaml(config), write_part, keep)
                if stop.asked:
                    tell(f"stopped; saved {saved}. Run the same command again to go on")
                    return INTERRUPTED_STATUS
                if validator and report.step % config.validation.validation_steps == 0:
                    with training.result_weights():
                        tracker.log_pictures(report.step, "validation", validator.draw(report.step))
    finally:
        tracker.close()
    training.write_result(output, total)
    draw_loss(read_history(output), output / "loss.png")
    tell(f"wrote {result_of(config.method.method, output)[0]}")
    return 0


def set_up_training(config: TrainConfig, folder: ModelFolder, unet: UNet2DConditionModel) -> Training:
    """The method's trainables, with their optimiser and step, as they are before the first step."""
    method, o = config.method, config.optimiser
    text_encoders = folder.load_text_encoders() if method.train_text_encoder else None
    learner = METHODS[method.method](method, folder, unet, text_encoders, seed_of(config))
    text_rate = o.text_encoder_lr / config.learning_rate if o.text_encoder_lr else 1.0
    decay, text_decay = o.adam_weight_decay, config.text_encoder_weight_decay
    largest_decay = max(decay, text_decay) or 1.0
    optimiser = AdamW(
        learner.trainables,
        AdamWHyperparameters(o.adam_beta1, o.adam_beta2, max(decay, text_decay), o.adam_epsilon),
        [text_rate if of_text else 1.0 for of_text in learner.is_of_text_encoder],
        [(text_decay if of_text else decay) / largest_decay for of_text in learner.is_of_text_encoder],
    )
    step = TrainStep if config.run.gradient_accumulation_steps == 1 else AccumulatingTrainStep
    loss = DiffusionLoss(learner.denoiser, prediction_type(config, folder))
    return Training(
        learner=learner,
        step=step(loss, learner.trainables, optimiser, o.max_grad_norm),
        average=MovingAverage(learner.trainables, method.ema_decay) if method.use_ema else None,
    )


def prediction_type(config: TrainConfig, folder: ModelFolder) -> PredictionType:
    """What the UNet is trained to predict."""
    chosen = config.loss.prediction_type
    return PredictionType(chosen) if chosen else folder.schedule_spec.prediction_type


def _compile_cache(config: TrainConfig, folder: ModelFolder, batches: BatchMaker) -> AbstractContextManager[None]:
    if config.run.gradient_accumulation_steps > 1:
        return nullcontext()  # A step is two graphs then, and the cache is sound for one.
    latent_shape = folder.latent_shape(config.data.resolution, config.data.resolution)
    specs = (folder.unet_spec, folder.text_spec, folder.text_spec_2, folder.schedule_spec)
    rows = len(batches.plan.rows(0))
    return compile_cache(specs, config.method, config.loss, config.optimiser, latent_shape, rows)


def _learning_rate(config: TrainConfig, total: int) -> Callable[[int], float]:
    o, run = config.optimiser, config.run
    rows_of_step = run.train_batch_size * run.gradient_accumulation_steps
    highest = config.learning_rate * (rows_of_step if o.scale_lr else 1)
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
