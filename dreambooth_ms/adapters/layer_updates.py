"""Which layers get which update: decided here alone, for training and for the estimate of its memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mindspore import nn

from dreambooth_ms.adapters.formulas import factorised
from dreambooth_ms.adapters.lora import Dropout, LoraConv2d, PrincipalDense, check_rank, layers_to_adapt, lora_layer
from dreambooth_ms.adapters.reweighted import CHANGES, ReweightedLayer
from dreambooth_ms.config.choices import AdapterKind
from dreambooth_ms.config.ranges import Pattern, pattern
from dreambooth_ms.config.train import MethodConfig
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.formats.naming.formats import unet_layer
from dreambooth_ms.formats.naming.update_kinds import DOWN, MAGNITUDE, MID, UP
from dreambooth_ms.models.parameter_shapes import Shape
from dreambooth_ms.models.specs import UNetSpec, at_level
from dreambooth_ms.ops import Conv2d

Targets = tuple[Mapping[str, Shape], Sequence[str]]
"""A network's parameters by name, and what the names of those of its layers end in that are adapted."""


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one layer, before it is made."""

    kind: AdapterKind
    rank: int
    alpha: float
    size: int = 0
    """LoKr's factor, or the side of OFT's blocks."""
    has_middle: bool = False
    is_principal: bool = False
    """Whether it begins with the largest singular values of the weight."""

    def layer(self, base: nn.Cell, dropout: Dropout | None) -> nn.Cell:
        """The base with it."""
        if self.kind in CHANGES:
            kernel = (base.kernel_size,) * 2 if isinstance(base, Conv2d) else ()
            shapes = self.shapes((base.out_channels, base.in_channels, *kernel))
            change = CHANGES[self.kind](base, shapes, self.alpha / self.rank, self.size)
            return ReweightedLayer(base, change, self.alpha)
        if self.has_middle:
            return LoraConv2d(base, self.rank, self.alpha, dropout, has_middle=True)
        return (PrincipalDense if self.is_principal else lora_layer)(base, self.rank, self.alpha, dropout)

    def shapes(self, weight: Shape) -> dict[str, Shape]:
        """The factors for a weight, as matrices, by the names that files have for them."""
        rows, columns, kernel, rank = weight[0], math.prod(weight[1:]), math.prod(weight[2:]), self.rank
        pair: dict[str, Shape] = {DOWN: (rank, columns), UP: (rows, rank)}
        match self.kind:
            case "dora":
                return {**pair, MAGNITUDE: (rows,)}
            case "loha":
                left, right = (rows, rank), (rank, columns)
                return {"hada_w1_a": left, "hada_w2_a": left, "hada_w1_b": right, "hada_w2_b": right}
            case "lokr":
                (a, c), (b, d) = (factorised(side, self.size) for side in weight[:2])
                if rank >= max(c, d) / 2:
                    return {"lokr_w1": (a, b), "lokr_w2": (c, d * kernel)}
                return {"lokr_w1": (a, b), "lokr_w2_a": (c, rank), "lokr_w2_b": (rank, d * kernel)}
            case "oft":
                return {"oft_R": (columns // self.size, self.size * (self.size - 1) // 2)}
        middle = {DOWN: (rank, weight[1]), MID: (rank, rank * kernel)} if self.has_middle else {}
        return pair | middle

    def numbers(self, weight: Shape) -> int:
        """How many are trained for a weight."""
        return sum(map(math.prod, self.shapes(weight).values()))


def layer_updates(
    config: MethodConfig, networks: Mapping[str, Targets], unet: UNetSpec
) -> dict[str, dict[str, LayerUpdate]]:
    """By network and layer. A layer whose rank or alpha is 0 by a pattern has none. ConfigError if a layer cannot have
    such an update, or a pattern fits none."""
    given = {flag: pattern(getattr(config, flag)) or {} for flag in ("rank_pattern", "alpha_pattern")}
    updates, names = dict[str, dict[str, LayerUpdate]](), list[str]()
    for network, (shapes, targets) in networks.items():
        weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if shape[1:]}
        wanted = layers_to_adapt({name: (shape[0], shape[1]) for name, shape in weights.items()}, 1, targets)
        spec, updates[network] = unet if network == "unet" else None, {}
        # From the smallest on, which is named where the rank is too large.
        for name in sorted(wanted, key=lambda name: min(weights[name][:2])):
            own = [_said(flag, said, name, weights[name], spec) for flag, said in given.items()]
            if update := _update(config, name, weights[name], *own):
                updates[network][name] = update
        names += wanted
    for flag, said in given.items():
        for end in said if isinstance(said, dict) else ():
            if not any(_ends(name, end) for name in names):
                raise ConfigError(f"--{flag}: no layer that is adapted is named {end}")
    if not any(updates.values()):
        raise ConfigError("--rank_pattern: all are 0, so that nothing would be trained")
    return updates


def _update(
    config: MethodConfig, layer: str, weight: Shape, rank_said: float | None, alpha_said: float | None
) -> LayerUpdate | None:
    kind, has_kernel, columns = config.adapter, math.prod(weight[2:]) > 1, math.prod(weight[1:])
    ranks = {"rank_pattern": rank_said, "conv_rank": config.conv_rank if has_kernel else None, "rank": config.rank}
    flag, rank = next((flag, int(own)) for flag, own in ranks.items() if own is not None)
    alphas = alpha_said, config.conv_alpha if has_kernel else None, config.lora_alpha, rank
    alpha = next(float(own) for own in alphas if own is not None)
    if not (rank and alpha):
        return None
    if kind == "oft" and (has_kernel or columns % config.oft_block_size):
        reason = "has a kernel" if has_kernel else f"has {columns} columns, which that does not divide"
        raise ConfigError(f"--oft_block_size {config.oft_block_size}: {layer} {reason}; choose other layers or blocks")
    if config.init_lora_weights == "pissa" and weight[2:]:
        raise ConfigError(f"--init_lora_weights pissa: is for linear layers; {layer} is a convolution")
    if kind not in ("lokr", "oft"):
        check_rank(rank, flag, [weight[:2]])
    return LayerUpdate(
        kind=kind,
        rank=rank,
        # Rank-stabilised LoRA scales by alpha / sqrt(r) (Kalajdzievski, 2023, eq. 4).
        alpha=alpha * math.sqrt(rank) if config.use_rslora else alpha,
        size=config.oft_block_size if kind == "oft" else config.lokr_factor,
        has_middle=config.use_tucker and has_kernel,
        is_principal=config.init_lora_weights == "pissa",
    )


def _said(flag: str, given: Pattern, layer: str, weight: Shape, unet: UNetSpec | None) -> float | None:
    """What a pattern says of a layer."""
    if isinstance(given, dict):
        return next((own for end, own in given.items() if _ends(layer, end)), None)
    if not unet or math.prod(weight[2:]) > 1:
        return None
    # As kohya's scripts number the blocks: SDXL's time embedding is the first, and each of the middle is one.
    levels, xl = range(len(unet.block_out_channels)), bool(unet.addition_embed_type)
    blocks = sum(at_level(unet.layers_per_block, level) + 1 for level in levels)
    starts = {"input_blocks": int(xl), "middle_block": xl + blocks, "output_blocks": xl + blocks + (3 if xl else 1)}
    expected = 0 if unet.simple_blocks else starts["output_blocks"] + blocks + xl
    if len(given) != expected:
        raise ConfigError(f"--{flag}: this base has {expected} blocks, by kohya's count, got {len(given)} numbers")
    group, number, *_ = unet_layer(layer, unet).split(".")
    return given[starts[group] + (int(number) if xl or group != "middle_block" else 0)] if group in starts else None


def _ends(layer: str, end: str) -> bool:
    return f".{layer}".endswith(f".{end}")
