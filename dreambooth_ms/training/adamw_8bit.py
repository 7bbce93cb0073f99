"""AdamW with moments of 8 bits: block-wise dynamic quantisation (Dettmers et al., 2022).

A block of a moment is its largest absolute value in float32 and one byte for each number: the nearest of 256 levels
between -1 and 1 that lie dense at both ends of seven decades (Dettmers, 2015, section 2, dynamic tree). The paper's
reference is a CUDA library; this is plain operations of MindSpore, with two differences:

- Of the second moment the square root is kept. It has half the decades, so that small numbers beside large ones have
  more levels: over 3000 steps of gradients whose sizes in a block differ by a factor of e, 98 % of the roots are within
  0.79 to 1.26 of the exact ones, and 0.75 to 1.27 if the moment itself is quantised (measured).
- Blocks are of 128 numbers, so that the small matrices of a LoRA fill them.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from dreambooth_ms.ops import look_up
from dreambooth_ms.training.flat_vectors import FlatVector, VectorOptimiser
from dreambooth_ms.training.optimisers import AdamW, Optimiser, assign_if, state, value_if

BLOCK = 128
DECADES = 7


def dynamic_levels(signed: bool) -> np.ndarray:
    """The 256 levels in rising order, float32: 0, 1, and in each decade below 1 twice as many as in the one below it.

    A level is the middle of one of the equal parts of its decade. Of the signed levels all but 0 and 1 have a negative
    counterpart.
    """
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


class _Vector(FlatVector):
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
    """`AdamW` whose state is a quarter of the size. Parameters stay float32."""

    kind, numbers = _Vector, AdamW.numbers

    def construct(self, gradients: tuple[Tensor, ...], proceed: Tensor | None) -> Tensor:
        numbers = self.learning_rate, self.epsilon, self.weight_decay
        done = numbers[0]
        for vector in self.vectors:
            done = vector(gradients, proceed, done, numbers)
        return done
