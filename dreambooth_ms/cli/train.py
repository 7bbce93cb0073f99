"""`dreambooth-ms train`: config -> records -> latents and embeddings -> batches -> steps -> checkpoints -> adapter."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor
from tqdm import tqdm

from dreambooth_ms.adapters.lora import initialise_lora, inject_lora, lora_tensors, lora_trainables
from dreambooth_ms.cli.assemble import embed_prompts, open_base, tell
from dreambooth_ms.config.load import load_train_config, to_yaml
from dreambooth_ms.config.schema import TrainConfig
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.cache import ContentCache, cached_embeddings, cached_posteriors
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, read_records
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule, PredictionType
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import VaeEncoder
from dreambooth_ms.ops import compile_cache
from dreambooth_ms.sampling.class_images import draw_class_images, missing_numbers
from dreambooth_ms.sampling.pipeline import Sampler, SamplingSettings
from dreambooth_ms.training.checkpoint import Checkpoint, find_latest, open_checkpoint, restore, save_checkpoint
from dreambooth_ms.training.loop import train
from dreambooth_ms.training.lr_schedules import learning_rate_factor
from dreambooth_ms.training.optimisers import AdamW, AdamWHyperparameters
from dreambooth_ms.training.run_folder import seed_of, settle_config, write_config
from dreambooth_ms.training.step import DiffusionLoss, TrainStep
from dreambooth_ms.training.stop import stop_requests
from dreambooth_ms.training.trackers import Tracker, draw_loss, read_history
from dreambooth_ms.weights.digest import file_digest
from dreambooth_ms.weights.lora_file import FILE_NAME, steps_taken, write_lora
from dreambooth_ms.weights.model_folder import ModelFolder, weight_file

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
    model = config.model
    folder = open_base(config.device, model.pretrained_model_name_or_path, model.revision, model.variant)
    output = Path(config.run.output_dir)

    instances = read_records(Path(config.data.instance_data_dir), config.data.instance_prompt, INSTANCE, tell=tell)
    checkpoint = _checkpoint_to_resume(config)
    write_config(config)
    unet = None
    groups = [instances]
    class_pictures = _class_pictures(config)
    if class_pictures:
        unet = draw_missing_class_images(config, folder, class_pictures)
        groups.append(
            read_records(class_pictures.folder, class_pictures.prompt, CLASS, tell, at_most=class_pictures.count)
        )
    framing = Framing(config.data.resolution, config.data.center_crop, config.data.random_flip)
    plan = Plan(tuple(groups), config.run.train_batch_size, framing, seed_of(config))
    total = config.run.max_train_steps or config.run.num_train_epochs * plan.steps_per_epoch
    done = checkpoint.step if checkpoint else 0
    if (output / FILE_NAME).is_file() and steps_taken(output / FILE_NAME) >= total:
        tell(f"{output / FILE_NAME} is already there, trained for {total} steps; nothing left to do")
        return 0

    batches = encode_data(config, folder, plan, done, total)
    unet = unet or folder.load_unet()
    return _train_lora(config, folder, unet, batches, checkpoint, total)


def draw_missing_class_images(
    config: TrainConfig, folder: ModelFolder, wanted: ClassPictures
) -> UNet2DConditionModel | None:
    """Draw the class pictures that are missing; returns the UNet if it was loaded for that."""
    prior = config.prior
    numbers = missing_numbers(wanted.folder, wanted.count)
    if not numbers:
        return None
    unet, vae = folder.load_unet(), folder.load_vae()
    embeddings = embed_prompts(folder, [wanted.prompt])
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


def encode_data(config: TrainConfig, folder: ModelFolder, plan: Plan, done: int, total: int) -> BatchMaker:
    """Everything the steps done … total need of pictures and prompts; VAE and text encoder are gone afterwards."""
    data, cache = config.data, ContentCache(Path(config.run.output_dir) / "cache")
    posteriors = cached_posteriors(
        cache,
        plan.views(done, total),
        file_digest(weight_file(folder.path, "vae", folder.variant)),
        data.resolution,
        data.image_interpolation_mode,
        lambda: _load_encoder(folder),
        lambda views: tqdm(views, desc="encoding pictures", unit="picture") if views else views,
    )
    prompts = sorted({record.prompt for records in plan.groups for record in records})
    embeddings = cached_embeddings(
        cache, prompts, file_digest(weight_file(folder.path, "text_encoder", folder.variant)),
        lambda missing: embed_prompts(folder, missing),
    )  # fmt: skip
    gc.collect()
    return BatchMaker(
        plan=plan,
        posteriors=posteriors,
        embeddings=embeddings,
        schedule=NoiseSchedule.from_spec(folder.schedule_spec),
        scaling_factor=folder.vae_spec.scaling_factor,
        group_weights={INSTANCE: 1.0, CLASS: config.prior.prior_loss_weight},
    )


def _train_lora(
    config: TrainConfig,
    folder: ModelFolder,
    unet: UNet2DConditionModel,
    batches: BatchMaker,
    checkpoint: Checkpoint | None,
    total: int,
) -> int:
    """Inject, train, save; returns the exit status."""
    method, run, output = config.method, config.run, Path(config.run.output_dir)
    alpha = float(method.lora_alpha or method.rank)
    layers = inject_lora(unet, method.rank, alpha, method.lora_target_modules)
    initialise_lora(layers, seed_of(config))
    trainables = lora_trainables(layers)
    step_cell = _step_cell(config, folder, unet, trainables)
    state = [*trainables, *step_cell.optimiser.moments()]
    done = 0
    if checkpoint:
        restore(checkpoint, state)
        done = checkpoint.step
        tell(f"resuming from {checkpoint.path}")

    def write_adapter(target: Path, step: int) -> None:
        write_lora(target, lora_tensors(layers), method.rank, alpha, method.lora_target_modules, step)

    def save(step: int) -> Path:
        return save_checkpoint(
            output, step, state, to_yaml(config), lambda target: write_adapter(target, step),
            keep=run.checkpoints_total_limit,
        )  # fmt: skip

    tell(f"training {sum(p.size for p in trainables):,} parameters in {len(trainables)} tensors for {total} steps")
    tracker = Tracker(output, run.logging_dir, done)
    latent_shape = folder.latent_shape(config.data.resolution, config.data.resolution)
    rows = len(batches.plan.rows(0))
    specs = (folder.unet_spec, folder.text_spec, folder.schedule_spec)
    cache = compile_cache(specs, method, config.loss, config.optimiser, latent_shape, rows)
    try:
        with tqdm(total=total, initial=done, desc="training", unit="step") as bar, stop_requests() as stop, cache:
            for report in train(step_cell, batches, _learning_rate(config, total), done, total):
                done = report.step
                tracker.log(report)
                bar.set_postfix({group: f"{value:.4f}" for group, value in report.group_losses.items()})
                bar.update()
                if done % run.checkpointing_steps == 0 or stop.asked:
                    saved = save(done)
                if stop.asked:
                    tell(f"stopped; saved {saved}. Run the same command again to go on")
                    return INTERRUPTED_STATUS
    finally:
        tracker.close()
    write_adapter(output, total)
    draw_loss(read_history(output), output / "loss.png")
    tell(f"wrote {output / FILE_NAME}")
    return 0


def _step_cell(
    config: TrainConfig, folder: ModelFolder, unet: UNet2DConditionModel, trainables: list[Parameter]
) -> TrainStep:
    chosen = config.loss.prediction_type
    prediction_type = PredictionType(chosen) if chosen else folder.schedule_spec.prediction_type
    o = config.optimiser
    optimiser = AdamW(trainables, AdamWHyperparameters(o.adam_beta1, o.adam_beta2, o.adam_weight_decay, o.adam_epsilon))
    return TrainStep(DiffusionLoss(unet, prediction_type), trainables, optimiser, o.max_grad_norm)


def _learning_rate(config: TrainConfig, total: int) -> Callable[[int], float]:
    o = config.optimiser
    return lambda step: (
        o.learning_rate
        * learning_rate_factor(
            o.lr_scheduler, step, o.lr_warmup_steps, total, o.lr_num_cycles, o.lr_power, o.learning_rate
        )
    )


def _checkpoint_to_resume(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that was asked for; without asking, the newest of a run that was stopped."""
    asked = config.run.resume_from_checkpoint
    if asked not in (None, "latest"):
        return open_checkpoint(Path(asked))
    found = find_latest(Path(config.run.output_dir))
    if asked == "latest" and found is None:
        tell(f"--resume_from_checkpoint latest: no checkpoint in {config.run.output_dir}, starting from the beginning")
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
