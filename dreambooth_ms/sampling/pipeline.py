"""From starting noise and encoded prompts to pictures.

Shapes: N pictures, B of them at a time, C, h, w of the latents.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from dreambooth_ms.config.schema import SamplingScheduler
from dreambooth_ms.data.conditioning import (
    AESTHETIC_SCORE,
    NEGATIVE_AESTHETIC_SCORE,
    Conditioning,
    PromptText,
    size_ids,
)
from dreambooth_ms.data.pictures import CropBox
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import AutoencoderKL, VaeDecoder
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.sampling.denoiser import Denoiser
from dreambooth_ms.sampling.schedulers import create_scheduler


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn."""

    scheduler: SamplingScheduler
    num_inference_steps: int
    guidance_scale: float
    batch_size: int


class Sampler:
    """Draws pictures with one UNet and one autoencoder; both are compiled once, for batches of one fixed size.

    A picture depends on its own noise and text alone, so it is the same whatever the batch size.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler_config: Mapping[str, Any],
        settings: SamplingSettings,
    ) -> None:
        self.settings = settings
        self._scheduler_config = scheduler_config
        self._denoiser = Denoiser(unet, guided=settings.guidance_scale > 1)
        self._decoder = VaeDecoder(vae)
        self._unet_spec, self._vae_spec = unet.spec, vae.spec

    def pictures(self, noise: np.ndarray, prompts: Sequence[PromptText], negative: PromptText) -> Iterator[np.ndarray]:
        """Pictures (H, W, 3) uint8, one per row of noise, as soon as their batch is done.

        Args:
            noise: (N, C, h, w) standard normal.
            prompts: the encoded prompts, N.
            negative: the encoded negative prompt.

        Raises:
            WeightError: a picture comes out as values that are no numbers, which a viewer would show as black.
        """
        size = self.settings.batch_size
        for start in range(0, len(noise), size):
            rows = np.arange(start, min(start + size, len(noise)))
            padded = np.resize(rows, size)
            for latents in self.denoise(noise[padded], [prompts[row] for row in padded], negative):
                last = latents
            decoded = self._decoder(Tensor(self._vae_spec.unscaled(last.asnumpy()))).asnumpy()
            for row, picture in zip(rows, decoded, strict=False):
                if not np.isfinite(picture).all():
                    raise WeightError(
                        f"picture {row} came out as values that are no numbers; check the base's weights and the "
                        "adapter's, or give another autoencoder with --pretrained_vae_model_name_or_path"
                    )
            yield from to_pictures(decoded[: len(rows)])

    def denoise(self, noise: np.ndarray, prompts: Sequence[PromptText], negative: PromptText) -> Iterator[Tensor]:
        """The latents (B, C, h, w) after every step: the caller decides what to show of them."""
        settings = self.settings
        scheduler = create_scheduler(settings.scheduler, self._scheduler_config, settings.num_inference_steps)
        rows = len(noise)
        latents = Tensor(noise, ms.float32) * float(scheduler.init_noise_sigma)
        conditioning = self._conditioning(noise.shape, prompts, negative).tensors()
        guidance = Tensor(settings.guidance_scale, ms.float32)
        for timestep in scheduler.timesteps:
            timesteps_B = Tensor(np.full(rows, float(timestep), np.float32))
            inputs = scheduler.scale_model_input(latents, timestep)
            prediction = self._denoiser(inputs, timesteps_B, guidance, *conditioning)
            latents = scheduler.step(prediction, timestep, latents)[0]
            yield latents

    def _conditioning(
        self, latent_shape: tuple[int, ...], prompts: Sequence[PromptText], negative: PromptText
    ) -> Conditioning:
        """Prompts, and the pictures' sizes as if they were whole; behind the same of the negative if it is guided."""
        rows, _, height, width = latent_shape
        size = width * self._vae_spec.downsampling, height * self._vae_spec.downsampling
        count = self._unet_spec.num_size_ids(len(negative.pooled))
        positive_ids, negative_ids = (
            size_ids(count, size, CropBox(0, 0), size, score) for score in (AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE)
        )
        if not self._denoiser.guided:
            return Conditioning.of(prompts, [positive_ids] * rows)
        return Conditioning.of([negative] * rows + list(prompts), [negative_ids] * rows + [positive_ids] * rows)


def starting_noise(
    count: int, latent_shape: tuple[int, int, int], seed: int, purpose: str, first: int = 0
) -> np.ndarray:
    """Standard normal (count, C, h, w); a picture's noise depends on the seed, the purpose and its own number alone."""
    return np.stack([standard_normal(latent_shape, seed, purpose, row=first + i) for i in range(count)])


def to_pictures(decoded_B3HW: np.ndarray) -> np.ndarray:
    """Decoder output in about [-1, 1] -> (B, H, W, 3) uint8, cut to the range."""
    levels = np.rint((decoded_B3HW.transpose(0, 2, 3, 1) * 0.5 + 0.5) * 255)
    return np.clip(levels, 0, 255).astype(np.uint8)
