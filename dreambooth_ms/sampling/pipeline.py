"""From starting noise and text embeddings to pictures.

Shapes: N pictures, B of them at a time, C, h, w of the latents, S text tokens, E text width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from dreambooth_ms.config.schema import SamplingScheduler
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
        self._scaling_factor = vae.spec.scaling_factor

    def pictures(self, noise: np.ndarray, text: np.ndarray, negative: np.ndarray) -> Iterator[np.ndarray]:
        """Pictures (H, W, 3) uint8, one per row of noise, as soon as their batch is done.

        Args:
            noise: (N, C, h, w) standard normal.
            text: (N, S, E) embeddings of the prompts.
            negative: (S, E) embedding of the negative prompt.
        """
        size = self.settings.batch_size
        for start in range(0, len(noise), size):
            rows = np.arange(start, min(start + size, len(noise)))
            padded = np.resize(rows, size)
            for latents in self.denoise(noise[padded], text[padded], negative):
                last = latents
            decoded = self._decoder(last * (1 / self._scaling_factor)).asnumpy()
            yield from to_pictures(decoded[: len(rows)])

    def denoise(self, noise: np.ndarray, text: np.ndarray, negative: np.ndarray) -> Iterator[Tensor]:
        """The latents (B, C, h, w) after every step: the caller decides what to show of them."""
        settings = self.settings
        scheduler = create_scheduler(settings.scheduler, self._scheduler_config, settings.num_inference_steps)
        rows = len(noise)
        latents = Tensor(noise, ms.float32) * float(scheduler.init_noise_sigma)
        positive_BSE = Tensor(text, ms.float32)
        negative_BSE = Tensor(np.broadcast_to(negative, text.shape).copy(), ms.float32)
        guidance = Tensor(settings.guidance_scale, ms.float32)
        for timestep in scheduler.timesteps:
            timesteps_B = Tensor(np.full(rows, float(timestep), np.float32))
            inputs = scheduler.scale_model_input(latents, timestep)
            prediction = self._denoiser(inputs, timesteps_B, positive_BSE, negative_BSE, guidance)
            latents = scheduler.step(prediction, timestep, latents)[0]
            yield latents


def starting_noise(
    count: int, latent_shape: tuple[int, int, int], seed: int, purpose: str, first: int = 0
) -> np.ndarray:
    """Standard normal (count, C, h, w); a picture's noise depends on the seed, the purpose and its own number alone."""
    return np.stack([standard_normal(latent_shape, seed, purpose, row=first + i) for i in range(count)])


def to_pictures(decoded_B3HW: np.ndarray) -> np.ndarray:
    """Decoder output in about [-1, 1] -> (B, H, W, 3) uint8, cut to the range."""
    levels = np.rint((decoded_B3HW.transpose(0, 2, 3, 1) * 0.5 + 0.5) * 255)
    return np.clip(levels, 0, 255).astype(np.uint8)
