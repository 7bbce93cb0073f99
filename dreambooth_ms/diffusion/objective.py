"""What the network is asked to predict, and how its error is measured. Shapes: B rows, C, H, W of the latents."""

from mindspore import Tensor, ops

from dreambooth_ms.diffusion.noise_schedule import PredictionType


def per_row(values_B: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """One number per row -> the same number at every element of the row."""
    return ops.broadcast_to(ops.reshape(values_B, (shape[0], 1, 1, 1)), shape)


def noisy_latents(latents_BCHW: Tensor, noise_BCHW: Tensor, signal_BCHW: Tensor, sigma_BCHW: Tensor) -> Tensor:
    """x_t = signal x_0 + sigma eps (Ho et al., 2020, eq. 4)."""
    return latents_BCHW * signal_BCHW + noise_BCHW * sigma_BCHW


def diffusion_target(
    kind: PredictionType, latents_BCHW: Tensor, noise_BCHW: Tensor, signal_BCHW: Tensor, sigma_BCHW: Tensor
) -> Tensor:
    """The noise, or the velocity v = signal eps - sigma x_0 (Salimans and Ho, 2022, section 4)."""
    if kind == PredictionType.V_PREDICTION:
        return noise_BCHW * signal_BCHW - latents_BCHW * sigma_BCHW
    return noise_BCHW


def mean_squared_error(prediction_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Mean over the elements of each row: (B,)."""
    difference = prediction_BCHW - target_BCHW
    return (difference * difference).mean((1, 2, 3))
