"""One denoising step as one compiled cell, with classifier-free guidance."""

from mindspore import Tensor, nn, ops

from dreambooth_ms.ops import equal_parts, mean
from dreambooth_ms.runtime.compiled_cell import CompiledCell


class Denoiser(CompiledCell):
    """negative + guidance * (positive - negative) (Ho and Salimans, 2022, eq. 6, with w = guidance - 1).

    Latents (B, C, H, W), timesteps (B,), guidance (2,), conditioning -> (B, C, H, W). Where it is guided, the rows of
    the conditioning are 2 B: the negative ones, then the positive ones. `guidance` is its scale and, where it is
    rescaled, how much: a share of the result is brought back to the deviation of the positive prediction (Lin et al.,
    2024, eq. 15 and 16).
    """

    title = "the denoising step"

    def __init__(self, unet: nn.Cell, guided: bool, rescaled: bool = False) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet
        self.guided, self.rescaled = guided, rescaled

    def construct(self, latents: Tensor, timesteps_B: Tensor, guidance: Tensor, *conditioning: Tensor) -> Tensor:
        if not self.guided:
            return self.unet(latents, timesteps_B, *conditioning)
        prediction = self.unet(ops.concat((latents, latents)), ops.concat((timesteps_B, timesteps_B)), *conditioning)
        negative, positive = equal_parts(prediction, 2, 0)
        scale, share = equal_parts(guidance, 2, 0)
        guided = negative + (positive - negative) * ops.broadcast_to(scale, latents.shape)
        if not self.rescaled:
            return guided
        factor = ops.broadcast_to(_deviation(positive) / _deviation(guided), latents.shape)
        share = ops.broadcast_to(share, latents.shape)
        return guided * factor * share + guided * (1.0 - share)


def _deviation(x_BCHW: Tensor) -> Tensor:
    """Standard deviation of each row (B, 1, 1, 1), up to a factor that is the same for all of one shape."""
    centred = x_BCHW - ops.broadcast_to(mean(x_BCHW, (1, 2, 3), True), x_BCHW.shape)
    return ops.sqrt(mean(centred * centred, (1, 2, 3), True))
