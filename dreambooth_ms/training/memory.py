"""How much memory a training will need, from the sizes of its networks and the tensors that the backward passes in
`ops` and `models` need, before anything is loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from dreambooth_ms.adapters.cross_attention import CROSS_ATTENTION
from dreambooth_ms.adapters.lora import layers_to_adapt
from dreambooth_ms.models.layout import Layer, LayerKind, unet_layout
from dreambooth_ms.models.parameter_shapes import Shape, text_shapes, unet_shapes
from dreambooth_ms.models.specs import ClipTextSpec, RobertaSpec, UNetSpec
from dreambooth_ms.ops.attention import fused_head, scores_at_a_time
from dreambooth_ms.ops.conv import MAX_TAPS

FLOAT32, TEXT_TOKENS = 4, 77
"""Bytes of a number in norms and scores, whatever the network computes in; and what a UNet reads of a prompt."""

SMALL = (LayerKind.TIME_EMBEDDING, LayerKind.TEXT, LayerKind.UNET_OUTPUT)
"""Layers whose activations are not counted."""

Ranks = Mapping[str, int | None]
"""Of a network: how many numbers are trained of each layer's update; None where its weights themselves are trained."""

_TEXT_ENDS, _UNET_ENDS = (".q_proj", ".k_proj", ".v_proj", ".out_proj"), (".to_q", ".to_k", ".to_v", ".to_out.0")
_XLM_R_ENDS = (".query", ".key", ".value", ".attention.output.dense")
ATTENTION_ENDS = (*_UNET_ENDS, ".add_k_proj", ".add_v_proj", *_TEXT_ENDS, *_XLM_R_ENDS)
"""Layers whose updates keep no more than the inputs of attention,"""
OF_TEXT = CROSS_ATTENTION["crossattn_kv"]
"""and nothing of a picture's size."""

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


Trained = Enum("Trained", ("NOTHING", "ATTENTION", "ALL"))
"""What of a network is trained, whose inputs are kept; ATTENTION: adapters of queries, keys, values and outputs."""


@dataclass(frozen=True)
class SegmentMemory:
    """Bytes of a part of a network that gradient checkpointing computes again as one."""

    result: int
    """Kept from the forward pass to the part's backward pass in any case."""
    inside: int = 0
    """Kept as well, unless the part is computed again."""
    work: int = 0
    """Needed at once while the part is computed."""
    casts: int = 0
    """Of trained weights, in the type that is computed in; kept as what is inside."""
    gradients: int = 0
    """Of what is trained in the part; they stay until the update."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What decides how much memory a training needs."""

    unet: UNetSpec
    text_encoders: Sequence[ClipTextSpec | RobertaSpec] = ()
    """Those in the step: trained, or with new words."""
    ranks: Sequence[Ranks]
    """Of the UNet, then of each text encoder."""
    rows: int
    """Of a batch."""
    latent_height: int
    latent_width: int
    bytes_of_number: int = FLOAT32
    """Of the type that the networks compute in, which frozen weights have too."""
    dropout: bool = False
    """Whether adapters drop inputs; what was dropped is kept."""
    computes_weights: bool = False
    """Whether the weights of layers with updates are computed anew in each step."""
    on_ascend: bool = False
    """In its formulation, whose attention is one kernel in half precision."""
    recomputed: bool = False
    """Whether the backward pass computes activations again."""
    bytes_of_optimiser: int = OPTIMISER_BYTES["adamw"]
    """State of the optimiser, by trained number."""
    copies_of_trained: int = 0
    """Further float32 copies of what is trained: running averages, sums of gradients, the base."""
    answers: bool = False
    """Whether the base answers some of the rows before each step."""
    processes: int = 1
    """That train as one."""
    shares_optimiser: bool = False
    """Whether each of them keeps a part of the optimiser's state alone."""

    @property
    def shapes(self) -> list[dict[str, Shape]]:
        """Of the UNet's parameters, then of each text encoder's."""
        return [unet_shapes(self.unet), *map(text_shapes, self.text_encoders)]

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
        parts = ", ".join(f"{name} {gib(size)}" for name, size in self.parts.items())
        return f"expected memory: {gib(self.total)} GiB ({parts})"


def ranks_of(shapes: Mapping[str, Shape], rank: int | None, targets: Sequence[str] | None = None) -> Ranks:
    """LoRAs of one rank for the layers whose names end in one of the targets, or all layers themselves. Raises
    ConfigError if there is no such layer, or one is smaller than the rank."""
    if rank is None or targets is None:
        return {name.rpartition(".")[0]: rank for name in shapes}
    # Linear layers and convolutions; tables of embeddings have no targets.
    layers = {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in shapes.items() if shape[1:]}
    wanted = {name: shapes[f"{name}.weight"] for name in layers_to_adapt(layers, rank, targets)}
    return {name: rank * (shape[0] + math.prod(shape[1:])) for name, shape in wanted.items()}


def estimate(work: Workload) -> MemoryEstimate:
    """The memory at the peak of a step: on CPU the process's; on Ascend the card's, where the program is not."""
    frozen, trained = work.numbers
    # All gradients, which on Ascend are among what the backward pass keeps, and where processes join them, their sums.
    copies = 1 + work.copies_of_trained + (not work.on_ascend) + 2 * (work.processes > 1)
    optimiser = trained * work.bytes_of_optimiser
    parts = {
        "weights": frozen * work.bytes_of_number,
        "trained": trained * FLOAT32 * copies,
        "optimiser": optimiser // work.processes if work.shares_optimiser else optimiser,
    }
    if not work.on_ascend:
        return MemoryEstimate(parts | _step_on_cpu(work))
    return MemoryEstimate(parts | {"activations and gradients": peak_with_gradients(_segments(work), work.recomputed)})


def _segments(work: Workload) -> list[SegmentMemory]:
    """Of the text encoders that are trained, then of all layers of the UNet, as in the forward pass."""
    (shapes, ranks), *of_texts = zip(work.shapes, work.ranks, strict=True)
    segments = []
    for spec, of_text in zip(work.text_encoders, of_texts, strict=True):
        segments.append(_with_weights(text_segment(spec, work, _trained(of_text[1])), work, *of_text))
    for layer in unet_layout(work.unet):
        own = {name: of for name, of in shapes.items() if name.startswith(tuple(f"{one}." for one in layer.modules))}
        segments.append(_with_weights(unet_segment(layer, work, _trained(ranks)), work, own, ranks))
    return segments


def _with_weights(segment: SegmentMemory, work: Workload, shapes: Mapping[str, Shape], ranks: Ranks) -> SegmentMemory:
    """With the gradients of what is trained in it, and whole weights that are trained in the type computed in."""
    _, trained = _numbers(shapes, ranks)
    is_cast = None in ranks.values() and work.bytes_of_number < FLOAT32
    adapted = [math.prod(shape) for name, shape in shapes.items() if ranks.get(name.removesuffix(".weight"))]
    # The weight, and the two products or the like that it is made of.
    computed = 3 * FLOAT32 * sum(adapted) * work.computes_weights
    casts = work.bytes_of_number * trained * is_cast
    return replace(segment, inside=segment.inside + computed, casts=casts, gradients=FLOAT32 * trained)


def _step_on_cpu(work: Workload) -> dict[str, int]:
    layers = sum(layer.kind not in SMALL for layer in unet_layout(work.unet))
    text_layers = sum(spec.transformer.num_hidden_layers for spec in work.text_encoders)
    passes = 1 + (GRAPH_SHARE_RECOMPUTED - 1) * (work.recomputed + work.answers)
    graphs = GRAPH_OF_SEGMENT * layers + GRAPH_OF_TEXT_LAYER * text_layers
    # 3x3 convolutions take memory a second time, whatever the pictures' size (measured).
    kernels = sum(math.prod(shape) for network in work.shapes for shape in network.values() if shape[2:] == (3, 3))
    return {
        "activations": int(POOL_SHARE * peak_activations(_segments(work), work.recomputed)),
        "program and graphs": PROGRAM + kernels * FLOAT32 + int(passes * graphs),
    }


def _trained(ranks: Ranks) -> Trained:
    if not all(layer.endswith(ATTENTION_ENDS) for layer in ranks):
        return Trained.ALL
    return Trained.NOTHING if all(layer.endswith(OF_TEXT) for layer in ranks) else Trained.ATTENTION


def _numbers(shapes: Mapping[str, Shape], ranks: Ranks) -> tuple[int, int]:
    """Numbers that are frozen and trained."""
    frozen = trained = 0
    for name, shape in shapes.items():
        layer, _, parameter = name.rpartition(".")
        if (of_update := ranks.get(layer, 0)) is None:
            trained += math.prod(shape)
        else:
            frozen += math.prod(shape)
            trained += of_update if parameter == "weight" else 0
    return frozen, trained


def gib(size: int) -> str:
    """So many bytes in GiB."""
    return f"{size / 2**30:.1f}"


def peak_activations(segments: Sequence[SegmentMemory], recomputed: bool) -> int:
    """Bytes of activations where the backward pass is about to begin; recomputed: with gradient checkpointing."""
    kept = sum(segment.result + (0 if recomputed else segment.inside) for segment in segments)
    return kept + max(segment.work + (segment.inside if recomputed else 0) for segment in segments)


def peak_with_gradients(segments: Sequence[SegmentMemory], recomputed: bool) -> int:
    """Bytes of activations, casts and gradients at the worst moment of a backward pass, from the last part on."""
    held = [segment.result if recomputed else segment.inside + segment.casts for segment in segments]
    before, gradients, peak = sum(held), 0, 0
    for segment, own in zip(reversed(segments), reversed(held), strict=True):
        before -= own
        gradients += segment.gradients
        peak = max(peak, before + segment.inside + segment.casts + segment.work + gradients)
    return peak


def text_segment(spec: ClipTextSpec | RobertaSpec, work: Workload, trained: Trained) -> SegmentMemory:
    """A trained text encoder, which is one segment."""
    tower = spec.transformer
    tokens = work.rows * min(TEXT_TOKENS, spec.max_position_embeddings)
    one = tokens * tower.hidden_size
    # Of a layer: both norms' inputs; queries, keys, values and the result by head; the inner width before and after the
    # activation and its slope. What is trained keeps its inputs, adapters in float32.
    layer = 2 * FLOAT32 * one + work.bytes_of_number * (4 * one + 3 * tokens * tower.intermediate_size)
    if trained is not Trained.NOTHING:
        layer += (FLOAT32 if trained is Trained.ATTENTION else work.bytes_of_number) * 3 * one
    return SegmentMemory(work.bytes_of_number * one, tower.num_hidden_layers * layer)


def unet_segment(layer: Layer, work: Workload, trained: Trained) -> SegmentMemory:
    """The memory of a layer, from the numbers in its input and its result."""
    number, trains_all = work.bytes_of_number, trained is Trained.ALL
    pixels = work.rows * (work.latent_height >> layer.level) * (work.latent_width >> layer.level)
    in_, out = pixels * layer.in_channels, pixels * layer.out_channels
    # The gathered taps of one part, the padded input, the result and the norm's backward pass before it.
    convolution = number * (min(MAX_TAPS, 9 * max(in_, out)) + 4 * max(in_, out))
    if work.on_ascend:
        # Gradients of a norm and of its SiLU, and the convolution's result.
        convolution = (2 * FLOAT32 + number) * max(in_, out)
    # Inputs of the projections before and behind a transformer's blocks.
    projections = 2 * number * out if trains_all else 0
    match layer.kind:
        case LayerKind.RESNET | LayerKind.SKIP_RESNET | LayerKind.RESNET_DOWNSAMPLER | LayerKind.RESNET_UPSAMPLER:
            # The second norm's input; with a skip, the first one's is a tensor of its own.
            norms = out + (in_ if layer.kind is LayerKind.SKIP_RESNET else 0)
            if work.on_ascend:
                norms = 2 * (in_ + out)  # Both, and the inputs of SiLU after them.
            if work.unet.resnet_time_scale_shift == "scale_shift":
                norms += 3 * out  # What is scaled, by what, and what the activation reads.
            inputs = in_ + out if trains_all else 0
            return SegmentMemory(number * out, FLOAT32 * norms + number * inputs, convolution)
        case LayerKind.TRANSFORMER_BLOCK:
            return _transformer_block(layer, work, trained, pixels)
        case LayerKind.TRANSFORMER:
            block = _transformer_block(layer, work, trained, pixels)
            # The projection's result, which the block's first norm reads, is inside too.
            return replace(block, inside=block.inside + projections + FLOAT32 * out)
        case LayerKind.TEXT_AND_PIXEL_ATTENTION:
            # Queries, keys, values and the result by head, keys and values of the text also before they are joined; of
            # what is trained two inputs. The norm's input is the layer's.
            inside = number * (4 * out + 4 * work.rows * TEXT_TOKENS * layer.out_channels)
            inside += 2 * out * {Trained.NOTHING: 0, Trained.ATTENTION: FLOAT32, Trained.ALL: number}[trained]
            tokens = pixels // work.rows
            scores = scores_at_a_time(work.unet.num_heads[layer.level] * work.rows, tokens, tokens + TEXT_TOKENS)
            return SegmentMemory(number * out, inside, FLOAT32 * 3 * scores + number * 5 * out)
        case LayerKind.TRANSFORMER_INPUT:
            return SegmentMemory(number * out, projections + (FLOAT32 * out if work.on_ascend else 0))
        case LayerKind.TRANSFORMER_OUTPUT:
            return SegmentMemory(number * out)
        case LayerKind.UNET_INPUT | LayerKind.DOWNSAMPLER | LayerKind.UPSAMPLER:
            return SegmentMemory(number * out, number * out if trains_all else 0, convolution)
    return SegmentMemory(0)


def _transformer_block(layer: Layer, work: Workload, trained: Trained, pixels: int) -> SegmentMemory:
    """What a transformer block keeps beside its input and its result, and attention's and the gated unit's work."""
    number, one = work.bytes_of_number, pixels * layer.out_channels
    text = work.rows * TEXT_TOKENS * layer.out_channels
    # Two norms' inputs; queries, keys, values and the result of both attentions by head; the gated unit's input.
    by_head = 6 * one + 2 * text
    inside = 2 * FLOAT32 * one + number * (by_head + 8 * one)
    if work.on_ascend:
        # The third norm's input, which is no float32 tensor that something else keeps.
        inside += FLOAT32 * one
    if trained is not Trained.NOTHING:
        # Inputs of both attentions' projections and of their outputs. Adapters take them in float32.
        inside += (FLOAT32 if trained is Trained.ATTENTION else number) * 4 * one
    if trained is Trained.ALL:
        inside += number * 5 * one
    if work.dropout:
        # What each of six projections of the image drops, and the result.
        inside += FLOAT32 * 12 * one
    tokens, heads = pixels // work.rows, work.unet.num_heads[layer.level]
    if work.on_ascend and number < FLOAT32:
        # What is by head has zeros up to a supported size; of either attention the softmax's maximum and sum, which the
        # kernel gives 8 times for each query and head.
        padding = fused_head(layer.out_channels // heads) - layer.out_channels // heads
        inside += number * by_head * padding * heads // layer.out_channels + 2 * 2 * 8 * FLOAT32 * heads * pixels
        return SegmentMemory(number * one, inside, number * 24 * one)
    scores = scores_at_a_time(heads * work.rows, tokens, tokens)
    return SegmentMemory(number * one, inside, max(FLOAT32 * 3 * scores + number * 5 * one, number * 24 * one))
