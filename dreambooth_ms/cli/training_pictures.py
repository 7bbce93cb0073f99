"""What a run trains on: class pictures, embeddings and latents, until every batch can be made from its number."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from dreambooth_ms.cli.output import progress, tell, with_progress
from dreambooth_ms.cli.training_concepts import numbers_to_come, read_concepts, tell_cut_prompts
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.cli.training_needs import check_expected_disk
from dreambooth_ms.config.choices import Interpolation
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.cache import ContentCache, embedding_lookup, posterior_lookup
from dreambooth_ms.data.conditioning import PromptText, PromptTokenizer, embed_prompts
from dreambooth_ms.data.pictures import frame_of, open_picture, resize_and_crop
from dreambooth_ms.data.plan import Plan, table_of_sizes, taking_turns
from dreambooth_ms.data.records import CLASS, Concept, Source
from dreambooth_ms.data.second_stage import small_ones, twice
from dreambooth_ms.diffusion import draw_columns
from dreambooth_ms.errors import DataError, count_of
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.picture_file import Row, class_picture_name, write_picture, write_sheet
from dreambooth_ms.sampling.request import SampleRequest, settings_of_training
from dreambooth_ms.sampling.schedulers import fitting_scheduler
from dreambooth_ms.training.content import digests_of, in_order
from dreambooth_ms.training.run_folder import check_data


def prepare_training(job: TrainingJob) -> tuple[TrainingJob, nn.Cell, BatchMaker]:
    """The job with all its pictures, the network to train, and what makes batches; all encoders are gone afterwards."""
    base, cache = job.base, ContentCache(job.config.output_dir / "cache")
    generated = [(one.prompt, one.generated.class_negative_prompt) for one in job.sources if one.generated]
    class_prompts = [text for both in generated for text in both]
    digests = " ".join(job.base_digests[reader.name] for reader in base.text)
    key = f"{digests}, clip_skip {base.clip_skip}, zeros {base.zeros_for_empty_prompt}"
    embeddings = embedding_lookup(cache, key, lambda missing: embed_prompts(base, missing))
    encodes_text = job.config.encodes_text
    tell_cut_prompts(job, class_prompts)
    with job.processes.first_goes_ahead("the prompts' embeddings"):
        # All at once, because the encoders are compiled anew each time.
        prompts = () if encodes_text else (view.prompt for view in job.views())
        embeddings.prepare({*prompts, *class_prompts, ""})
    unet, earlier = None, job.checkpoint.content if job.checkpoint else {}
    missing = job.processes.from_first("the class pictures", lambda: numbers_to_come(job.sources))
    if any(missing.values()):
        unet = sample_class_pictures(job, missing, {text: embeddings(text) for text in class_prompts})
        job.processes.wait_for_all("the class pictures")
        job = replace(job, concepts=read_concepts(job.sources, lambda line: None))
        check_data(job.config, job.checkpoint, job.content, {}, tell)
    check_same_pictures(job.processes, [*job.concepts, *job.held_out], job.sources)
    held_out = tuple(in_order(concept, earlier) for concept in job.held_out)
    job = replace(job, concepts=[in_order(concept, earlier) for concept in job.concepts], held_out=held_out)
    texts: Callable[[str], PromptText] = embeddings
    if encodes_text:
        tokenizer = PromptTokenizer(base.text, warns=False)
        texts = lambda prompt: tokenizer.texts([prompt])[prompt][0]  # noqa: E731
    batches = encode_pictures(job, cache, texts)
    return job, unet or base.denoiser.load(), batches


def check_same_pictures(processes: Processes, concepts: Sequence[Concept], sources: Sequence[Source] = ()) -> None:
    """Raise DataError if another process, perhaps on another machine, found other pictures, captions or masks."""
    digests = [value for source in sources for value in source.settings.values()]
    digests += [digest for concept in concepts for digest in digests_of(concept)]
    for rank, others in enumerate(processes.exchange("the list of pictures", digests)):
        if others != digests:
            raise DataError(
                f"rank {rank} found other pictures than rank {processes.rank}; "
                "--instance_data_dir and --class_data_dir must be the same folders on every machine"
            )


def sample_class_pictures(
    job: TrainingJob, missing: Mapping[str, Sequence[int]], texts: Mapping[str, PromptText]
) -> nn.Cell | None:
    """Sample this process's share of these class pictures, by folder; returns the UNet if that loaded it."""
    shares = {folder: job.processes.share(numbers) for folder, numbers in missing.items()}
    if not any(shares.values()):
        return None
    model = SamplingModel(job.base, embeddings=texts)
    bar = progress(total=sum(map(len, shares.values())), desc="class pictures", unit="picture")
    classes = [one for one in job.sources if one.concept.group == CLASS]
    for source, subject in zip(classes, job.subjects, strict=False):
        numbers = shares.pop(str(source.folder), ())
        for request in class_requests(source, replace(job.plan, concepts=(subject,)), numbers, job.base.clip_skip):
            scheduler = fitting_scheduler(request.scheduler, job.base.schedule.config)
            for sample in model.sample(replace(request, scheduler=scheduler)):
                settings = settings_of_training(sample)
                write_picture(source.folder / class_picture_name(sample.number), sample.picture, settings)
                bar.update()
    bar.close()
    return model.denoiser


def class_requests(source: Source, subject: Plan, numbers: Sequence[int], clip_skip: int) -> Iterator[SampleRequest]:
    """The pictures of a class with these numbers, at the sizes of its subject's steps and in their proportions."""
    for at, bucket in enumerate(subject.buckets):
        own = tuple(number for number in numbers if taking_turns(subject.shares, number)[0] == at)
        if own and (prior := source.generated):
            yield SampleRequest(
                prompts=(source.prompt,),
                negative_prompt=prior.class_negative_prompt,
                num_images_per_prompt=len(own),
                numbers=own,
                width=bucket.size[0],
                height=bucket.size[1],
                seed=subject.seed,
                purpose=f"{source.concept.name} picture",
                batch_size=min(prior.sample_batch_size, len(own)),
                num_inference_steps=prior.infer_steps,
                guidance_scale=prior.guidance_scale,
                clip_skip=clip_skip,
            )


def encode_pictures(job: TrainingJob, cache: ContentCache, texts: Callable[[str], PromptText]) -> BatchMaker:
    """Make what is missing of the latents that the rest of the run needs; the autoencoder is gone afterwards. Raises
    WeightError if the model of a second stage does not say how small pictures are noisy."""
    data, base, processes, plan = job.config.data, job.base, job.processes, job.plan

    def load_encoder() -> Callable[[np.ndarray], np.ndarray]:
        encoder = CellMethod(base.codec.load(decodes=False).encode)
        return lambda pictures: np.concatenate([one.asnumpy() for one in encoder(Tensor(pictures))]).astype(np.float32)

    posteriors = posterior_lookup(
        cache,
        encoder_digest=job.base_digests["vae"],
        interpolation=data.image_interpolation_mode,
        load_encoder=load_encoder,
        progress=lambda views: with_progress(views, len(views), desc="encoding pictures", unit="picture"),
    )
    missing = posteriors.missing(job.views())
    if data.use_aspect_ratio_bucket:
        for (width, height), pictures, lost, steps in table_of_sizes(plan, job.total):
            tell(f"{width}x{height}: {count_of(pictures, 'picture')}, {lost:.1%} cut off, {count_of(steps, 'step')}")
    if processes.is_first:
        if data.debug_arb:
            write_crops(plan, data.image_interpolation_mode, job.config.output_dir / "crops.png")
        check_expected_disk(job, len(missing))
    processes.wait_for_all("the list of missing latents")
    posteriors.prepare(processes.share(missing))
    processes.wait_for_all("the encoded pictures")
    posteriors.prepare(missing)  # Nothing, but where processes on several machines have no folder in common.
    gc.collect()
    loss, second_stage = job.config.loss, None
    if base.enlarges:
        second_stage = small_ones(base.noise_of_small) if loss.low_res_conditioning else twice
    return BatchMaker(
        plan=plan,
        posteriors=posteriors,
        texts=texts,
        objective=draw_columns(base.schedule.trained(loss), loss),
        scaled=base.codec.spec.scaled,
        loss=loss,
        num_add_time_ids=base.num_add_time_ids,
        second_stage=second_stage,
        masked=job.masked,
        unmasked_weight=data.unmasked_weight,
    )


def write_crops(plan: Plan, interpolation: Interpolation, path: Path) -> None:
    """A sheet of the first pictures of each size, cropped in the middle."""
    rows = []
    for bucket in plan.buckets:
        records = [record for concept in bucket.groups[0] for record in concept.records]
        shown, label = records[:8], "{}x{}\n{}".format(*bucket.size, count_of(len(records), "picture"))
        crops = [
            resize_and_crop(open_picture(one.path, one.background), frame_of(one.size, bucket.size), interpolation)
            for one in shown
        ]
        rows.append(Row(label, list(map(np.asarray, crops)), [one.path.name for one in shown]))
    write_sheet(path, "What is left of the pictures at each size", rows)
    tell(f"wrote {path}")
