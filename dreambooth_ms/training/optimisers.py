"""Optimisers as cells with explicit state, so that a checkpoint is their parameters and a step number; and rates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from dreambooth_ms.config.train import POLYNOMIAL_END_RATE, OptimiserConfig
from dreambooth_ms.ops import mean, total
from dreambooth_ms.ops.graph import set_between_runs
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.runtime.collective import ShareParts, from_process

_map = ops.HyperMap()


@dataclass(frozen=True)
class Hyperparameters:
    """Of all optimisers, each of which reads its own. Defaults as in the published DreamBooth scripts."""

    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-2
    epsilon: float = 1e-8
    beta3: float | None = None
    """Decay of the sums behind Prodigy's estimate. None: the square root of beta2."""
    decouple: bool = True
    """Prodigy's weight decay as in AdamW; otherwise it is added to the gradients."""
    use_bias_correction: bool = True
    safeguard_warmup: bool = True
    """Keep the learning rate out of the denominator of Prodigy's estimate, so that a warm-up does not raise it."""
    scale_parameter: bool = False
    """Whether Adafactor's learning rate of a parameter is times its root mean square, as in the paper."""


class Optimiser(nn.Cell):
    """As a cell it takes (gradients, proceed). Where `proceed`, a truth value (), does not hold, everything stays as it
    is, whatever the gradients are; None holds always."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        hyperparameters: Hyperparameters,
        rate_factors: Sequence[float] | None = None,
        decay_factors: Sequence[float] | None = None,
    ) -> None:
        """Each parameter's learning rate and weight decay over those of a step. None: 1 for all."""
        super().__init__(auto_prefix=False)
        self.parameters, self.hyperparameters = ParameterTuple(parameters), hyperparameters
        self.rate_factors = tuple(rate_factors or [1.0] * len(parameters))
        self.decay_factors = tuple(decay_factors or [1.0] * len(parameters))
        for name in self.numbers(1, 0.0):
            setattr(self, name, state(f"of_step.{name}", np.float32(0)))
        self.make_moments(parameters)

    def make_moments(self, parameters: Sequence[Parameter]) -> None:
        """The end of the construction."""
        raise NotImplementedError

    def moments(self) -> list[Parameter]:
        """The state that a resumed run needs: what the cell holds beside the parameters and the numbers of a step."""
        others = {id(one) for one in (*self.parameters, *(getattr(self, name) for name in self.numbers(1, 0.0)))}
        return [one for one in self.get_parameters() if id(one) not in others]

    def numbers(self, step: int, learning_rate: float) -> dict[str, float]:
        """What changes from step to step, for the update counted from 1; each is a float32 parameter of its name."""
        raise NotImplementedError

    def prepare(self, step: int, learning_rate: float) -> None:
        """Set the numbers of the step that is taken next. As parameters they are seen without compiling again."""
        for name, number in self.numbers(step, learning_rate).items():
            set_between_runs(getattr(self, name), np.float32(number))


class AdamW(Optimiser):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, algorithm 2) on float32 parameters. One fused
    kernel updates a parameter: var -= lr' (m / (sqrt(v) + eps') + decay' var). It knows no bias correction, which
    therefore enters through the numbers of a step."""

    def make_moments(self, parameters: Sequence[Parameter]) -> None:
        self.first_moments = ParameterTuple([zeros_like(p, "first_moment") for p in parameters])
        self.second_moments = ParameterTuple([zeros_like(p, "second_moment") for p in parameters])
        self.beta1, self.beta2 = self.hyperparameters.beta1, self.hyperparameters.beta2
        self.fused_update = ops.AdamWeightDecay()

    def numbers(self: Optimiser, step: int, learning_rate: float) -> dict[str, float]:
        """lr', eps' and decay' of the update number `step`, counted from 1; computed in float64."""
        h = self.hyperparameters
        # The kernel holds the betas in float32; the corrections are those of these numbers.
        correction1 = 1 - float(np.float32(h.beta1)) ** step
        correction2 = math.sqrt(1 - float(np.float32(h.beta2)) ** step)
        return {
            "learning_rate": learning_rate * correction2 / correction1,
            "epsilon": h.epsilon * correction2,
            "weight_decay": h.weight_decay * correction1 / correction2,
        }

    def construct(self, gradients: tuple[Tensor, ...], proceed: Tensor | None) -> tuple[Tensor, ...]:
        learning_rate, beta1, beta2 = self.learning_rate, self.beta1, self.beta2
        factors, decays, first, second = self.rate_factors, self.decay_factors, self.first_moments, self.second_moments
        if proceed is not None:
            # A rate of 0 and moments that keep all of themselves change no bit, if only the gradient is finite.
            gradients = _map(ops.partial(value_if, proceed), gradients, first)
            learning_rate = ops.select(proceed, learning_rate, learning_rate * 0.0)
            beta1, beta2 = _or_one(proceed, beta1), _or_one(proceed, beta2)
        update = ops.partial(_update, self.fused_update, beta1, beta2, learning_rate, self.epsilon, self.weight_decay)
        return _map(update, factors, decays, self.parameters, first, second, gradients)


def _or_one(proceed: Tensor, beta: float) -> Tensor:
    return ops.select(proceed, Tensor(beta, ms.float32), Tensor(1.0, ms.float32))


def _update(
    fused_update, beta1, beta2, rate, epsilon, decay, rate_factor, decay_factor, parameter, first, second, gradient
):
    rate = rate if rate_factor == 1.0 else rate * rate_factor
    decay = decay if decay_factor == 1.0 else decay * decay_factor
    return fused_update(parameter, first, second, rate, beta1, beta2, epsilon, decay, gradient)


LEAST_SQUARE, LEAST_SCALE = 1e-30, 1e-3
"""Epsilon 1 and 2 of the paper."""
DECAY_POWER = -0.8
"""The second moments of step t keep 1 - t^power of themselves."""


class Adafactor(Optimiser):
    """Adafactor (Shazeer and Stern, 2018): second moments of a matrix as one number for each row and each column.
    Algorithms 4 and 5 of the paper with a learning rate from outside and without the first moment, as fine-tuning uses
    it. A convolution is the matrix of its output channels, a vector one row."""

    def make_moments(self, parameters: Sequence[Parameter]) -> None:
        self.scale_parameter = self.hyperparameters.scale_parameter
        self.decays = tuple(factor * self.hyperparameters.weight_decay for factor in self.decay_factors)
        sides = [(p.shape[0], p.size // p.shape[0]) if p.ndim > 1 else (1, p.size) for p in parameters]
        self.rows, self.columns = (
            ParameterTuple([zeros_like(p, role, of[axis]) for p, of in zip(parameters, sides, strict=True)])
            for axis, role in enumerate(("rows", "columns"))
        )

    def numbers(self, step: int, learning_rate: float) -> dict[str, float]:
        """Learning rate, and the share of the update number `step`, counted from 1, in the second moments."""
        return {"learning_rate": learning_rate, "share": float(step) ** DECAY_POWER}

    def construct(self, gradients: tuple[Tensor, ...], proceed: Tensor | None) -> tuple[tuple[Tensor, ...], ...]:
        update = ops.partial(_update_factored, self.scale_parameter, proceed, self.learning_rate, self.share)
        return _map(update, self.rate_factors, self.decays, self.parameters, self.rows, self.columns, gradients)


def _update_factored(scale_parameter, proceed, rate, share, rate_factor, decay, parameter, rows, columns, gradient):
    gradient_RC = ops.reshape(gradient, (rows.shape[0], columns.shape[0]))
    value_RC = ops.reshape(parameter, gradient_RC.shape)
    square_RC = gradient_RC * gradient_RC + LEAST_SQUARE
    new_rows = rows + (mean(square_RC, (1,)) - rows) * share
    new_columns = columns + (mean(square_RC, (0,)) - columns) * share
    row_factor = ops.rsqrt(new_rows / ops.broadcast_to(mean(new_rows, (0,)), new_rows.shape))
    row_factor_RC = ops.broadcast_to(ops.reshape(row_factor, (-1, 1)), gradient_RC.shape)
    column_factor_RC = ops.broadcast_to(ops.reshape(ops.rsqrt(new_columns), (1, -1)), gradient_RC.shape)
    change_RC = gradient_RC * row_factor_RC * column_factor_RC
    rate = rate * rate_factor
    if scale_parameter:
        rate = rate * ops.maximum(_root_mean_square(value_RC), LEAST_SCALE)
    # The largest root mean square of an update before the learning rate is 1.
    clip = 1 / ops.maximum(_root_mean_square(change_RC), 1.0)
    updated_RC = value_RC - value_RC * (rate * decay) - change_RC * (rate * clip)
    return (
        assign_if(proceed, parameter, ops.reshape(updated_RC, parameter.shape)),
        assign_if(proceed, rows, new_rows),
        assign_if(proceed, columns, new_columns),
    )


def _root_mean_square(x: Tensor) -> Tensor:
    return ops.sqrt(total(x * x) * (1 / x.size))


def value_if(proceed: Tensor | None, value: Tensor, otherwise: Tensor) -> Tensor:
    """`value` where `proceed`, a truth value (), holds; None holds always. Else `value` may be NaN."""
    if proceed is None:
        return value
    return ops.select(ops.broadcast_to(proceed, value.shape), value, otherwise)


def assign_if(proceed: Tensor | None, parameter: Parameter, value: Tensor) -> Tensor:
    """Set a parameter where `proceed` holds."""
    return ops.assign(parameter, value_if(proceed, value, parameter))


def zeros_like(parameter: Parameter, role: str, length: int | None = None) -> Parameter:
    """Zeros that stand beside a parameter, such as a moment of its gradients: of its shape, or a vector of a length."""
    return state(f"{role}.{parameter.name}", np.zeros(length or parameter.shape, np.float32))


def state(name: str, value: np.ndarray | np.generic) -> Parameter:
    """A parameter that no gradient goes to."""
    return Parameter(Tensor(value), name=name, requires_grad=False)


def part_bounds(sizes: Sequence[int], count: int) -> list[int]:
    """Where the parts begin, and the end: `count` runs of neighbours, about equal in size, all of them in order."""
    ends = np.cumsum(sizes)
    inner = [int(np.argmin(np.abs(ends - ends[-1] * part / count))) + 1 for part in range(1, count)]
    return [0, *np.maximum.accumulate(inner).tolist(), len(sizes)] if inner else [0, len(sizes)]


class ShardedOptimiser(nn.Cell):
    """An optimiser of all trainables, of whose state this process keeps a part: ZeRO 1 (Rajbhandari et al., 2020,
    section 5.1). It updates its part of the parameters, and takes the others' updated parts from them. `trainables` are
    the same on every process; `make` gives the optimiser of start … stop - 1 of them."""

    def __init__(
        self, trainables: Sequence[Parameter], make: Callable[[int, int], Optimiser], processes: Processes
    ) -> None:
        super().__init__(auto_prefix=False)
        bounds = part_bounds([parameter.size for parameter in trainables], processes.count)
        self.start, self.stop = bounds[processes.rank], bounds[processes.rank + 1]
        self.own = make(self.start, self.stop)
        self.prepare, self.moments = self.own.prepare, self.own.moments
        parts = [list(trainables[start:stop]) for start, stop in pairwise(bounds)]
        self.share_parts = ShareParts(parts, processes.rank)
        self._kept = processes.exchange(
            "the optimiser's state", [[m.name, list(m.shape), str(m.dtype)] for m in self.own.moments()]
        )

    def construct(self, gradients: tuple[Tensor, ...], proceed: Tensor | None) -> tuple[Tensor, ...]:
        return self.share_parts(self.own(gradients[self.start : self.stop], proceed))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the state of all processes."""
        return {name: tuple(shape) for kept in self._kept for name, shape, _ in kept}

    def all_moments(self) -> list[Parameter]:
        """The whole state; all processes must ask at the same time."""
        held = {moment.name: moment for moment in self.own.moments()}
        return [
            Parameter(from_process(rank, held.get(name), tuple(shape), dtype), name=name)
            for rank, kept in enumerate(self._kept)
            for name, shape, dtype in kept
        ]


def learning_rate_factor(config: OptimiserConfig, step: int, total_steps: int, base_learning_rate: float) -> float:
    """The factor on the base learning rate for one optimiser step, as in diffusers.optimization. `step` is how many
    were taken before, `total_steps` the length of the run with its warm-up. All schedules but `constant` rise linearly
    from 0 over the warm-up; `polynomial` ends at an absolute rate."""
    warmup_steps, end = config.lr_warmup_steps, POLYNOMIAL_END_RATE / base_learning_rate
    if config.lr_scheduler != "constant" and step < warmup_steps:
        return step / warmup_steps
    decay_steps = max(1, total_steps - warmup_steps)
    progress, remaining = (step - warmup_steps) / decay_steps, max(0, total_steps - step) / decay_steps
    of_cycle = config.lr_num_cycles * progress % 1.0 if progress < 1.0 else 1.0
    return {
        "constant": 1.0,
        "constant_with_warmup": 1.0,
        "linear": remaining,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "cosine_with_restarts": 0.5 * (1.0 + math.cos(math.pi * of_cycle)),
        "polynomial": (1.0 - end) * remaining**config.lr_power + end,
    }[config.lr_scheduler]
