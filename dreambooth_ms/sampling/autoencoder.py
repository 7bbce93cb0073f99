"""The autoencoder at the two ends of sampling: latents of a picture to start from, pictures of the latents drawn.

One picture passes at a time, so that the memory it takes does not grow with the batch. Shapes: C, h, w of the latents.
"""

from collections.abc import Iterator

import numpy as np
from mindspore import Tensor

from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.vae import AutoencoderKL, VaeDecoder, VaeEncoder
from dreambooth_ms.randomness import standard_normal

PURPOSE = "latents of the picture to start from"

OVERLAP = 4
"""Tiles overlap by one part in so many of their side, as in diffusers."""


class PictureDecoder:
    """Latents -> pictures, whole or, above a size, in tiles that overlap."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.spec = vae.spec
        self._decoder = VaeDecoder(vae)

    def picture(self, latents: np.ndarray, number: int, tile_size: int | None = None) -> np.ndarray:
        """The picture (H, W, 3) uint8 of latents (C, h, w) as the diffusion has them.

        Args:
            latents: of the picture.
            number: of the picture, for errors.
            tile_size: side in pixels of the tiles that a larger picture is decoded in. Their norms see only the tile,
                so the picture is not quite the same; where they overlap they fade into each other.

        Raises:
            WeightError: values come out that are no numbers, which a viewer would show as black.
        """
        decoded = self._decoded(self.spec.unscaled(latents), tile_size)
        if not np.isfinite(decoded).all():
            raise WeightError(
                f"picture {number} came out as values that are no numbers; check the base's weights and the "
                "adapter's, or give another autoencoder with --pretrained_vae_model_name_or_path"
            )
        return to_picture(decoded)

    def _decoded(self, latents: np.ndarray, tile_size: int | None) -> np.ndarray:
        """(C, h, w) -> (3, H, W)."""
        _, height, width = latents.shape
        tile = max(height, width) if tile_size is None else tile_size // self.spec.downsampling
        if max(height, width) <= tile:
            return self._decoded_whole(latents)
        factor = self.spec.downsampling
        total = np.zeros((3, height * factor, width * factor), np.float32)
        weight = np.zeros((1, height * factor, width * factor), np.float32)
        for top, bottom in tile_spans(height, tile):
            for left, right in tile_spans(width, tile):
                fade = np.outer(_fade((bottom - top) * factor), _fade((right - left) * factor))
                area = np.s_[:, top * factor : bottom * factor, left * factor : right * factor]
                total[area] += self._decoded_whole(latents[:, top:bottom, left:right]) * fade
                weight[area] += fade
        return total / weight

    def _decoded_whole(self, latents: np.ndarray) -> np.ndarray:
        return self._decoder(Tensor(np.ascontiguousarray(latents)[None])).asnumpy()[0]


class PictureEncoder:
    """Pictures -> latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.spec = vae.spec
        self._encoder = VaeEncoder(vae)

    def latents(self, picture_3HW: np.ndarray, seed: int, rows: int) -> Iterator[np.ndarray]:
        """Latents (C, h, w) as the diffusion has them, drawn from the picture's posterior once for each row.

        Args:
            picture_3HW: float32 in [-1, 1].
            seed: of the draws, each of which is a function of it and of the row's number.
            rows: how many to draw.
        """
        mean, log_variance = (one.asnumpy()[0] for one in self._encoder(Tensor(picture_3HW[None])))
        for row in range(rows):
            draw = standard_normal(mean.shape, seed, PURPOSE, row=row)
            yield self.spec.scaled(mean + np.exp(np.float32(0.5) * log_variance) * draw)


def tile_spans(length: int, tile: int) -> list[tuple[int, int]]:
    """(start, end) of as few tiles of one size as cover a side and overlap by a part in `OVERLAP`, evenly spread."""
    if length <= tile:
        return [(0, length)]
    stride = tile - tile // OVERLAP
    count = -(-(length - tile) // stride) + 1
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def _fade(length: int) -> np.ndarray:
    """Weight of each pixel along a tile's side: 1 in the middle, falling to both ends."""
    ramp = (np.arange(length) + 0.5) / max(1, length // OVERLAP)
    return np.minimum(1, np.minimum(ramp, ramp[::-1])).astype(np.float32)


def to_picture(decoded_3HW: np.ndarray) -> np.ndarray:
    """Decoder output in about [-1, 1] -> (H, W, 3) uint8, cut to the range."""
    levels = np.rint((decoded_3HW.transpose(1, 2, 0) * 0.5 + 0.5) * 255)
    return np.clip(levels, 0, 255).astype(np.uint8)
