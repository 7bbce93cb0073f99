"""LoRA (Hu et al., 2021): a frozen linear layer plus a trained update of low rank.

y = W x + (alpha / r) B A x   (eq. 3), with A random and B = 0 at the start, so that a fresh adapter changes nothing.
"""

import zlib
from collections.abc import Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.ops import Dense
from dreambooth_ms.ops.linear import empty_parameter
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.weights.parameters import public_parameters


class LoraDense(nn.Cell):
    """A linear layer with an adapter: (..., in) -> (..., out).

    It holds the base layer's `weight` and `bias` under their own names, so the base's names do not change.
    """

    def __init__(self, base: Dense, rank: int, alpha: float) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.has_bias = base.in_channels, base.out_channels, base.has_bias
        self.rank, self.alpha = rank, alpha
        self.weight = base.weight
        if base.has_bias:
            self.bias = base.bias
            self.bias_add = base.bias_add
        self.matmul = ops.MatMul(transpose_b=True)
        self.lora_A = LoraMatrix(rank, base.in_channels)
        self.lora_B = LoraMatrix(base.out_channels, rank)
        # A parameter, because a compiled graph would not see a changed attribute.
        self.lora_scale = Parameter(Tensor(np.float32(alpha / rank)), requires_grad=False)

    def construct(self, x: Tensor) -> Tensor:
        rows = ops.reshape(x, (-1, self.in_channels))
        y = self.matmul(rows, self.weight)
        if self.has_bias:
            y = self.bias_add(y, self.bias)
        down = self.matmul(rows.astype(ms.float32), self.lora_A.weight)
        down = down * ops.broadcast_to(self.lora_scale, down.shape)
        y = y + self.matmul(down, self.lora_B.weight).astype(y.dtype)
        return ops.reshape(y, x.shape[:-1] + (self.out_channels,))

    def set_factors(self, factor_a: np.ndarray, factor_b: np.ndarray) -> None:
        """Fill the adapter: A (r, in), B (out, r).

        Raises:
            WeightError: the factors are those of a layer of another size.
        """
        for matrix, value in ((self.lora_A, factor_a), (self.lora_B, factor_b)):
            if tuple(matrix.weight.shape) != value.shape:
                raise WeightError(f"the adapter does not fit the base: {value.shape} for {tuple(matrix.weight.shape)}")
            matrix.weight.set_data(Tensor(np.ascontiguousarray(value, np.float32)))

    def set_scale(self, multiplier: float) -> None:
        """Weaken or strengthen the adapter: 0 is the base layer, 1 is as trained."""
        self.lora_scale.set_data(Tensor(np.float32(multiplier * self.alpha / self.rank)))


class LoraMatrix(nn.Cell):
    """One of the two factors, a float32 matrix."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = empty_parameter((rows, columns))


def inject_lora(root: nn.Cell, rank: int, alpha: float, target_modules: Sequence[str]) -> dict[str, LoraDense]:
    """Give every linear layer whose name ends in one of the targets an adapter of zeros; freeze everything else.

    Returns:
        The adapted layers by the public names of their base layers.

    Raises:
        ConfigError: a target matches no linear layer, or the rank is larger than a layer.
    """
    layers = linear_layers(root)
    chosen = {name: cell for name, cell in layers.items() if any(_matches(name, target) for target in target_modules)}
    unmatched = [target for target in target_modules if not any(_matches(name, target) for name in layers)]
    if unmatched:
        endings = sorted({_ending(name) for name in layers})
        raise ConfigError(
            f"--lora_target_modules: no linear layer is named {', '.join(unmatched)}; there are {', '.join(endings)}"
        )
    largest = min(min(cell.in_channels, cell.out_channels) for cell in chosen.values())
    if rank > largest:
        raise ConfigError(f"--rank: expected 1 to {largest}, the size of the smallest adapted layer, got {rank}")
    for _, parameter in root.parameters_and_names():
        parameter.requires_grad = False
    adapted = {name: LoraDense(cell, rank, alpha) for name, cell in chosen.items()}
    for name, layer in adapted.items():
        _replace(root, name, layer)
    public_parameters(root)
    return adapted


def linear_layers(root: nn.Cell) -> dict[str, Dense]:
    """The plain linear layers of a network by their public names."""
    return {name: cell for name, cell in root.cells_and_names() if type(cell) is Dense}


def initialise_lora(layers: dict[str, LoraDense], seed: int) -> None:
    """A ~ N(0, 1 / r^2) and B = 0, as the published DreamBooth scripts start; a function of (seed, name)."""
    for name, layer in layers.items():
        shape = layer.lora_A.weight.shape
        draw = standard_normal(shape, seed, "lora start", zlib.crc32(name.encode()))
        layer.lora_A.weight.set_data(Tensor(draw / layer.rank))
        layer.lora_B.weight.set_data(Tensor(np.zeros(layer.lora_B.weight.shape, np.float32)))


def lora_trainables(layers: dict[str, LoraDense]) -> list[Parameter]:
    """The parameters to train, in a fixed order."""
    return [matrix.weight for layer in layers.values() for matrix in (layer.lora_A, layer.lora_B)]


def lora_tensors(layers: dict[str, LoraDense]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name of the base layer, A, B) of every adapter."""
    for name, layer in layers.items():
        yield name, layer.lora_A.weight.asnumpy(), layer.lora_B.weight.asnumpy()


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _ending(name: str) -> str:
    """The part of a layer's name that tells what it is for: `to_q`, or `to_out.0`."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _replace(root: nn.Cell, name: str, layer: nn.Cell) -> None:
    """Put a cell in the place of the one with this name."""
    *path, last = name.split(".")
    parent = root
    for part in path:
        parent = parent[int(part)] if isinstance(parent, nn.CellList) else getattr(parent, part)
    if isinstance(parent, nn.CellList):
        parent[int(last)] = layer
    else:
        setattr(parent, last, layer)
