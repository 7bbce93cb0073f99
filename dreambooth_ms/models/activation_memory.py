"""What a training step keeps in memory of a network's activations, from its spec alone: no network is built for it.

The counts are those of the tensors that the backward passes in `ops` and `models` need, on CPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from dreambooth_ms.models.layout import Layer, LayerKind, unet_layout
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
class ActivationSettings:
    """What decides the size of the activations of a network."""

    rows: int
    """Rows that are computed together."""
    latent_height: int
    latent_width: int
    text_tokens: int = 77
    bytes_of_number: int = FLOAT32
    """Of the type that the networks compute in."""
    dropout: bool = False
    """Whether adapters drop inputs; what was dropped is kept."""


@dataclass(frozen=True)
class SegmentMemory:
    """Bytes of a part of a network that gradient checkpointing computes again as one."""

    result: int
    """Kept from the forward pass to the part's backward pass in any case."""
    inside: int = 0
    """Kept as well, unless the part is computed again."""
    work: int = 0
    """Needed at once while the part is computed."""


def peak_activations(segments: Iterable[SegmentMemory], recomputed: bool) -> int:
    """Bytes of activations where the backward pass is about to begin; recomputed: with gradient checkpointing."""
    segments = list(segments)
    results = sum(segment.result for segment in segments)
    if recomputed:
        return results + max(segment.inside + segment.work for segment in segments)
    return results + sum(segment.inside for segment in segments) + max(segment.work for segment in segments)


def unet_segments(
    spec: UNetSpec, settings: ActivationSettings, trained: Trained = Trained.ATTENTION
) -> list[SegmentMemory]:
    """The layers of a UNet but those that are small: time embedding, text and prediction."""
    small = (LayerKind.TIME_EMBEDDING, LayerKind.TEXT, LayerKind.UNET_EXIT)
    return [
        _UNetLayer(spec, settings, trained, layer).memory() for layer in unet_layout(spec) if layer.kind not in small
    ]


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


class _UNetLayer:
    """The memory of one layer: `number` bytes a number, of `pixels` in all rows, `one` numbers in its result."""

    def __init__(self, spec: UNetSpec, settings: ActivationSettings, trained: Trained, layer: Layer) -> None:
        self.spec, self.settings, self.trained, self.layer = spec, settings, trained, layer
        self.number, self.trains_all = settings.bytes_of_number, trained is Trained.ALL
        self.pixels = settings.rows * (settings.latent_height >> layer.level) * (settings.latent_width >> layer.level)
        self.one = self.pixels * layer.out_channels

    def memory(self) -> SegmentMemory:
        result = self.number * self.one
        match self.layer.kind:
            case LayerKind.RESNET | LayerKind.SKIP_RESNET:
                return SegmentMemory(result, self._resnet_inside(), self._convolution_work())
            case LayerKind.TRANSFORMER:
                # The projection's result, which the block's first norm reads, is inside too.
                inside = self._block_inside() + self._around_blocks() + FLOAT32 * self.one
                return SegmentMemory(result, inside, self._block_work())
            case LayerKind.TRANSFORMER_ENTRANCE:
                return SegmentMemory(result, self._around_blocks())
            case LayerKind.TRANSFORMER_BLOCK:
                return SegmentMemory(result, self._block_inside(), self._block_work())
            case LayerKind.TRANSFORMER_EXIT:
                return SegmentMemory(result)
            case LayerKind.UNET_ENTRANCE | LayerKind.DOWNSAMPLER | LayerKind.UPSAMPLER:
                return SegmentMemory(result, self.number * self.one if self.trains_all else 0, self._convolution_work())
        raise AssertionError(self.layer.kind)

    def _resnet_inside(self) -> int:
        """With a skip, its input is a tensor of its own that joins two others."""
        in_ = self.pixels * self.layer.in_channels
        inside = FLOAT32 * (self.one + (in_ if self.layer.kind is LayerKind.SKIP_RESNET else 0))
        return inside + (self.number * (in_ + self.one) if self.trains_all else 0)

    def _convolution_work(self) -> int:
        """The gathered taps of one part, the padded input, the result and the norm's backward pass before it."""
        numbers = self.pixels * max(self.layer.in_channels, self.layer.out_channels)
        return self.number * (min(MAX_TAPS, 9 * numbers) + 4 * numbers)

    def _around_blocks(self) -> int:
        """Inputs of the projections before and behind a transformer's blocks."""
        return 2 * self.number * self.one if self.trains_all else 0

    def _block_inside(self) -> int:
        """What a transformer block keeps beside its input and its result."""
        one, text = self.one, self.settings.rows * self.settings.text_tokens * self.layer.out_channels
        # Two norms' inputs; queries, keys, values and the result of both attentions by head; the gated unit's input.
        kept = 2 * FLOAT32 * one + self.number * (6 * one + 2 * text + 8 * one)
        if self.trained is not Trained.NOTHING:
            # Inputs of both attentions' projections and of their outputs. Adapters take them in float32.
            kept += (FLOAT32 if self.trained is Trained.ATTENTION else self.number) * 4 * one
        if self.trains_all:
            kept += self.number * 5 * one
        if self.settings.dropout:
            # What each of six projections of the image drops, and the result.
            kept += FLOAT32 * 12 * one
        return kept

    def _block_work(self) -> int:
        """The larger of attention's and the gated unit's backward pass."""
        pixels = self.pixels // self.settings.rows
        scores = scores_at_a_time(self.spec.num_heads[self.layer.level] * self.settings.rows, pixels, pixels)
        return max(FLOAT32 * 3 * scores + self.number * 5 * self.one, self.number * 24 * self.one)
