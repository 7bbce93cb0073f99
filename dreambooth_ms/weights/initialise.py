"""Random starting values for a network that is trained from scratch."""

import math
import zlib

import numpy as np
from mindspore import nn

from dreambooth_ms.randomness import generator
from dreambooth_ms.weights.parameters import PublicParameter, public_parameters


def initialise(root: nn.Cell, seed: int) -> None:
    """Fill a network with random values, each a function of (seed, name).

    Matrices and convolutions are uniform with the variance 1 / (3 fan_in) that PyTorch's layers start from; norms are
    the identity; biases are 0; embeddings and single vectors are normal with deviation 0.02.
    """
    for name, parameter in public_parameters(root).items():
        parameter.write(_start_value(name, parameter, seed))


def _start_value(name: str, parameter: PublicParameter, seed: int) -> np.ndarray:
    rng = generator(seed, "initial weights", zlib.crc32(name.encode()))
    shape = parameter.shape
    if name.endswith("embedding.weight") or name.endswith("class_embedding"):
        return 0.02 * rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("logit_scale"):
        return np.full(shape, math.log(1 / 0.07), np.float32)
    if len(shape) > 1:
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    return np.full(shape, 1.0 if name.endswith(".weight") else 0.0, np.float32)
