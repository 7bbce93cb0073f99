"""The smallest networks that have every kind of layer, and inputs for them: for checks of an installation.

They are generated, so that nothing is downloaded; every value is a function of names and numbers.
"""

from dataclasses import replace

import mindspore as ms
import numpy as np
from mindspore import Tensor

from dreambooth_ms.data.batches import Batch
from dreambooth_ms.diffusion import Columns
from dreambooth_ms.models.specs import UNetSpec, VaeSpec
from dreambooth_ms.randomness import standard_normal

ROWS, TOKENS, SIDE, SEED = 2, 77, 8, 0
"""Rows of a batch, tokens of a text, and side of the latents."""

SD_UNET = UNetSpec(
    block_out_channels=(16, 32),
    has_attention=(True, False),
    num_heads=(1, 2),
    cross_attention_dim=32,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=SIDE,
)
POOLED = 24
SDXL_UNET = replace(
    SD_UNET,
    has_attention=(False, True),
    cross_attention_dim=64,
    use_linear_projection=True,
    transformer_layers_per_block=(1, 1),
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=POOLED + 6 * 8,
)
VAE = VaeSpec(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
LATENTS = (1, VAE.latent_channels, SIDE, SIDE)
"""Shape of those of one picture."""


def normal(name: str, *shape: int) -> Tensor:
    """Standard normal values that depend on a name alone."""
    return Tensor(standard_normal(shape, SEED, name), ms.float32)


def batch(**conditioning: Tensor) -> Batch:
    """Two rows of a batch that predicts noise, with this conditioning."""
    signal, ones = np.array([0.9, 0.3]), np.ones(ROWS)
    columns = Columns(signal, np.sqrt(1 - signal**2), 0 * ones, ones, np.array([120, 700]), ones / ROWS)
    shape = (ROWS, SD_UNET.in_channels, SIDE, SIDE)
    clean, noise = (normal(name, *shape).asnumpy() for name in ("latents", "noise"))
    named = {name: rows.asnumpy() for name, rows in conditioning.items()}
    return Batch.of(columns, clean, noise, named, ["toy"] * ROWS)


def add_time_ids() -> Tensor:
    """SDXL's add_time_ids (B, 6)."""
    return Tensor(np.tile(np.array([64, 64, 0, 0, 64, 64], np.float32), (ROWS, 1)))
