"""Updates that a formula makes of a layer's tensors, by the names that these have in files, and of its weight.

LoRA (Hu et al., 2021, section 4.1), with a middle factor for convolutions (LoCon), and DoRA (Liu et al., 2024, eq. 5);
LoHa (Hyeon-Woo et al., 2022, proposition 2) and LoKr (Yeh et al., 2024, section 3) as LyCORIS and peft have them; OFT
(Qiu et al., 2023, section 3.3), of rows as LyCORIS' or of columns as peft's; IA3 (Liu et al., 2022); differences; whole
weights in place of a layer's, as Custom Diffusion trains them (Kumari et al., 2023).

Shapes: O output and I input channels, K side of a convolution's kernel, r rank. Weights are (O, I) or (O, I, K, K).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.naming import update_kinds
from dreambooth_ms.formats.naming.update_kinds import ALPHA, BIAS, COLUMNS, DOWN, MAGNITUDE, MID, TERMS, UP, WEIGHT

Factors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Update:
    """What an adapter makes of one layer: what the formula of their kind makes of its tensors."""

    factors: Factors
    """By the names in `formats.naming.update_kinds`."""

    @property
    def is_lora(self) -> bool:
        """Whether it is B A and no more, so that it can stand beside a layer."""
        return self.factors.keys() <= {DOWN, UP, ALPHA}

    @property
    def is_whole(self) -> bool:
        """Whether it is a weight in place of the layer's."""
        return WEIGHT in self.factors

    @property
    def down(self) -> np.ndarray:
        """A of a LoRA, (r, I) or (r, I, K, K)."""
        return self.factors[DOWN]

    @property
    def up(self) -> np.ndarray:
        """B of a LoRA, (O, r) or (O, r, 1, 1)."""
        return self.factors[UP]

    @property
    def rank(self) -> int:
        """r, by which alpha is divided; 0 where there is none."""
        return update_kinds.rank_of(self.factors) or 0

    @property
    def alpha(self) -> float | None:
        """None means the rank, a scale of 1."""
        return float(self.factors[ALPHA].reshape(-1)[0]) if ALPHA in self.factors else None

    @property
    def alpha_or_rank(self) -> float:
        """The alpha, which is the rank where it was left open."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """alpha / r; 1 without a rank."""
        return self.alpha_or_rank / self.rank if self.rank else 1.0

    @property
    def parameters(self) -> tuple[str, ...]:
        """Those of the layer that it changes, by their names in it."""
        return (WEIGHT,) if self.factors.keys().isdisjoint(update_kinds.OF_BIAS) else (WEIGHT, BIAS)

    def delta(self, value: np.ndarray, parameter: str = WEIGHT) -> np.ndarray:
        """What it adds to a parameter, in public form: float32 -> float32 of the same shape; WeightError if it is for a
        layer of another size."""
        f = {name: own.astype(np.float32) for name, own in self.factors.items()}
        formula = _FORMULAS[str(update_kinds.kind_of(f))]
        try:
            if parameter == BIAS:
                f = {"diff": f["diff_b"]} if "diff_b" in f else {WEIGHT: f[BIAS]}
            delta = formula(f, value).reshape(value.shape)
            return _decomposed(delta, f, value) if update_kinds.is_decomposed(f) else delta
        except ValueError as error:
            raise WeightError(f"the adapter does not fit the base: {error} for {value.shape}") from error

    def tensors(self) -> dict[str, np.ndarray]:
        """All of them, and alpha where there is a rank."""
        return {**self.factors, **({ALPHA: np.array(self.alpha_or_rank)} if self.rank else {})}


def _scale(f: Factors) -> np.float32:
    return np.float32(Update(f).scale)


def lora(f: Factors, value: np.ndarray) -> np.ndarray:
    """alpha / r * B A, or with the middle factor M (r, r, K, K) the sum over both ranks of B M A."""
    down, up = f[DOWN].reshape(len(f[DOWN]), -1), f[UP].reshape(len(f[UP]), -1)
    rows = np.einsum("rs...,si->ri...", f[MID], down).reshape(len(f[MID]), -1) if MID in f else down
    return _scale(f) * (up @ rows)


def _decomposed(delta: np.ndarray, f: Factors, value: np.ndarray) -> np.ndarray:
    """What makes of W the W + delta whose rows, or columns, have the norms of `f`."""
    axes = tuple(axis for axis in range(value.ndim) if axis != int(COLUMNS in f))
    norm = np.sqrt(np.square(value + delta, dtype=np.float64).sum(axes, keepdims=True))
    share = (f[COLUMNS] if COLUMNS in f else f[MAGNITUDE]).reshape(norm.shape) / norm
    return ((share - 1) * value + share * delta).astype(np.float32)


def loha(f: Factors, value: np.ndarray) -> np.ndarray:
    """alpha / r * (A1 B1) * (A2 B2), element by element; with cores T (r, r, K, K) both are Tucker's products."""
    left, right = (_product(f[f"hada_w{n}_a"], f[f"hada_w{n}_b"], f.get(f"hada_t{n}")) for n in (1, 2))
    return _scale(f) * left * right


def lokr(f: Factors, value: np.ndarray) -> np.ndarray:
    """alpha / r * kron(C, D), where both may be products; with neither there is no rank, and the scale is 1."""
    left = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    right = f["lokr_w2"] if "lokr_w2" in f else _product(f["lokr_w2_a"], f["lokr_w2_b"], f.get("lokr_t2"))
    columns = right.size // len(right) // math.prod(value.shape[2:])
    right = right.reshape(len(right), columns, -1)
    return _scale(f) * left[:, None, :, None, None] * right[None, :, None, :, :]


def factorised(number: int, factor: int) -> tuple[int, int]:
    """m, n with m n = number by peft's rule: m is the factor if it divides the number, else the largest divisor that is
    no larger than either the factor or the root; a factor of -1 bounds nothing."""
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    most = min(math.isqrt(number), factor if factor > 0 else number)
    m = max(one for one in range(1, most + 1) if number % one == 0)
    return m, number // m


def _product(a: np.ndarray, b: np.ndarray, core: np.ndarray | None) -> np.ndarray:
    """A (O, r) times B (r, I); or of A (r, O) and B (r, I) with a core (r, r, K, K) the sum over both ranks."""
    if core is None:
        return a @ b.reshape(len(b), -1)
    return np.einsum("rs...,ro,si->oi...", core, a, b)


def rotated_rows(f: Factors, value: np.ndarray) -> np.ndarray:
    """R W - W for blocks (n, b, b) of rows: R = (1 + Q) (1 - Q)^-1 of Q = S - S^T. An alpha bounds the norm of Q by
    alpha * O, and `oft_rescale` is a factor of each row."""
    skew = f["oft_blocks"] - f["oft_blocks"].transpose(0, 2, 1)
    bound, norm = float(f[ALPHA].reshape(-1)[0]) * len(value) if ALPHA in f else 0.0, np.linalg.norm(skew)
    if 0 < bound < norm:
        skew = skew * np.float32(bound / norm)
    change = 2 * skew @ np.linalg.inv(np.eye(skew.shape[1], dtype=np.float32) - skew)
    rows = value.reshape(len(value), -1)
    turned = (change.transpose(0, 2, 1) @ rows.reshape(len(skew), skew.shape[1], -1)).reshape(rows.shape)
    rescale = f["oft_rescale"].reshape(-1, 1) if "oft_rescale" in f else np.float32(1)
    return turned * rescale + rows * (rescale - 1)


NEUMANN_TERMS = 5
"""Of the series that peft takes for a Cayley transform, as its configurations have it by default."""


def rotated_columns(f: Factors, value: np.ndarray) -> np.ndarray:
    """W R^T - W for blocks of columns, whose Q (b, b) is skew with the upper triangle given, (n, b (b - 1) / 2); R is
    1 + 2 Q + ... + 2 Q^(m-2) + Q^(m-1) by m terms, or by none (1 - Q) (1 + Q)^-1. A single Q is that of all blocks."""
    triangles, terms = f["oft_R"], int(f.get(TERMS, NEUMANN_TERMS))
    side = math.isqrt(2 * triangles.shape[1]) + 1
    skew, one = (triangles @ skew_basis(side)).reshape(-1, side, side), np.eye(side, dtype=np.float32)
    # Without the 1, since W itself is taken off. peft has no series of three terms: it is that of four.
    rotation = -2 * skew @ np.linalg.inv(one + skew) if not terms else np.zeros_like(skew)
    factors = [0, *[2] * (max(terms, 4) - 2), 1][: terms if terms < 3 else None]
    for factor in reversed(factors if terms else []):
        rotation = np.float32(factor) * one + skew @ rotation
    blocks = value.reshape(len(value), -1, 1, side) @ rotation.transpose(0, 2, 1)
    return blocks.reshape(len(value), -1)


def skew_basis(side: int) -> np.ndarray:
    """(b (b - 1) / 2, b * b) of 0, 1 and -1: upper triangles, row by row, times this are skew-symmetric matrices."""
    rows, columns = np.triu_indices(side, 1)
    basis, numbers = np.zeros((len(rows), side, side), np.float32), np.arange(len(rows))
    basis[numbers, rows, columns], basis[numbers, columns, rows] = 1, -1
    return basis.reshape(len(rows), -1)


def scaled(f: Factors, value: np.ndarray) -> np.ndarray:
    """W times a number for each of its rows, or with `ia3_on_input` of its columns."""
    shape = [1] * value.ndim
    shape[int(f["ia3_on_input"].any())] = -1
    return value * f["ia3"].reshape(shape)


def _instead(own: np.ndarray, value: np.ndarray) -> np.ndarray:
    """What a value in place of another adds to it."""
    if own.shape != value.shape:
        raise ValueError(own.shape)
    return own - value


_FORMULAS: Mapping[str, Callable[[Factors, np.ndarray], np.ndarray]] = {
    "lora": lora,
    "hada": loha,
    "lokr": lokr,
    "oft": lambda f, value: (rotated_columns if "oft_R" in f else rotated_rows)(f, value),
    "ia3": scaled,
    "diff": lambda f, value: f["diff"],
    "weight": lambda f, value: _instead(f[WEIGHT], value),
}
"""By kind: a layer's tensors and its weight, float32 -> what is added to it, of as many elements."""
