"""The prompts of requests, encoded by a model's text encoders with its adapters."""

import gc
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from dreambooth_ms.adapters.attach import AttachedAdapters, attach
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.text import PromptTokenizer, encode_prompts
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.sampling.adapters import ModelAdapters
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import ModelBundle

TEXT_ROWS = 2
"""Prompts encoded at a time, always as many, so that the text encoders are compiled once."""


class PromptReader:
    """Reads prompts, and remembers what it has read.

    Args:
        bundle: the base, whose text encoders are loaded when a prompt is not known.
        adapters: what is put on them.
        keep: keep them in memory, for prompts to come; otherwise they are loaded, and compiled, again for them.
        encoders: networks to be used as they are at the time, in place of the base's; nothing is remembered then.
        known: prompts that are encoded already.
    """

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
        scales = self._adapters.scales(request) if self._adapters.adapt_text else ()
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
