"""Pictures at the two ends of sampling: the one that image to image starts from, and those of the finished latents.
One passes the autoencoder at a time. Shapes: C, h, w of the latents. Sizes are (height, width)."""

import math
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from mindspore import Tensor
from PIL import Image, ImageOps

from dreambooth_ms.data.pictures import to_array
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.models.vae import AutoencoderKL, BandedDecoder
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.runtime.device import Formulation, formulation
from dreambooth_ms.weights.bundle import Codec

PURPOSE = "latents of the picture to start from"

WHOLE_UP_TO = {Formulation.CPU: 256, Formulation.ASCEND: 2048}
"""Side in pixels of the largest square that is decoded at once. What has more pixels is decoded in bands of rows, which
takes less memory and gives the same picture (`BandedDecoder`)."""


class PictureCodec:
    """Pictures <-> latents by the codec of a model, each half of which is loaded when it is first needed."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def picture(self, latents: np.ndarray, number: int, whole_up_to: int | None = None) -> np.ndarray:
        """The picture (H, W, 3) uint8 of latents (C, h, w) as the diffusion has them, cut to the range of levels.
        `number` is the picture's, for errors; `whole_up_to` is in place of `WHOLE_UP_TO`. Raises WeightError if NaN or
        infinity comes out, which a viewer would show as black."""
        _, height, width = latents.shape
        pixels, (whole, in_bands) = height * width * self._codec.spec.downsampling**2, self.decoders
        latents_1Chw = Tensor(np.ascontiguousarray(self._codec.spec.unscaled(latents))[None])
        if in_bands is None or pixels <= (whole_up_to or WHOLE_UP_TO[formulation()]) ** 2:
            decoded_3HW = whole(latents_1Chw).asnumpy()[0]
        else:
            decoded_3HW = in_bands(latents_1Chw)[0]
        if not np.isfinite(decoded_3HW).all():
            raise WeightError(
                f"picture {number} came out as NaN or infinity; check the base's weights and the adapter's, or give "
                "another autoencoder with --pretrained_vae_model_name_or_path"
            )
        levels = np.rint((decoded_3HW.transpose(1, 2, 0) * 0.5 + 0.5) * 255)
        return np.clip(levels, 0, 255).astype(np.uint8)

    def latents(
        self, picture_3HW: np.ndarray, seed: int, numbers: Iterable[int], purpose: str = PURPOSE
    ) -> Iterator[np.ndarray]:
        """Latents (C, h, w) as the diffusion has them, drawn from the posterior of a picture, float32 in [-1, 1].

        There is a draw for each number, a function of it, of the seed and of the purpose.
        """
        mean, log_variance = (one.asnumpy()[0] for one in self._encoder(Tensor(picture_3HW[None])))
        for number in numbers:
            draw = standard_normal(mean.shape, seed, purpose, row=number)
            yield self._codec.spec.scaled(mean + np.exp(np.float32(0.5) * log_variance) * draw)

    @cached_property
    def decoders(self) -> tuple[CellMethod, BandedDecoder | None]:
        """Of whole pictures, and of pictures in bands of rows, if an autoencoder decodes them."""
        codec = self._codec.load(encodes=False)
        return CellMethod(codec.decode), BandedDecoder(codec) if isinstance(codec, AutoencoderKL) else None

    @cached_property
    def _encoder(self) -> CellMethod:
        return CellMethod(self._codec.load(decodes=False).encode)


def fitted_size(
    image: Image.Image, height: int | None, width: int | None, model_side: int, multiple: int
) -> tuple[int, int]:
    """The size to sample at: what is asked for; what is not follows from the picture's shape, in multiples of a number.

    Without either, the area is the one that the model was trained at, whatever the size of the picture.
    """

    def nearest(side: float) -> int:
        return max(multiple, round(side / multiple) * multiple)

    ratio = image.width / image.height
    if height is None:
        height = nearest(width / ratio if width else model_side / math.sqrt(ratio))
        width = width or nearest(model_side * math.sqrt(ratio))
    return height, width or nearest(height * ratio)


def fitted(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The middle of a picture at this size: (3, H, W) float32 in [-1, 1]."""
    cropped = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(to_array(cropped).transpose(2, 0, 1))
