"""What a run trains on: class pictures, embeddings and latents, until every batch can be made from its number."""

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from dreambooth_ms.cli.output import progress, tell
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.cli.training_needs import check_expected_disk
from dreambooth_ms.config.train import CAPTIONS, TrainConfig
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.buckets import least_losing, lost_area, sizes_of
from dreambooth_ms.data.cache import ContentCache, embedding_lookup, posterior_lookup
from dreambooth_ms.data.captions import Captioning, Wording
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.pictures import Size, told
from dreambooth_ms.data.plan import Framing, Plan, View, taking_turns
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Source
from dreambooth_ms.data.text import PromptTokenizer, embed_prompts
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule
from dreambooth_ms.diffusion.objectives import draw_columns
from dreambooth_ms.errors import DataError, count_of
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.picture_file import class_picture_name, missing_numbers, write_picture
from dreambooth_ms.sampling.request import SampleRequest, settings_of_training
from dreambooth_ms.training.content import content_of, in_order
from dreambooth_ms.training.run_folder import check_data
from dreambooth_ms.weights.bundle import ModelBundle


def read_concepts(config: TrainConfig, tell: Callable[[str], object] = tell) -> list[Concept]:
    """The subject, and its class as far as it is there already.

    Raises:
        DataError: there is no subject, or a picture or caption of either is damaged or missing.
    """
    data, prior = config.data, config.prior
    background, captioning = data.transparent_background, partial(_captioning, config)
    subject = Source(Path(data.instance_data_dir), data.instance_prompt, captioning(INSTANCE), None, background)
    concepts = [Concept(INSTANCE, subject.records(tell), wording=_wording(config))]
    if prior.folder and len(class_numbers_to_come(config)) < prior.num_class_images:
        of_class = Source(prior.folder, prior.class_prompt or "", captioning(CLASS), prior.num_class_images, background)
        concepts.append(Concept(CLASS, of_class.records(tell), prior.prior_loss_weight))
    return concepts


def _captioning(config: TrainConfig, name: str) -> Captioning:
    """Where the prompts of the subject's or the class's pictures come from."""
    wanted, is_subject = config.captions, name == INSTANCE
    combines = wanted.read_prompt_from_txt in (name, "both")
    replaces = is_subject and (wanted.use_txt_as_label or (wanted.caption_column and not combines))
    return Captioning(
        from_files=bool(combines or replaces),
        column=wanted.caption_column if combines or replaces else None,
        from_names=is_subject and wanted.use_filename_as_label,
        template=wanted.prompt_template if combines and not wanted.use_txt_as_label else CAPTIONS[0],
    )


def _wording(config: TrainConfig) -> Wording | None:
    """How rows vary the subject's prompts, if they do."""
    wanted = config.captions
    wording = Wording(wanted.caption_dropout, wanted.shuffle_caption, wanted.keep_tokens)
    return None if wording == Wording() else wording


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
    trains_text = job.config.method.train_text_encoder
    tell_cut_prompts(base, concepts, class_prompt)
    with job.processes.first_goes_ahead("the prompts' embeddings"):
        # All at once, because the encoders are compiled anew each time.
        embeddings.prepare([*([] if trains_text else prompts_of(job, concepts)), class_prompt, ""])
    unet, earlier = None, job.checkpoint.content if job.checkpoint else {}
    missing = job.processes.from_first("the class pictures", lambda: class_numbers_to_come(job.config))
    if prior.folder and missing:
        unet = sample_class_pictures(job, missing, prior.folder, embeddings, plan_of(job, concepts[:1]))
        job.processes.wait_for_all("the class pictures")
        concepts = read_concepts(job.config, lambda line: None)
        check_data(job.config, job.checkpoint, content_of(job.base_digests, concepts), (), tell)
    check_same_pictures(job.processes, concepts)
    concepts = [in_order(concept, earlier) for concept in concepts]
    texts: Callable[[str], PromptText] = embeddings
    if trains_text:
        tokens = PromptTokenizer(base.text, warns=False).texts(prompts_of(job, concepts))
        texts = {prompt: text for prompt, (text,) in tokens.items()}.__getitem__
    batches = encode_pictures(job, concepts, cache, texts)
    return unet or base.denoiser.load(), batches


def plan_of(job: TrainingJob, concepts: Sequence[Concept]) -> Plan:
    """The rows of the run."""
    data, rows = job.config.data, job.config.run.train_batch_size
    framing = Framing(sizes_of_run(job, concepts[0]), data.center_crop, data.random_flip)
    return Plan(tuple(concepts), rows, framing, job.seed, job.batches_per_step)


def sizes_of_run(job: TrainingJob, subject: Concept) -> tuple[Size, ...]:
    """Those that pictures are trained at."""
    data = job.config.data
    if not data.use_aspect_ratio_bucket:
        return (job.size,)
    pictures = [record.size for record in subject.records]
    sizes = sizes_of(data.resolution, job.base.side_multiple)
    return tuple(least_losing(sizes, pictures, data.max_buckets) if data.max_buckets else sizes)


def tell_sizes(plan: Plan, total: int) -> None:
    """A line for each size of the run: its pictures, what is cut off them, and its steps."""
    turns = Counter(taking_turns(plan.shares, step)[0] for step in range(total))
    for at, bucket in enumerate(plan.buckets):
        pictures = [record.size for concept in bucket.groups[0] for record in concept.records]
        lost, (width, height) = float(lost_area([bucket.size], pictures).mean()), bucket.size
        held, steps = count_of(len(pictures), "picture"), count_of(turns[at], "step")
        tell(f"{width}x{height}: {held}, {lost:.1%} cut off, {steps}")


def views_of(job: TrainingJob, plan: Plan) -> tuple[View, ...]:
    """What the rest of the run sees."""
    return plan.views(job.done * job.batches_per_step, job.total * job.batches_per_step)


def prompts_of(job: TrainingJob, concepts: Sequence[Concept]) -> list[str]:
    """All prompts that the rest of the run reads, each once."""
    return list(dict.fromkeys(view.prompt for view in views_of(job, plan_of(job, concepts))))


def tell_cut_prompts(base: ModelBundle, concepts: Sequence[Concept], class_prompt: str) -> None:
    """Tell what is lost of prompts that are too long: of captions their files."""
    tokenizer, shared = PromptTokenizer(base.text), [class_prompt]
    for concept in concepts:
        if len({record.captions for record in concept.records}) == 1:
            shared += concept.records[0].captions
            continue
        long = [one.path for one in concept.records if any(map(tokenizer.lost, one.captions))]
        for line in told({f"captions of more than {tokenizer.length} tokens, the rest is not read": long}):
            tell(line)
    tokenizer.texts(shared)  # Warns of each by itself.


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
    job: TrainingJob, missing: Sequence[int], folder: Path, embeddings: Callable[[str], PromptText], subject: Plan
) -> nn.Cell | None:
    """Sample this process's share of the class pictures with these numbers, at the sizes of the subject's steps and in
    their proportions; returns the UNet if that loaded it."""
    processes, prior = job.processes, job.config.prior
    prompt = prior.class_prompt or ""
    numbers = tuple(processes.share(missing))
    if not numbers:
        return None
    model = SamplingModel(job.base, embeddings={prompt: embeddings(prompt) for prompt in (prompt, "")})
    bar = progress(total=len(numbers), desc="class pictures", unit="picture")
    for at, bucket in enumerate(subject.buckets):
        own = tuple(number for number in numbers if taking_turns(subject.shares, number)[0] == at)
        request = SampleRequest(
            prompts=(prompt,),
            num_images_per_prompt=len(own),
            numbers=own,
            width=bucket.size[0],
            height=bucket.size[1],
            seed=job.seed,
            purpose="class picture",
            batch_size=min(prior.sample_batch_size, max(len(own), 1)),
            num_inference_steps=prior.infer_steps,
            guidance_scale=prior.guidance_scale,
        )
        for sample in model.sample(request) if own else ():
            settings = settings_of_training(sample)
            write_picture(folder / class_picture_name(sample.number), sample.picture, settings)
            bar.update()
    bar.close()
    return model.denoiser


def encode_pictures(
    job: TrainingJob, concepts: Sequence[Concept], cache: ContentCache, texts: Callable[[str], PromptText]
) -> BatchMaker:
    """Make what is missing of the latents that the rest of the run needs; the autoencoder is gone afterwards."""
    data, base, processes, plan = job.config.data, job.base, job.processes, plan_of(job, concepts)

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
    missing = posteriors.missing(views_of(job, plan))
    if data.use_aspect_ratio_bucket:
        tell_sizes(plan, job.total)
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
