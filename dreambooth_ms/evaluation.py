"""How well a subject was learnt and what its class lost by it, measured with CLIP's image tower.

Shapes: N pictures, E width of CLIP's space.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor
from PIL import Image

from dreambooth_ms.formats.folder_layout import read_json
from dreambooth_ms.formats.model_config import read_config, read_image_statistics
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.weights.bundle import load_clip


@dataclass(frozen=True)
class Fidelity:
    """Figures of one set of pictures."""

    subject_similarity: float
    """Mean cosine between pictures of the subject's prompts and photographs of the subject (DreamBooth's CLIP-I)."""
    class_drift: float
    """1 - mean cosine between pictures of the class prompt and the base's from the same noise; 0 for the base."""
    class_subject_similarity: float
    """Mean cosine between pictures of the class prompt and photographs of the subject: rises if the class forgets."""


def load_image_embedder(clip_folder: Path, batch_size: int = 16) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    """A function from pictures (H, W, 3) uint8 of any size to unit vectors (N, E)."""
    clip = load_clip(clip_folder)
    encoder = CellMethod(clip.encode_image)
    size = clip.spec.vision.image_size
    preprocessing = clip_folder / "preprocessor_config.json"
    statistics = read_config(preprocessing, read_json(preprocessing), read_image_statistics)
    mean, std = (np.array(values, np.float32) for values in statistics)

    def embed(pictures: Sequence[np.ndarray]) -> np.ndarray:
        pixels = np.stack([(_square(picture, size) / np.float32(255) - mean) / std for picture in pictures])
        pixels_N3HW = pixels.transpose(0, 3, 1, 2).astype(np.float32)
        # The last batch is filled up with the first pictures.
        rows = np.resize(np.arange(len(pictures)), (-(-len(pictures) // batch_size), batch_size))
        vectors = [encoder(Tensor(pixels_N3HW[batch], ms.float32)).asnumpy() for batch in rows]
        return np.concatenate(vectors)[: len(pictures)]

    return embed


def measure(
    embed: Callable[[Sequence[np.ndarray]], np.ndarray],
    photographs: Sequence[np.ndarray],
    subject_pictures: Sequence[np.ndarray],
    class_pictures: Sequence[np.ndarray],
    base_class_pictures: Sequence[np.ndarray],
) -> Fidelity:
    """The figures of one model; every argument but the first is pictures (H, W, 3) uint8."""
    photograph_NE, subject_NE = embed(photographs), embed(subject_pictures)
    class_NE, base_class_NE = embed(class_pictures), embed(base_class_pictures)
    return Fidelity(
        subject_similarity=float((subject_NE @ photograph_NE.T).mean()),
        class_drift=float(1 - (class_NE * base_class_NE).sum(1).mean()),
        class_subject_similarity=float((class_NE @ photograph_NE.T).mean()),
    )


def _square(picture: np.ndarray, size: int) -> np.ndarray:
    """The picture's central square, resized as CLIP's own preprocessing does (bicubic)."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(picture[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.float32)
