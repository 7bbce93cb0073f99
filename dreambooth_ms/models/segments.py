"""A denoiser as a list of segments, for a backward pass that computes each one again (Chen et al., 2016).

Values are numbered in the order of their making: first the inputs, then the results of one segment after the other.
"""

from dataclasses import replace

from dreambooth_ms.models.clip import TextEncoders
from dreambooth_ms.models.unet import Segment, UNet2DConditionModel

TEXT_INPUTS = ("encoder_hidden_states", "text_embeds")
"""Inputs of a UNet that text encoders give."""


class Segments:
    """A denoiser in segments: noisy latents, timesteps, conditioning -> the prediction, which the last one gives."""

    def __init__(self, unet: UNet2DConditionModel, text_encoders: TextEncoders | None = None) -> None:
        """With text encoders the conditioning is what `training.methods.TextConditioned` takes."""
        self.num_inputs = len(unet.input_names)
        self.segments: list[Segment] = []
        numbers, made = list(range(self.num_inputs)), self.num_inputs
        if text_encoders is not None:
            texts = tuple(i for i, name in enumerate(unet.input_names) if name in TEXT_INPUTS)
            self.segments.append(Segment(text_encoders, texts, (text_encoders,), len(texts)))
            for i in texts:
                numbers[i], made = made, made + 1
        for segment in unet.segments:
            self.segments.append(replace(segment, reads=tuple(numbers[i] for i in segment.reads)))
            numbers.append(made)
            made += 1
