"""One training step as one compiled cell: loss, gradients of the explicit trainables, clip, update."""

from collections.abc import Sequence

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from dreambooth_ms.diffusion.noise_schedule import PredictionType
from dreambooth_ms.diffusion.objective import diffusion_target, mean_squared_error, noisy_latents, per_row
from dreambooth_ms.training.optimisers import AdamW


class DiffusionLoss(nn.Cell):
    """The row-wise loss of a batch (see `data.batches.Batch` for the rows).

    loss = sum over rows of coefficient_row * mean squared error_row. The coefficients hold what makes a method:
    prior preservation, for one, is lambda_group / rows of the group.
    """

    def __init__(self, unet: nn.Cell, prediction_type: PredictionType) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet
        self.prediction_type = prediction_type

    def construct(
        self,
        latents_BCHW: Tensor,
        noise_BCHW: Tensor,
        timesteps_B: Tensor,
        signal_B: Tensor,
        sigma_B: Tensor,
        text_BSE: Tensor,
        coefficients_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the unscaled error of each row (B,)."""
        signal, sigma = per_row(signal_B, latents_BCHW.shape), per_row(sigma_B, latents_BCHW.shape)
        noisy = noisy_latents(latents_BCHW, noise_BCHW, signal, sigma)
        target = diffusion_target(self.prediction_type, latents_BCHW, noise_BCHW, signal, sigma)
        errors_B = mean_squared_error(self.unet(noisy, timesteps_B, text_BSE), target)
        return (errors_B * coefficients_B).sum(), errors_B


class TrainStep(nn.Cell):
    """loss_cell(*inputs) -> (loss, report); then gradients, clip by their global norm, and the optimiser's update."""

    def __init__(
        self, loss_cell: nn.Cell, trainables: Sequence[Parameter], optimiser: AdamW, max_grad_norm: float
    ) -> None:
        super().__init__(auto_prefix=False)
        self.loss_cell = loss_cell
        self.trainables = ParameterTuple(trainables)
        self.optimiser = optimiser
        self.max_grad_norm = max_grad_norm
        self.loss_and_gradients = ops.value_and_grad(loss_cell, None, self.trainables, has_aux=True)
        self.set_train(True)

    def construct(
        self, learning_rate: Tensor, epsilon: Tensor, weight_decay: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, the loss cell's report, and the norm of the gradients before the clip."""
        (loss, report), gradients = self.loss_and_gradients(*inputs)
        gradients, norm = clip_by_global_norm(gradients, self.max_grad_norm)
        updated = self.optimiser(gradients, learning_rate, epsilon, weight_decay)
        return ops.depend(loss, updated), report, norm


_square_sum = ops.MultitypeFuncGraph("square_sum")
_scale = ops.MultitypeFuncGraph("scale")
_map = ops.HyperMap()


@_square_sum.register("Tensor")
def _square_sum_of_tensor(gradient):
    return (gradient * gradient).sum()


@_scale.register("Tensor", "Tensor")
def _scale_tensor(factor, gradient):
    return gradient * ops.broadcast_to(factor, gradient.shape)


def clip_by_global_norm(gradients: tuple[Tensor, ...], max_norm: float) -> tuple[tuple[Tensor, ...], Tensor]:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)); also returns the norm before (Pascanu et al., 2013)."""
    norm = ops.sqrt(ops.addn(_map(_square_sum, gradients)))
    factor = ops.minimum(max_norm / (norm + 1e-6), 1.0)
    return _map(ops.partial(_scale, factor), gradients), norm
