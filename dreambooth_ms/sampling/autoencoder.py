"""The autoencoder at the two ends of sampling: latents of a picture to start from, pictures of the finished latents.

One picture passes at a time, so that the memory it takes does not grow with the batch. Shapes: C, h, w of the latents.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from mindspore import Tensor

from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.models.vae import AutoencoderKL
from dreambooth_ms.models.vae_bands import BandedDecoder
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.runtime.device import Formulation, formulation

PURPOSE = "latents of the picture to start from"

WHOLE_UP_TO = {Formulation.CPU: 256, Formulation.ASCEND: 2048}
"""Side in pixels of the largest square that is decoded at once. What has more pixels is decoded in bands of rows, which
takes less memory and gives the same picture (`models.vae_bands`)."""


class PictureDecoder:
    """Latents -> pictures, whole or, above a size, in bands of rows."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.spec = vae.spec
        self._decoder, self._banded = CellMethod(vae.decode), BandedDecoder(vae)

    def picture(self, latents: np.ndarray, number: int, whole_up_to: int | None = None) -> np.ndarray:
        """The picture (H, W, 3) uint8 of latents (C, h, w) as the diffusion has them.

        Args:
            latents: of the picture.
            number: of the picture, for errors.
            whole_up_to: side in pixels of the largest square that is decoded at once; None: `WHOLE_UP_TO`.

        Raises:
            WeightError: NaN or infinity comes out, which a viewer would show as black.
        """
        _, height, width = latents.shape
        is_whole = height * width * self.spec.downsampling**2 <= (whole_up_to or WHOLE_UP_TO[formulation()]) ** 2
        latents_1Chw = Tensor(np.ascontiguousarray(self.spec.unscaled(latents))[None])
        decoded = self._decoder(latents_1Chw).asnumpy()[0] if is_whole else self._banded(latents_1Chw)[0]
        if not np.isfinite(decoded).all():
            raise WeightError(
                f"picture {number} came out as NaN or infinity; check the base's weights and the adapter's, or give "
                "another autoencoder with --pretrained_vae_model_name_or_path"
            )
        return to_picture(decoded)


class PictureEncoder:
    """Pictures -> latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.spec = vae.spec
        self._encoder = CellMethod(vae.encode)

    def latents(self, picture_3HW: np.ndarray, seed: int, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """Latents (C, h, w) as the diffusion has them, drawn from the picture's posterior once for each number.

        Args:
            picture_3HW: float32 in [-1, 1].
            seed: of the draws, each of which is a function of it and of its number.
            numbers: of the pictures that start from it.
        """
        mean, log_variance = (one.asnumpy()[0] for one in self._encoder(Tensor(picture_3HW[None])))
        for number in numbers:
            draw = standard_normal(mean.shape, seed, PURPOSE, row=number)
            yield self.spec.scaled(mean + np.exp(np.float32(0.5) * log_variance) * draw)


def to_picture(decoded_3HW: np.ndarray) -> np.ndarray:
    """Decoder output in about [-1, 1] -> (H, W, 3) uint8, cut to the range."""
    levels = np.rint((decoded_3HW.transpose(1, 2, 0) * 0.5 + 0.5) * 255)
    return np.clip(levels, 0, 255).astype(np.uint8)
