"""How much memory a training will need, from the sizes of its networks alone, before anything is loaded."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dreambooth_ms.adapters.lora import layers_to_adapt
from dreambooth_ms.errors import DeviceError
from dreambooth_ms.models.activation_memory import (
    FLOAT32,
    ActivationSettings,
    SegmentMemory,
    Trained,
    peak_activations,
    peak_with_gradients,
    text_segment,
    unet_segment,
    unet_segments,
)
from dreambooth_ms.models.layout import unet_layout
from dreambooth_ms.models.parameter_shapes import Shape, clip_text_shapes, unet_shapes
from dreambooth_ms.models.specs import ClipTextSpec, UNetSpec

Ranks = Mapping[str, int | None]
"""Of a network: the rank of the update of each layer that has one; None where its weights themselves are trained."""

ATTENTION_ENDS = tuple(
    f".{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
)
"""Layers whose updates keep no more than the inputs of attention."""

OPTIMISER_BYTES = {"adamw": 2 * FLOAT32, "adamw_8bit": 2, "prodigy": 4 * FLOAT32, "adafactor": 0}
"""State of each optimiser by trained number: AdamW's are two moments; Adafactor's rows and columns are next to none."""

PROGRAM = 400 << 20
"""Python, MindSpore and their libraries (measured)."""
GRAPH_OF_SEGMENT = 32 << 20
"""What MindSpore's compiler keeps of a segment of a UNet and of its backward pass (measured: 31 to 33 MiB)."""
GRAPH_OF_TEXT_LAYER = 12 << 20
"""The same of a layer of a text encoder, which has as many operations as a third of a segment."""
GRAPH_SHARE_RECOMPUTED = 1.75
"""The same with the forward pass in it twice (measured)."""
POOL_SHARE = 1.15
"""MindSpore's memory pool over the tensors that are in it at once (measured)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What decides how much memory a training needs."""

    unet: UNetSpec
    text_encoders: Sequence[ClipTextSpec] = ()
    """Those that are trained."""
    ranks: Sequence[Ranks]
    """Of the UNet, then of each text encoder."""
    activations: ActivationSettings
    recomputed: bool = False
    """Whether the backward pass computes activations again."""
    bytes_of_weight: int = FLOAT32
    """Of a weight that is not trained."""
    bytes_of_optimiser: int = OPTIMISER_BYTES["adamw"]
    """State of the optimiser, by trained number."""
    copies_of_trained: int = 0
    """Further float32 copies of what is trained: running averages, sums of gradients."""
    processes: int = 1
    """That train as one."""
    shares_optimiser: bool = False
    """Whether each of them keeps a part of the optimiser's state alone."""

    @property
    def shapes(self) -> list[dict[str, Shape]]:
        """Of the UNet's parameters, then of each text encoder's."""
        return [unet_shapes(self.unet), *map(clip_text_shapes, self.text_encoders)]

    @property
    def numbers(self) -> tuple[int, int]:
        """How many numbers are frozen and trained."""
        frozen, trained = map(sum, zip(*map(_numbers, self.shapes, self.ranks), strict=True))
        return frozen, trained


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in self.parts.items())
        return f"expected memory: {_gib(self.total)} GiB ({parts})"


def ranks_of(shapes: Mapping[str, Shape], rank: int | None, targets: Sequence[str] | None = None) -> Ranks:
    """One rank for the layers whose names end in one of the targets, or for all layers.

    Raises:
        ConfigError: there is no such layer, or one is smaller than the rank.
    """
    if rank is None or targets is None:
        return {name.rpartition(".")[0]: rank for name in shapes}
    # Linear layers and convolutions; tables of embeddings have no targets.
    layers = {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in shapes.items() if shape[1:]}
    return dict.fromkeys(layers_to_adapt(layers, rank, targets), rank)


def estimate(work: Workload) -> MemoryEstimate:
    """The memory at the peak of a step: on CPU the process's; on Ascend the card's, where the program is not."""
    (frozen, trained), on_ascend = work.numbers, work.activations.on_ascend
    # All gradients, which on Ascend are among what the backward pass keeps, and where processes join them, their sums.
    copies = 1 + work.copies_of_trained + (0 if on_ascend else 1) + (2 if work.processes > 1 else 0)
    optimiser = trained * work.bytes_of_optimiser
    parts = {
        "weights": frozen * work.bytes_of_weight,
        "trained": trained * FLOAT32 * copies,
        "optimiser": optimiser // work.processes if work.shares_optimiser else optimiser,
    }
    return MemoryEstimate(parts | (_step_on_ascend(work) if on_ascend else _step_on_cpu(work)))


def _step_on_ascend(work: Workload) -> dict[str, int]:
    networks, activations = list(zip(work.shapes, work.ranks, strict=True)), work.activations
    # In the order of the forward pass.
    segments = [
        _with_weights(text_segment(spec, activations, _trained(ranks)), activations, shapes, ranks)
        for spec, (shapes, ranks) in zip(work.text_encoders, networks[1:], strict=True)
    ]
    shapes, ranks = networks[0]
    for layer in unet_layout(work.unet):
        modules = tuple(f"{module}." for module in layer.modules)
        own = {name: shape for name, shape in shapes.items() if name.startswith(modules)}
        segment = unet_segment(layer, work.unet, activations, _trained(ranks))
        segments.append(_with_weights(segment, activations, own, ranks))
    return {"activations and gradients": peak_with_gradients(segments, work.recomputed)}


def _with_weights(
    segment: SegmentMemory, settings: ActivationSettings, shapes: Mapping[str, Shape], ranks: Ranks
) -> SegmentMemory:
    """With the gradients of what is trained in it, and whole weights that are trained in the type computed in."""
    _, trained = _numbers(shapes, ranks)
    is_cast = None in ranks.values() and settings.bytes_of_number < FLOAT32
    return replace(segment, casts=settings.bytes_of_number * trained * is_cast, gradients=FLOAT32 * trained)


def _step_on_cpu(work: Workload) -> dict[str, int]:
    of_unet, *of_texts = map(_trained, work.ranks)
    segments = unet_segments(work.unet, work.activations, of_unet)
    texts = [text_segment(spec, work.activations, own) for spec, own in zip(work.text_encoders, of_texts, strict=True)]
    text_layers = sum(spec.transformer.num_hidden_layers for spec in work.text_encoders)
    passes = GRAPH_SHARE_RECOMPUTED if work.recomputed else 1
    graphs = GRAPH_OF_SEGMENT * len(segments) + GRAPH_OF_TEXT_LAYER * text_layers
    # 3x3 convolutions take memory a second time, whatever the pictures' size (measured).
    kernels = sum(math.prod(shape) for network in work.shapes for shape in network.values() if shape[2:] == (3, 3))
    return {
        "activations": int(POOL_SHARE * peak_activations([*segments, *texts], work.recomputed)),
        "program and graphs": PROGRAM + kernels * FLOAT32 + int(passes * graphs),
    }


def check_memory(expected: MemoryEstimate, limit: int, advice: str, processes: int = 1) -> None:
    """Refuse what cannot fit: what is expected of each of some processes, which share `limit` bytes.

    Raises:
        DeviceError: they need more than there is; `advice` says what would need less.
    """
    if expected.total * processes > limit:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise DeviceError(f"{expected}{each}, and there are {_gib(limit)} GiB; {advice}")


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _trained(ranks: Ranks) -> Trained:
    if all(rank and layer.endswith(ATTENTION_ENDS) for layer, rank in ranks.items()):
        return Trained.ATTENTION if ranks else Trained.NOTHING
    return Trained.ALL


def _numbers(shapes: Mapping[str, Shape], ranks: Ranks) -> tuple[int, int]:
    """Numbers that are frozen and trained; an update has the factors A, rank x inputs, and B, outputs x rank."""
    frozen = trained = 0
    for name, shape in shapes.items():
        layer, _, parameter = name.rpartition(".")
        rank, size = ranks.get(layer, 0), math.prod(shape)
        if rank is None:
            trained += size
        else:
            frozen += size
            trained += rank * (shape[0] + size // shape[0]) if parameter == "weight" else 0
    return frozen, trained


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
