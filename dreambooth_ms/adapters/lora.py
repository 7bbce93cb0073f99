"""LoRA (Hu et al., 2021): a frozen linear layer or convolution plus a trained update of low rank.

y = W x + (alpha / r) B A x   (eq. 3), with A random and B = 0 at the start, so that a fresh adapter changes nothing.
"""

import math
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats.naming.update_kinds import ALPHA, DOWN, MAGNITUDE, MID, UP
from dreambooth_ms.models.parameters import PublicParameter, name_prefix, public_parameters
from dreambooth_ms.ops import Conv2d, Dense, bitwise_and, exclusive_or, total
from dreambooth_ms.ops.graph import after, on_ascend, set_between_runs
from dreambooth_ms.ops.linear import empty_parameter, times, times_transposed, transposed_times
from dreambooth_ms.randomness import generator, standard_normal


class DropoutState(nn.Cell):
    """What the dropouts of all layers share: how much they drop, and the number that their draws depend on. Parameters,
    because a compiled graph would not see changed attributes."""

    def __init__(self, rate: float, seed: int) -> None:
        super().__init__(auto_prefix=False)
        self._rate, self._seed = rate, seed
        self.rate = Parameter(Tensor(np.float32(rate)), name="dropout_rate", requires_grad=False)
        self.draw = Parameter(Tensor(np.int32(0)), name="dropout_draw", requires_grad=False)

    def begin_batch(self, number: int) -> None:
        """From here on the layers draw what belongs to the batch with this number."""
        draw = generator(self._seed, "lora dropout", number).integers(2**31, dtype=np.int32)
        set_between_runs(self.draw, np.int32(draw))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, nothing is dropped, as in sampling."""
        self.rate.set_data(Tensor(np.float32(0)))
        try:
            yield
        finally:
            self.rate.set_data(Tensor(np.float32(self._rate)))


class Dropout(nn.Cell):
    """Drop each input with probability `rate` and scale up the others (Srivastava et al., 2014): (N, I) -> (N, I). What
    is dropped is a hash of (draw, layer, position): the library's operators keep a state of their own, which a resumed
    run would not have. The hash is lowbias32 (Wellons, 2018) in wrapping 32-bit integers."""

    def __init__(self, state: DropoutState, layer: str) -> None:
        super().__init__(auto_prefix=False)
        self.rate, self.draw, self.layer = state.rate, state.draw, zlib.crc32(layer.encode())

    def construct(self, x_NI: Tensor) -> Tensor:
        state = _positions(x_NI.shape[0] * x_NI.shape[1], self.layer)
        # After the input, so that a backward pass that computes it again does not keep the forward pass's.
        draw = after(self.draw, x_NI)
        state = _mixed(exclusive_or(state, ops.broadcast_to(draw, state.shape)))
        uniform = bitwise_and(state, 0x7FFFFF).astype(ms.float32) * (1 / 2**23)
        rate = ops.broadcast_to(self.rate, uniform.shape)
        factor = (uniform >= rate).astype(ms.float32) / (1.0 - rate)
        return x_NI * ops.stop_gradient(ops.reshape(factor, x_NI.shape))


def _mixed(state: Tensor) -> Tensor:
    for shift, multiplier in ((16, 0x7FEB352D), (15, -0x7B935975), (16, 1)):
        low = ops.bitwise_right_shift(state, shift)
        low = bitwise_and(low, (1 << (32 - shift)) - 1)
        state = exclusive_or(state, low) * multiplier
    return state


@constexpr
def _positions(count: int, layer: int) -> Tensor:
    """A number of its own for each position of each layer."""
    numbers = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(layer)
    return Tensor(numbers.astype(np.int32), ms.int32)


class AdaptedLayer(nn.Cell):
    """A layer with an update: what all kinds have in common. It holds the base layer's `weight` and `bias` under their
    own names, so the base's names do not change."""

    def __init__(self, base: Dense | Conv2d, alpha: float, scale: float) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.has_bias = base.in_channels, base.out_channels, base.has_bias
        self.alpha, self.weight = alpha, base.weight
        if base.has_bias:
            self.bias = base.bias
        # A parameter, because a compiled graph would not see a changed attribute.
        self.lora_scale = Parameter(Tensor(np.float32(scale)), requires_grad=False)

    @property
    def parts(self) -> dict[str, PublicParameter]:
        """What is trained, by the names that a file has for it."""
        raise NotImplementedError

    def tensors(self) -> dict[str, np.ndarray]:
        """What a file holds of it at present."""
        return {name: part.read() for name, part in self.parts.items()} | {ALPHA: np.array(self.alpha)}


class LoraLayer(AdaptedLayer):
    """A layer with A and B beside it, and perhaps a middle factor between them."""

    has_middle = False

    def __init__(self, base: Dense | Conv2d, rank: int, alpha: float, dropout: Dropout | None) -> None:
        super().__init__(base, alpha, alpha / rank)
        self.dropout, self.rank = dropout, rank

    @property
    def parts(self) -> dict[str, PublicParameter]:
        """A and B: (r, in) and (out, r), of a convolution (r, in, k, k) and (out, r, 1, 1); between them the middle."""
        cells = {DOWN: self.lora_A, UP: self.lora_B} | ({MID: self.lora_mid} if self.has_middle else {})
        layouts = {name: getattr(cell, "stored_layouts", {}).get("weight") for name, cell in cells.items()}
        return {name: PublicParameter(cell.weight, layouts[name]) for name, cell in cells.items()}

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """A and B."""
        return self.parts[DOWN].read(), self.parts[UP].read()

    def set_factors(self, factor_a: np.ndarray, factor_b: np.ndarray) -> None:
        """Fill the adapter, with A and B in the shapes of `factors`; WeightError if they are of another size."""
        for weight, value in zip(self.parts.values(), (factor_a, factor_b), strict=True):
            if weight.shape != value.shape:
                raise WeightError(f"the adapter does not fit the base: {value.shape} for {weight.shape}")
            weight.write(value)

    def squared_change(self) -> Tensor:
        """The sum of the squares of what is added to the weight at present: () float32."""
        down_RI, up_OR = self.matrices()
        # Of the products' traces, without the product.
        squares_RR = times_transposed(down_RI, down_RI) * transposed_times(up_OR, up_OR)
        return total(squares_RR) * self.lora_scale * self.lora_scale


class LoraDense(LoraLayer):
    """A linear layer with an adapter: (..., in) -> (..., out)."""

    def __init__(self, base: Dense, rank: int, alpha: float, dropout: Dropout | None = None) -> None:
        super().__init__(base, rank, alpha, dropout)
        self.product = base.product
        self.lora_A = LoraMatrix(rank, base.in_channels)
        self.lora_B = LoraMatrix(base.out_channels, rank)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A' (r, I) and B' (O, r), whose product is added, over the scale."""
        return self.lora_A.weight, self.lora_B.weight

    def added(self, inputs: Tensor) -> Tensor:
        """To the result, float32."""
        down = _scaled(times_transposed(inputs, self.lora_A.weight), self.lora_scale)
        return times_transposed(down, self.lora_B.weight)

    def construct(self, x: Tensor) -> Tensor:
        rows = ops.reshape(x, (-1, self.in_channels))
        y = self.product(rows, self.weight, self.bias if self.has_bias else None)
        inputs = rows.astype(ms.float32)
        if self.dropout is not None:
            inputs = self.dropout(inputs)
        return ops.reshape(y + self.added(inputs).astype(y.dtype), x.shape[:-1] + (self.out_channels,))


SUBSPACE_ITERATIONS = 16


class PrincipalDense(LoraDense):
    """PiSSA (Meng et al., 2024, eq. 2 to 4): A and B begin as the largest singular values and vectors of the weight,
    and what they are then is taken off again: beside the weight, which stays the base's, so that a fresh one changes no
    bit."""

    def __init__(self, base: Dense, rank: int, alpha: float, dropout: Dropout | None = None) -> None:
        super().__init__(base, rank, alpha, dropout)
        self.start_A, self.start_B = LoraMatrix(rank, base.in_channels), LoraMatrix(base.out_channels, rank)

    def start(self) -> tuple[Parameter, Parameter]:
        """What A and B were."""
        return self.start_A.weight, self.start_B.weight

    def tensors(self) -> dict[str, np.ndarray]:
        """With what is taken off: a LoRA of twice the rank, which applies to the base itself."""
        (down, up), (first_down, first_up) = self.factors(), (one.asnumpy() for one in self.start())
        factors = {DOWN: np.concatenate([down, first_down]), UP: np.concatenate([up, -first_up], 1)}
        return factors | {ALPHA: np.array(2 * self.alpha)}

    def start_from_weight(self) -> None:
        """Fill both pairs, by subspace iteration (Halko et al., 2011, algorithms 4.4 and 5.1)."""
        weight, rank = self.weight.asnumpy(), self.rank
        basis = standard_normal((self.in_channels, min(2 * rank + 8, *weight.shape)), 0, "principal start", 0)
        for _ in range(SUBSPACE_ITERATIONS):
            basis = np.linalg.qr(weight.T @ (weight @ basis))[0]
        left, values, right = np.linalg.svd(weight @ basis, full_matrices=False)
        roots = np.sqrt(values[:rank] * np.float32(rank / self.alpha))
        self.set_factors(roots[:, None] * (right @ basis.T)[:rank], left[:, :rank] * roots)
        for one, value in zip(self.start(), self.factors(), strict=True):
            one.set_data(Tensor(value))
            one.requires_grad = False

    def matrices(self) -> tuple[Tensor, Tensor]:
        first_down, first_up = self.start()
        return ops.concat((self.lora_A.weight, first_down)), ops.concat((self.lora_B.weight, -first_up), 1)

    def added(self, inputs: Tensor) -> Tensor:
        down = _scaled(times_transposed(inputs, self.lora_A.weight), self.lora_scale)
        first = _scaled(times_transposed(inputs, self.start_A.weight), self.lora_scale)
        return times_transposed(down, self.lora_B.weight) - times_transposed(first, self.start_B.weight)


class LoraConv2d(LoraLayer):
    """A convolution with an adapter: A has the base's kernel, stride and padding, and B is pointwise. With `has_middle`
    a factor (r, r, k, k) between them has these, and A is pointwise, too."""

    def __init__(
        self, base: Conv2d, rank: int, alpha: float, dropout: Dropout | None = None, has_middle: bool = False
    ) -> None:
        super().__init__(base, rank, alpha, dropout)
        self.stored_layouts, self.convolve = base.stored_layouts, base.convolve
        of_base, pointwise = (base.kernel_size, base.stride, base.padding, False), (1, 1, None, False)
        self.lora_A = Conv2d(base.in_channels, rank, *(pointwise if has_middle else of_base))
        if has_middle:
            self.lora_mid, self.has_middle = Conv2d(rank, rank, *of_base), True
        self.lora_B = Conv2d(rank, base.out_channels, kernel_size=1, has_bias=False)

    def matrices(self) -> tuple[Tensor, Tensor]:
        down = ops.reshape(self.lora_A.weight, (self.rank, -1))
        if self.has_middle:
            middle = ops.transpose(self.lora_mid.weight, (0, 2, 3, 1)) if on_ascend() else self.lora_mid.weight
            down = ops.reshape(times(ops.reshape(middle, (-1, self.rank)), down), (self.rank, -1))
        return down, ops.reshape(self.lora_B.weight, (-1, self.rank))

    def construct(self, x: Tensor) -> Tensor:
        y = self.convolve(x, self.weight, self.bias if self.has_bias else None)
        inputs = x.astype(ms.float32)
        if self.dropout is not None:
            inputs = ops.reshape(self.dropout(ops.reshape(inputs, (-1, inputs.shape[-1]))), inputs.shape)
        inner = self.lora_A(inputs)
        if self.has_middle:
            inner = self.lora_mid(inner)
        return y + self.lora_B(_scaled(inner, self.lora_scale)).astype(y.dtype)


def _scaled(down: Tensor, scale: Tensor) -> Tensor:
    """By one number, or by one for each column; broadcasting several keeps an index table on CPU (measured)."""
    return down * (ops.broadcast_to(scale, down.shape) if scale.ndim else scale)


class LoraMatrix(nn.Cell):
    """One of the two factors, a float32 matrix."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = empty_parameter((rows, columns))


MakeLayer = Callable[[nn.Cell, Dropout | None], AdaptedLayer]


def inject_lora(
    root: nn.Cell, rank: int, alpha: float, target_modules: Sequence[str], dropout: DropoutState | None = None
) -> dict[str, Any]:
    """Give every layer whose name ends in one of the targets an adapter of zeros; freeze everything else. Returns the
    adapted layers by the public names of their base layers; raises as `layers_to_adapt`."""
    channels = {name: (cell.out_channels, cell.in_channels) for name, cell in adaptable_layers(root).items()}
    wanted = layers_to_adapt(channels, rank, target_modules)
    return inject(root, dict.fromkeys(wanted, lambda base, drop: lora_layer(base, rank, alpha, drop)), dropout)


def inject(root: nn.Cell, makers: Mapping[str, MakeLayer], dropout: DropoutState | None) -> dict[str, Any]:
    """The same, of layers by their names: each is made of the base layer and of what it drops."""
    layers, prefix = adaptable_layers(root), name_prefix(root)
    adapted = {
        name: makers[name](cell, Dropout(dropout, prefix + name) if dropout else None)
        for name, cell in layers.items()
        if name in makers
    }
    put_in_place(root, adapted)
    return adapted


def layers_to_adapt(layers: Mapping[str, tuple[int, int]], rank: int, target_modules: Sequence[str]) -> set[str]:
    """Those of a network's layers, given by their channels, whose names end in one of the targets. ConfigError if one
    matches no linear layer and no convolution; or as `check_rank`."""
    chosen = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in target_modules}
    if unmatched := ", ".join(target for target, names in chosen.items() if not names):
        # `to_q`, or `to_out.0`.
        endings = ", ".join(sorted({re.findall(r"[^.]+(?:\.\d+)?$", name)[0] for name in layers}))
        raise ConfigError(f"--lora_target_modules: no layer is named {unmatched}; there are {endings}")
    wanted = set(chain.from_iterable(chosen.values()))
    check_rank(rank, "rank", [layers[name] for name in wanted])
    return wanted


def check_rank(rank: int, flag: str, layers: Collection[Sequence[int]]) -> None:
    """ConfigError if a rank is larger than one of some layers, given by their channels, so that more numbers would be
    trained than the layer has."""
    if rank > (largest := min(map(min, layers), default=rank)):
        raise ConfigError(f"--{flag}: expected 1 to {largest}, the size of the smallest adapted layer, got {rank}")


def put_in_place(root: nn.Cell, layers: Mapping[str, nn.Cell]) -> None:
    """Put cells in the places of the layers with these names; freeze everything else."""
    for _, parameter in root.parameters_and_names():
        parameter.requires_grad = False
    cells = dict(root.cells_and_names())
    for name, layer in layers.items():
        path, _, last = name.rpartition(".")
        parent = cells[path]
        if isinstance(parent, nn.CellList):
            parent[int(last)] = layer
        else:
            setattr(parent, last, layer)
    public_parameters(root)
    # If it was compiled without the adapter, it would go on without.
    root.compile_cache.clear()


def lora_layer(base: nn.Cell, rank: int, alpha: float, dropout: Dropout | None = None) -> LoraLayer:
    """A linear layer or convolution with an adapter beside it."""
    return (LoraConv2d if isinstance(base, Conv2d) else LoraDense)(base, rank, alpha, dropout)


def adaptable_layers(root: nn.Cell) -> dict[str, Dense | Conv2d]:
    """The layers that can have an adapter, and have none, by their public names."""
    return {name: cell for name, cell in root.cells_and_names() if type(cell) in (Dense, Conv2d)}


ZERO_AT_START = (UP, "hada_w2_b", "lokr_w1", "oft_R")
"""Factors by which a fresh update changes nothing, as in peft."""


def initialise_lora(layers: Mapping[str, AdaptedLayer], seed: int, prefix: str = "") -> None:
    """Fill fresh updates, which change nothing; each factor is a function of (seed, prefix + name). A ~ N(0, 1 / r^2)
    as the published DreamBooth scripts start; others have the deviation of PyTorch's linear layers, as in peft; DoRA's
    magnitudes are the norms of the base's rows. Those of PiSSA are singular values'."""
    for name, layer in layers.items():
        for factor, part in layer.parts.items():
            if factor == MAGNITUDE:
                # By the operation that is in the graph, so that a fresh update changes no bit.
                part.parameter.set_data(norms(ops.reshape(layer.weight, (layer.out_channels, -1))))
                continue
            purpose = "lora start" if factor == DOWN else f"{factor} start"
            draw = standard_normal(part.shape, seed, purpose, zlib.crc32((prefix + name).encode()))
            deviation = 1 / part.shape[0] if factor == DOWN else 1 / math.sqrt(3 * math.prod(part.shape[1:]))
            part.write(draw * 0 if factor in ZERO_AT_START else draw * np.float32(deviation))
        if isinstance(layer, PrincipalDense):
            layer.start_from_weight()


def norms(weight_OI: Tensor) -> Tensor:
    """Of the rows (O,)."""
    return ops.sqrt((weight_OI * weight_OI).sum(1))


def lora_trainables(layers: Mapping[str, AdaptedLayer]) -> list[Parameter]:
    """The parameters to train, in a fixed order."""
    return [part.parameter for layer in layers.values() for part in layer.parts.values()]
