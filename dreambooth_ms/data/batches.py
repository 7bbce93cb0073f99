"""A batch is rows: whatever a method wants of a picture is a value in its row.

Shapes: B rows, C, H, W of the latents, S text tokens, E text width, P width of pooled text, N add_time_ids.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle

import mindspore as ms
import numpy as np
from mindspore import Tensor

from dreambooth_ms.data.conditioning import Conditioning, PromptText, add_time_ids_of_view
from dreambooth_ms.data.plan import Plan, View
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule
from dreambooth_ms.randomness import generator, standard_normal


def _no_rows() -> np.ndarray:
    return np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class Batch:
    """The rows of one batch; the fields of `inputs` are the inputs of `training.step.DiffusionLoss`."""

    latents: np.ndarray
    """(B, C, H, W) clean latents, scaled to deviation 1."""
    noise: np.ndarray
    """(B, C, H, W)."""
    timesteps: np.ndarray
    """(B,) int32."""
    signal: np.ndarray
    """(B,) factor of the latents in the noisy latents."""
    sigma: np.ndarray
    """(B,) factor of the noise."""
    text: np.ndarray
    """Each row's own prompt: embeddings (B, S, E), or token ids (B, S) int32 where the text encoder is trained."""
    coefficients: np.ndarray
    """(B,) weight of each row's error in the loss: lambda of the group * w_row / rows of the group in a step."""
    groups: tuple[str, ...]
    """Each row's group."""
    pooled: np.ndarray = field(default_factory=_no_rows)
    """Each row's own pooled text (B, P), or the ends of its token ids (B, S); empty where the UNet reads none."""
    add_time_ids: np.ndarray = field(default_factory=_no_rows)
    """Each row's own add_time_ids (B, N) (see `data.conditioning`); empty where the UNet reads none."""

    def inputs(self) -> tuple[Tensor, ...]:
        """The rows as the compiled step takes them."""
        return (
            Tensor(self.latents, ms.float32),
            Tensor(self.noise, ms.float32),
            Tensor(self.timesteps, ms.int32),
            Tensor(self.signal, ms.float32),
            Tensor(self.sigma, ms.float32),
            Tensor(self.coefficients, ms.float32),
            *Conditioning(self.text, self.pooled, self.add_time_ids).tensors(),
        )


@dataclass(frozen=True)
class BatchMaker:
    """Makes any batch of the run, from its number alone. A step takes `batches_per_step` of them."""

    plan: Plan
    posteriors: Mapping[View, np.ndarray]
    texts: Mapping[str, PromptText]
    """What the step takes for each prompt: its embedding, or its token ids."""
    schedule: NoiseSchedule
    loss_weights: Callable[[np.ndarray], np.ndarray]
    """Timesteps (B,) -> w_row (B,)."""
    scaled: Callable[[np.ndarray], np.ndarray]
    """The autoencoder's latents (C, H, W) -> the diffusion's (`VaeSpec.scaled`)."""
    group_weights: Mapping[str, float]
    """Lambda of each group: 1 for the instance pictures, --prior_loss_weight for the class pictures."""
    batches_per_step: int = 1
    noise_offset: float = 0.0
    """Strength of a random constant that is added to each channel of the noise (Guttenberg, 2023)."""
    num_add_time_ids: int = 0
    """add_time_ids of each row: 6 for SDXL, 5 for its refiner."""

    def __call__(self, number: int) -> Batch:
        """The batch with this number, counted from 0."""
        views, seed = self.plan.rows(number), self.plan.seed
        latents, noise, timesteps = [], [], []
        for view, row in zip(views, cycle(self.plan.row_numbers(number)), strict=False):
            group = view.record.group
            mean, log_variance = self.posteriors[view]
            posterior_noise = standard_normal(mean.shape, seed, f"{group} posterior", row)
            latents.append(self.scaled(mean + np.exp(0.5 * log_variance) * posterior_noise))
            offset = standard_normal((len(mean), 1, 1), seed, f"{group} noise offset", row)
            noise.append(standard_normal(mean.shape, seed, f"{group} noise", row) + self.noise_offset * offset)
            rng = generator(seed, f"{group} timestep", row)
            timesteps.append(int(rng.integers(self.schedule.num_train_timesteps)))
        conditioning = Conditioning.of(
            [self.texts[view.record.prompt] for view in views],
            [add_time_ids_of_view(self.num_add_time_ids, view, self.plan.framing.resolution) for view in views],
        )
        drawn = np.array(timesteps, np.int32)
        rows_of_step = self.plan.batch_size * self.batches_per_step
        lambdas = np.array([self.group_weights[view.record.group] for view in views])
        return Batch(
            latents=np.stack(latents).astype(np.float32),
            noise=np.stack(noise).astype(np.float32),
            timesteps=drawn,
            signal=self.schedule.signal(drawn).astype(np.float32),
            sigma=self.schedule.noise(drawn).astype(np.float32),
            text=conditioning.text,
            coefficients=(lambdas * self.loss_weights(drawn) / rows_of_step).astype(np.float32),
            groups=tuple(view.record.group for view in views),
            pooled=conditioning.pooled,
            add_time_ids=conditioning.add_time_ids,
        )
