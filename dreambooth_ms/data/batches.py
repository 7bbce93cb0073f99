"""A batch is rows: whatever a method wants of a picture is a value in its row.

Shapes: B rows, C, H, W of the latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from mindspore import Tensor

from dreambooth_ms.data.conditioning import PromptText, add_time_ids, conditioning
from dreambooth_ms.data.masks import mask_of_latents
from dreambooth_ms.data.plan import Plan, Row, View
from dreambooth_ms.diffusion import Columns
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
    """Makes any batch of the run, from its number alone."""

    plan: Plan
    posteriors: Callable[[View], np.ndarray]
    """View -> mean and log-variance (2, C, H, W) of its latents, as the autoencoder has them."""
    texts: Callable[[str], PromptText]
    """What the step takes for each prompt: its embedding, or its token ids."""
    objective: Callable[[Sequence[np.random.Generator]], Columns]
    """A generator for each row -> what is drawn from it (see `diffusion`)."""
    scaled: Callable[[np.ndarray], np.ndarray]
    """The autoencoder's latents (C, H, W) -> the diffusion's (`VaeSpec.scaled`)."""
    noise_offset: float = 0.0
    """Strength of a random constant that is added to each channel of the noise (Guttenberg, 2023)."""
    num_add_time_ids: int = 0
    """add_time_ids of each row: 6 for SDXL, 5 for its refiner."""
    masked: bool = False
    """Whether rows have masks; what has none counts everywhere."""
    unmasked_weight: float = 0.0
    """How much counts what is not in a mask."""

    def __call__(self, number: int) -> Batch:
        """The batch with this number, counted from 0."""
        rows, seed = self.plan.rows(number), self.plan.seed
        latents, noise, generators, texts, of_sizes = [], [], [], [], []
        for concept, row, view in rows:
            name = concept.drawn_as or concept.name
            mean, log_variance = self.posteriors(view)
            posterior_noise = standard_normal(mean.shape, seed, f"{name} posterior", row)
            latents.append(self.scaled(mean + np.exp(0.5 * log_variance) * posterior_noise))
            offset = standard_normal((len(mean), 1, 1), seed, f"{name} noise offset", row)
            noise.append(standard_normal(mean.shape, seed, f"{name} noise", row) + self.noise_offset * offset)
            generators.append(generator(seed, f"{name} timestep", row))
            texts.append(self.texts(view.prompt))
            of_sizes.append(add_time_ids(self.num_add_time_ids, view.record.size, view.corner, view.frame.size))
        columns = self.objective(generators)
        weights = np.array([row.concept.weight for row in rows]) * columns.weight / self.plan.rows_per_step
        batch = Batch.of(
            replace(columns, weight=weights),
            np.stack(latents).astype(np.float32),
            np.stack(noise).astype(np.float32),
            conditioning(texts, of_sizes),
            [row.concept.name for row in rows],
        )
        return replace(batch, mask=self._masks(rows, batch.target.shape)) if self.masked else batch

    def _masks(self, rows: Sequence[Row], shape: tuple[int, ...]) -> np.ndarray:
        """The rows' masks in the shape (B, C, h, w) of their latents."""
        masks = np.ones(shape, np.float32)
        for mask, (_, _, view) in zip(masks, rows, strict=True):
            if view.record.mask or view.frame.place:
                size = shape[-1], shape[-2]
                mask[:] = mask_of_latents(view.record.mask, view.frame, view.flip, size, self.unmasked_weight)
        return masks
