"""Pictures during training: always the same prompt and noise, so that a person sees the subject being learnt."""

from contextlib import nullcontext

from mindspore import nn

from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.cli.training_setup import Training
from dreambooth_ms.config.choices import SamplingScheduler, ValidationScheduler
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


class ShowValidation:
    """A hook: after every so many steps the pictures of --validation_prompt, with the weights as they are.

    The process that has the tracker samples them one at a time, by one compiled denoiser, which takes less memory than
    a training step of as many rows.
    """

    def __init__(self, job: TrainingJob, unet: nn.Cell, training: Training, tracker: Tracker | None) -> None:
        wanted, (width, height) = job.config.validation, job.size
        assert wanted.validation_prompt is not None, "asked for by a prompt"
        self._output, self._every = job.config.output_dir / FOLDER, job.validation_interval
        self._training, self._tracker, self._processes = training, tracker, job.processes
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
            clip_skip=job.base.clip_skip,
        )
        self._model = SamplingModel(job.base, denoiser=unet, text_encoders=training.learner.text_encoders)
        if tracker:
            if not training.learner.text_encoders:
                self._model.embeddings(self._request)  # So that the text encoders are gone before the first step.
            self._model.load()

    def __call__(self, report: StepReport) -> None:
        """Sample, write and log after this step, if it is time and the run goes on."""
        if report.step % self._every or report.stop_asked:
            return
        if self._tracker:
            dropout = self._training.learner.dropout
            with self._training.result_weights(), dropout.off() if dropout else nullcontext():
                samples = list(self._model.sample(self._request))
            for sample in samples:
                path = self._output / f"step-{report.step:06d}-{sample.number}.png"
                settings = settings_of_training(sample) | {"step": report.step}
                write_picture(path, sample.picture, settings)
            self._tracker.log_pictures(report.step, FOLDER, [sample.picture for sample in samples])
        self._processes.wait_for_all("the validation pictures")
