"""How well a subject was learnt and what its class lost by it, as DreamBooth's authors measure it (Ruiz et al., 2023,
section 4): pictures and texts as vectors of length 1, and measures of these.

Shapes: N, M pictures or texts, K photographs, D width of a space.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn
from PIL import Image

from dreambooth_ms.data.pictures import frame_of, resize_and_crop
from dreambooth_ms.formats.clip_tokenizer import SIZE, ClipTokenizer, tokenizer_on_board
from dreambooth_ms.formats.folder_layout import read_json
from dreambooth_ms.formats.model_config import read_config, read_image_statistics
from dreambooth_ms.models.clip import CLIPModel, end_positions
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.models.vit import ViTModel
from dreambooth_ms.weights.bundle import load_encoder

BATCH = 16
"""Pictures or texts embedded at a time, always as many, so that an encoder is compiled once."""


@dataclass(frozen=True)
class Embedder:
    """What makes vectors (N, D) of pictures (H, W, 3) uint8 of any size, and of texts if it reads any."""

    space: str
    """"DINO" or "CLIP"."""
    pictures: Callable[[Sequence[np.ndarray]], np.ndarray]
    texts: Callable[[Sequence[str]], np.ndarray] | None = None


def load_clip_embedder(folder: Path) -> Embedder:
    """CLIP's (Radford et al., 2021) from a folder in transformers' layout, a model's own or another; WeightError if it
    holds none. Texts are read by the tokenizer on board if it has as many tokens, else by one in the folder or beside
    it."""
    clip = load_encoder(folder, CLIPModel)
    spec, size, texts = clip.spec.text, clip.spec.vision.image_size, None
    places = [tokenizer_on_board()] if spec.vocab_size == SIZE else [folder, folder.parent / "tokenizer"]
    if found := [one for one in places if (one / "tokenizer_config.json").exists()]:
        tokenizer = ClipTokenizer(found[0], spec.max_position_embeddings, spec.vocab_size)
        texts = partial(_embed_texts, CellMethod(clip.encode_text), tokenizer, spec.eos_token_id)
    return Embedder("CLIP", _picture_embedder(folder, clip, size, size), texts)


def load_dino_embedder(folder: Path) -> Embedder:
    """The same of DINO's vision transformer (Caron et al., 2021): its class token. Pictures are cut as in the authors'
    own evaluation (`eval_knn.py`): at 224 px the middle of one of 256."""
    vit = load_encoder(folder, ViTModel)
    size = vit.spec.image_size
    return Embedder("DINO", _picture_embedder(folder, vit, size, size * 8 // 7))


def _picture_embedder(folder: Path, network: nn.Cell, size: int, shorter_side: int) -> Callable[..., np.ndarray]:
    """Pictures resized to a shorter side, cut in the middle and normalised -> vectors."""
    file, encoder = folder / "preprocessor_config.json", CellMethod(network.encode_image)
    mean, deviation = np.array(read_config(file, read_json(file), read_image_statistics), np.float32)

    def embed(pictures: Sequence[np.ndarray]) -> np.ndarray:
        crops_NHW3 = np.stack([middle(picture, shorter_side, size) for picture in pictures])
        pixels_NHW3 = (crops_NHW3 / np.float32(255) - mean) / deviation
        return _in_batches(encoder, pixels_NHW3.transpose(0, 3, 1, 2))

    return embed


def _embed_texts(encoder: nn.Cell, tokenizer: ClipTokenizer, eos_token_id: int, texts: Sequence[str]) -> np.ndarray:
    ids_NS = np.concatenate([tokenizer.pieces(text, 1) for text in texts])
    return _in_batches(encoder, ids_NS, end_positions(ids_NS, eos_token_id))


def _in_batches(encoder: nn.Cell, *inputs: np.ndarray) -> np.ndarray:
    """What an encoder makes of N rows. The last batch is filled up with the first rows."""
    count = len(inputs[0])
    batches = np.resize(np.arange(count), (-(-count // BATCH), BATCH))
    vectors = [encoder(*(Tensor(one[batch]) for one in inputs)).asnumpy() for batch in batches]
    return np.concatenate(vectors)[:count]


def middle(picture: np.ndarray, shorter_side: int, size: int) -> np.ndarray:
    """A picture (H, W, 3) uint8 resized (bicubic) to a shorter side, and the square of `size` in its middle."""
    image, margin = Image.fromarray(picture), (shorter_side - size) // 2
    square = resize_and_crop(image, frame_of(image.size, (shorter_side, shorter_side)), "bicubic")
    return np.asarray(square.crop((margin, margin, margin + size, margin + size)))


def similarity(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Mean cosine over all pairs of one of each: DreamBooth's DINO, CLIP-I and PRES."""
    return float((x_ND @ y_MD.T).mean())


def similarity_among(x_ND: np.ndarray) -> float:
    """Mean cosine over all pairs of two different ones, of two or more."""
    products, count = x_ND @ x_ND.T, len(x_ND)
    return float((products.sum() - np.trace(products)) / (count * (count - 1)))


def similarity_in_turn(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
    """Mean cosine of each with the one at its place: DreamBooth's CLIP-T, of pictures and their prompts."""
    return float((x_ND * y_ND).sum(1).mean())


def drift(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
    """1 - mean cosine of each with the one at its place; 0, not -0, of the same."""
    return max(0.0, 1 - similarity_in_turn(x_ND, y_ND))


class Drawn(NamedTuple):
    """What a model drew from one seed: by the subject's prompts, and by the class prompt, two or more."""

    subject_ND: np.ndarray
    class_MD: np.ndarray


@dataclass(frozen=True)
class Figure:
    """A figure of a model: for each seed, their mean and, of several, their standard deviation (unbiased)."""

    mean: float
    spread: float | None
    seeds: tuple[float, ...]

    @classmethod
    def of(cls, seeds: Iterable[float]) -> "Figure":
        """From what it is for each seed."""
        own = tuple(seeds)
        return cls(float(np.mean(own)), float(np.std(own, ddof=1)) if len(own) > 1 else None, own)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.spread is None else f" ± {self.spread:.3f}")


@dataclass(frozen=True)
class Measure:
    """What is measured of base and adapted model, and what photographs of this and of another subject have."""

    name: str
    better: str
    """"higher" or "lower"."""
    base: Figure
    adapted: Figure
    ceiling: float | None = None
    floor: float | None = None


def measures(
    space: str,
    base: Sequence[Drawn],
    adapted: Sequence[Drawn],
    texts_ND: np.ndarray | None,
    given_KD: np.ndarray,
    held_out_KD: np.ndarray | None = None,
    other_KD: np.ndarray | None = None,
) -> list[Measure]:
    """What can be measured in a space, "DINO" or "CLIP", of what two models drew from the same seeds, by the prompts of
    the subject's pictures and photographs: of the subject, others that are held out, and another's. A single photograph
    of the subject has no ceiling.

    DINO or CLIP-I   subject fidelity: similarity to photographs of the subject, those given or those held out
    CLIP-T           prompt fidelity: similarity of each picture to its prompt
    PRES             similarity of pictures of the class to the photographs given
    DIV              1 - similarity of pictures of the class among each other: CADS' mean similarity score (Sadat et
                     al., 2024), turned round. The paper's is the mean LPIPS of such pairs, by a network of its own
    class drift      1 - similarity of pictures of the class to those of the base from the same noise
    """

    def of(name: str, better: str, figure: Callable[[Drawn, Drawn], float], *bounds: float | None) -> Measure:
        return Measure(name, better, Figure.of(map(figure, base, base)), Figure.of(map(figure, adapted, base)), *bounds)

    def fidelity(kind: str, to_KD: np.ndarray, ceiling: float | None) -> Measure:
        name = f"CLIP-I{kind}" if space == "CLIP" else f"{space}{kind}"
        floor = None if other_KD is None else similarity(other_KD, to_KD)
        return of(name, "higher", lambda own, _: similarity(own.subject_ND, to_KD), ceiling, floor)

    found = [fidelity("", given_KD, similarity_among(given_KD) if len(given_KD) > 1 else None)]
    if held_out_KD is not None:
        found.append(fidelity(", held out", held_out_KD, similarity(given_KD, held_out_KD)))
    if texts_ND is not None:
        found.append(of("CLIP-T", "higher", lambda own, _: similarity_in_turn(own.subject_ND, texts_ND)))
    return [
        *found,
        of(f"PRES, {space}", "lower", lambda own, _: similarity(own.class_MD, given_KD)),
        of(f"DIV, {space}", "higher", lambda own, _: 1 - similarity_among(own.class_MD)),
        of(f"class drift, {space}", "lower", lambda own, old: drift(own.class_MD, old.class_MD)),
    ]
