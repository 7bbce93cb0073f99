"""From starting noise and encoded prompts to pictures.

Shapes: N pictures, B of them at a time, C, h, w of the latents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from dreambooth_ms.data.conditioning import Conditioning, PromptText, add_time_ids
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import AutoencoderKL
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.sampling.autoencoder import PictureDecoder
from dreambooth_ms.sampling.denoiser import Denoiser
from dreambooth_ms.sampling.settings import PictureSizes, SamplingSettings, Stopped
from dreambooth_ms.sampling.trajectory import Trajectory

__all__ = ["Rows", "Sampler", "SamplingSettings", "starting_noise"]

BatchStep = Callable[[int, int, range, np.ndarray], object]
"""Step from 1, steps, numbers of the pictures, their latents (B, C, h, w)."""


@dataclass(frozen=True)
class Rows:
    """Pictures to draw, by number from 0."""

    noise: np.ndarray
    """(N, C, h, w) standard normal."""
    prompts: Sequence[PromptText]
    """N encoded prompts."""
    negative: PromptText
    """The encoded negative prompt."""
    start: np.ndarray | None = None
    """Latents (N, C, h, w) of the pictures that they start from."""
    sizes: PictureSizes = field(default_factory=PictureSizes)
    seed: int = 0
    """Of the noise that steps draw."""


class Sampler:
    """Draws pictures with one UNet and one autoencoder; what is compiled is compiled once for each size of a batch.

    A picture depends on its own row alone, so it is the same whatever the batch size.

    Args:
        unet: the denoiser.
        vae: the autoencoder, which decodes one picture at a time.
        scheduler_config: `scheduler_config.json` of the model.
        settings: how to draw; they may be replaced between pictures.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler_config: Mapping[str, Any],
        settings: SamplingSettings,
    ) -> None:
        self.settings = settings
        self.decoder = PictureDecoder(vae)
        self._scheduler_config = scheduler_config
        self._unet, self._vae_spec = unet, vae.spec
        self._denoisers: dict[tuple[bool, bool], Denoiser] = {}

    def pictures(self, noise: np.ndarray, prompts: Sequence[PromptText], negative: PromptText) -> Iterator[np.ndarray]:
        """Pictures (H, W, 3) uint8, one per row of noise, as soon as their batch is done.

        Args:
            noise: (N, C, h, w) standard normal.
            prompts: the encoded prompts, N.
            negative: the encoded negative prompt.

        Raises:
            WeightError: a picture comes out as values that are no numbers, which a viewer would show as black.
        """
        for number, latents in self.latents(Rows(noise, prompts, negative)):
            yield self.decoder.picture(latents, number)

    def latents(
        self,
        rows: Rows,
        on_step: BatchStep | None = None,
        stopped: Stopped | None = None,
        settings: SamplingSettings | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Number and latents (C, h, w) of each picture, as soon as its batch is done.

        Args:
            rows: the pictures.
            on_step: called after each step of each batch.
            stopped: asked before each step; once it is True there are no more.
            settings: how to draw these; None: as always.
        """
        settings = settings or self.settings
        size = settings.batch_size
        for first in range(0, len(rows.noise), size):
            numbers = range(first, min(first + size, len(rows.noise)))
            trajectory = Trajectory(settings, self._scheduler_config, rows.seed, np.resize(numbers, size).tolist())
            steps = self._steps(rows, trajectory, np.resize(numbers, size), settings)
            latents = next(steps)
            for step in range(len(trajectory.timesteps)):
                if stopped and stopped():
                    return
                latents = next(steps)
                if on_step:
                    on_step(step + 1, len(trajectory.timesteps), numbers, latents.asnumpy()[: len(numbers)])
            yield from zip(numbers, latents.asnumpy(), strict=False)

    def denoise(self, noise: np.ndarray, prompts: Sequence[PromptText], negative: PromptText) -> Iterator[Tensor]:
        """The latents (B, C, h, w) after every step of one batch: the caller decides what to show of them."""
        numbers = np.arange(len(noise))
        trajectory = Trajectory(self.settings, self._scheduler_config, 0, numbers.tolist())
        steps = self._steps(Rows(noise, prompts, negative), trajectory, numbers, self.settings)
        next(steps)
        yield from steps

    def _steps(
        self, rows: Rows, trajectory: Trajectory, numbers: np.ndarray, settings: SamplingSettings
    ) -> Iterator[Tensor]:
        """The latents of a batch before the first step, and after each."""
        latents = trajectory.begin(rows.noise[numbers], None if rows.start is None else rows.start[numbers])
        yield latents
        guided = settings.guidance_scale > 1
        conditioning = self._conditioning(rows, numbers, guided).tensors()
        guidance = Tensor([settings.guidance_scale, settings.guidance_rescale], ms.float32)
        denoiser = self._denoiser(guided, guided and settings.guidance_rescale > 0)
        for index, timestep in enumerate(trajectory.timesteps):
            timesteps_B = Tensor(np.full(len(numbers), float(timestep), np.float32))
            prediction = denoiser(trajectory.inputs(latents, timestep), timesteps_B, guidance, *conditioning)
            latents = trajectory.step(index, prediction, latents)
            yield latents

    def _denoiser(self, guided: bool, rescaled: bool) -> Denoiser:
        key = guided, rescaled
        if key not in self._denoisers:
            self._denoisers[key] = Denoiser(self._unet, *key)
        return self._denoisers[key]

    def _conditioning(self, rows: Rows, numbers: np.ndarray, guided: bool) -> Conditioning:
        """Prompts and the sizes of their pictures; where it is guided, behind the same of the negative prompt."""
        _, _, height, width = rows.noise.shape
        drawn = width * self._vae_spec.downsampling, height * self._vae_spec.downsampling
        sizes, count = rows.sizes, self._unet.spec.num_add_time_ids(len(rows.negative.pooled))
        positive_ids, negative_ids = (
            add_time_ids(
                count,
                sizes.original_size or drawn,
                (sizes.crop_top, sizes.crop_left),
                sizes.target_size or drawn,
                score,
            )
            for score in (sizes.aesthetic_score, sizes.negative_aesthetic_score)
        )
        prompts, batch = [rows.prompts[number] for number in numbers], len(numbers)
        if not guided:
            return Conditioning.of(prompts, [positive_ids] * batch)
        return Conditioning.of([rows.negative] * batch + prompts, [negative_ids] * batch + [positive_ids] * batch)


def starting_noise(
    count: int, latent_shape: tuple[int, int, int], seed: int, purpose: str, first: int = 0
) -> np.ndarray:
    """Standard normal (count, C, h, w); a picture's noise depends on the seed, the purpose and its own number alone."""
    return np.stack([standard_normal(latent_shape, seed, purpose, row=first + i) for i in range(count)])
