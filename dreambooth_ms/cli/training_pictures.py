"""What a run trains on: class pictures, embeddings and latents, until every batch can be made from its number."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from mindspore import Tensor

from dreambooth_ms.cli.assemble import embed_prompts
from dreambooth_ms.cli.output import progress
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.cache import ContentCache, cached_embeddings, cached_posteriors
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.plan import Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, Record
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule
from dreambooth_ms.diffusion.objectives import draw_columns
from dreambooth_ms.errors import DataError
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import VaeEncoder
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.sampling.class_images import draw_class_images, missing_numbers
from dreambooth_ms.sampling.pipeline import Sampler, SamplingSettings
from dreambooth_ms.training.run_folder import seed_of
from dreambooth_ms.weights.bundle import ModelBundle


@dataclass(frozen=True)
class ClassPictures:
    """The pictures of prior preservation: where they are, under which prompt, and how many."""

    folder: Path
    prompt: str
    count: int


def class_pictures_of(config: TrainConfig) -> ClassPictures | None:
    """What the configuration says of class pictures, with prior preservation."""
    prior = config.prior
    if not prior.with_prior_preservation:
        return None
    assert prior.class_data_dir is not None and prior.class_prompt is not None, "TrainConfig.check comes first"
    return ClassPictures(Path(prior.class_data_dir), prior.class_prompt, prior.num_class_images)


def check_same_pictures(processes: Processes, groups: Sequence[Sequence[Record]]) -> None:
    """Raise DataError if another process, perhaps on another machine, found other pictures."""
    digests = [record.digest for group in groups for record in group]
    for rank, others in enumerate(processes.exchange("the list of pictures", digests)):
        if others != digests:
            raise DataError(
                f"rank {rank} found other pictures than rank {processes.rank}; "
                "--instance_data_dir and --class_data_dir must be the same folders on every machine"
            )


def embed_all(folder: ModelBundle, cache: ContentCache, prompts: Sequence[str]) -> dict[str, PromptText]:
    """Prompts by the base's own text encoders, all at once, because each time they are compiled anew."""
    digests = [folder.digest(name) for name in folder.text_encoders]
    key = " ".join([*digests, "zeros"] if folder.zeros_for_empty_prompt else digests)
    return cached_embeddings(cache, prompts, key, lambda missing: embed_prompts(folder, missing))


def draw_missing_class_images(
    processes: Processes,
    config: TrainConfig,
    folder: ModelBundle,
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
    unet, vae = folder.load_unet(), folder.load_vae(encodes=False)
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
    folder: ModelBundle,
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
    spec = folder.trained_schedule()
    return BatchMaker(
        plan=plan,
        posteriors=posteriors,
        texts=texts,
        objective=draw_columns(
            config.loss.prediction_type or spec.prediction_type, NoiseSchedule.from_spec(spec), config.loss.snr_gamma
        ),
        scaled=folder.vae_spec.scaled,
        group_weights={INSTANCE: 1.0, CLASS: config.prior.prior_loss_weight},
        batches_per_step=batches_per_step,
        noise_offset=config.noise_offset,
        num_add_time_ids=folder.num_add_time_ids,
    )


def _load_encoder(folder: ModelBundle) -> Callable[[np.ndarray], np.ndarray]:
    encoder = VaeEncoder(folder.load_vae(decodes=False))

    def encode(pictures_B3HW: np.ndarray) -> np.ndarray:
        mean, log_variance = encoder(Tensor(pictures_B3HW))
        return np.concatenate([mean.asnumpy(), log_variance.asnumpy()]).astype(np.float32)

    return encode
