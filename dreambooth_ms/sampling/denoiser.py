"""One denoising step as one compiled cell, with classifier-free guidance."""

from mindspore import Tensor, nn, ops

from dreambooth_ms.ops import CompiledCell


class Denoiser(CompiledCell):
    """negative + guidance * (positive - negative) (Ho and Salimans, 2022, eq. 6, with w = guidance - 1).

    Latents (B, C, H, W), timesteps (B,), guidance (), conditioning -> (B, C, H, W). Where it is guided, the rows of the
    conditioning are 2 B: the negative ones, then the positive ones.
    """

    def __init__(self, unet: nn.Cell, guided: bool) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet
        self.guided = guided

    def construct(self, latents: Tensor, timesteps_B: Tensor, guidance: Tensor, *conditioning: Tensor) -> Tensor:
        if not self.guided:
            return self.unet(latents, timesteps_B, *conditioning)
        prediction = self.unet(ops.concat((latents, latents)), ops.concat((timesteps_B, timesteps_B)), *conditioning)
        negative, positive = ops.split(prediction, latents.shape[0])
        return negative + (positive - negative) * ops.broadcast_to(guidance, latents.shape)
