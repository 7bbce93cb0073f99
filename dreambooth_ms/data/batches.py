"""A batch is rows: whatever a method wants of a picture is a value in its row.

Shapes: B rows, C, H, W of the latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
from mindspore import Tensor

from dreambooth_ms.data.conditioning import Conditioning, PromptText, add_time_ids_of_view
from dreambooth_ms.data.plan import Plan, View
from dreambooth_ms.diffusion.objectives import Columns
from dreambooth_ms.randomness import generator, standard_normal


@dataclass(frozen=True)
class Batch:
    """The rows of one batch: what a denoiser reads, what it should answer, and how its errors count."""

    inputs: dict[str, np.ndarray]
    """By the denoiser's `input_names`, in their order: sample (B, C, H, W), timestep (B,), conditioning (B, ...)."""
    target: np.ndarray
    """(B, C, H, W)."""
    weight: np.ndarray
    """(B,) of each row's error in the loss: lambda of the concept * w_row / rows of the concept in a step."""
    concepts: tuple[str, ...]
    """The name of each row's concept."""
    mask: np.ndarray | None = None
    """(B, C, H, W), of mean 1 in each row: how much each element counts in the row's error. None: all the same."""

    @classmethod
    def of(
        cls,
        columns: Columns,
        clean_BCHW: np.ndarray,
        noise_BCHW: np.ndarray,
        conditioning: Mapping[str, np.ndarray],
        concepts: Sequence[str],
    ) -> "Batch":
        """The columns of an objective applied to clean latents and noise; the conditioning is as in `inputs`."""
        sample_BCHW, timestep_B = columns.network_input(clean_BCHW, noise_BCHW), columns.time.astype(np.float32)
        return cls(
            inputs={"sample": sample_BCHW, "timestep": timestep_B, **conditioning},
            target=columns.target(clean_BCHW, noise_BCHW),
            weight=columns.weight.astype(np.float32),
            concepts=tuple(concepts),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """What the compiled step takes (see `training.step.DiffusionLoss`)."""
        masks = () if self.mask is None else (self.mask,)
        return tuple(map(Tensor, (self.target, self.weight, *masks, *self.inputs.values())))


@dataclass(frozen=True)
class BatchMaker:
    """Makes any batch of the run, from its number alone. A step takes `batches_per_step` of them."""

    plan: Plan
    posteriors: Mapping[View, np.ndarray]
    texts: Mapping[str, PromptText]
    """What the step takes for each prompt: its embedding, or its token ids."""
    objective: Callable[[Sequence[np.random.Generator]], Columns]
    """A generator for each row -> what is drawn from it (see `diffusion.objectives`)."""
    scaled: Callable[[np.ndarray], np.ndarray]
    """The autoencoder's latents (C, H, W) -> the diffusion's (`VaeSpec.scaled`)."""
    group_weights: Mapping[str, float]
    """Lambda of each concept: 1 for the instance pictures, --prior_loss_weight for the class pictures."""
    batches_per_step: int = 1
    noise_offset: float = 0.0
    """Strength of a random constant that is added to each channel of the noise (Guttenberg, 2023)."""
    num_add_time_ids: int = 0
    """add_time_ids of each row: 6 for SDXL, 5 for its refiner."""

    def __call__(self, number: int) -> Batch:
        """The batch with this number, counted from 0."""
        views, seed = self.plan.rows(number), self.plan.seed
        latents, noise, generators = [], [], []
        for view, row in zip(views, cycle(self.plan.row_numbers(number)), strict=False):
            group = view.record.group
            mean, log_variance = self.posteriors[view]
            posterior_noise = standard_normal(mean.shape, seed, f"{group} posterior", row)
            latents.append(self.scaled(mean + np.exp(0.5 * log_variance) * posterior_noise))
            offset = standard_normal((len(mean), 1, 1), seed, f"{group} noise offset", row)
            noise.append(standard_normal(mean.shape, seed, f"{group} noise", row) + self.noise_offset * offset)
            generators.append(generator(seed, f"{group} timestep", row))
        conditioning = Conditioning.of(
            [self.texts[view.record.prompt] for view in views],
            [add_time_ids_of_view(self.num_add_time_ids, view, self.plan.framing.resolution) for view in views],
        )
        columns = self.objective(generators)
        lambdas = np.array([self.group_weights[view.record.group] for view in views])
        rows_of_step = self.plan.batch_size * self.batches_per_step
        return Batch.of(
            replace(columns, weight=lambdas * columns.weight / rows_of_step),
            np.stack(latents).astype(np.float32),
            np.stack(noise).astype(np.float32),
            conditioning.inputs,
            [view.record.group for view in views],
        )
