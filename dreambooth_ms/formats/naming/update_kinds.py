"""The kinds of updates of a layer: what its tensors are called here, and for which weights their shapes are.

A name begins with its kind, but for ALPHA and DoRA's norms, which several kinds have. `names.yaml` has what they are
called in files. Shapes: O rows and I columns of a weight, the latter times the taps of a convolution; r, s ranks.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dreambooth_ms.formats.naming import TABLES

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Sides = tuple[int, int]
"""(O, I) of a weight."""

DOWN, UP, MID = "lora_A.weight", "lora_B.weight", "lora_mid.weight"
"""Of a LoRA; the last is a middle factor (r, r, K, K) of convolutions."""
ALPHA, MAGNITUDE, COLUMNS = "alpha", "dora_scale", "dora_columns"
"""What scales an update, and DoRA's norms: of rows (O,), or of columns (1, I) or (1, I, 1, 1)."""
TERMS = "oft_terms"
"""Of the series that stands for a Cayley transform, 0 for none; peft keeps it beside the tensors."""
BESIDE = (ALPHA, TERMS)
"""What files may keep beside the tensors."""
WEIGHT, BIAS = "weight", "bias"
"""In place of the layer's own; their kind is "weight"."""
OF_BIAS = (BIAS, "diff_b")

_RANKED = (DOWN, "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Tensors whose first side is the rank, the first that a layer has."""


def rank_of(tensors: Mapping[str, Any]) -> int | None:
    """The rank of a layer's tensors, by which its alpha is divided; None where there is none."""
    return next((len(tensors[name]) for name in _RANKED if name in tensors), None)


def kind_of(names: Collection[str]) -> str | None:
    """The kind of a layer's tensors, by their names; None where they are of several."""
    kinds = {name.partition("_")[0] for name in names if name not in (ALPHA, MAGNITUDE, COLUMNS, BIAS)} or {"lora"}
    return kinds.pop() if len(kinds) == 1 else None


def is_decomposed(names: Collection[str]) -> bool:
    """Whether there are DoRA's norms."""
    return MAGNITUDE in names or COLUMNS in names


def needs_base(names: Collection[str]) -> bool:
    """Whether what an update adds to a weight depends on the weight."""
    return is_decomposed(names) or kind_of(names) in ("oft", "ia3", "weight")


def title_of(names: Collection[str]) -> str:
    """What updates with tensors of these names are called."""
    title = TABLES["update_titles"][kind_of(names)]
    if is_decomposed(names):
        title = "DoRA" if title == "LoRA" else f"{title} with DoRA's norms"
    more = {MID: " with a middle factor", COLUMNS: " of columns", "oft_blocks": " of rows"}
    return title + "".join(text for name, text in more.items() if name in names)


def fits(kind: str, shapes: Shapes, weight: Shape) -> bool:
    """Whether tensors of these shapes are an update of a weight of this one; KeyError with the name of one that is
    missing."""
    replaced = TABLES["update_instead"].items()
    twice = any(one in shapes and not shapes.keys().isdisjoint(others) for one, others in replaced)
    if twice or not all(map(math.prod, shapes.values())):
        return False
    try:
        return norms_fit(shapes, weight) and _FITS[kind](shapes, (weight[0], math.prod(weight[1:])))
    except (IndexError, ValueError):  # One has fewer sides, or more.
        return False


def norms_fit(shapes: Shapes, weight: Shape) -> bool:
    """Whether DoRA's norms, if there are any, are of the rows or columns of a weight."""
    sides = (shapes.get(MAGNITUDE, weight[:1]), shapes.get(COLUMNS, weight[1:2]))
    return tuple(map(math.prod, sides)) == weight[:2]


def _product(a: Shape, b: Shape, core: Shape | None = None) -> Sides | None:
    """Sides of A (O, r) times B (r, I), or with a core (r, s, K, K) of (r, O) and (s, I); None if they do not fit."""
    if core:
        return (a[1], b[1] * math.prod(core[2:])) if (a[0], b[0]) == core[:2] else None
    return (a[0], math.prod(b[1:])) if a[1] == b[0] else None


def _lokr(s: Shapes, sides: Sides) -> bool:
    left = s.get("lokr_w1") or _product(s["lokr_w1_a"], s["lokr_w1_b"])
    right = s.get("lokr_w2") or _product(s["lokr_w2_a"], s["lokr_w2_b"], s.get("lokr_t2"))
    return bool(left and right) and (left[0] * right[0], left[1] * math.prod(right[1:])) == sides  # type: ignore[index]


def _oft(s: Shapes, sides: Sides) -> bool:
    if "oft_R" not in s:
        count, side, other = s["oft_blocks"]
        return side == other and {count * side, math.prod(s.get("oft_rescale", sides[:1]))} == {sides[0]}
    side = math.isqrt(2 * s["oft_R"][1]) + 1
    blocks = sides[1] // side if s["oft_R"][0] == 1 else s["oft_R"][0]
    return side * (side - 1) == 2 * s["oft_R"][1] and blocks * side == sides[1]


def _alike(name: str, of_bias: str) -> Callable[[Shapes, Sides], bool]:
    return lambda s, sides: (s[name][0], math.prod(s[name][1:])) == sides and s.get(of_bias, sides[:1]) == sides[:1]


_FITS: Mapping[str, Callable[[Shapes, Sides], bool]] = {
    "hada": lambda s, sides: (
        {_product(s[f"hada_w{n}_a"], s[f"hada_w{n}_b"], s.get(f"hada_t{n}")) for n in (1, 2)} == {sides}
    ),
    "lokr": _lokr,
    "oft": _oft,
    "diff": _alike("diff", "diff_b"),
    "ia3": lambda s, sides: math.prod(s["ia3_on_input"]) == 1 and math.prod(s["ia3"]) in sides,
    "weight": _alike(WEIGHT, BIAS),
}
"""Of the kinds but LoRA, whose factors may also lie in files in another way."""
