"""Optimisers without a fused kernel, on many tensors as a few long vectors: AdamW with moments of 8 bits, and Prodigy.
Each of their some thirty operations costs about as much as the arithmetic of a small tensor on CPU
(docs/performance.md), so small tensors are joined. Vectors wait for each other, so that only one exists at a time."""

from collections.abc import Callable, Sequence
from itertools import groupby

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from dreambooth_ms.ops import look_up, part, total
from dreambooth_ms.ops.graph import constant
from dreambooth_ms.runtime.collective import starts
from dreambooth_ms.training.optimisers import AdamW, Optimiser, assign_if, state, value_if

_map = ops.HyperMap()
LENGTH, MOST_VECTORS = 1 << 22, 128
"""Tensors are joined up to about so many numbers (16 MiB in float32). Of larger models vectors are longer, since each
adds to the graph; tensors above the length come on top."""


class FlatVector(nn.Cell):
    """Parameters start … stop - 1 of an optimiser as one vector (N,). Each begins at a multiple of `block`."""

    def __init__(self, optimiser: Optimiser, start: int, stop: int, block: int = 1) -> None:
        super().__init__(auto_prefix=False)
        parameters = optimiser.parameters[start:stop]
        self.start, self.stop, self.parameters, self.block = start, stop, ParameterTuple(parameters), block
        self.rate_factor, self.decay_factor = optimiser.rate_factors[start], optimiser.decay_factors[start]
        lengths = [-(-parameter.size // block) * block for parameter in parameters]
        self.offsets, self.length = starts(lengths), sum(lengths)

    def join(self, tensors: tuple[Tensor, ...], earlier: Tensor) -> Tensor:
        """Tensors of the parameters' shapes -> (N,), but not before `earlier` has been computed."""
        rows = _map(ops.partial(_row, self.block, earlier), tensors)
        return ops.concat(rows) if len(rows) > 1 else rows[0]

    def read(self, gradients: tuple[Tensor, ...], earlier: Tensor) -> tuple[Tensor, Tensor]:
        """Of the optimiser's gradients those of these parameters, and the parameters' present values."""
        return self.join(gradients[self.start : self.stop], earlier), self.join(self.parameters, earlier)

    def write(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Set the parameters."""
        return _map(ops.partial(_write, vector), self.offsets, self.parameters)


def group_by_length(parameters: Sequence[Parameter], kinds: Sequence[object]) -> list[tuple[int, int]]:
    """Start and stop of the parameters that are joined: neighbours of one kind, up to about `LENGTH` numbers."""
    length = max(LENGTH, sum(parameter.size for parameter in parameters) // MOST_VECTORS)
    slices, start = [], 0
    for _, neighbours in groupby(range(len(parameters)), key=lambda index: kinds[index]):
        total = 0
        for index in neighbours:
            if index > start and (total == 0 or total + parameters[index].size > length):
                slices.append((start, index))
                start, total = index, 0
            total += parameters[index].size
    return [*slices, (start, len(parameters))]


class VectorOptimiser(Optimiser):
    """An optimiser whose parameters and state are in vectors of a kind: (optimiser, start, stop, number) -> vector."""

    kind: Callable[..., FlatVector]

    def make_moments(self, parameters: Sequence[Parameter]) -> None:
        slices = group_by_length(parameters, list(zip(self.rate_factors, self.decay_factors, strict=True)))
        vectors = [type(self).kind(self, *bounds, number) for number, bounds in enumerate(slices)]
        self.vectors = nn.CellList(vectors, auto_prefix=False)


def _row(block, earlier, tensor):
    row = ops.reshape(ops.depend(tensor, earlier), (-1,))
    missing = -row.shape[0] % block
    return ops.concat((row, constant(0.0, (missing,)))) if missing else row


def _write(vector, offset, parameter):
    own = part(vector, offset, ops.size(parameter))
    return ops.assign(parameter, ops.reshape(own, parameter.shape))


BLOCK, DECADES = 128, 7


def dynamic_levels(signed: bool) -> np.ndarray:
    """The 256 levels in rising order, float32: 0, 1, and in each decade below 1 twice as many as in the one below it,
    each the middle of an equal part. Of the signed levels all but 0 and 1 have a negative counterpart."""
    levels = [0.0, 1.0]
    for decade in range(DECADES):
        borders = np.linspace(0.1, 1, (1 if signed else 2) * 2**decade + 1)
        middles = (borders[1:] + borders[:-1]) / 2 * 10.0 ** (decade - DECADES + 1)
        levels += [*middles, *-middles] if signed else [*middles]
    return np.sort(np.array(levels)).astype(np.float32)


class Quantised(nn.Cell):
    """A vector of N numbers, a multiple of `BLOCK`, in N bytes and N / BLOCK scales; at first all are 0."""

    def __init__(self, length: int, signed: bool, name: str) -> None:
        super().__init__(auto_prefix=False)
        levels = dynamic_levels(signed)
        self.levels, self.borders = Tensor(levels), Tensor((levels[1:] + levels[:-1]) / 2)
        codes = np.full((length // BLOCK, BLOCK), int(np.searchsorted(levels, 0)), np.uint8)
        scales = np.zeros((length // BLOCK, 1), np.float32)
        self.codes, self.scales = state(f"{name}_codes", codes), state(f"{name}_scales", scales)

    def read(self, earlier: Tensor) -> Tensor:
        """The numbers, (N / BLOCK, BLOCK), not before `earlier` has been computed."""
        numbers = look_up(self.levels, ops.depend(self.codes.astype(ms.int32), earlier))
        return numbers * ops.broadcast_to(self.scales, numbers.shape)

    def write(self, proceed: Tensor | None, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Set the numbers, (N / BLOCK, BLOCK)."""
        scales = ops.amax(ops.abs(numbers), 1, True)
        # A block of zeros has a scale of 0, and nothing to divide.
        divisors = ops.maximum(scales, 1e-37)
        codes = ops.searchsorted(self.borders, numbers / ops.broadcast_to(divisors, numbers.shape))
        return assign_if(proceed, self.codes, codes.astype(ms.uint8)), assign_if(proceed, self.scales, scales)


class _VectorOf8bit(FlatVector):
    def __init__(self, optimiser: Optimiser, start: int, stop: int, number: int) -> None:
        super().__init__(optimiser, start, stop, BLOCK)
        h = optimiser.hyperparameters
        # The betas of AdamW's kernel are float32.
        self.beta1, self.beta2 = float(np.float32(h.beta1)), float(np.float32(h.beta2))
        self.first_moment = Quantised(self.length, True, f"first_moment_{number}")
        self.second_root = Quantised(self.length, False, f"second_moment_root_{number}")

    def construct(
        self, gradients: tuple[Tensor, ...], proceed: Tensor | None, earlier: Tensor, numbers: tuple[Tensor, ...]
    ) -> Tensor:
        learning_rate, epsilon, weight_decay = numbers
        gradient, value = self.read(gradients, earlier)
        gradient, value = ops.reshape(gradient, (-1, BLOCK)), ops.reshape(value, (-1, BLOCK))
        first = self.first_moment.read(earlier) * self.beta1 + gradient * (1 - self.beta1)
        root = self.second_root.read(earlier)
        root = ops.sqrt(root * root * self.beta2 + gradient * gradient * (1 - self.beta2))
        change = first / (root + epsilon)
        change = change + value * (weight_decay * self.decay_factor)
        updated = value_if(proceed, value - change * (learning_rate * self.rate_factor), value)
        written = self.write(ops.reshape(updated, (-1,)))
        states = (self.first_moment.write(proceed, first), self.second_root.write(proceed, root))
        return ops.depend(learning_rate, (written, states))


class AdamW8bit(VectorOptimiser):
    """`AdamW` with moments of 8 bits: block-wise dynamic quantisation (Dettmers et al., 2022). Parameters stay float32.

    A block of a moment is its largest absolute value in float32 and one byte for each number: the nearest of 256 levels
    between -1 and 1 that lie dense at both ends of seven decades (Dettmers, 2015, section 2, dynamic tree). Unlike in
    the paper's reference, blocks are of 128 numbers, so that the small matrices of a LoRA fill them, and of the second
    moment the square root is kept, whose decades are half as many: over 3000 steps of gradients whose sizes in a block
    differ by a factor of e, 98 % of the roots are within 0.79 to 1.26 of the exact ones, else 0.75 to 1.27 (measured).
    """

    kind, numbers = _VectorOf8bit, AdamW.numbers

    def construct(self, gradients: tuple[Tensor, ...], proceed: Tensor | None) -> Tensor:
        numbers = self.learning_rate, self.epsilon, self.weight_decay
        done = numbers[0]
        for vector in self.vectors:
            done = vector(gradients, proceed, done, numbers)
        return done


FIRST_ESTIMATE = 1e-6
"""d_0, from which the estimate grows."""


class _VectorOfProdigy(FlatVector):
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
    """Adam that estimates its own step size (Mishchenko and Defazio, 2024). The learning rate is a factor, usually 1.
    Algorithm 4 of the paper, with the numerator and denominator of the estimate d over d0, weight decay, bias
    correction and the safeguard of the authors' own program. The estimate is one for all parameters, which must have
    the values that training starts from, and one learning rate."""

    kind = _VectorOfProdigy

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
            numerator, denominator, done = numerator + along, denominator + size, size
        # Without any gradient there is nothing to divide.
        found = ops.select(denominator > 0, numerator / ops.maximum(denominator, 1e-37), before)
        estimate = ops.maximum(before, found)
        done = estimate
        for vector in self.vectors:
            done = vector.step(proceed, done, estimate, rate)
        numbers = (assign_if(proceed, self.estimate, estimate), assign_if(proceed, self.numerator, numerator))
        return ops.depend(done, numbers)
