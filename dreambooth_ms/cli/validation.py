"""Pictures during training: always the same prompt and noise, so that a person sees the subject being learnt."""

from contextlib import nullcontext

import numpy as np

from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.cli.training_setup import Training
from dreambooth_ms.config.choices import SamplingScheduler, ValidationScheduler
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.picture_file import write_picture
from dreambooth_ms.sampling.request import SampleRequest, settings_of_training
from dreambooth_ms.training.loop import StepReport
from dreambooth_ms.training.trackers import Tracker

PURPOSE, FOLDER = "validation", "validation"
STEPS, GUIDANCE = 25, 7.5
"""As in diffusers' scripts."""

SCHEDULERS: dict[ValidationScheduler, SamplingScheduler] = {
    "DPMSolverMultistepScheduler": "dpm++_2m",
    "DDIMScheduler": "ddim",
}


class Validation:
    """A hook: samples the pictures of --validation_prompt after every so many steps, in the first process.

    One picture at a time, by one compiled denoiser, which takes less memory than a training step of as many rows.

    Args:
        job: the run.
        unet: the network that is trained.
        training: what it is trained with.
        tracker: takes the pictures; None in all processes but the first.
    """

    def __init__(
        self, job: TrainingJob, unet: UNet2DConditionModel, training: Training, tracker: Tracker | None
    ) -> None:
        wanted, text_encoders = job.config.validation, training.learner.text_encoders
        assert wanted.validation_prompt is not None, "asked for by a prompt"
        self._every, self._output = wanted.validation_steps, job.config.output_dir / FOLDER
        self._training, self._tracker, self._processes = training, tracker, job.processes
        width, height = job.size
        self._request = SampleRequest(
            prompts=(wanted.validation_prompt,),
            num_images_per_prompt=wanted.num_validation_images,
            height=height,
            width=width,
            seed=job.seed,
            purpose=PURPOSE,
            batch_size=1,
            scheduler=SCHEDULERS[wanted.validation_scheduler],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        )
        self._model = SamplingModel(job.base, denoiser=unet, text_encoders=text_encoders)
        if tracker:
            if not text_encoders:
                self._model.embeddings(self._request)  # So that the text encoders are gone before the first step.
            self._model.load()

    def __call__(self, report: StepReport) -> None:
        """Sample after this step, if it is time and the run goes on."""
        if report.step % self._every or report.stop_asked:
            return
        if self._tracker:
            self._tracker.log_pictures(report.step, "validation", self._sample(report.step))
        self._processes.wait_for_all("the validation pictures")

    def _sample(self, step: int) -> list[np.ndarray]:
        """Sample and write the pictures after a step; returns them, each (H, W, 3) uint8."""
        dropout = self._training.learner.dropout
        with self._training.result_weights(), dropout.off() if dropout else nullcontext():
            samples = list(self._model.sample(self._request))
        for sample in samples:
            path = self._output / f"step-{step:06d}-{sample.number}.png"
            write_picture(path, sample.picture, settings_of_training(self._request, sample) | {"step": step})
        return [sample.picture for sample in samples]
