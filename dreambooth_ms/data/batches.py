"""A batch is rows: whatever a method wants of a picture is a value in its row.

Shapes: B rows, C, H, W of the latents, S text tokens, E text width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor

from dreambooth_ms.data.plan import Plan, View
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule
from dreambooth_ms.randomness import generator, standard_normal


@dataclass(frozen=True)
class Batch:
    """The rows of one step; the fields of `inputs` are the inputs of `training.step.DiffusionLoss`."""

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
    """(B, S, E) embeddings of each row's own prompt."""
    coefficients: np.ndarray
    """(B,) weight of each row's error in the loss: the group's weight over the group's number of rows."""
    groups: tuple[str, ...]
    """Each row's group."""

    def inputs(self) -> tuple[Tensor, ...]:
        """The rows as the compiled step takes them."""
        return (
            Tensor(self.latents, ms.float32),
            Tensor(self.noise, ms.float32),
            Tensor(self.timesteps, ms.int32),
            Tensor(self.signal, ms.float32),
            Tensor(self.sigma, ms.float32),
            Tensor(self.text, ms.float32),
            Tensor(self.coefficients, ms.float32),
        )

    def group_means(self, errors_B: np.ndarray) -> dict[str, float]:
        """Mean of the rows' errors by group, unweighted."""
        return {
            group: float(np.mean([error for error, of in zip(errors_B, self.groups, strict=True) if of == group]))
            for group in dict.fromkeys(self.groups)
        }


@dataclass(frozen=True)
class BatchMaker:
    """Makes the batch of any step, from the step's number alone."""

    plan: Plan
    posteriors: Mapping[View, np.ndarray]
    embeddings: Mapping[str, np.ndarray]
    schedule: NoiseSchedule
    scaling_factor: float
    group_weights: Mapping[str, float]
    """Lambda of each group: 1 for the instance pictures, --prior_loss_weight for the class pictures."""

    def __call__(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        views, size, seed = self.plan.rows(step), self.plan.batch_size, self.plan.seed
        latents, noise, timesteps = [], [], []
        for position, view in enumerate(views):
            group, row = view.record.group, position % size
            mean, log_variance = self.posteriors[view]
            posterior_noise = standard_normal(mean.shape, seed, f"{group} posterior", step, row)
            latents.append((mean + np.exp(0.5 * log_variance) * posterior_noise) * self.scaling_factor)
            noise.append(standard_normal(mean.shape, seed, f"{group} noise", step, row))
            rng = generator(seed, f"{group} timestep", step, row)
            timesteps.append(int(rng.integers(self.schedule.num_train_timesteps)))
        drawn = np.array(timesteps, np.int32)
        return Batch(
            latents=np.stack(latents).astype(np.float32),
            noise=np.stack(noise),
            timesteps=drawn,
            signal=self.schedule.signal(drawn).astype(np.float32),
            sigma=self.schedule.noise(drawn).astype(np.float32),
            text=np.stack([self.embeddings[view.record.prompt] for view in views]),
            coefficients=np.array([self.group_weights[view.record.group] / size for view in views], np.float32),
            groups=tuple(view.record.group for view in views),
        )
