"""mindone's schedulers that need operators which CPUs have not, without these. Importing it takes a moment."""

import math
from typing import Any

import numpy as np
from mindone.diffusers import schedulers
from mindspore import Tensor


class DDPMScheduler(schedulers.DDPMScheduler):
    """Ancestral sampling (Ho et al., 2020) without `NonZeroExt`."""

    def previous_timestep(self, timestep: Any) -> int:
        """The timestep that is taken after this one; -1 at the end."""
        order = [*self.timesteps.asnumpy().tolist(), -1]
        return int(order[order.index(int(timestep)) + 1])


class UniPCMultistepScheduler(schedulers.UniPCMultistepScheduler):
    """A multistep predictor and a corrector that costs no evaluation more (Zhao et al., 2023), without `StackExt`."""

    def multistep_uni_p_bh_update(self, model_output: Tensor, *, sample: Tensor, order: int) -> Tensor:
        """The predictor: from this noise level to the next."""
        return self._advanced(sample, self.step_index, order)

    def multistep_uni_c_bh_update(
        self, this_model_output: Tensor, *, last_sample: Tensor, this_sample: Tensor, order: int
    ) -> Tensor:
        """The corrector: the last step once more, now that the prediction at its end is known."""
        return self._advanced(last_sample, self.step_index - 1, order, this_model_output)

    def _advanced(self, latents: Tensor, start: int, order: int, following: Tensor | None = None) -> Tensor:
        """From the noise level of index `start` to the next by `order` predictions: UniP, eq. 9 of the paper for data
        prediction, and its like for noise; UniC with `following`, the prediction at the end."""
        sigmas = self.sigmas.asnumpy().astype(np.float64).tolist()
        signal = [1 / math.sqrt(sigma**2 + 1) for sigma in sigmas]
        noise = [sigma * own for sigma, own in zip(sigmas, signal, strict=True)]
        log_snr = [-math.log(sigma) if sigma else math.inf for sigma in sigmas]
        h = log_snr[start + 1] - log_snr[start]
        kept, gained, exponent = (noise, signal, -h) if self.predict_x0 else (signal, noise, h)
        growth = math.expm1(exponent)
        scale = exponent if self.config.solver_type == "bh1" else growth
        ratios = [(log_snr[start - i] - log_snr[start]) / h for i in range(1, order)]
        newest = self.model_outputs[-1]
        slopes = [(self.model_outputs[-1 - i] - newest) * (1 / ratio) for i, ratio in enumerate(ratios, 1)]
        slopes += [] if following is None else [following - newest]
        update = latents * (kept[start + 1] / kept[start]) - newest * (gained[start + 1] * growth)
        for weight, slope in zip(_weights(exponent, scale, ratios, following is not None), slopes, strict=True):
            update = update - slope * (gained[start + 1] * scale * weight)
        return update


def _weights(exponent: float, scale: float, ratios: list[float], corrects: bool) -> list[float]:
    """Of the differences from the newest prediction: the solution of the paper's system (eq. 7) for nodes at `ratios`,
    r of the paper, and for the corrector 1; of a single one 1/2."""
    nodes = [*ratios, 1.0] if corrects else ratios
    if len(nodes) < 2:
        return [0.5] * len(nodes)
    right: list[float] = []
    term, factorial = math.expm1(exponent) / exponent - 1, 1
    for k in range(1, len(nodes) + 1):
        right.append(term * factorial / scale)
        factorial *= k + 1
        term = term / exponent - 1 / factorial
    weights: list[float] = np.linalg.solve(np.vander(nodes, increasing=True).T, right).tolist()
    return weights


class EDMEulerScheduler(schedulers.EDMDPMSolverMultistepScheduler):
    """Euler steps in EDM's formulation (Karras et al., 2022, algorithm 1 without its second half), at the noise levels
    of the multistep solver, without `Arange`."""

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> tuple[Tensor]:
        """The latents at the next noise level."""
        sigma, following = (self.sigmas[self.step_index + i] for i in range(2))
        clean = self.precondition_outputs(latents, prediction, sigma)
        self._step_index += 1
        return (latents + (latents - clean) * ((following - sigma) / sigma),)
