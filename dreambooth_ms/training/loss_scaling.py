"""Loss scaling: gradients that float16 would round to zero are computed times a number, and divided by it once.

As in Micikevicius et al. (2018), section 3.2, with the rule of PyTorch's GradScaler: a step with NaN or
infinity in its gradients is skipped and the scale falls; after a window of good steps it grows.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from dreambooth_ms.config.train import LossScalingConfig
from dreambooth_ms.training.optimisers import state


class LossScaler(nn.Cell):
    """The scale, and its change after each step: whether the gradients were finite () -> what was assigned.

    Its state stays on the device, so that no step waits for the host to learn whether the last one was skipped.
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
    """loss_cell(*inputs) -> (loss, report) becomes (scaled loss, loss, report): the first one is differentiated."""

    def __init__(self, loss_cell: nn.Cell, scaler: LossScaler | None) -> None:
        super().__init__(auto_prefix=False)
        self.loss_cell = loss_cell
        self.scale = scaler.scale if scaler else None

    def construct(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, report = self.loss_cell(*inputs)
        return loss if self.scale is None else loss * self.scale, loss, report
