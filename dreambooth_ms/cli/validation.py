"""Pictures during training: always the same prompt and noise, so that a person sees the subject being learnt."""

from contextlib import nullcontext

import numpy as np

from dreambooth_ms.config.choices import SamplingScheduler, ValidationScheduler
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.picture_file import write_picture
from dreambooth_ms.sampling.request import SampleRequest, settings_of_training
from dreambooth_ms.training.methods import Learner
from dreambooth_ms.training.run_folder import seed_of
from dreambooth_ms.weights.bundle import ModelBundle

PURPOSE, FOLDER = "validation", "validation"
STEPS, GUIDANCE = 25, 7.5
"""As in diffusers' scripts."""

SCHEDULERS: dict[ValidationScheduler, SamplingScheduler] = {
    "DPMSolverMultistepScheduler": "dpm++_2m",
    "DDIMScheduler": "ddim",
}


class Validator:
    """Samples the pictures of --validation_prompt with the weights as they are.

    One picture at a time, by one compiled denoiser, which takes less memory than a training step of as many rows.
    """

    def __init__(self, config: TrainConfig, bundle: ModelBundle, unet: UNet2DConditionModel, learner: Learner) -> None:
        wanted = config.validation
        assert wanted.validation_prompt is not None, "asked for by a prompt"
        self._output, self._dropout = config.output_dir / FOLDER, learner.dropout
        self._request = SampleRequest(
            prompts=(wanted.validation_prompt,),
            num_images_per_prompt=wanted.num_validation_images,
            height=config.data.resolution,
            width=config.data.resolution,
            seed=seed_of(config),
            purpose=PURPOSE,
            batch_size=1,
            scheduler=SCHEDULERS[wanted.validation_scheduler],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        )
        self._model = SamplingModel(bundle, denoiser=unet, text_encoders=learner.text_encoders)
        if not learner.text_encoders:
            self._model.embeddings(self._request)  # So that the text encoders are gone before the first step.
        self._model.load()

    def sample(self, step: int) -> list[np.ndarray]:
        """Sample and write the pictures after a step; returns them, each (H, W, 3) uint8."""
        with self._dropout.off() if self._dropout else nullcontext():
            samples = list(self._model.sample(self._request))
        for sample in samples:
            path = self._output / f"step-{step:06d}-{sample.number}.png"
            write_picture(path, sample.picture, settings_of_training(self._request, sample) | {"step": step})
        return [sample.picture for sample in samples]
