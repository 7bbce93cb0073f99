"""Random values for a network."""

import math
import zlib

import numpy as np
from mindspore import nn

from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.randomness import generator

EMBEDDING_DEVIATION = np.float32(0.02)
"""CLIP's own (transformers' initializer_range)."""


def initialise(root: nn.Cell, seed: int, variance: float = 1 / 3) -> None:
    """Fill a network with random values, each a function of (seed, name).

    Matrices and convolutions are uniform with `variance` / fan_in, as PyTorch's layers start by default; norms are the
    identity; biases are 0; embeddings and single vectors are normal with `EMBEDDING_DEVIATION`.
    """
    for name, parameter in public_parameters(root).items():
        rng = generator(seed, "initial weights", zlib.crc32(name.encode()))
        parameter.write(_start_value(name, parameter.shape, rng, variance))


def _start_value(name: str, shape: tuple[int, ...], rng: np.random.Generator, variance: float) -> np.ndarray:
    if name.endswith("embedding.weight") or name.endswith("class_embedding"):
        return EMBEDDING_DEVIATION * rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("logit_scale"):
        return np.full(shape, math.log(1 / 0.07), np.float32)
    if len(shape) > 1:
        bound = math.sqrt(3 * variance / math.prod(shape[1:]))
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    return np.full(shape, 1.0 if name.endswith(".weight") else 0.0, np.float32)
