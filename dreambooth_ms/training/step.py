"""One training step: loss, gradients of the explicit trainables, clip, update; and the average of what steps leave."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from dreambooth_ms.config.train import LossScalingConfig
from dreambooth_ms.models.unet import Segments
from dreambooth_ms.ops import SumOfSquares, equal_parts, mean
from dreambooth_ms.runtime.collective import SumOverProcesses
from dreambooth_ms.runtime.compiled_cell import CompiledCell
from dreambooth_ms.training.optimisers import Optimiser, state, zeros_like
from dreambooth_ms.training.recomputation import RecomputedGradients

_map = ops.HyperMap()


class LossScaler(nn.Cell):
    """The scale of the loss (Micikevicius et al., 2018, section 3.2), and its change after each step: whether the
    gradients were finite () -> what was assigned.

    By the rule of PyTorch's GradScaler the scale falls where NaN or infinity is in the gradients of a step, which is
    skipped, and grows after a window of good steps. The state stays on the device, so that no step waits for the host.
    """

    def __init__(self, config: LossScalingConfig) -> None:
        super().__init__(auto_prefix=False)
        # A scale that stays is one that changes by a factor of 1.
        self.factor = config.loss_scale_factor if config.loss_scaler_type == "dynamic" else 1.0
        self.window = config.scale_window
        self.scale = state("loss_scale", np.float32(config.init_loss_scale))
        self.good_steps, self.skipped = state("good_steps", np.int32(0)), state("skipped_steps", np.int32(0))

    def state(self) -> list[Parameter]:
        """What a resumed run needs."""
        return [self.scale, self.good_steps, self.skipped]

    @property
    def value(self) -> float:
        """The scale of the next step."""
        return float(self.scale.asnumpy())

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped since the beginning of the run."""
        return int(self.skipped.asnumpy())

    def construct(self, finite: Tensor) -> tuple[Tensor, ...]:
        good = finite.astype(ms.int32)
        skipped = ops.assign(self.skipped, self.skipped + (1 - good))
        in_a_row = (self.good_steps + 1) * good
        grows = in_a_row >= self.window
        grown = ops.select(grows, self.scale * self.factor, self.scale * 1.0)
        # An infinite scale would never fall again.
        grown = ops.select(ops.isfinite(grown), grown, self.scale * 1.0)
        scale = ops.assign(self.scale, ops.select(finite, grown, self.scale * (1 / self.factor)))
        return skipped, scale, ops.assign(self.good_steps, in_a_row * (1 - grows.astype(ms.int32)))


class ScaledLoss(nn.Cell):
    """loss_cell(*inputs) -> (loss, report) becomes (scaled loss, loss, report): the first one is differentiated. A
    penalty, () -> (), is a part of either loss."""

    def __init__(self, loss_cell: nn.Cell, scaler: LossScaler | None, penalty: nn.Cell | None) -> None:
        super().__init__(auto_prefix=False)
        self.loss_cell, self.penalty = loss_cell, penalty
        self.scale = scaler.scale if scaler else None

    def construct(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, report = self.loss_cell(*inputs)
        if self.penalty is not None:
            loss = loss + self.penalty()
        return loss if self.scale is None else loss * self.scale, loss, report


class WeightedError(nn.Cell):
    """Prediction, target (B, C, H, W), weights (B,), extras -> loss, and the error of each row (B,).

    loss = sum over rows of weight_row * error_row, and an error is the mean over the row of the squared difference d^2,
    or of 2 c (sqrt(d^2 + c^2) - c) if there is "huber_c" (B,); "mask" (B, C, H, W) of mean 1 counts each element. The
    weights hold what makes a method: prior preservation, for one, is lambda of the concept / rows of the concept.

    `extras` are the names of what there is of "mask" and "huber_c", in this order.
    """

    def __init__(self, extras: Sequence[str] = ()) -> None:
        super().__init__(auto_prefix=False)
        self.num_extras, self.masked, self.has_c = len(extras), "mask" in extras, "huber_c" in extras

    def construct(
        self, prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor, *extras: Tensor
    ) -> tuple[Tensor, Tensor]:
        if prediction_BCHW.shape[1] > target_BCHW.shape[1]:
            # The variance, which is not trained.
            prediction_BCHW = equal_parts(prediction_BCHW, 2, 1)[0]
        difference = prediction_BCHW - target_BCHW
        squares = difference * difference
        if self.has_c:
            c_BCHW = ops.broadcast_to(ops.reshape(extras[-1], (-1, 1, 1, 1)), squares.shape)
            root = ops.stop_gradient(ops.sqrt(squares + c_BCHW * c_BCHW))
            # The gradient c / root of d^2, without the root's, for which Ascend has no newer kernel; and the value, in
            # which small errors are not lost to rounding.
            slope, value = squares * (c_BCHW / root), squares * (2 * c_BCHW / (root + c_BCHW))
            squares = slope + ops.stop_gradient(value - slope)
        if self.masked:
            squares = squares * extras[0]
        errors_B = mean(squares, (1, 2, 3))
        return (errors_B * weight_B).sum(), errors_B


class DiffusionLoss(nn.Cell):
    """Predict, compare, weigh: the rows of a batch as `data.batches.Batch.tensors` gives them -> see `WeightedError`.

    `denoiser`: what it reads of the rows, in order -> prediction (B, C, H, W).
    """

    title = "the loss"

    def __init__(self, denoiser: nn.Cell, extras: Sequence[str] = ()) -> None:
        super().__init__(auto_prefix=False)
        self.denoiser, self.compare = denoiser, WeightedError(extras)
        self.num_extras = self.compare.num_extras

    def construct(self, target_BCHW: Tensor, weight_B: Tensor, *extras_and_inputs: Tensor) -> tuple[Tensor, Tensor]:
        extras, inputs = extras_and_inputs[: self.num_extras], extras_and_inputs[self.num_extras :]
        return self.compare(self.denoiser(*inputs), target_BCHW, weight_B, *extras)


class TrainStep(CompiledCell):
    """loss_cell(*batch) -> (loss, report); then gradients, clip by their global norm, and the optimiser's update.

    The optimiser must be prepared for the step. With a `scaler`, steps whose gradients overflow are skipped. With
    `sum_gradients`, `recomputed` or `penalty`, see `Update` and `loss_and_gradients`.
    """

    title = "the training step"

    def __init__(
        self,
        loss_cell: nn.Cell,
        trainables: Sequence[Parameter],
        optimiser: Optimiser,
        max_grad_norm: float,
        sum_gradients: SumOverProcesses | None = None,
        scaler: LossScaler | None = None,
        recomputed: Segments | None = None,
        penalty: nn.Cell | None = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.trainables, self.optimiser, self.scaler = ParameterTuple(trainables), optimiser, scaler
        clip = ClipByGlobalNorm([parameter.shape for parameter in trainables], max_grad_norm)
        self.update = Update(optimiser, clip, sum_gradients, scaler)
        self.loss_and_gradients = loss_and_gradients(loss_cell, self.trainables, scaler, recomputed, penalty)
        self.set_train(True)

    def construct(self, *batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, the loss cell's report, and the norm of the gradients before the clip."""
        (_, loss, report), gradients = self.loss_and_gradients(*batch)
        norm = self.update(gradients)
        return ops.depend(loss, norm), report, norm

    def compile_for(self, batch: Sequence[Tensor]) -> None:
        """Compile for such a batch, without taking a step."""
        self.compile(*batch)

    def take(self, batches: Iterable[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor], Tensor]:
        """A step whose rows are one batch: loss, the loss cell's reports, norm of the gradients."""
        (batch,) = batches
        loss, report, norm = self(*batch)
        return loss, [report], norm


class AccumulatingTrainStep:
    """A step with its rows in several batches, whose losses are parts of one sum."""

    def __init__(self, step: TrainStep) -> None:
        self._step, self.optimiser, self.scaler = step, step.optimiser, step.scaler
        sums = ParameterTuple([zeros_like(parameter, "gradient") for parameter in step.trainables])
        self._add_gradients = _AddGradients(step.loss_and_gradients, sums)
        self._update = _UpdateFromSums(sums, step.update)

    def compile_for(self, batch: Sequence[Tensor]) -> None:
        """Compile for such a batch, without taking a step."""
        self._add_gradients.compile(Tensor(True), *batch)
        self._update.compile()

    def take(self, batches: Iterable[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Loss over all batches, the loss cell's report of each, norm of the summed gradients."""
        added = [self._add_gradients(Tensor(number == 0), *batch) for number, batch in enumerate(batches)]
        losses, reports = zip(*added, strict=True)
        return sum(losses[1:], losses[0]), list(reports), self._update()


class _AddGradients(CompiledCell):
    """sums <- gradients for the first batch of a step, sums + gradients for the others."""

    title = "the gradients of a batch"

    def __init__(self, loss_and_gradients: nn.Cell, sums: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.loss_and_gradients, self.sums = loss_and_gradients, sums
        self.set_train(True)

    def construct(self, is_first: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
        (_, loss, report), gradients = self.loss_and_gradients(*batch)
        added = _map(ops.partial(_add_to, is_first), self.sums, gradients)
        return ops.depend(loss, added), report


class _UpdateFromSums(CompiledCell):
    """Clip and update; gives the norm of the summed gradients before the clip."""

    title = "the update of a step"

    def __init__(self, sums: ParameterTuple, update: "Update") -> None:
        super().__init__(auto_prefix=False)
        self.sums, self.update = sums, update

    def construct(self) -> Tensor:
        return self.update(self.sums)


class Update(nn.Cell):
    """Sum over processes, clip, and the optimiser's update: gradients -> their norm before the clip.

    With a scaler the gradients are those of the scaled loss, and one factor takes the scale out and clips. Where the
    norm of the sum over all processes is NaN or infinity, the optimiser leaves everything as it is.
    """

    def __init__(
        self, optimiser: Optimiser, clip: nn.Cell, sum_gradients: SumOverProcesses | None, scaler: LossScaler | None
    ) -> None:
        super().__init__(auto_prefix=False)
        self.optimiser, self.clip, self.sum_gradients, self.scaler = optimiser, clip, sum_gradients, scaler

    def construct(self, gradients: tuple[Tensor, ...]) -> Tensor:
        if self.sum_gradients is not None:
            gradients = self.sum_gradients(gradients)
        if self.scaler is None:
            gradients, norm = self.clip(gradients)
            return ops.depend(norm, self.optimiser(gradients, None))
        gradients, norm = self.clip(gradients, 1 / self.scaler.scale)
        finite = ops.isfinite(norm)
        updated = self.optimiser(gradients, finite)
        return ops.depend(norm, (updated, self.scaler(finite)))


class ClipByGlobalNorm(nn.Cell):
    """Gradients of these shapes -> those times min(1, max_norm / (norm + 1e-6)), and their norm before that (Pascanu et
    al., 2013). With `unscale`, a number (), the gradients are those times it, and both factors are one."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], max_norm: float) -> None:
        super().__init__(auto_prefix=False)
        self.sum_of_squares, self.max_norm = SumOfSquares(shapes), max_norm

    def construct(
        self, gradients: tuple[Tensor, ...], unscale: Tensor | float = 1.0
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        norm = ops.sqrt(self.sum_of_squares(gradients)) * unscale
        factor = ops.minimum(self.max_norm / (norm + 1e-6), 1.0) * unscale
        return _map(ops.partial(_scale, factor), gradients), norm


class MovingAverage(CompiledCell):
    """A running average of the trained weights: average <- average - (1 - decay) (average - weight) after every step,
    as in diffusers' EMAModel."""

    title = "the moving average"

    def __init__(self, trainables: Sequence[Parameter], decay: float) -> None:
        super().__init__(auto_prefix=False)
        self.decay, self.trainables = decay, ParameterTuple(trainables)
        self.averages = ParameterTuple([state(f"average.{one.name}", one.asnumpy()) for one in trainables])

    def construct(self, share: Tensor) -> tuple[Tensor, ...]:
        return _map(ops.partial(_blend, share), self.averages, self.trainables)

    def update(self, step: int) -> None:
        """Take in the weights after the step with this number, counted from 1."""
        self(Tensor(np.float32(1 - decay_at(step, self.decay))))

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the trained parameters hold their averages."""
        kept = [parameter.asnumpy().copy() for parameter in self.trainables]
        for parameter, average in zip(self.trainables, self.averages, strict=True):
            parameter.set_data(Tensor(average.asnumpy()))
        try:
            yield
        finally:
            for parameter, value in zip(self.trainables, kept, strict=True):
                parameter.set_data(Tensor(value))


def decay_at(step: int, decay: float) -> float:
    """Decay of the update after a step counted from 1: at first the average follows fast (diffusers' EMAModel)."""
    before = step - 1
    return 0.0 if before <= 0 else min(decay, (1 + before) / (10 + before))


def loss_and_gradients(
    loss_cell: nn.Cell,
    trainables: ParameterTuple,
    scaler: LossScaler | None,
    recomputed: Segments | None,
    penalty: nn.Cell | None = None,
) -> nn.Cell:
    """batch -> (scaled loss, loss, report), gradients of the first; `recomputed`: of a `DiffusionLoss`'s denoiser;
    `penalty`, () -> (): a part of the loss of each batch."""
    if recomputed is None:
        return _Gradients(ScaledLoss(loss_cell, scaler, penalty), trainables)
    compare = ScaledLoss(loss_cell.compare, scaler, penalty)
    return RecomputedGradients(compare, loss_cell.num_extras, recomputed, trainables)


class _Gradients(nn.Cell):
    def __init__(self, loss_cell: nn.Cell, trainables: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.loss_cell, self.trainables = loss_cell, trainables
        self.differentiate = ops.value_and_grad(loss_cell, None, trainables, has_aux=True)

    def construct(self, *batch: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.differentiate(*batch)


def _scale(factor, gradient):
    # To broadcast one number keeps no index table on CPU, unlike several (measured), and `broadcast_to` takes longer.
    return gradient * factor


def _add_to(is_first, total, gradient):
    # Not by a factor of 0, which would leave what overflowed in the step before.
    return ops.assign(total, ops.select(ops.broadcast_to(is_first, total.shape), gradient, total + gradient))


def _blend(share: Tensor, average: Parameter, parameter: Parameter) -> Tensor:
    return ops.assign(average, average - share * (average - parameter))
