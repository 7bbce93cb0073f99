"""Pictures during training: always the same prompt and noise, so that a person sees the subject being learnt."""

from contextlib import nullcontext

import numpy as np

from dreambooth_ms.cli.assemble import embed_prompts, encode
from dreambooth_ms.config.choices import SamplingScheduler, ValidationScheduler
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.sampling.picture_file import write_picture
from dreambooth_ms.sampling.pipeline import Sampler, SamplingSettings, starting_noise
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
    """Draws the pictures of --validation_prompt with the weights as they are.

    One picture at a time, by one compiled denoiser, which takes less memory than a training step of as many rows.
    """

    def __init__(self, config: TrainConfig, folder: ModelBundle, unet: UNet2DConditionModel, learner: Learner) -> None:
        wanted = config.validation
        assert wanted.validation_prompt is not None, "asked for by a prompt"
        self.prompt = wanted.validation_prompt
        self._output = config.output_dir / FOLDER
        self._folder, self._learner = folder, learner
        settings = SamplingSettings(SCHEDULERS[wanted.validation_scheduler], STEPS, GUIDANCE, batch_size=1)
        self._settings = {**vars(settings), "prompt": self.prompt, "seed": seed_of(config)}
        self._sampler = Sampler(unet, folder.load_vae(encodes=False), folder.scheduler_config, settings)
        shape = folder.latent_shape(config.data.resolution, config.data.resolution)
        self._noise = starting_noise(wanted.num_validation_images, shape, seed_of(config), PURPOSE)
        self._frozen_embeddings = None if learner.text_encoders else embed_prompts(folder, [self.prompt])

    def draw(self, step: int) -> list[np.ndarray]:
        """Draw and write the pictures after a step; returns them, each (H, W, 3) uint8."""
        with self._learner.dropout.off() if self._learner.dropout else nullcontext():
            embeddings = self._frozen_embeddings or self._embed()
            prompts = [embeddings[self.prompt]] * len(self._noise)
            pictures = list(self._sampler.pictures(self._noise, prompts, embeddings[""]))
        for number, picture in enumerate(pictures):
            path = self._output / f"step-{step:06d}-{number}.png"
            write_picture(path, picture, {**self._settings, "step": step, "number": number})
        return pictures

    def _embed(self) -> dict[str, PromptText]:
        assert self._learner.text_encoders is not None
        return encode(self._folder, self._learner.text_encoders, [self.prompt])
