"""Pictures during training: always the same prompts and noise, so that a person sees the subject being learnt."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn
from PIL import Image

from dreambooth_ms.cli.sample import read_prompts
from dreambooth_ms.cli.training_job import Training, TrainingJob
from dreambooth_ms.config.choices import SamplingScheduler, ValidationScheduler
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.holes import middle_hole
from dreambooth_ms.data.pictures import Size, frame_of, open_picture, resize_and_crop
from dreambooth_ms.data.records import Record
from dreambooth_ms.data.second_stage import ENLARGED
from dreambooth_ms.sampling.autoencoder import fitted
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.picture_file import Row, validation_name, write_picture, write_sheet, write_strip
from dreambooth_ms.sampling.request import SampleRequest, settings_of_training
from dreambooth_ms.sampling.schedulers import fitting_scheduler
from dreambooth_ms.training.loop import StepReport
from dreambooth_ms.training.trackers import Trackers

PURPOSE, FOLDER = "validation", "validation"

SCHEDULERS: dict[ValidationScheduler, SamplingScheduler] = {
    "DPMSolverMultistepScheduler": "dpm++_2m",
    "DDIMScheduler": "ddim",
}


def with_prompts_read(config: TrainConfig) -> TrainConfig:
    """The same with the lines of the files that --validation_prompt names in their place, each prompt once. Raises
    DataError if a file is missing, not UTF-8 text, or has no line with a prompt."""
    wanted = config.validation
    read = [read_prompts(text, "--validation_prompt") for text in wanted.validation_prompt or ()]
    prompts = tuple(dict.fromkeys(prompt for lines in read for prompt in lines)) or None
    return replace(config, validation=replace(wanted, validation_prompt=prompts))


class ShowValidation:
    """A hook: after every so many steps the pictures of --validation_prompt, with the weights as they are; a sheet of
    them, and one of each prompt through the run. The process that has the trackers samples them, one at a time."""

    def __init__(self, job: TrainingJob, unet: nn.Cell, training: Training, trackers: Trackers | None) -> None:
        wanted = job.config.validation
        assert wanted.validation_prompt is not None, "asked for by a prompt"
        self._output, self._every = job.config.output_dir / FOLDER, job.validation_interval
        self._training, self._trackers, self._processes = training, trackers, job.processes
        self._base = job.config.model.pretrained_model_name_or_path
        self._request = validation_request(job, wanted.validation_prompt, wanted.num_validation_images)
        if trackers:
            self._model = lent_model(job, unet, training, self._request)

    def __call__(self, report: StepReport) -> None:
        """Sample, write and log after this step, if it is time and the run goes on."""
        if report.step % self._every or report.stop_asked:
            return
        if self._trackers:
            prompts = self._request.prompts
            # Each by itself: the numbers of its pictures, and so their noise, do not depend on the other prompts.
            requests = [replace(self._request, prompts=(prompt,)) for prompt in prompts]
            with self._training.as_result():
                of_prompts = [list(self._model.sample(request)) for request in requests]
            samples = [sample for own in of_prompts for sample in own]
            more = {"step": report.step, "pretrained_model_name_or_path": self._base}
            for number, sample in enumerate(samples):
                path = self._output / validation_name(report.step, number)
                write_picture(path, sample.picture, settings_of_training(sample) | more)
            rows = [Row(prompt, [one.picture for one in own]) for prompt, own in zip(prompts, of_prompts, strict=True)]
            write_sheet(self._output / f"step-{report.step:06d}.png", f"After step {report.step}", rows)
            write_strip(self._output, prompts, report.step)
            captions = [row.label for row in rows for _ in row.pictures]
            self._trackers.images(report.step, FOLDER, [sample.picture for sample in samples], captions)
        self._processes.wait_for_all("the validation pictures")


def validation_request(job: TrainingJob, prompts: tuple[str, ...], count: int) -> SampleRequest:
    """So many pictures of each prompt, or one for each that is enlarged, as --validation_* says, one at a time."""
    wanted, side = job.config.validation, job.config.data.resolution
    read = (open_picture(Path(path), job.config.data.transparent_background) for path in wanted.validation_images or ())
    small = [fitted(picture, side // ENLARGED, side // ENLARGED) for picture in read]
    return SampleRequest(
        prompts=prompts,
        negative_prompt=wanted.validation_negative_prompt,
        num_images_per_prompt=len(small) or count,
        small=np.stack(small) if small else None,
        height=side,
        width=side,
        seed=job.seed if wanted.validation_seed is None else wanted.validation_seed,
        purpose=PURPOSE,
        batch_size=1,
        scheduler=fitting_scheduler(SCHEDULERS[wanted.validation_scheduler], job.base.schedule.config),
        num_inference_steps=wanted.validation_inference_steps,
        guidance_scale=wanted.validation_guidance_scale,
        clip_skip=job.base.clip_skip,
        **(_to_inpaint(job, job.concepts[0].records[0], (side, side)) if job.base.inpaints else {}),
    )


def lent_model(job: TrainingJob, unet: nn.Cell, training: Training, request: SampleRequest) -> SamplingModel:
    """What samples such a request with the networks of a training; unless these read text, its prompts are read."""
    encoders = training.learner.text_encoders
    model = SamplingModel(job.trained_base, denoiser=unet, text_encoders=encoders)
    if not encoders:
        model.embeddings(request)  # So that the text encoders are gone before the first step.
    model.load()
    return model


def _to_inpaint(job: TrainingJob, record: Record, size: Size) -> dict[str, Any]:
    """What a request has of a picture whose middle is drawn anew."""
    picture, frame = open_picture(record.path, record.background), frame_of(record.size, size)
    crop = resize_and_crop(picture, frame, job.config.data.image_interpolation_mode)
    return {"image": crop, "mask": Image.fromarray(middle_hole(size).mask(size)), "strength": 1.0}
