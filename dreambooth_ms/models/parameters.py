"""A network's parameters under their public names and shapes, and random values for them."""

import math
import zlib
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from dreambooth_ms.ops.layout import StoredLayout
from dreambooth_ms.randomness import generator


@dataclass(frozen=True)
class PublicParameter:
    """A parameter and what stands between its stored form and the public one."""

    parameter: Parameter
    layout: StoredLayout | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The public shape."""
        return self.layout.public_shape(self.parameter.shape) if self.layout else tuple(self.parameter.shape)

    def read(self) -> np.ndarray:
        """The value in its public form, as float32."""
        value = self.parameter.asnumpy()
        return self.layout.restore(value) if self.layout else value.copy()

    def write(self, value: np.ndarray) -> None:
        """Set the value from its public form; it is cast to the parameter's dtype."""
        stored = self.layout.store(value) if self.layout else value
        dtype = np.float16 if self.parameter.dtype == ms.float16 else np.float32
        # Not ascontiguousarray: that would give a scalar an axis.
        self.parameter.set_data(Tensor(np.asarray(stored, dtype=dtype, order="C")))


def name_prefix(root: nn.Cell) -> str:
    """What distinguishes a network's parameters from those of another with the same public names; "" for most."""
    return getattr(root, "name_prefix", "")


def public_parameters(root: nn.Cell) -> dict[str, PublicParameter]:
    """Every parameter of a network by its public name, in the order of the module tree.

    The parameters themselves are renamed to the same names, behind the root's `name_prefix`: attaching a
    cell prefixes only relative to its parent, so names can repeat until they are set once from the root.
    """
    prefix_of_root = name_prefix(root)
    layouts = {}
    for cell_name, cell in root.cells_and_names():
        prefix = f"{cell_name}." if cell_name else ""
        layouts.update({prefix + name: layout for name, layout in getattr(cell, "stored_layouts", {}).items()})
    found = {}
    for name, parameter in root.parameters_and_names():
        parameter.name = prefix_of_root + name
        found[name] = PublicParameter(parameter, layouts.get(name))
    return found


def read_parameters(root: nn.Cell) -> dict[str, np.ndarray]:
    """The values of all parameters, by public name and in public form."""
    return {name: parameter.read() for name, parameter in public_parameters(root).items()}


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
