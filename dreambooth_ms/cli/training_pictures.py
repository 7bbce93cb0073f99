"""What a run trains on: class pictures, embeddings and latents, until every batch can be made from its number."""

import gc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from dreambooth_ms.cli.output import progress, tell
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.cli.training_needs import check_expected_disk
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.cache import ContentCache, embedding_lookup, posterior_lookup
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, read_concept
from dreambooth_ms.data.text import PromptTokenizer, embed_prompts
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule
from dreambooth_ms.diffusion.objectives import draw_columns
from dreambooth_ms.errors import DataError
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.picture_file import class_picture_name, missing_numbers, write_picture
from dreambooth_ms.sampling.request import SampleRequest, settings_of_training
from dreambooth_ms.training.content import content_of, in_order
from dreambooth_ms.training.run_folder import check_data


def read_concepts(config: TrainConfig, tell: Callable[[str], object] = tell) -> list[Concept]:
    """The subject, and its class as far as it is there already.

    Raises:
        DataError: there is no subject, or a picture of either is damaged.
    """
    data, prior = config.data, config.prior
    folder, background = Path(data.instance_data_dir), data.transparent_background
    concepts = [read_concept(INSTANCE, folder, data.instance_prompt, tell, background=background)]
    if prior.folder and len(class_numbers_to_come(config)) < prior.num_class_images:
        weight, count = prior.prior_loss_weight, prior.num_class_images
        concepts.append(read_concept(CLASS, prior.folder, prior.class_prompt or "", tell, weight, count, background))
    return concepts


def class_numbers_to_come(config: TrainConfig) -> list[int]:
    """The numbers of the class pictures that are yet to be sampled."""
    return missing_numbers(config.prior.folder, config.prior.num_class_images) if config.prior.folder else []


def prepare_training(job: TrainingJob, concepts: Sequence[Concept]) -> tuple[nn.Cell, BatchMaker]:
    """The network to train, and all that its batches are made of. Autoencoder and text encoders are gone afterwards."""
    base, prior, cache = job.base, job.config.prior, ContentCache(job.config.output_dir / "cache")
    class_prompt = prior.class_prompt or ""
    digests = [job.base_digests[reader.name] for reader in base.text]
    key = " ".join([*digests, *(["zeros"] if base.zeros_for_empty_prompt else [])])
    embeddings = embedding_lookup(cache, key, lambda missing: embed_prompts(base, missing))
    with job.processes.first_goes_ahead("the prompts' embeddings"):
        # All at once, because the encoders are compiled anew each time.
        embeddings.prepare([*captions_of(concepts), class_prompt, ""])
    unet, earlier = None, job.checkpoint.content if job.checkpoint else {}
    missing = job.processes.from_first("the class pictures", lambda: class_numbers_to_come(job.config))
    if prior.folder and missing:
        unet = sample_class_pictures(job, missing, prior.folder, class_prompt, embeddings)
        concepts = read_concepts(job.config, lambda line: None)
        check_data(job.config, job.checkpoint, content_of(job.base_digests, concepts), (), tell)
    check_same_pictures(job.processes, concepts)
    concepts = [in_order(concept, earlier) for concept in concepts]
    texts: Callable[[str], PromptText] = embeddings
    if job.config.method.train_text_encoder:
        tokens = PromptTokenizer(base.text).texts(captions_of(concepts))
        texts = {prompt: text for prompt, (text,) in tokens.items()}.__getitem__
    batches = encode_pictures(job, concepts, cache, texts)
    return unet or base.denoiser.load(), batches


def captions_of(concepts: Iterable[Concept]) -> list[str]:
    """All prompts that rows may have, each once."""
    return list(dict.fromkeys(caption for c in concepts for record in c.records for caption in record.captions))


def check_same_pictures(processes: Processes, concepts: Sequence[Concept]) -> None:
    """Raise DataError if another process, perhaps on another machine, found other pictures."""
    digests = [record.digest for concept in concepts for record in concept.records]
    for rank, others in enumerate(processes.exchange("the list of pictures", digests)):
        if others != digests:
            raise DataError(
                f"rank {rank} found other pictures than rank {processes.rank}; "
                "--instance_data_dir and --class_data_dir must be the same folders on every machine"
            )


def sample_class_pictures(
    job: TrainingJob, missing: Sequence[int], folder: Path, prompt: str, embeddings: Callable[[str], PromptText]
) -> nn.Cell | None:
    """Sample this process's share of the class pictures with these numbers; returns the UNet if that loaded it."""
    processes, prior = job.processes, job.config.prior
    numbers = tuple(processes.share(missing))
    if not numbers:
        processes.wait_for_all("the class pictures")
        return None
    model = SamplingModel(job.base, embeddings={prompt: embeddings(prompt) for prompt in (prompt, "")})
    width, height = job.size
    request = SampleRequest(
        prompts=(prompt,),
        num_images_per_prompt=len(numbers),
        numbers=numbers,
        height=height,
        width=width,
        seed=job.seed,
        purpose="class picture",
        batch_size=min(prior.sample_batch_size, len(numbers)),
        num_inference_steps=prior.infer_steps,
        guidance_scale=prior.guidance_scale,
    )
    for sample in progress(model.sample(request), desc="class pictures", total=len(numbers), unit="picture"):
        settings = settings_of_training(sample)
        write_picture(folder / class_picture_name(sample.number), sample.picture, settings)
    processes.wait_for_all("the class pictures")
    return model.denoiser


def encode_pictures(
    job: TrainingJob, concepts: Sequence[Concept], cache: ContentCache, texts: Callable[[str], PromptText]
) -> BatchMaker:
    """Make what is missing of the latents that the rest of the run needs; the autoencoder is gone afterwards."""
    data, base, processes = job.config.data, job.base, job.processes
    framing = Framing((job.size,), data.center_crop, data.random_flip)
    plan = Plan(tuple(concepts), job.config.run.train_batch_size, framing, job.seed, job.batches_per_step)

    def load_encoder() -> Callable[[np.ndarray], np.ndarray]:
        encoder = CellMethod(base.codec.load(decodes=False).encode)
        return lambda pictures: np.concatenate([one.asnumpy() for one in encoder(Tensor(pictures))]).astype(np.float32)

    posteriors = posterior_lookup(
        cache,
        encoder_digest=job.base_digests["vae"],
        interpolation=data.image_interpolation_mode,
        load_encoder=load_encoder,
        progress=lambda views: progress(views, desc="encoding pictures", unit="picture"),
    )
    missing = posteriors.missing(plan.views(job.done * job.batches_per_step, job.total * job.batches_per_step))
    if processes.is_first:
        check_expected_disk(job.config, base, job.done, job.total, len(missing))
    processes.wait_for_all("the list of missing latents")
    posteriors.prepare(processes.share(missing))
    processes.wait_for_all("the encoded pictures")
    posteriors.prepare(missing)  # Nothing, but where processes on several machines have no folder in common.
    gc.collect()
    loss = job.config.loss
    schedule = base.schedule.trained(loss.prediction_type)
    return BatchMaker(
        plan=plan,
        posteriors=posteriors,
        texts=texts,
        objective=draw_columns(schedule.prediction_type, NoiseSchedule.from_spec(schedule), loss.snr_gamma),
        scaled=base.codec.spec.scaled,
        noise_offset=job.config.noise_offset,
        num_add_time_ids=base.num_add_time_ids,
    )
