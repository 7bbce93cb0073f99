"""LoRA (Hu et al., 2021): a frozen linear layer or convolution plus a trained update of low rank.

y = W x + (alpha / r) B A x   (eq. 3), with A random and B = 0 at the start, so that a fresh adapter changes nothing.
"""

import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.adapters.lora_file import LoraWeights
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats.naming.lora import Factors
from dreambooth_ms.models.parameters import PublicParameter, name_prefix, public_parameters
from dreambooth_ms.ops import Conv2d, Dense, conv2d
from dreambooth_ms.ops.graph import after
from dreambooth_ms.ops.linear import empty_parameter
from dreambooth_ms.randomness import generator, standard_normal


class Adapted(Protocol):
    """A layer with the sum of some adapters, whose strengths can be set."""

    def set_scale(self, *multipliers: float) -> None:
        """One for all adapters of the model, or one for each: 0 is the base layer, 1 is as trained."""


class LoraLayer(nn.Cell):
    """A layer with an adapter: what linear layers and convolutions have in common.

    It holds the base layer's `weight` and `bias` under their own names, so the base's names do not change.
    """

    lora_A: nn.Cell
    lora_B: nn.Cell

    def __init__(self, base: Dense | Conv2d, rank: int, alpha: float, dropout: "LoraDropout | None") -> None:
        super().__init__()
        self.dropout = dropout
        self.in_channels, self.out_channels, self.has_bias = base.in_channels, base.out_channels, base.has_bias
        self.rank, self.alpha = rank, alpha
        self.weight = base.weight
        if base.has_bias:
            self.bias = base.bias
        # A parameter, because a compiled graph would not see a changed attribute.
        self.lora_scale = Parameter(Tensor(np.float32(alpha / rank)), requires_grad=False)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """A and B as files hold them: (r, in) and (out, r), of a convolution (r, in, k, k) and (out, r, 1, 1)."""
        return _public_weight(self.lora_A).read(), _public_weight(self.lora_B).read()

    def set_factors(self, factor_a: np.ndarray, factor_b: np.ndarray) -> None:
        """Fill the adapter, with A and B in the shapes of `factors`.

        Raises:
            WeightError: the factors are those of a layer of another size.
        """
        for weight, value in ((_public_weight(self.lora_A), factor_a), (_public_weight(self.lora_B), factor_b)):
            if weight.shape != value.shape:
                raise WeightError(f"the adapter does not fit the base: {value.shape} for {weight.shape}")
            weight.write(value)

    def set_scale(self, multiplier: float) -> None:
        """Weaken or strengthen the adapter: 0 is the base layer, 1 is as trained."""
        self.lora_scale.set_data(Tensor(np.float32(multiplier * self.alpha / self.rank)))


def _public_weight(cell: nn.Cell) -> PublicParameter:
    return PublicParameter(cell.weight, getattr(cell, "stored_layouts", {}).get("weight"))


class LoraDense(LoraLayer):
    """A linear layer with an adapter: (..., in) -> (..., out)."""

    def __init__(self, base: Dense, rank: int, alpha: float, dropout: "LoraDropout | None" = None) -> None:
        super().__init__(base, rank, alpha, dropout)
        self.matmul, self.bias_add = base.matmul, base.bias_add
        self.lora_A = LoraMatrix(rank, base.in_channels)
        self.lora_B = LoraMatrix(base.out_channels, rank)

    def construct(self, x: Tensor) -> Tensor:
        rows = ops.reshape(x, (-1, self.in_channels))
        y = self.matmul(rows, self.weight)
        if self.has_bias:
            y = self.bias_add(y, self.bias)
        inputs = rows.astype(ms.float32)
        if self.dropout is not None:
            inputs = self.dropout(inputs)
        down = self.matmul(inputs, self.lora_A.weight)
        down = _scaled(down, self.lora_scale)
        y = y + self.matmul(down, self.lora_B.weight).astype(y.dtype)
        return ops.reshape(y, x.shape[:-1] + (self.out_channels,))


class LoraConv2d(LoraLayer):
    """A convolution with an adapter: A has the base's kernel, stride and padding, and B is pointwise."""

    def __init__(self, base: Conv2d, rank: int, alpha: float, dropout: "LoraDropout | None" = None) -> None:
        super().__init__(base, rank, alpha, dropout)
        self.stored_layouts = base.stored_layouts
        self.convolve = base.convolve
        self.lora_A = conv2d(base.in_channels, rank, base.kernel_size, base.stride, base.padding, has_bias=False)
        self.lora_B = conv2d(rank, base.out_channels, kernel_size=1, has_bias=False)

    def construct(self, x: Tensor) -> Tensor:
        y = self.convolve(x, self.weight, self.bias if self.has_bias else None)
        inputs = x.astype(ms.float32)
        if self.dropout is not None:
            inputs = ops.reshape(self.dropout(ops.reshape(inputs, (-1, inputs.shape[-1]))), inputs.shape)
        down = self.lora_A(inputs)
        down = _scaled(down, self.lora_scale)
        return y + self.lora_B(down).astype(y.dtype)


def _scaled(down: Tensor, scale: Tensor) -> Tensor:
    """By one number, or by one for each column; broadcasting several keeps an index table on CPU (measured)."""
    return down * (ops.broadcast_to(scale, down.shape) if scale.ndim else scale)


class LoraMatrix(nn.Cell):
    """One of the two factors, a float32 matrix."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = empty_parameter((rows, columns))


class DropoutState(nn.Cell):
    """What the dropouts of all layers share: how much they drop, and the number that their draws depend on.

    Parameters, because a compiled graph would not see changed attributes.
    """

    def __init__(self, rate: float, seed: int) -> None:
        super().__init__(auto_prefix=False)
        self._rate, self._seed = rate, seed
        self.rate = Parameter(Tensor(np.float32(rate)), name="dropout_rate", requires_grad=False)
        self.draw = Parameter(Tensor(np.int32(0)), name="dropout_draw", requires_grad=False)

    def begin_batch(self, number: int) -> None:
        """From here on the layers draw what belongs to the batch with this number."""
        draw = generator(self._seed, "lora dropout", number).integers(2**31, dtype=np.int32)
        self.draw.set_data(Tensor(np.int32(draw)))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, nothing is dropped, as in drawing pictures."""
        self.rate.set_data(Tensor(np.float32(0)))
        try:
            yield
        finally:
            self.rate.set_data(Tensor(np.float32(self._rate)))


class LoraDropout(nn.Cell):
    """Drop each input with probability `rate` and scale up the others (Srivastava et al., 2014): (N, I) -> (N, I).

    What is dropped is a hash of (draw, layer, position): the library's operators keep a state of their own, which a
    resumed run would not have. The hash is lowbias32 (Wellons, 2018) in wrapping 32-bit integers.
    """

    def __init__(self, state: DropoutState, layer: int) -> None:
        super().__init__(auto_prefix=False)
        self.rate, self.draw, self.layer = state.rate, state.draw, layer

    def construct(self, x_NI: Tensor) -> Tensor:
        state = _positions(x_NI.shape[0] * x_NI.shape[1], self.layer)
        # After the input, so that a backward pass that computes it again does not keep the forward pass's.
        draw = after(self.draw, x_NI)
        state = _mixed(ops.bitwise_xor(state, ops.broadcast_to(draw, state.shape)))
        uniform = ops.bitwise_and(state, 0x7FFFFF).astype(ms.float32) * (1 / 2**23)
        rate = ops.broadcast_to(self.rate, uniform.shape)
        factor = (uniform >= rate).astype(ms.float32) / (1.0 - rate)
        return x_NI * ops.stop_gradient(ops.reshape(factor, x_NI.shape))


def _mixed(state: Tensor) -> Tensor:
    for shift, multiplier in ((16, 0x7FEB352D), (15, -0x7B935975), (16, 1)):
        low = ops.bitwise_right_shift(state, shift)
        low = ops.bitwise_and(low, (1 << (32 - shift)) - 1)
        state = ops.bitwise_xor(state, low) * multiplier
    return state


@constexpr
def _positions(count: int, layer: int) -> Tensor:
    """A number of its own for each position of each layer."""
    numbers = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(layer)
    return Tensor(numbers.astype(np.int32), ms.int32)


def inject_lora(
    root: nn.Cell,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    dropout: DropoutState | None = None,
) -> dict[str, LoraLayer]:
    """Give every layer whose name ends in one of the targets an adapter of zeros; freeze everything else.

    Returns:
        The adapted layers by the public names of their base layers.

    Raises:
        ConfigError: a target matches no linear layer and no convolution.
    """
    layers = adaptable_layers(root)
    chosen = {name: cell for name, cell in layers.items() if any(_matches(name, target) for target in target_modules)}
    unmatched = [target for target in target_modules if not any(_matches(name, target) for name in layers)]
    if unmatched:
        endings = sorted({_ending(name) for name in layers})
        raise ConfigError(
            f"--lora_target_modules: no layer is named {', '.join(unmatched)}; there are {', '.join(endings)}"
        )
    for _, parameter in root.parameters_and_names():
        parameter.requires_grad = False
    prefix = name_prefix(root)
    adapted = {
        name: _with_adapter(cell, rank, alpha, LoraDropout(dropout, _number(prefix + name)) if dropout else None)
        for name, cell in chosen.items()
    }
    for name, layer in adapted.items():
        _replace(root, name, layer)
    public_parameters(root)
    # If it was compiled without the adapter, it would go on without.
    root.compile_cache.clear()
    return adapted


def _with_adapter(cell: Dense | Conv2d, rank: int, alpha: float, dropout: LoraDropout | None) -> LoraLayer:
    if isinstance(cell, Conv2d):
        return LoraConv2d(cell, rank, alpha, dropout)
    return LoraDense(cell, rank, alpha, dropout)


def check_rank(rank: int, layers: dict[str, LoraLayer]) -> None:
    """A rank above a layer's size trains more numbers than the layer has.

    Raises:
        ConfigError: the rank is larger than the smallest of these layers.
    """
    largest = min(min(cell.in_channels, cell.out_channels) for cell in layers.values())
    if rank > largest:
        raise ConfigError(f"--rank: expected 1 to {largest}, the size of the smallest adapted layer, got {rank}")


def linear_layers(root: nn.Cell) -> dict[str, Dense]:
    """The plain linear layers of a network by their public names."""
    return {name: cell for name, cell in root.cells_and_names() if type(cell) is Dense}


def adaptable_layers(root: nn.Cell) -> dict[str, Dense | Conv2d]:
    """The layers that can have an adapter, and have none, by their public names."""
    return {name: cell for name, cell in root.cells_and_names() if type(cell) in (Dense, Conv2d)}


def initialise_lora(layers: dict[str, LoraLayer], seed: int, prefix: str = "") -> None:
    """A ~ N(0, 1 / r^2) and B = 0, as the published DreamBooth scripts start; a function of (seed, prefix + name)."""
    for name, layer in layers.items():
        factor_a, factor_b = layer.factors()
        draw = standard_normal(factor_a.shape, seed, "lora start", _number(prefix + name))
        layer.set_factors(draw / layer.rank, np.zeros_like(factor_b))


def lora_trainables(layers: dict[str, LoraLayer]) -> list[Parameter]:
    """The parameters to train, in a fixed order."""
    return [matrix.weight for layer in layers.values() for matrix in (layer.lora_A, layer.lora_B)]


def lora_weights(layers: dict[str, LoraLayer], target_modules: Sequence[str]) -> LoraWeights:
    """The adapters of a network's layers, as a file holds them."""
    factors = {name: layer.factors() for name, layer in layers.items()}
    any_layer = next(iter(layers.values()))
    return LoraWeights(factors, any_layer.rank, any_layer.alpha, tuple(target_modules))


def load_lora(root: nn.Cell, adapters: Sequence[LoraWeights | None], scales: Sequence[float]) -> dict[str, Adapted]:
    """Put the sum of some adapters on a network; returns the adapted layers by name.

    Linear layers get an adapter beside them; updates of convolutions are added to their weights.

    Args:
        root: the network.
        adapters: all adapters of the model; None for those that do not adapt this network.
        scales: one for all of them, or one for each.

    Raises:
        WeightError: an adapter was trained on another network.
    """
    if not any(adapters):
        return {}
    linear, parameters = linear_layers(root).keys(), public_parameters(root)
    names = {name for adapter in adapters if adapter for name in adapter.factors}
    if not all(name in linear or f"{name}.weight" in parameters for name in names):
        raise WeightError("the adapter was trained on another base")
    adapted: dict[str, Adapted] = {
        name: FoldedUpdate(parameters[f"{name}.weight"], [_of_layer(own, name) for own in adapters])
        for name in sorted(names - linear)
    }
    beside = [own and _of_layers(own, linear) for own in adapters]
    held = [own for own in beside if own]
    if held:
        total = sum_of(held)
        layers = inject_lora(root, total.rank, total.alpha, total.target_modules)
        for name, layer in layers.items():
            layer.set_factors(*total.factors[name])
            owners = [(number, own.rank) for number, own in enumerate(beside) if own and name in own.factors]
            adapted[name] = AdapterSum(layer, owners)
    for one in adapted.values():
        one.set_scale(*scales)
    return adapted


def _of_layers(adapter: LoraWeights, names: Collection[str]) -> LoraWeights | None:
    """An adapter of these layers alone; None if it has none of them."""
    factors = {name: pair for name, pair in adapter.factors.items() if name in names}
    return replace(adapter, factors=factors) if factors else None


def _of_layer(adapter: LoraWeights | None, name: str) -> Factors | None:
    return Factors(*adapter.factors[name], adapter.alpha) if adapter and name in adapter.factors else None


class AdapterSum:
    """A layer whose adapter is several side by side; each has a scale of its own, which a compiled graph reads."""

    def __init__(self, layer: LoraLayer, owners: Sequence[tuple[int, int]]) -> None:
        """`owners`: (number of the adapter, its rank), in the order in which their factors stand."""
        self._layer = layer
        numbers = [number for number, rank in owners for _ in range(rank)]
        # What is left of the rank is filled with zeros, whose scale makes no difference.
        self._numbers = np.array(numbers + [owners[0][0]] * (layer.rank - len(numbers)))
        scale = Parameter(Tensor(np.ones(layer.rank, np.float32)), name=layer.lora_scale.name, requires_grad=False)
        layer.lora_scale = scale

    def set_scale(self, *multipliers: float) -> None:
        """One for all adapters of the model, or one for each: 0 is the base layer, 1 is as trained."""
        each = np.array(multipliers, np.float32)
        values = each[self._numbers] if len(each) > 1 else np.repeat(each, self._layer.rank)
        self._layer.lora_scale.set_data(Tensor(values))


class FoldedUpdate:
    """The update of a convolution, in its weight; its scale can be set again, to 0 for the base's own bits."""

    def __init__(self, weight: PublicParameter, factors: Sequence[Factors | None]) -> None:
        self._weight, self._base = weight, weight.read()
        self._updates = {number: own.update() for number, own in enumerate(factors) if own}
        for update in self._updates.values():
            if update.shape != weight.shape:
                raise WeightError(f"the adapter does not fit the base: {update.shape} for {weight.shape}")

    def set_scale(self, *multipliers: float) -> None:
        """One for all adapters of the model, or one for each: 0 is the base layer, 1 is as trained."""
        value = self._base
        for number, update in self._updates.items():
            scale = multipliers[number] if len(multipliers) > 1 else multipliers[0]
            value = value + np.float32(scale) * update if scale else value
        self._weight.write(value)


def sum_of(adapters: Sequence[LoraWeights]) -> LoraWeights:
    """One adapter whose update is the sum of all: their factors side by side, each with its own scale in its A."""
    layers = {name for adapter in adapters for name in adapter.factors}
    rank = sum(adapter.rank for adapter in adapters)
    factors = {}
    for name in layers:
        halves = [
            (adapter.factors[name][0] * (adapter.alpha / adapter.rank), adapter.factors[name][1])
            for adapter in adapters
            if name in adapter.factors
        ]
        factor_a = np.concatenate([half for half, _ in halves])
        factor_b = np.concatenate([half for _, half in halves], axis=1)
        filler = rank - len(factor_a)
        factors[name] = (np.pad(factor_a, ((0, filler), (0, 0))), np.pad(factor_b, ((0, 0), (0, filler))))
    return LoraWeights(factors, rank, float(rank), tuple(factors))


def _number(name: str) -> int:
    """A number for draws that depend on a layer's name."""
    return zlib.crc32(name.encode())


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
