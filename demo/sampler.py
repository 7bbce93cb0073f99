"""All that the page uses of the toolkit to sample: one model, loaded and compiled once, and requests to it."""

import math
import time
from collections.abc import Callable, Iterator
from itertools import compress
from typing import Any

import numpy as np
from PIL import Image

from demo.messages import ModelChoice, Phase, Picture, PictureRequest, Side, Start, Step
from dreambooth_ms.cli.device import described, open_base, set_up
from dreambooth_ms.config.sample import RefinerConfig, SuperResolutionConfig
from dreambooth_ms.config.shared import BaseModelConfig, DeviceConfig
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.parameter_shapes import text_shapes, unet_shapes
from dreambooth_ms.sampling.model import SamplingModel, sample_enlarged, sample_refined
from dreambooth_ms.sampling.request import Sample, SampleRequest, StepReport
from dreambooth_ms.weights.bundle import ModelBundle

Send = Callable[[Any], None]

PREVIEW_SHARE = 0.2
"""Of the time, for showing the picture as it forms."""
FIRST_STAGE = 0.2
"""Share of the time that a first stage takes, about, before a second one enlarges its pictures."""
PREVIEW_SIDE = 512
"""Larger previews are made smaller before they are sent."""


def keeps_text_encoders(base: ModelBundle) -> bool:
    """Whether they stay in memory for prompts to come: not where they take more than the UNet, as T5 does in DeepFloyd
    IF, which is read again for each new prompt."""
    of_text = (math.prod(shape) for one in base.text for shape in text_shapes(one.spec).values())
    return sum(of_text) <= sum(map(math.prod, unet_shapes(base.denoiser.spec).values()))


class Sampler:
    """Samples with one model.

    Args:
        model: the base, its adapters, and the refiner if there is one.
        send: takes what there is to say.
        job: which job it is loaded for.

    Raises:
        WeightError: no model, or no adapter for it.
    """

    def __init__(self, model: ModelChoice, send: Send, job: int) -> None:
        send(Phase(job, "Loading the model"))
        send(Phase(job, f"Loading the model, to compute {described(set_up(DeviceConfig()))}"))
        base = _open(model.base)
        self._model = SamplingModel(
            base, model.loras, words=model.embeddings, keep_text_encoders=keeps_text_encoders(base)
        )
        self._refiner = SamplingModel(_open(model.refiner), keep_text_encoders=True) if model.refiner else None
        self._compiled: set[tuple[object, ...]] = set()

    def sample(self, asked: Start, send: Send, cancelled: Callable[[], bool]) -> bool:
        """Sample what is asked for and send every step and picture; False if it was cancelled.

        Raises:
            ConfigError: the request asks for what this model cannot do.
            WeightError: the size does not fit, or NaN comes out.
        """
        request = asked.request
        self._model.bundle.latent_shape(request.height, request.width)
        compiled = request.width, request.height, request.guidance_scale > 1, request.image is None
        if compiled not in self._compiled:
            send(Phase(asked.job, "Compiling for this size, which is done once"))
        for side in request.sides:
            enlarges = self._refiner is not None and self._refiner.bundle.enlarges
            base_share = FIRST_STAGE if enlarges else request.refiner_start
            steps = _StepSender(asked.job, request, side, self._preview, send, base_share)
            for sample in self._samples(request, self._sample_request(request, side), steps, cancelled):
                send(Picture(asked.job, sample.number, side, sample.picture, self._settings(sample)))
            if cancelled():
                return False
        self._compiled.add(compiled)
        return True

    def _samples(
        self,
        request: PictureRequest,
        sample_request: SampleRequest,
        steps: "_StepSender",
        cancelled: Callable[[], bool],
    ) -> Iterator[Sample]:
        if self._refiner is None or request.model.refiner is None:
            return self._model.sample(sample_request, steps, cancelled)
        if self._refiner.bundle.enlarges:
            wanted = SuperResolutionConfig(super_resolution=request.model.refiner)
            return sample_enlarged(self._model, self._refiner, sample_request, wanted, steps, cancelled, release=False)
        refinement = RefinerConfig(denoising_end=request.refiner_start)
        return sample_refined(self._model, self._refiner, sample_request, refinement, steps, cancelled, release=False)

    def _sample_request(self, request: PictureRequest, side: Side) -> SampleRequest:
        wanted = dict(zip(request.model.loras, request.lora_scales, strict=True)) if side == "adapted" else {}
        return SampleRequest.of(
            request,
            prompts=(request.prompt,),
            num_images_per_prompt=request.count,
            # One at a time: any number of pictures is sampled by what was compiled for the first.
            batch_size=1,
            image=None if request.image is None else Image.fromarray(request.image),
            mask=None if request.mask is None else Image.fromarray(request.mask),
            lora_scales=tuple(wanted.get(path, 0.0) for path in self._model.adapters.paths),
        )

    def _preview(self, report: StepReport) -> np.ndarray | None:
        """The picture as it is after a step; None where it cannot be shown yet."""
        model = self._refiner if report.stage != "base" and self._refiner else self._model
        try:
            picture = Image.fromarray(model.picture(report.latents[0], report.rows.start))
        except WeightError:
            return None
        picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        return np.asarray(picture)

    @staticmethod
    def _settings(sample: Sample) -> dict[str, Any]:
        """What makes a picture again, without the adapters that had no part in it."""
        settings, names = dict(sample.settings), ("lora", "lora_scale", "lora_hashes")
        used = [bool(scale) for scale in settings["lora_scale"]]
        return settings | {name: [*compress(settings[name], used)] for name in names}


class _StepSender:
    """Called after every step: says how far the request is, and shows the picture as often as there is time for.

    Args:
        job: whose steps they are.
        request: the whole request.
        side: the part of it that is being sampled.
        preview: gives the picture after a step.
        send: takes the steps.
        base_share: of the time that the base takes, about, if another model goes on from its pictures.
    """

    def __init__(
        self,
        job: int,
        request: PictureRequest,
        side: Side,
        preview: Callable[[StepReport], np.ndarray | None],
        send: Send,
        base_share: float,
    ) -> None:
        self._job, self._request, self._side, self._base_share = job, request, side, base_share
        self._preview, self._send = preview, send
        self._shown = 0
        self._next_preview = 0.0

    def __call__(self, report: StepReport) -> None:
        self._send(
            Step(
                job=self._job,
                number=report.rows.start,
                side=self._side,
                stage=report.stage,
                step=report.step,
                steps=report.steps,
                share=self._share(report),
                preview=self._preview_in_time(report) if report.step < report.steps else None,
            )
        )

    def _share(self, report: StepReport) -> float:
        """0 to 1 of the whole request."""
        of_stage = (report.rows.start + report.step / report.steps) / report.total
        if self._request.model.refiner:
            start = self._base_share
            of_stage = start * of_stage if report.stage == "base" else start + (1 - start) * of_stage
        sides = self._request.sides
        return (sides.index(self._side) + of_stage) / len(sides)

    def _preview_in_time(self, report: StepReport) -> np.ndarray | None:
        begun = time.monotonic()
        if begun < self._next_preview:
            return None
        picture = self._preview(report)
        ended = time.monotonic()
        self._shown += 1
        # The first one is compiled: its time says nothing about the next.
        if self._shown > 1:
            self._next_preview = ended + (ended - begun) * (1 / PREVIEW_SHARE - 1)
        return picture


def _open(name_or_path: str) -> ModelBundle:
    return open_base(BaseModelConfig(pretrained_model_name_or_path=name_or_path))
