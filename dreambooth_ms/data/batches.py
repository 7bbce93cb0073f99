"""A batch is rows: whatever a method wants of a picture is a value in its row. Shapes: B rows, C, H, W of latents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from mindspore import Tensor

from dreambooth_ms.config.train import LossConfig
from dreambooth_ms.data.conditioning import PromptText, add_time_ids, conditioning
from dreambooth_ms.data.holes import beside_noise
from dreambooth_ms.data.masks import mask_of_latents
from dreambooth_ms.data.plan import Plan, Row, View
from dreambooth_ms.data.second_stage import SecondStage
from dreambooth_ms.diffusion import DEFAULT, Columns, perturbed, pyramid_noise


@dataclass(frozen=True)
class Batch:
    """The rows of one batch: what a denoiser reads, what it should answer, and how its errors count."""

    inputs: dict[str, np.ndarray]
    """By the denoiser's `input_names`, in their order: sample (B, C, H, W), or with holes (B, 2 C + 1, H, W), or of a
    second stage (B, 2 C, H, W); timestep (B,), conditioning (B, ...)."""
    target: np.ndarray
    """(B, C, H, W)."""
    weight: np.ndarray
    """(B,) of each row's error in the loss: lambda of the concept * w_row / rows of the concept in a step."""
    concepts: tuple[str, ...]
    """The name of each row's concept."""
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    """What there is of these, in this order: mask (B, C, H, W), of mean 1 in each row, how much each element counts in
    the row's error; and huber_c (B,), see `diffusion.pseudo_huber`."""

    @classmethod
    def of(
        cls,
        columns: Columns,
        clean_BCHW: np.ndarray,
        noise_BCHW: np.ndarray,
        conditioning: Mapping[str, np.ndarray],
        concepts: Sequence[str],
        read_noise_BCHW: np.ndarray | None = None,
    ) -> "Batch":
        """The columns of an objective applied to clean latents and noise; the conditioning is as in `inputs`. The
        network reads the other noise, if there is one."""
        read_BCHW = noise_BCHW if read_noise_BCHW is None else read_noise_BCHW
        sample_BCHW, timestep_B = columns.network_input(clean_BCHW, read_BCHW), columns.time.astype(np.float32)
        return cls(
            inputs={"sample": sample_BCHW, "timestep": timestep_B, **conditioning},
            target=columns.target(clean_BCHW, noise_BCHW),
            weight=columns.weight.astype(np.float32),
            concepts=tuple(concepts),
            extras={} if columns.huber_c is None else {"huber_c": columns.huber_c.astype(np.float32)},
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """What the compiled step takes (see `training.step.DiffusionLoss`)."""
        return tuple(map(Tensor, (self.target, self.weight, *self.extras.values(), *self.inputs.values())))


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
    loss: LossConfig = DEFAULT
    """What noise it is: a random constant added to each channel (Guttenberg, 2023), a pyramid, a perturbation."""
    num_add_time_ids: int = 0
    """add_time_ids of each row: 6 for SDXL, 5 for its refiner."""
    second_stage: SecondStage | None = None
    """What a denoiser that enlarges reads besides."""
    masked: bool = False
    """Whether rows have masks; what has none counts everywhere."""
    unmasked_weight: float = 0.0
    """How much counts what is not in a mask."""

    def __call__(self, number: int) -> Batch:
        """The batch with this number, counted from 0."""
        rows = self.plan.rows(number)
        columns = self.objective([self.plan.draws(row.concept, row.number)("timestep") for row in rows])
        weights = np.array([row.concept.weight for row in rows]) * columns.weight / self.plan.rows_per_step
        made = zip(*map(self._row, rows), strict=True)
        clean, beside, noise, read_noise = (np.stack(own).astype(np.float32) for own in made)
        views = [row.view for row in rows]
        ids = [add_time_ids(self.num_add_time_ids, one.record.size, one.corner, one.frame.size) for one in views]
        read = conditioning([self.texts(view.prompt) for view in views], ids)
        names = [row.concept.name for row in rows]
        batch = Batch.of(replace(columns, weight=weights), clean, noise, read, names, read_noise)
        noisy, labels = batch.inputs["sample"], {}
        if self.second_stage:
            draws = [self.plan.draws(row.concept, row.number) for row in rows]
            beside, labels["class_labels"] = self.second_stage(noisy, batch.inputs["timestep"], clean, draws)
        inputs = batch.inputs | {"sample": np.concatenate((noisy, beside), axis=1)} | labels
        masks = {"mask": self._masks(rows, batch.target.shape)} if self.masked else {}
        return replace(batch, inputs=inputs, extras=masks | batch.extras)

    def _row(self, row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of a row clean latents, what is read beside them, noise, and the noise that is read: each (C, H, W)."""
        view, loss, draws = row.view, self.loss, self.plan.draws(row.concept, row.number)
        clean, *rest = (self._latents(one, draws) for one in view.encoded)
        beside = beside_noise(view.hole.mask(view.frame.size), *rest) if view.hole else clean[:0]
        noise = draws("noise").standard_normal(clean.shape, np.float32)
        noise += loss.offset_strength * draws("noise offset").standard_normal((len(clean), 1, 1), np.float32)
        rounds, discount = loss.multires_noise_iterations, loss.multires_noise_discount
        noise = pyramid_noise(noise, draws("noise pyramid"), rounds, discount)
        return clean, beside, noise, perturbed(noise, draws("input perturbation"), loss.ip_noise_gamma)

    def _latents(self, view: View, draws: Callable[[str], np.random.Generator]) -> np.ndarray:
        """Latents (C, H, W) of what is encoded of a row, drawn from their posterior."""
        mean, log_variance = self.posteriors(view)
        draw = draws("posterior of the rest" if view.hole else "posterior").standard_normal(mean.shape, np.float32)
        return self.scaled(mean + np.exp(0.5 * log_variance) * draw)

    def _masks(self, rows: Sequence[Row], shape: tuple[int, ...]) -> np.ndarray:
        """The rows' masks in the shape (B, C, h, w) of their latents."""
        masks = np.ones(shape, np.float32)
        for mask, (_, _, view) in zip(masks, rows, strict=True):
            if view.record.mask or view.frame.place:
                size = shape[-1], shape[-2]
                mask[:] = mask_of_latents(view.record.mask, view.frame, view.flip, size, self.unmasked_weight)
        return masks
