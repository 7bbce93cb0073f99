"""Adafactor (Shazeer and Stern, 2018): second moments of a matrix as one number for each row and each column.

Algorithms 4 and 5 of the paper with a learning rate from outside and without the first moment, as fine-tuning uses it.
A convolution is the matrix of its output channels, a vector one row; for that the factors are the moments themselves.
"""

from collections.abc import Sequence

from mindspore import Parameter, ParameterTuple, Tensor, ops

from dreambooth_ms.ops import mean, total
from dreambooth_ms.training.optimisers import Optimiser, assign_if, zeros_like

LEAST_SQUARE, LEAST_SCALE = 1e-30, 1e-3
"""Epsilon 1 and 2 of the paper."""
CLIP = 1.0
"""The largest root mean square of an update before the learning rate."""
DECAY_POWER = -0.8
"""The second moments of step t keep 1 - t^power of themselves."""


class Adafactor(Optimiser):
    """Parameters and the factors of their second moments."""

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
        update = ops.partial(_update, self.scale_parameter, proceed, self.learning_rate, self.share)
        return _map(update, self.rate_factors, self.decays, self.parameters, self.rows, self.columns, gradients)


_map = ops.HyperMap()


def _update(scale_parameter, proceed, rate, share, rate_factor, decay, parameter, rows, columns, gradient):
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
    clip = 1 / ops.maximum(_root_mean_square(change_RC) * (1 / CLIP), 1.0)
    updated_RC = value_RC - value_RC * (rate * decay) - change_RC * (rate * clip)
    return (
        assign_if(proceed, parameter, ops.reshape(updated_RC, parameter.shape)),
        assign_if(proceed, rows, new_rows),
        assign_if(proceed, columns, new_columns),
    )


def _root_mean_square(x: Tensor) -> Tensor:
    return ops.sqrt(total(x * x) * (1 / x.size))
