"""A base model with its adapters, ready to draw what it is asked for again and again."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from dreambooth_ms.adapters.attach import AttachedAdapters, attach
from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.adapters.precision import compute_in
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.text import PromptTokenizer, encode_prompts
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.models.clip import TextEncoders
from dreambooth_ms.runtime.device import compute_dtype
from dreambooth_ms.sampling.autoencoder import PictureEncoder
from dreambooth_ms.sampling.pipeline import BatchStep, Rows, Sampler, starting_noise
from dreambooth_ms.sampling.schedulers import check_formulation
from dreambooth_ms.sampling.settings import Drawn, DrawRequest, OnStep, SamplingSettings, StepReport, Stopped
from dreambooth_ms.sampling.start_picture import fitted, fitted_size
from dreambooth_ms.weights.bundle import ModelBundle

TEXT_ROWS = 2
"""Prompts encoded at a time, always as many, so that the text encoders are compiled once."""


class SamplingModel:
    """Draws pictures with one base and its adapters. Networks are loaded when they are first needed.

    Args:
        folder: the base.
        adapters: files or folders of LoRAs, of any format. Their scales belong to a request.
        keep_text_encoders: keep the text encoders in memory, for prompts to come; otherwise they are loaded, and
            compiled, again for them.
        mixed_precision: what the UNet computes in, as `ops.compute_dtype` takes it; text encoders and autoencoder are
            float32.

    Raises:
        WeightError: an adapter is none, or is for another base.
    """

    def __init__(
        self,
        folder: ModelBundle,
        adapters: Sequence[str | Path] = (),
        keep_text_encoders: bool = False,
        mixed_precision: str | None = None,
    ) -> None:
        self.folder = folder
        self.adapters = tuple(str(path) for path in adapters)
        models = [folder.opened().spec] if adapters else []
        self._opened = [open_adapter(Path(path), models, folder.path).adapter for path in adapters]
        self._mixed_precision = mixed_precision
        self._text = _PromptReader(self, keep_text_encoders)
        self._sampler: Sampler | None = None
        self._encoder: PictureEncoder | None = None
        self._layers = AttachedAdapters()

    def draw(
        self, request: DrawRequest, on_step: OnStep | None = None, stopped: Stopped | None = None
    ) -> Iterator[Drawn]:
        """The pictures of a request, as soon as their batch is done.

        A picture depends on its own number, prompt and seed, not on the size of its batch.

        Args:
            request: what to draw.
            on_step: called after every step.
            stopped: asked before every step; see `Stopped`.

        Raises:
            ConfigError: the request asks for what this model cannot do.
            WeightError: the size does not fit the networks, or values come out that are no numbers.
        """
        rows = self.rows(request)
        for number, latents in self.latents(request, rows, on_step=on_step, stopped=stopped):
            yield self.drawn(request, number, latents)

    def rows(self, request: DrawRequest) -> Rows:
        """The rows of a request: prompts encoded, noise drawn, and the picture that it starts from in latents."""
        self._check(request)
        height, width = self.size(request)
        shape = self.folder.latent_shape(height, width)
        prompts = repeated(request)
        texts = self.embeddings(request)
        start = None
        if request.image is not None:
            encoder = self._picture_encoder()
            start = np.stack(list(encoder.latents(fitted(request.image, height, width), request.seed, len(prompts))))
        return Rows(
            noise=starting_noise(len(prompts), shape, request.seed, request.purpose),
            prompts=[texts[prompt] for prompt in prompts],
            negative=texts[request.negative_prompt],
            start=start,
            sizes=request.sizes,
            seed=request.seed,
        )

    def latents(
        self,
        request: DrawRequest,
        rows: Rows,
        stage: str = "base",
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        on_step: OnStep | None = None,
        stopped: Stopped | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Number and latents (C, h, w) of each row; with a share of the noise's range, before it or after it only."""
        settings = SamplingSettings(
            scheduler=request.scheduler,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            batch_size=min(request.batch_size, len(rows.noise)),
            guidance_rescale=request.guidance_rescale,
            strength=None if rows.start is None else request.strength,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
        )
        reported = _reporting(on_step, len(rows.noise), stage)
        return self._ready(request).latents(rows, reported, stopped, settings)

    def drawn(self, request: DrawRequest, number: int, latents: np.ndarray) -> Drawn:
        """The picture of finished latents."""
        picture = self._ready(request).decoder.picture(latents, number, request.whole_up_to)
        prompt = repeated(request)[number]
        return Drawn(number, prompt, picture, self.picture_settings(request, prompt, number))

    def size(self, request: DrawRequest) -> tuple[int, int]:
        """(height, width) of the pictures of a request, in pixels."""
        side = self.folder.picture_size
        if request.image is None:
            return request.height or side, request.width or side
        return fitted_size(request.image, request.height, request.width, side, self.folder.side_multiple)

    def embeddings(self, request: DrawRequest) -> dict[str, PromptText]:
        """The prompts of a request, encoded, and the empty one as it stands for "no negative prompt"."""
        return self._text.read(request)

    def release(self) -> None:
        """Give back the memory of all networks; they are loaded again when they are needed."""
        self._sampler, self._encoder, self._layers = None, None, AttachedAdapters()
        self._text.release()
        gc.collect()

    def scales(self, request: DrawRequest) -> tuple[float, ...]:
        """The strength of each adapter."""
        return request.lora_scales if request.lora_scales is not None else (1.0,) * len(self.adapters)

    def put_adapters(self, networks: Mapping[str, nn.Cell]) -> AttachedAdapters:
        """Put the adapters on some of the networks."""
        return attach(networks, self._opened)

    @property
    def adapts_text(self) -> bool:
        """Whether an adapter changes how prompts are read."""
        return any(adapter.parts.keys() - {"unet"} for adapter in self._opened)

    def picture_settings(self, request: DrawRequest, prompt: str, number: int) -> dict[str, Any]:
        """What makes a picture again, as plain values."""
        height, width = self.size(request)
        left_out = {"prompts", "image", "sizes", "purpose", "lora_scales", "height", "width"}
        own = {one.name: getattr(request, one.name) for one in fields(request) if one.name not in left_out}
        if request.image is None:
            del own["strength"]
        if self.folder.num_add_time_ids:
            own |= vars(request.sizes)
        base = {"pretrained_model_name_or_path": str(self.folder.path), "lora": list(self.adapters)}
        scales = {"lora_scale": list(self.scales(request))}
        return {**base, **scales, **own, "prompt": prompt, "number": number, "height": height, "width": width}

    def _check(self, request: DrawRequest) -> None:
        if len(self.scales(request)) not in (1, len(self.adapters)) and self.adapters:
            raise ConfigError(
                f"--lora_scale: expected one number, or one for each of {len(self.adapters)} adapters, "
                f"got {len(self.scales(request))}"
            )
        check_formulation(request.scheduler, self.folder.scheduler_config)
        if request.image is not None and int(request.num_inference_steps * request.strength) < 1:
            raise ConfigError(
                f"--strength {request.strength}: of {request.num_inference_steps} steps none is left; raise "
                "--strength or --num_inference_steps"
            )

    def _ready(self, request: DrawRequest) -> Sampler:
        """What draws, with the adapters at the request's strength."""
        if self._sampler is None:
            unet = self.folder.load_unet()
            self._layers = self.put_adapters({"unet": unet})
            compute_in(unet, compute_dtype(self._mixed_precision))
            settings = SamplingSettings(request.scheduler, request.num_inference_steps, request.guidance_scale, 1)
            self._sampler = Sampler(unet, self.folder.load_vae(encodes=False), self.folder.scheduler_config, settings)
        self._layers.set_scales(self.scales(request))
        return self._sampler

    def _picture_encoder(self) -> PictureEncoder:
        if self._encoder is None:
            self._encoder = PictureEncoder(self.folder.load_vae(decodes=False))
        return self._encoder


class _PromptReader:
    """The text encoders of a model, with its adapters, and the prompts that they have read."""

    def __init__(self, model: SamplingModel, keep: bool) -> None:
        self._model, self._keep = model, keep
        self._tokenizer: PromptTokenizer | None = None
        self._encoders: TextEncoders | None = None
        self._by_clip_skip: dict[int, TextEncoders] = {}
        self._layers = AttachedAdapters()
        self._known: dict[tuple[Any, ...], dict[str, PromptText]] = {}

    def read(self, request: DrawRequest) -> dict[str, PromptText]:
        """Prompts, negative prompt and the empty prompt, encoded."""
        folder = self._model.folder
        if self._tokenizer is None:
            pooled = folder.text_spec_2
            self._tokenizer = PromptTokenizer(
                *folder.tokenizer_paths, pooled_at=pooled.eos_token_id if pooled else None
            )
        wanted = {*request.prompts, request.negative_prompt, ""}
        pieces = self._tokenizer.num_pieces(sorted(wanted)) if request.support_long_prompts else 1
        # Without adapters of text, their scales make no difference.
        scales = self._model.scales(request) if self._model.adapts_text else ()
        known = self._known.setdefault((pieces, request.clip_skip, scales), {})
        missing = sorted(wanted - known.keys())
        if missing:
            encoders = self._ready(request.clip_skip, scales)
            known |= encode_prompts(self._tokenizer, encoders, missing, TEXT_ROWS, pieces)
            if "" in missing and folder.zeros_for_empty_prompt:
                known[""] = PromptText(*map(np.zeros_like, known[""]))
            if not self._keep:
                self.release()
        return {prompt: known[prompt] for prompt in wanted}

    def release(self) -> None:
        """Give back the memory of the networks; what was read stays."""
        self._encoders, self._by_clip_skip, self._layers = None, {}, AttachedAdapters()
        gc.collect()

    def _ready(self, clip_skip: int, scales: Sequence[float]) -> TextEncoders:
        if self._encoders is None:
            self._encoders = self._model.folder.load_text_encoders()
            self._layers = self._model.put_adapters(self._encoders.networks())
        self._layers.set_scales(scales)
        if clip_skip not in self._by_clip_skip:
            self._by_clip_skip[clip_skip] = self._encoders.with_clip_skip(clip_skip)
        return self._by_clip_skip[clip_skip]


def repeated(request: DrawRequest) -> list[str]:
    """The prompt of each picture of a request."""
    return [prompt for prompt in request.prompts for _ in range(request.num_images_per_prompt)]


def _reporting(on_step: OnStep | None, total: int, stage: str) -> BatchStep | None:
    if on_step is None:
        return None
    return lambda step, steps, rows, latents: on_step(StepReport(step, steps, rows, total, stage, latents))
