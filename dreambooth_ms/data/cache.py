"""Posterior parameters and text embeddings, computed once and kept on disk by the content they came from.

A key is a digest of everything that decides the value: the picture's bytes, the crop, the network's weights. So a
cache can't go stale: another picture, base or size has another key.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.config.choices import Interpolation
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.pictures import open_picture, resize_and_crop, to_array
from dreambooth_ms.data.plan import View
from dreambooth_ms.errors import DataError, WeightError
from dreambooth_ms.formats.tensor_file import read_tensors, write_tensors

Encode = Callable[[np.ndarray], np.ndarray]


class ContentCache:
    """Arrays in a folder, one file per key. A damaged file counts as absent and is made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> np.ndarray | None:
        """The array of this key, if there is one."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            return read_tensors(path)[0]["value"]
        except (WeightError, KeyError):
            return None

    def put(self, key: str, value: np.ndarray) -> None:
        """Keep an array under this key."""
        write_tensors(self._path(key), {"value": value})

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def content_key(**parts: Any) -> str:
    """A digest of named values, the same for the same values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def cached_posteriors(
    cache: ContentCache,
    views: Sequence[View],
    encoder_digest: str,
    resolution: int,
    interpolation: Interpolation,
    load_encoder: Callable[[], Encode],
    progress: Callable[[Sequence[View]], Any],
) -> dict[View, np.ndarray]:
    """Mean and log-variance (2, C, h, w) of every view's posterior.

    Args:
        cache: where they are looked up and kept.
        views: what to encode.
        encoder_digest: identifies the autoencoder's weights.
        resolution: side of the squares, in pixels.
        interpolation: filter used to resize.
        load_encoder: called only if something is missing; gives pictures (1, 3, H, W) -> (2, C, h, w).
        progress: wraps the loop over what is missing.

    Raises:
        DataError: a picture gives values that are no numbers.
    """
    keys = {
        view: content_key(
            picture=view.record.digest,
            crop=view.crop,
            flip=view.flip,
            encoder=encoder_digest,
            resolution=resolution,
            interpolation=interpolation,
        )
        for view in views
    }
    found = {view: value for view, key in keys.items() if (value := cache.get(key)) is not None}
    missing = [view for view in views if view not in found]
    if not missing:
        return found
    encode = load_encoder()
    for view in progress(missing):
        square = resize_and_crop(open_picture(view.record.path), resolution, interpolation, view.crop, view.flip)
        value = encode(to_array(square).transpose(2, 0, 1)[None])
        flaw = _flaw(value)
        if flaw:
            raise DataError(
                f"{view.record.path}: the autoencoder gave {flaw}; give a sound one with "
                "--pretrained_vae_model_name_or_path (for SDXL madebyollin/sdxl-vae-fp16-fix), or remove the picture"
            )
        cache.put(keys[view], value)
        found[view] = value
    return found


def _flaw(posterior: np.ndarray) -> str | None:
    """What is wrong with mean and log-variance (2, C, h, w), if anything is."""
    if not np.isfinite(posterior).all():
        return "values that are no numbers"
    if not posterior[0].any():
        return "nothing but zeros, which is black"
    return None


def cached_embeddings(
    cache: ContentCache,
    prompts: Sequence[str],
    encoder_digest: str,
    encode: Callable[[Sequence[str]], dict[str, PromptText]],
) -> dict[str, PromptText]:
    """What the UNet reads of every prompt; `encode` is called only if one is missing."""
    parts = PromptText._fields
    keys = {
        prompt: [content_key(prompt=prompt, encoder=encoder_digest, part=part) for part in parts] for prompt in prompts
    }
    found = {}
    for prompt, its_keys in keys.items():
        values = [value for key in its_keys if (value := cache.get(key)) is not None]
        if len(values) == len(parts):
            found[prompt] = PromptText(*values)
    missing = [prompt for prompt in keys if prompt not in found]
    if missing:
        embeddings = encode(missing)
        for prompt in missing:
            for key, value in zip(keys[prompt], embeddings[prompt], strict=True):
                cache.put(key, value)
            found[prompt] = embeddings[prompt]
    return found
