"""What a training step keeps in memory of a network's activations, from its spec alone: no network is built for it.

The counts are those of the tensors that the backward passes in `ops` and `models` need, on CPU.

Shapes: B rows, T tokens of an image or a text in all rows, C channels, N = T * C numbers of an activation.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from dreambooth_ms.models.specs import ClipTextSpec, UNetSpec
from dreambooth_ms.ops.attention import scores_at_a_time
from dreambooth_ms.ops.conv import MAX_TAPS

FLOAT32 = 4
"""Bytes of a number in norms and scores, whatever the network computes in."""


class Trained(Enum):
    """What of a network is trained; its inputs are kept for it."""

    NOTHING = "nothing"
    ATTENTION = "attention"
    """Adapters of queries, keys, values and outputs."""
    ALL = "all"


@dataclass(frozen=True)
class Settings:
    """What decides the size of the activations of given networks."""

    rows: int
    """Rows that are computed together."""
    latent_height: int
    latent_width: int
    text_tokens: int = 77
    bytes_of_number: int = FLOAT32
    """Of the type that the networks compute in."""
    trained: Trained = Trained.ATTENTION
    dropout: bool = False
    """Whether adapters drop inputs; what was dropped is kept."""


@dataclass(frozen=True)
class Segment:
    """Bytes of a part of a network that gradient checkpointing computes again as one."""

    result: int
    """Kept from the forward pass to the part's backward pass in any case."""
    inside: int
    """Kept as well, unless the part is computed again."""
    work: int
    """Needed at once while the part is computed."""


def peak_activations(segments: Iterable[Segment], recomputed: bool) -> int:
    """Bytes of activations where the backward pass is about to begin; recomputed: with gradient checkpointing."""
    segments = list(segments)
    results = sum(segment.result for segment in segments)
    if recomputed:
        return results + max(segment.inside + segment.work for segment in segments)
    return results + sum(segment.inside for segment in segments) + max(segment.work for segment in segments)


def unet_segments(spec: UNetSpec, settings: Settings) -> Iterator[Segment]:
    """The segments of a UNet, as `models.segments` cuts it."""
    channels, layers = spec.block_out_channels, spec.layers_per_block
    pixels = [
        settings.rows * (settings.latent_height >> level) * (settings.latent_width >> level)
        for level in range(len(channels))
    ]
    yield _convolution(pixels[0], channels[0], channels[0], settings)
    width, skips = channels[0], [channels[0]]
    for level, out in enumerate(channels):
        for _ in range(layers):
            yield _resnet(pixels[level], width, out, settings, joined=False)
            yield from _transformer(spec, level, pixels[level], settings)
            width = out
            skips.append(out)
        if level < len(channels) - 1:
            yield _convolution(pixels[level + 1], out, out, settings)
            skips.append(out)
    last = len(channels) - 1
    yield _resnet(pixels[last], width, width, settings, joined=False)
    yield from _transformer(spec, last, pixels[last], settings, always=True)
    yield _resnet(pixels[last], width, width, settings, joined=False)
    for level in reversed(range(len(channels))):
        out = channels[level]
        for _ in range(layers + 1):
            yield _resnet(pixels[level], width + skips.pop(), out, settings, joined=True)
            yield from _transformer(spec, level, pixels[level], settings)
            width = out
        if level > 0:
            yield _convolution(pixels[level - 1], out, out, settings)


def text_segment(spec: ClipTextSpec, settings: Settings) -> Segment:
    """A trained text encoder, which is one segment."""
    tower = spec.transformer
    tokens = settings.rows * spec.max_position_embeddings
    one = tokens * tower.hidden_size
    # Of a layer: both norms' inputs; queries, keys, values and the result by head; the inner width before and after the
    # activation and its slope. What is trained keeps its inputs.
    inputs = {Trained.NOTHING: 0, Trained.ATTENTION: 3 * one, Trained.ALL: 3 * one}[settings.trained]
    layer = 2 * FLOAT32 * one + settings.bytes_of_number * (4 * one + 3 * tokens * tower.intermediate_size)
    layer += (FLOAT32 if settings.trained is Trained.ATTENTION else settings.bytes_of_number) * inputs
    return Segment(settings.bytes_of_number * one, tower.num_hidden_layers * layer, 0)


def _resnet(pixels: int, in_: int, out: int, settings: Settings, joined: bool) -> Segment:
    """A residual block; with `joined`, its input is a tensor of its own that joins two others."""
    number = settings.bytes_of_number
    inside = FLOAT32 * pixels * (out + (in_ if joined else 0))
    if settings.trained is Trained.ALL:
        inside += number * pixels * (in_ + out)
    return Segment(number * pixels * out, inside, _convolution_work(pixels, max(in_, out), settings))


def _transformer(
    spec: UNetSpec, level: int, tokens: int, settings: Settings, always: bool = False
) -> Iterator[Segment]:
    if not (always or spec.has_attention[level]):
        return
    layers, width = spec.transformer_layers(level), spec.block_out_channels[level]
    one = Segment(settings.bytes_of_number * tokens * width, 0, 0)
    inside, work = _layer_inside(spec, level, tokens, settings), _layer_work(spec, level, tokens, settings)
    around = settings.bytes_of_number * tokens * width * (2 if settings.trained is Trained.ALL else 0)
    if layers == 1:
        # The projection's result, which the layer's first norm reads, is inside too.
        yield Segment(one.result, inside + around + FLOAT32 * tokens * width, work)
        return
    yield Segment(one.result, around, 0)
    for _ in range(layers):
        yield Segment(one.result, inside, work)
    yield one


def _layer_inside(spec: UNetSpec, level: int, tokens: int, settings: Settings) -> int:
    """What a transformer layer keeps beside its input and its result."""
    width, number = spec.block_out_channels[level], settings.bytes_of_number
    one, text = tokens * width, settings.rows * settings.text_tokens * width
    # Two norms' inputs; queries, keys, values and the result of both attentions by head; the gated unit's input.
    kept = 2 * FLOAT32 * one + number * (6 * one + 2 * text + 8 * one)
    if settings.trained is not Trained.NOTHING:
        # Inputs of both attentions' projections and of their outputs. Adapters take them in float32.
        kept += (FLOAT32 if settings.trained is Trained.ATTENTION else number) * 4 * one
    if settings.trained is Trained.ALL:
        kept += number * 5 * one
    if settings.dropout:
        # What each of six projections of the image drops, and the result.
        kept += FLOAT32 * 12 * one
    return kept


def _layer_work(spec: UNetSpec, level: int, tokens: int, settings: Settings) -> int:
    """The larger of attention's and the gated unit's backward pass."""
    width, heads = spec.block_out_channels[level], spec.num_heads[level]
    pixels = tokens // settings.rows
    scores = scores_at_a_time(heads * settings.rows, pixels, pixels)
    attention = FLOAT32 * 3 * scores + settings.bytes_of_number * 5 * tokens * width
    return max(attention, settings.bytes_of_number * 24 * tokens * width)


def _convolution(pixels: int, in_: int, out: int, settings: Settings) -> Segment:
    inside = settings.bytes_of_number * pixels * in_ if settings.trained is Trained.ALL else 0
    return Segment(settings.bytes_of_number * pixels * out, inside, _convolution_work(pixels, max(in_, out), settings))


def _convolution_work(pixels: int, channels: int, settings: Settings) -> int:
    """The gathered taps of one part, the padded input, the result and the norm's backward pass before it."""
    taps = min(MAX_TAPS, 9 * pixels * channels)
    return settings.bytes_of_number * (taps + 4 * pixels * channels)
