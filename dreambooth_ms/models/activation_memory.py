"""What a training step keeps in memory of a network's activations, from its spec alone: no network is built for it.

The counts are those of the tensors that the backward passes in `ops` and `models` need, in either formulation.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from dreambooth_ms.models.layout import Layer, LayerKind, unet_layout
from dreambooth_ms.models.specs import ClipTextSpec, UNetSpec
from dreambooth_ms.ops.attention import fused_head, scores_at_a_time
from dreambooth_ms.ops.conv import MAX_TAPS

FLOAT32 = 4
"""Bytes of a number in norms and scores, whatever the network computes in."""

SMALL = (LayerKind.TIME_EMBEDDING, LayerKind.TEXT, LayerKind.UNET_OUTPUT)
"""Layers whose activations are not counted."""


class Trained(Enum):
    """What of a network is trained; its inputs are kept for it."""

    NOTHING = "nothing"
    ATTENTION = "attention"
    """Adapters of queries, keys, values and outputs."""
    ALL = "all"


@dataclass(frozen=True)
class ActivationSettings:
    """What decides the size of the activations of a network."""

    rows: int
    """Rows of a batch."""
    latent_height: int
    latent_width: int
    text_tokens: int = 77
    bytes_of_number: int = FLOAT32
    """Of the type that the networks compute in."""
    dropout: bool = False
    """Whether adapters drop inputs; what was dropped is kept."""
    on_ascend: bool = False
    """In its formulation, whose attention is one kernel in half precision."""


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


def peak_activations(segments: Iterable[SegmentMemory], recomputed: bool) -> int:
    """Bytes of activations where the backward pass is about to begin; recomputed: with gradient checkpointing."""
    segments = list(segments)
    results = sum(segment.result for segment in segments)
    if recomputed:
        return results + max(segment.inside + segment.work for segment in segments)
    return results + sum(segment.inside for segment in segments) + max(segment.work for segment in segments)


def peak_with_gradients(segments: Sequence[SegmentMemory], recomputed: bool) -> int:
    """Bytes of activations, casts and gradients at the worst moment of a backward pass, from the last part on."""
    held = [segment.result if recomputed else segment.inside + segment.casts for segment in segments]
    before, gradients, peak = sum(held), 0, 0
    for segment, own in zip(reversed(segments), reversed(held), strict=True):
        before -= own
        gradients += segment.gradients
        peak = max(peak, before + segment.inside + segment.casts + segment.work + gradients)
    return peak


def unet_segments(
    spec: UNetSpec, settings: ActivationSettings, trained: Trained = Trained.ATTENTION
) -> list[SegmentMemory]:
    """The layers of a UNet but those that are small: time embedding, text and prediction."""
    return [unet_segment(layer, spec, settings, trained) for layer in unet_layout(spec) if layer.kind not in SMALL]


def text_segment(spec: ClipTextSpec, settings: ActivationSettings, trained: Trained) -> SegmentMemory:
    """A trained text encoder, which is one segment."""
    tower = spec.transformer
    tokens = settings.rows * spec.max_position_embeddings
    one = tokens * tower.hidden_size
    # Of a layer: both norms' inputs; queries, keys, values and the result by head; the inner width before and after the
    # activation and its slope. What is trained keeps its inputs, adapters in float32.
    layer = 2 * FLOAT32 * one + settings.bytes_of_number * (4 * one + 3 * tokens * tower.intermediate_size)
    if trained is not Trained.NOTHING:
        layer += (FLOAT32 if trained is Trained.ATTENTION else settings.bytes_of_number) * 3 * one
    return SegmentMemory(settings.bytes_of_number * one, tower.num_hidden_layers * layer)


def unet_segment(layer: Layer, spec: UNetSpec, settings: ActivationSettings, trained: Trained) -> SegmentMemory:
    """The memory of a layer, from the numbers in its input and its result."""
    number, trains_all = settings.bytes_of_number, trained is Trained.ALL
    pixels = settings.rows * (settings.latent_height >> layer.level) * (settings.latent_width >> layer.level)
    in_, out = pixels * layer.in_channels, pixels * layer.out_channels
    # The gathered taps of one part, the padded input, the result and the norm's backward pass before it.
    convolution = number * (min(MAX_TAPS, 9 * max(in_, out)) + 4 * max(in_, out))
    if settings.on_ascend:
        # Gradients of a norm and of its SiLU, and the convolution's result.
        convolution = (2 * FLOAT32 + number) * max(in_, out)
    # Inputs of the projections before and behind a transformer's blocks.
    projections = 2 * number * out if trains_all else 0
    match layer.kind:
        case LayerKind.RESNET | LayerKind.SKIP_RESNET:
            # The second norm's input; with a skip, the first one's is a tensor of its own.
            norms = out + (in_ if layer.kind is LayerKind.SKIP_RESNET else 0)
            if settings.on_ascend:
                norms = 2 * (in_ + out)  # Both, and the inputs of SiLU after them.
            inputs = in_ + out if trains_all else 0
            return SegmentMemory(number * out, FLOAT32 * norms + number * inputs, convolution)
        case LayerKind.TRANSFORMER | LayerKind.TRANSFORMER_BLOCK:
            block = _transformer_block(layer, spec, settings, trained, pixels)
            # The projection's result, which the block's first norm reads, is inside of a whole transformer too.
            whole = projections + FLOAT32 * out if layer.kind is LayerKind.TRANSFORMER else 0
            return replace(block, inside=block.inside + whole)
        case LayerKind.TRANSFORMER_INPUT:
            return SegmentMemory(number * out, projections + (FLOAT32 * out if settings.on_ascend else 0))
        case LayerKind.TRANSFORMER_OUTPUT:
            return SegmentMemory(number * out)
        case LayerKind.UNET_INPUT | LayerKind.DOWNSAMPLER | LayerKind.UPSAMPLER:
            return SegmentMemory(number * out, number * out if trains_all else 0, convolution)
    assert layer.kind in SMALL
    return SegmentMemory(0)


def _transformer_block(
    layer: Layer, spec: UNetSpec, settings: ActivationSettings, trained: Trained, pixels: int
) -> SegmentMemory:
    """What a transformer block keeps beside its input and its result, and attention's and the gated unit's work."""
    number, one = settings.bytes_of_number, pixels * layer.out_channels
    text = settings.rows * settings.text_tokens * layer.out_channels
    # Two norms' inputs; queries, keys, values and the result of both attentions by head; the gated unit's input.
    by_head = 6 * one + 2 * text
    inside = 2 * FLOAT32 * one + number * (by_head + 8 * one)
    if settings.on_ascend:
        # The third norm's input, which is no float32 tensor that something else keeps.
        inside += FLOAT32 * one
    if trained is not Trained.NOTHING:
        # Inputs of both attentions' projections and of their outputs. Adapters take them in float32.
        inside += (FLOAT32 if trained is Trained.ATTENTION else number) * 4 * one
    if trained is Trained.ALL:
        inside += number * 5 * one
    if settings.dropout:
        # What each of six projections of the image drops, and the result.
        inside += FLOAT32 * 12 * one
    tokens, heads = pixels // settings.rows, spec.num_heads[layer.level]
    if settings.on_ascend and number < FLOAT32:
        # What is by head has zeros up to a supported size; of either attention the softmax's maximum and sum, which the
        # kernel gives 8 times for each query and head.
        padding = fused_head(layer.out_channels // heads) - layer.out_channels // heads
        inside += number * by_head * padding * heads // layer.out_channels + 2 * 2 * 8 * FLOAT32 * heads * pixels
        return SegmentMemory(number * one, inside, number * 24 * one)
    scores = scores_at_a_time(heads * settings.rows, tokens, tokens)
    return SegmentMemory(number * one, inside, max(FLOAT32 * 3 * scores + number * 5 * one, number * 24 * one))
