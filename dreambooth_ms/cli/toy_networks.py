"""The smallest networks that have every kind of layer, and inputs for them, for checks of an installation."""

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from dreambooth_ms.data.batches import Batch
from dreambooth_ms.diffusion import Columns
from dreambooth_ms.models.specs import UNetSpec, VaeSpec, read_table, values_of
from dreambooth_ms.randomness import standard_normal

ROWS, TOKENS, SIDE, POOLED, SEED = 2, 77, 8, 24, 0
"""Rows of a batch, tokens of a text, side of the latents, and width of pooled text."""

_SD, _SDXL, _IF = map(values_of, read_table(Path(__file__).with_name("toy_networks.yaml")).values())
SD_UNET: UNetSpec = _SD["unet"]
SDXL_UNET: UNetSpec = _SDXL["unet"]
IF_UNET: UNetSpec = _IF["unet"]
VAE: VaeSpec = _SD["vae"]
LATENTS = (1, VAE.latent_channels, SIDE, SIDE)
"""Shape of those of one picture."""


def normal(name: str, *shape: int) -> Tensor:
    """Standard normal values that depend on a name alone."""
    return Tensor(standard_normal(shape, SEED, name), ms.float32)


def batch(channels: int = SD_UNET.in_channels, **conditioning: Tensor) -> Batch:
    """Two rows of a batch that predicts noise, with this conditioning."""
    signal, ones = np.array([0.9, 0.3]), np.ones(ROWS)
    columns = Columns(signal, np.sqrt(1 - signal**2), 0 * ones, ones, np.array([120, 700]), ones / ROWS)
    shape = (ROWS, channels, SIDE, SIDE)
    clean, noise = (normal(name, *shape).asnumpy() for name in ("latents", "noise"))
    named = {name: rows.asnumpy() for name, rows in conditioning.items()}
    return Batch.of(columns, clean, noise, named, ["toy"] * ROWS)


def add_time_ids() -> Tensor:
    """SDXL's add_time_ids (B, 6)."""
    return Tensor(np.tile(np.array([64, 64, 0, 0, 64, 64], np.float32), (ROWS, 1)))
