"""How much memory a training will need, from the sizes of its networks alone, before anything is loaded."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dreambooth_ms.errors import DeviceError
from dreambooth_ms.models.activation_memory import (
    FLOAT32,
    Settings,
    Trained,
    peak_activations,
    text_segment,
    unet_segments,
)
from dreambooth_ms.models.parameter_shapes import Shape, clip_text_shapes, unet_shapes
from dreambooth_ms.models.specs import ClipTextSpec, UNetSpec

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
"""Layers whose adapters keep no more than the inputs of attention."""

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


@dataclass(frozen=True)
class Adapter:
    """A LoRA: its rank, the ends of the names of the UNet's and the text encoders' adapted layers."""

    rank: int
    unet_targets: Sequence[str]
    text_targets: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What decides how much memory a training needs."""

    unet: UNetSpec
    text_encoders: Sequence[ClipTextSpec]
    """Those that are trained."""
    adapter: Adapter | None
    """None: all weights are trained."""
    settings: Settings
    """Rows that are computed together, size of latents, width of numbers; what is trained is told by `adapter`."""
    recomputed: bool = False
    """Whether the backward pass computes activations again."""
    bytes_of_weight: int = FLOAT32
    """Of a weight that is not trained."""
    bytes_of_optimiser: int = OPTIMISER_BYTES["adamw"]
    """State of the optimiser, by trained number."""
    sharing_optimiser: int = 1
    """Processes of which each keeps its part of that state."""
    copies_of_trained: int = 0
    """Further float32 copies of what is trained: running averages, sums of gradients."""


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


def estimate(work: Workload) -> MemoryEstimate:
    """The memory at the peak of a step on CPU."""
    shapes = [unet_shapes(work.unet), *map(clip_text_shapes, work.text_encoders)]
    weights = sum(map(_numbers, shapes))
    trained = weights if work.adapter is None else _adapter_numbers(work.adapter, shapes)
    segments = list(unet_segments(work.unet, replace(work.settings, trained=_trained(work.adapter))))
    text_layers = sum(spec.transformer.num_hidden_layers for spec in work.text_encoders)
    texts = [text_segment(spec, replace(work.settings, trained=_trained(work.adapter))) for spec in work.text_encoders]
    passes = GRAPH_SHARE_RECOMPUTED if work.recomputed else 1
    graphs = GRAPH_OF_SEGMENT * len(segments) + GRAPH_OF_TEXT_LAYER * text_layers
    frozen = 0 if work.adapter is None else weights
    return MemoryEstimate(
        {
            "weights": frozen * work.bytes_of_weight,
            "trained": trained * FLOAT32 * (2 + work.copies_of_trained),
            "optimiser": trained * work.bytes_of_optimiser // work.sharing_optimiser,
            "activations": int(POOL_SHARE * peak_activations([*segments, *texts], work.recomputed)),
            "program and graphs": PROGRAM + _kernels(shapes) * FLOAT32 + int(passes * graphs),
        }
    )


def check_memory(expected: MemoryEstimate, limit: int, advice: str, processes: int = 1) -> None:
    """Refuse what cannot fit.

    Args:
        expected: what each process will need.
        limit: bytes that there are for all of them.
        advice: what would need less.
        processes: how many share these bytes.

    Raises:
        DeviceError: they need more than there is.
    """
    if expected.total * processes > limit:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise DeviceError(f"{expected}{each}, and there are {_gib(limit)} GiB; {advice}")


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _trained(adapter: Adapter | None) -> Trained:
    if adapter is None or not set(adapter.unet_targets) <= set(ATTENTION_TARGETS):
        return Trained.ALL
    return Trained.ATTENTION


def _numbers(shapes: Mapping[str, Shape]) -> int:
    return sum(map(math.prod, shapes.values()))


def _kernels(networks: Iterable[Mapping[str, Shape]]) -> int:
    """Numbers of the 3x3 convolutions, which take memory a second time, whatever the pictures' size (measured)."""
    return sum(math.prod(shape) for shapes in networks for shape in shapes.values() if shape[2:] == (3, 3))


def _adapter_numbers(adapter: Adapter, networks: Iterable[Mapping[str, Shape]]) -> int:
    """Numbers of the factors A, rank x inputs, and B, outputs x rank, of every adapted layer."""
    total = 0
    for is_text, shapes in enumerate(networks):
        targets = adapter.text_targets if is_text else adapter.unet_targets
        endings = tuple(f".{target}.weight" for target in targets)
        total += sum(
            adapter.rank * (shape[0] + math.prod(shape[1:])) for name, shape in shapes.items() if name.endswith(endings)
        )
    return total


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
