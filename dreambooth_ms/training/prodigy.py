"""Prodigy (Mishchenko and Defazio, 2024): Adam that estimates its own step size.

Algorithm 4 of the paper, with the numerator and denominator of the estimate d over d0, weight decay, bias correction
and the safeguard of the authors' own program. The estimate is one number for all parameters: the distance from the
start, seen along the gradients. Equations are those of the algorithm's lines.
"""

from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, Tensor, ops

from dreambooth_ms.ops import total
from dreambooth_ms.training.flat_vectors import FlatVector, VectorOptimiser
from dreambooth_ms.training.optimisers import assign_if, state, value_if

FIRST_ESTIMATE = 1e-6
"""d_0, from which the estimate grows."""


class _Vector(FlatVector):
    def __init__(self, optimiser: "Prodigy", start: int, stop: int, number: int) -> None:
        super().__init__(optimiser, start, stop)
        h = optimiser.hyperparameters
        self.beta1, self.beta2, self.beta3, self.epsilon = h.beta1, h.beta2, optimiser.beta3, h.epsilon
        self.decay, self.decouple = h.weight_decay * self.decay_factor, h.decouple
        self.safeguard_warmup = h.safeguard_warmup
        values = np.concatenate([parameter.asnumpy().reshape(-1) for parameter in self.parameters])
        zeros = np.zeros_like(values)
        self.first_values = state(f"prodigy_start_{number}", values)
        self.first_moment = state(f"first_moment_{number}", zeros)
        self.second_moment = state(f"second_moment_{number}", zeros)
        self.gradient_sum = state(f"prodigy_gradient_sum_{number}", zeros)

    def gather(
        self, gradients: tuple[Tensor, ...], proceed: Tensor | None, earlier: Tensor, estimate: Tensor, rate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take in the gradients; returns what they add to the numerator (), and to the denominator ()."""
        gradient, value = self.read(gradients, earlier)
        if self.decay and not self.decouple:
            gradient = gradient + value * self.decay
        over_first = estimate * (1 / FIRST_ESTIMATE)
        along = total(gradient * (self.first_values - value)) * over_first * rate
        scaled = gradient * estimate
        first = self.first_moment * self.beta1 + scaled * (1 - self.beta1)
        second = self.second_moment * self.beta2 + scaled * scaled * (1 - self.beta2)
        weight = over_first * (estimate if self.safeguard_warmup else rate)
        gradient_sum = self.gradient_sum * self.beta3 + gradient * weight
        states = (
            assign_if(proceed, self.first_moment, first),
            assign_if(proceed, self.second_moment, second),
            assign_if(proceed, self.gradient_sum, gradient_sum),
        )
        return along, ops.depend(total(ops.abs(gradient_sum)), states)

    def step(self, proceed: Tensor | None, earlier: Tensor, estimate: Tensor, rate: Tensor) -> Tensor:
        """Move the parameters, not before `earlier` has been computed."""
        value = self.join(self.parameters, earlier)
        change = self.first_moment / (ops.sqrt(self.second_moment) + estimate * self.epsilon)
        if self.decay and self.decouple:
            change = change + value * self.decay
        return ops.depend(rate, self.write(value_if(proceed, value - change * rate, value)))


class Prodigy(VectorOptimiser):
    """Parameters, and the estimate d of their distance to the solution. The learning rate is a factor, usually 1.

    The parameters must have the values that training starts from, and one learning rate.
    """

    kind = _Vector

    def make_moments(self, parameters: Sequence[Parameter]) -> None:
        assert set(self.rate_factors) <= {1.0}, "the estimate is one for all parameters"
        h = self.hyperparameters
        self.beta3 = h.beta2**0.5 if h.beta3 is None else h.beta3
        super().make_moments(parameters)
        self.estimate = state("prodigy_estimate", np.float32(FIRST_ESTIMATE))
        self.numerator = state("prodigy_numerator", np.float32(0))

    def numbers(self, step: int, learning_rate: float) -> dict[str, float]:
        """The learning rate of the update number `step`, counted from 1, with Adam's bias correction."""
        h = self.hyperparameters
        correction = (1 - h.beta2**step) ** 0.5 / (1 - h.beta1**step) if h.use_bias_correction else 1.0
        return {"learning_rate": learning_rate * correction}

    def construct(self, gradients: tuple[Tensor, ...], proceed: Tensor | None) -> Tensor:
        before = self.estimate * 1.0
        rate = before * self.learning_rate
        numerator, denominator = self.numerator * self.beta3, rate * 0.0
        done = rate
        for vector in self.vectors:
            along, size = vector.gather(gradients, proceed, done, before, rate)
            numerator, denominator = numerator + along, denominator + size
            done = size
        # Without any gradient there is nothing to divide.
        found = ops.select(denominator > 0, numerator / ops.maximum(denominator, 1e-37), before)
        estimate = ops.maximum(before, found)
        done = estimate
        for vector in self.vectors:
            done = vector.step(proceed, done, estimate, rate)
        numbers = (assign_if(proceed, self.estimate, estimate), assign_if(proceed, self.numerator, numerator))
        return ops.depend(done, numbers)
