"""One denoising step as one compiled cell, with classifier-free guidance."""

from mindspore import Tensor, nn, ops


class Denoiser(nn.Cell):
    """negative + guidance * (positive - negative) (Ho and Salimans, 2022, eq. 6, with w = guidance - 1).

    Latents (B, C, H, W), timesteps (B,), texts (B, S, E) twice, guidance () -> (B, C, H, W).
    """

    def __init__(self, unet: nn.Cell, guided: bool) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet
        self.guided = guided

    def construct(
        self, latents: Tensor, timesteps_B: Tensor, text_BSE: Tensor, negative_BSE: Tensor, guidance: Tensor
    ) -> Tensor:
        if not self.guided:
            return self.unet(latents, timesteps_B, text_BSE)
        prediction = self.unet(
            ops.concat((latents, latents)),
            ops.concat((timesteps_B, timesteps_B)),
            ops.concat((negative_BSE, text_BSE)),
        )
        negative, positive = ops.split(prediction, latents.shape[0])
        return negative + (positive - negative) * ops.broadcast_to(guidance, latents.shape)
