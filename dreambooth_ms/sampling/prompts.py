"""The adapters of a model that is sampled with, and the prompts of requests, encoded with them."""

import gc
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dreambooth_ms.adapters.attach import AttachedAdapters, attach
from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.adapters.word_files import joined_words
from dreambooth_ms.data.conditioning import PromptText, PromptTokenizer, encode_prompts
from dreambooth_ms.errors import ConfigError, WeightError, count_of
from dreambooth_ms.formats.files.safetensors_file import LORA_HASHES
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import ModelBundle


class ModelAdapters:
    """Adapters of any format, read at once, to be put on the networks of their base as these are loaded; and new words,
    theirs and those of `embeddings`. `schedule` is what they were trained with, where the base has it otherwise,
    `hashes` are what other programs know them by, or empty, and `notes` are for the user. Raises WeightError if an
    adapter is none or for another base, or a word has several meanings."""

    def __init__(self, bundle: ModelBundle, paths: Sequence[str | Path], embeddings: Sequence[str | Path] = ()) -> None:
        self.paths, self.embeddings = (tuple(map(str, own)) for own in (paths, embeddings))
        named = self.paths + self.embeddings
        models = [bundle.opened().spec] if named else []
        opened = [open_adapter(Path(path), models, bundle.path) for path in named]
        found = [one.adapter for one in opened]
        self.opened = found[: len(self.paths)]
        self.hashes = tuple(one.metadata.get(LORA_HASHES[0], "") for one in opened[: len(self.paths)])
        self.schedule: dict[str, Any] = {}
        self.notes: list[str] = []
        for one in opened:
            if one.adapter.parts:
                changes, notes = bundle.schedule.as_marked(one.metadata, one.path)
                self.schedule |= changes
                self.notes += notes
        self.words = joined_words(dict(zip(named, found, strict=True)))
        self.words_alone = dict(zip(self.embeddings, (own.words for own in found[len(paths) :]), strict=True))
        """Those of each embedding."""
        if layers := [path for path, own in zip(named, found, strict=True) if own.parts and path not in self.paths]:
            raise WeightError(f"--embedding {layers[0]}: changes layers, too; name it with --lora")

    def scales(self, request: SampleRequest) -> tuple[float, ...]:
        """The strength of each adapter, or one number for all; ConfigError if the request has another number."""
        scales = (1.0,) * len(self.paths) if request.lora_scales is None else request.lora_scales
        if len(scales) not in (1, len(self.paths)) and self.paths:
            raise ConfigError(
                f"--lora_scale: expected one number, or one for each of {count_of(len(self.paths), 'adapter')}, "
                f"got {len(scales)}"
            )
        return scales


TEXT_ROWS = 2
"""Prompts encoded at a time, always as many, so that the text encoders are compiled once."""


class PromptReader:
    """Reads prompts, and remembers what it has read, but by networks that are lent; the arguments are those of
    `SamplingModel`."""

    def __init__(
        self,
        bundle: ModelBundle,
        adapters: ModelAdapters,
        keep: bool,
        encoders: TextEncoders | None,
        known: Mapping[str, PromptText],
    ) -> None:
        self._bundle, self._adapters, self._keep = bundle, adapters, keep
        self._lent = self._encoders = encoders
        self._attached = AttachedAdapters()
        self._known: dict[tuple[Any, ...], dict[str, PromptText]] = {(1, bundle.clip_skip, ()): dict(known)}

    def read(self, request: SampleRequest) -> dict[str, PromptText]:
        """Its prompts, its negative prompt, and the empty one as it stands for "no negative prompt", encoded."""
        wanted = {*request.prompts, request.negative_prompt, ""}
        pieces = self._tokenizer.num_pieces(wanted) if request.support_long_prompts else 1
        # Without adapters of text, their scales make no difference.
        adapts_text = any(adapter.parts.keys() - {"unet"} for adapter in self._adapters.opened)
        scales = self._adapters.scales(request) if adapts_text else ()
        known = {} if self._lent else self._known.setdefault((pieces, request.clip_skip, scales), {})
        missing = wanted - known.keys()
        if missing:
            if self._encoders is None:
                self._encoders = self._bundle.load_text_encoders()
                self._attached = attach(self._encoders.networks(), self._adapters.opened)
            if request.clip_skip != self._encoders.clip_skip:
                self._encoders = self._encoders.with_clip_skip(request.clip_skip)
            self._attached.set_scales(scales)
            zeros = self._bundle.zeros_for_empty_prompt
            known |= encode_prompts(self._tokenizer, self._encoders, missing, TEXT_ROWS, pieces, zeros)
            if not self._keep:
                self.release()
        return {prompt: known[prompt] for prompt in wanted}

    def release(self) -> None:
        """Give back the memory of the networks that it loaded; what was read stays."""
        if not self._lent:
            self._encoders, self._attached = None, AttachedAdapters()
            gc.collect()

    @cached_property
    def _tokenizer(self) -> PromptTokenizer:
        return PromptTokenizer(self._bundle.text)
