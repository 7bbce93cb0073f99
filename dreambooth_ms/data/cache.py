"""Posterior parameters and text embeddings, computed once and kept on disk by the content they came from. A key is a
digest of everything that decides the value (the picture's bytes, the crop, the network's weights), so that a cache
can't go stale. Values are looked up when a batch is made."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from dreambooth_ms.config.choices import Interpolation
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.holes import masked
from dreambooth_ms.data.pictures import open_picture, resize_and_crop, to_array
from dreambooth_ms.data.plan import View
from dreambooth_ms.errors import DataError, WeightError
from dreambooth_ms.formats.files.open import read_tensors, write_tensors
from dreambooth_ms.runtime.ascend import is_simulated

BYTES_IN_MEMORY = 64 * 2**20
"""512 posteriors at SD 1.5's size. A step computes for longer than it takes to read its rows again."""

Item = TypeVar("Item")
Value = TypeVar("Value")


class ContentCache:
    """Arrays in a folder, one file per key, of which those asked for last stay in memory, too. A damaged file counts as
    absent and is made again."""

    def __init__(self, folder: Path, bytes_in_memory: int = BYTES_IN_MEMORY) -> None:
        self.folder, self._limit = folder, bytes_in_memory
        self._recent: OrderedDict[str, np.ndarray] = OrderedDict()
        self._bytes = 0

    def has_file(self, key: str) -> bool:
        """Whether there is a file of this key; it is not read."""
        return self._path(key).is_file()

    def get(self, key: str) -> np.ndarray | None:
        """The array of this key, if there is one. It is shared: not to be written to."""
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        if not self.has_file(key):  # Of a file that is not there, the message would look for its like in thousands.
            return None
        try:
            value = read_tensors(self._path(key))[0]["value"]
        except (WeightError, KeyError):
            return None
        self._recent[key] = value
        self._bytes += value.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._recent.popitem(last=False)[1].nbytes
        return value

    def put(self, key: str, value: np.ndarray) -> None:
        """Keep an array under this key, on disk."""
        write_tensors(self._path(key), {"value": value})

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def content_key(**parts: Any) -> str:
    """A digest of named values, the same for the same values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Lookup(Generic[Item, Value]):
    """Item -> value, from the cache. What is missing is made, best in advance and at once by `prepare`."""

    cache: ContentCache
    keys: Callable[[Item], tuple[str, ...]]
    """Of the arrays that a value has."""
    make: Callable[[Sequence[Item]], Iterable[tuple[Item, Sequence[np.ndarray]]]]
    """Each item, in any order, with its arrays."""
    value: Callable[..., Value]
    """Arrays -> value."""

    def __call__(self, item: Item) -> Value:
        """The value of an item; made again if its file is damaged or gone."""
        arrays: Sequence[np.ndarray | None] = [self.cache.get(key) for key in self.keys(item)]
        if any(array is None for array in arrays):
            arrays = dict(self._made([item]))[item]
        return self.value(*arrays)

    def missing(self, items: Iterable[Item]) -> list[Item]:
        """Those that have no file, each value once. Files are looked at, not read; only what is missing is held."""
        keyed = ((self.keys(item), item) for item in items)
        return list({keys: item for keys, item in keyed if not all(map(self.cache.has_file, keys))}.values())

    def prepare(self, items: Iterable[Item]) -> None:
        """Make what is missing of these."""
        missing = self.missing(items)
        for _ in self._made(missing) if missing else ():
            pass

    def _made(self, items: Sequence[Item]) -> Iterator[tuple[Item, Sequence[np.ndarray]]]:
        for item, arrays in self.make(items):
            for key, array in zip(self.keys(item), arrays, strict=True):
                self.cache.put(key, array)
            yield item, arrays


def posterior_lookup(
    cache: ContentCache,
    encoder_digest: str,
    interpolation: Interpolation,
    load_encoder: Callable[[], Callable[[np.ndarray], np.ndarray]],
    progress: Callable[[Sequence[View]], Iterable[View]],
) -> Lookup[View, np.ndarray]:
    """View -> mean and log-variance (2, C, h, w) of its posterior; of one with a hole, of the masked picture.
    `encoder_digest` identifies the autoencoder's weights; `load_encoder` is called only if something is missing, and
    gives pictures (1, 3, H, W) -> (2, C, h, w); `progress` wraps the loop over what is missing. What it gives raises
    DataError of a picture that is encoded to NaN, infinity or black."""

    def keys(view: View) -> tuple[str]:
        frame = view.frame
        key = content_key(
            picture=view.record.digest,
            frame=(frame.size, frame.resized, frame.top, frame.left, frame.place),
            flip=view.flip,
            encoder=encoder_digest,
            interpolation=interpolation,
            **({"hole": view.hole} if view.hole else {}),
        )
        return (key,)

    def make(views: Sequence[View]) -> Iterator[tuple[View, tuple[np.ndarray]]]:
        encode = load_encoder()
        for view in progress(views):
            crop = resize_and_crop(
                open_picture(view.record.path, view.record.background), view.frame, interpolation, view.flip
            )
            pixels = to_array(crop).transpose(2, 0, 1)
            value = encode((masked(pixels, view.hole.mask(crop.size)) if view.hole else pixels)[None])
            flaw = "" if value[0].any() or is_simulated() else "nothing but zeros, which is black"
            flaw = flaw if np.isfinite(value).all() else "NaN or infinity"
            if flaw:
                raise DataError(
                    f"{view.record.path}: the autoencoder gave {flaw}; give a sound one with --pretrained_vae_model_"
                    "name_or_path (for SDXL madebyollin/sdxl-vae-fp16-fix), or remove the picture"
                )
            yield view, (value,)

    return Lookup(cache, keys, make, lambda posterior: posterior)


def embedding_lookup(
    cache: ContentCache, encoder_digest: str, encode: Callable[[Sequence[str]], Iterable[tuple[str, PromptText]]]
) -> Lookup[str, PromptText]:
    """Prompt -> what the UNet reads of it; `encode` gives it beside each prompt, if one is missing."""

    def keys(prompt: str) -> tuple[str, ...]:
        return tuple(content_key(prompt=prompt, encoder=encoder_digest, part=part) for part in PromptText._fields)

    return Lookup(cache, keys, encode, PromptText)
