"""A UNet as a list of segments, for a backward pass that computes each one again (Chen et al., 2016).

Values are numbered in the order of their making: first the inputs, then the results of one segment after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor, nn

from dreambooth_ms.models.clip import TextEncoders
from dreambooth_ms.models.layers import ResnetBlock2D
from dreambooth_ms.models.transformer import Transformer2DModel
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.ops import ConcatChannels


@dataclass(frozen=True)
class Segment:
    """A part of a network: what it computes, and from which values."""

    cell: nn.Cell
    reads: tuple[int, ...]
    parts: tuple[nn.Cell, ...]
    """The cells of the network whose parameters it uses; no two segments use the same."""
    num_results: int | None
    """Tensors in the tuple that it returns; None if it returns a tensor."""


class Segments:
    """A denoiser in segments: noisy latents, timesteps, conditioning -> the prediction, which the last one gives."""

    def __init__(self, unet: UNet2DConditionModel, text_encoders: TextEncoders | None = None) -> None:
        """With text encoders the conditioning is what `training.methods.TextConditioned` takes."""
        self.num_inputs = len(unet.input_names)
        self.segments: list[Segment] = []
        self.num_values = self.num_inputs
        noisy, timesteps, text, *pooled_and_sizes = range(self.num_inputs)
        if text_encoders is not None:
            num_results = 2 if unet.adds_text_and_sizes else 1
            text = self._add(text_encoders, text, *pooled_and_sizes[:1], num_results=num_results)
            pooled_and_sizes[:1] = [text + 1] if unet.adds_text_and_sizes else []
        if unet.compute_dtype != ms.float32:
            text = self._add(_CastText(unet), text)
        parts = [unet.time_embedding, unet.add_embedding] if unet.adds_text_and_sizes else [unet.time_embedding]
        temb = self._add(_EmbedTime(unet), timesteps, *pooled_and_sizes, parts=parts)
        x = self._add(_EnterUNet(unet), noisy, parts=[unet.conv_in])
        skips = [x]
        for down in unet.down_blocks:
            for i in range(down.num_layers):
                x = self._add(down.resnets[i], x, temb)
                x = self._transformer(down.attentions[i], x, text) if down.has_attention else x
                skips.append(x)
            if down.has_downsampler:
                x = self._add(down.downsamplers[0], x)
                skips.append(x)
        middle = unet.mid_block
        x = self._add(middle.resnets[0], x, temb)
        x = self._transformer(middle.attentions[0], x, text)
        x = self._add(middle.resnets[1], x, temb)
        for up in unet.up_blocks:
            for i in range(up.num_layers):
                x = self._add(_ConcatThenResnet(up.concat, up.resnets[i]), x, skips.pop(), temb)
                x = self._transformer(up.attentions[i], x, text) if up.has_attention else x
            x = self._add(up.upsamplers[0], x) if up.has_upsampler else x
        self._add(_LeaveUNet(unet), x, parts=[unet.conv_norm_out, unet.conv_out])

    def _add(self, cell: nn.Cell, *reads: int, parts: Sequence[nn.Cell] = (), num_results: int | None = None) -> int:
        """Append a segment, of whose parts there is one if none is named; returns the number of its first result."""
        self.segments.append(Segment(cell, reads, tuple(parts) or (cell,), num_results))
        first = self.num_values
        self.num_values += num_results or 1
        return first

    def _transformer(self, transformer: Transformer2DModel, x: int, text: int) -> int:
        """One layer is one segment; in SDXL's deep ones each layer is."""
        if len(transformer.transformer_blocks) == 1:
            return self._add(transformer, x, text)
        parts = [transformer.norm, transformer.proj_in]
        tokens = self._add(_EnterTransformer(transformer), x, parts=parts)
        for block in transformer.transformer_blocks:
            tokens = self._add(block, tokens, text)
        return self._add(_LeaveTransformer(transformer), tokens, x, parts=[transformer.proj_out])


class _EmbedTime(nn.Cell):
    """`UNet2DConditionModel.embed_time` as a cell; the parts below are the same of other steps."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet

    def construct(self, timesteps_B: Tensor, *pooled_and_sizes: Tensor) -> Tensor:
        return self.unet.embed_time(timesteps_B, *pooled_and_sizes)


class _CastText(nn.Cell):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(auto_prefix=False)
        self.dtype = unet.compute_dtype

    def construct(self, text_BSE: Tensor) -> Tensor:
        return text_BSE.astype(self.dtype)


class _EnterUNet(nn.Cell):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet

    def construct(self, latents_BCHW: Tensor) -> Tensor:
        return self.unet.enter(latents_BCHW)


class _LeaveUNet(nn.Cell):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet

    def construct(self, x: Tensor) -> Tensor:
        return self.unet.leave(x)


class _ConcatThenResnet(nn.Cell):
    def __init__(self, concat: ConcatChannels, resnet: ResnetBlock2D) -> None:
        super().__init__(auto_prefix=False)
        self.concat, self.resnet = concat, resnet

    def construct(self, x: Tensor, skip: Tensor, temb_BT: Tensor) -> Tensor:
        return self.resnet(self.concat(x, skip), temb_BT)


class _EnterTransformer(nn.Cell):
    def __init__(self, transformer: Transformer2DModel) -> None:
        super().__init__(auto_prefix=False)
        self.transformer = transformer

    def construct(self, x: Tensor) -> Tensor:
        return self.transformer.enter(x)


class _LeaveTransformer(nn.Cell):
    def __init__(self, transformer: Transformer2DModel) -> None:
        super().__init__(auto_prefix=False)
        self.transformer = transformer

    def construct(self, tokens_BLC: Tensor, x: Tensor) -> Tensor:
        return self.transformer.leave(tokens_BLC, x)
