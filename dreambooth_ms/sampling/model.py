"""A base model, ready to sample what it is asked for again and again; and two models one after the other.

Shapes: N pictures, B of them at a time, C, h, w of the latents.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from dreambooth_ms.adapters.attach import AttachedAdapters, attach
from dreambooth_ms.adapters.precision import compute_in
from dreambooth_ms.config.sample import RefinerConfig, SuperResolutionConfig
from dreambooth_ms.data import second_stage
from dreambooth_ms.data.conditioning import PromptText, add_time_ids, conditioning
from dreambooth_ms.data.holes import beside_noise, masked
from dreambooth_ms.data.second_stage import ENLARGED
from dreambooth_ms.errors import ConfigError, count_of
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.runtime.device import compute_dtype
from dreambooth_ms.sampling.autoencoder import PictureCodec, fitted, fitted_size
from dreambooth_ms.sampling.prompts import ModelAdapters, PromptReader
from dreambooth_ms.sampling.request import STEP_SETTINGS, OnStep, Sample, SampleRequest, StepReport, Stopped
from dreambooth_ms.sampling.schedulers import Denoiser, Trajectory, check_scheduler
from dreambooth_ms.weights.bundle import ModelBundle

REST = "latents of the masked picture"
_MEANING = attrgetter("latent_channels", "downsampling", "scaling_factor", "latents_mean", "latents_std")
"""Of an autoencoder: what decides what latents mean."""


@dataclass(frozen=True)
class Rows:
    """What latents are made of, in the order of a request's pictures."""

    noise: np.ndarray
    """(N, C, h, w) standard normal."""
    prompts: Sequence[PromptText]
    """N encoded prompts."""
    negative: PromptText
    """The encoded negative prompt."""
    start: np.ndarray | None = None
    """Latents (N, C, h, w) of the pictures that they start from."""
    beside: np.ndarray | None = None
    """Channels that a denoiser reads behind noisy latents: (N, 1 + C, h, w) one that inpaints
    (`data.holes.beside_noise`), (N, C, h, w) a second stage (`data.second_stage`)."""
    class_labels: np.ndarray | None = None
    """(N,) of a second stage."""


class SamplingModel:
    """Samples with one base. A picture depends on its own number, prompt and seed, not on the size of its batch.

    Networks are loaded when they are first needed, unless they are lent: those are used as they are, with the weights
    that they have at the time, and nothing is put on them. Raises WeightError if an adapter is none, or is for another
    base.

    Args:
        bundle: the base.
        adapters: files or folders of adapters, of any format. Their scales belong to a request.
        words: files or folders of embeddings of new words.
        keep_text_encoders: in memory, for prompts to come; otherwise they are loaded, and compiled, again.
        mixed_precision: what the UNet computes in, as `compute_dtype` takes it.
        denoiser: lent, in place of the base's UNet.
        text_encoders: lent, in place of the base's.
        embeddings: prompts that the base's text encoders have encoded already.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        adapters: Sequence[str | Path] = (),
        *,
        words: Sequence[str | Path] = (),
        keep_text_encoders: bool = False,
        mixed_precision: str | None = None,
        denoiser: nn.Cell | None = None,
        text_encoders: TextEncoders | None = None,
        embeddings: Mapping[str, PromptText] | None = None,
    ) -> None:
        self.adapters = ModelAdapters(bundle, adapters, words)
        self.bundle = bundle = bundle.with_words(self.adapters.words).with_schedule(self.adapters.schedule)
        self._mixed_precision = mixed_precision
        self._text = PromptReader(bundle, self.adapters, keep_text_encoders, text_encoders, embeddings or {})
        self._lent = self._unet = denoiser
        self._attached, self._codec = AttachedAdapters(), PictureCodec(bundle.codec)
        self._denoisers: dict[tuple[bool, bool], Denoiser] = {}

    def sample(
        self, request: SampleRequest, on_step: OnStep | None = None, stopped: Stopped | None = None
    ) -> Iterator[Sample]:
        """The pictures of a request, as soon as their batch is done. Raises ConfigError if the request asks for what
        this model cannot do, WeightError if the size does not fit the networks, or NaN comes out."""
        for number, picture in _pictures(self, request, self.rows(request), "base", on_step, stopped):
            yield Sample(number, picture, self.picture_settings(request, number))

    def rows(self, request: SampleRequest, texts: Mapping[str, PromptText] | None = None) -> Rows:
        """The rows of a request: prompts encoded, noise drawn, and the picture that it starts from in latents. `texts`:
        the prompts, if another model has encoded them already."""
        self.adapters.scales(request)
        self._check_mask(request)
        steps, strength = request.num_inference_steps, request.strength
        check_scheduler(request.scheduler, self.bundle.schedule.config, steps, self.bundle.predicts_variance)
        if request.image is not None and not self.bundle.enlarges and int(steps * strength) < 1:
            raise ConfigError(
                f"--strength {strength}: of {count_of(steps, 'step')} none is left; raise --strength or "
                "--num_inference_steps"
            )
        height, width = self.size(request)
        shape = self.bundle.latent_shape(height, width)
        if self.bundle.enlarges and request.small is None and request.image is None:
            raise ConfigError(
                f"--image: missing; {self.bundle.path} enlarges pictures: name a small one, or sample with a first "
                "stage and name this model with --super_resolution"
            )
        texts, start, beside, labels = texts or self.embeddings(request), None, None, None
        grey = np.zeros((3, height, width), np.float32)
        picture = grey if request.image is None else fitted(request.image, height, width)
        if self.bundle.enlarges:
            small, level, numbers = self._small(request, height, width), request.noise_level, [*request.pictures]
            schedule = self.bundle.noise_of_small
            beside, labels = second_stage.of_request(small, (height, width), level, schedule, request.seed, numbers)
        # Inpainting all the way begins with noise alone, as in diffusers' pipeline.
        elif request.image is not None and (request.mask is None or strength < 1):
            start = np.stack(list(self._codec.latents(picture, request.seed, request.pictures)))
        if self.bundle.inpaints:
            mask = np.ones((height, width), bool)
            if request.mask is not None:
                mask = fitted(request.mask, height, width)[0] > 0
            rest = self._codec.latents(masked(picture, mask), request.seed, request.pictures, REST)
            beside = np.stack([beside_noise(mask, one) for one in rest])
        return Rows(
            noise=starting_noise(request.pictures, shape, request.seed, request.purpose),
            prompts=[texts[prompt] for prompt in request.pictures.values()],
            negative=texts[request.negative_prompt],
            start=start,
            beside=beside,
            class_labels=labels,
        )

    def latents(
        self,
        request: SampleRequest,
        rows: Rows,
        stage: str = "base",
        on_step: OnStep | None = None,
        stopped: Stopped | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Number and latents (C, h, w) of each picture, as soon as its batch is done; `stage` is of the reports."""
        numbers, total = np.array([*request.pictures]), len(rows.noise)
        size = request.batch_size if request.fills_batch else min(request.batch_size, total)
        for first in range(0, total, size):
            batch = range(first, min(first + size, total))
            filled = np.resize(batch, size)  # All batches have one size; what fills the last one up is not given out.
            start = None if rows.start is None else rows.start[filled]
            trajectory = Trajectory(request, self.bundle.schedule.config, numbers[filled].tolist(), start is not None)
            latents = trajectory.begin(rows.noise[filled], start)
            predict, steps = self._prediction(request, rows, filled), len(trajectory.timesteps)
            for index, timestep in enumerate(trajectory.timesteps):
                if stopped and stopped():
                    return
                prediction = predict(trajectory.inputs(latents, timestep), float(timestep))
                latents = trajectory.step(index, prediction, latents)
                if on_step:
                    on_step(StepReport(index + 1, steps, batch, total, stage, latents.asnumpy()[: len(batch)]))
            yield from zip(numbers[batch].tolist(), latents.asnumpy(), strict=False)

    def picture(self, latents: np.ndarray, number: int, whole_up_to: int | None = None) -> np.ndarray:
        """The picture (H, W, 3) uint8 of latents (C, h, w); see `PictureCodec`."""
        return self._codec.picture(latents, number, whole_up_to)

    def size(self, request: SampleRequest) -> tuple[int, int]:
        """(height, width) of the pictures of a request, in pixels."""
        side = self.bundle.picture_size
        if request.image is None:
            return request.height or side, request.width or side
        return fitted_size(request.image, request.height, request.width, side, self.bundle.side_multiple)

    def embeddings(self, request: SampleRequest) -> dict[str, PromptText]:
        """The prompts of a request, encoded, and the empty one as it stands for "no negative prompt"."""
        return self._text.read(request)

    def picture_settings(self, request: SampleRequest, number: int) -> dict[str, Any]:
        """What makes a picture again, as plain values."""
        height, width = self.size(request)
        own = ("negative_prompt", "num_images_per_prompt", "clip_skip", "support_long_prompts", "whole_up_to")
        rows = request.batch_size if request.fills_batch else min(request.batch_size, len(request.pictures))
        return {
            "pretrained_model_name_or_path": str(self.bundle.path),
            "lora": list(self.adapters.paths),
            "lora_scale": list(self.adapters.scales(request)),
            "lora_hashes": list(self.adapters.hashes),
            "rows": rows,
            "purpose": request.purpose,
            "embedding": list(self.adapters.embeddings),
            **{name: getattr(request, name) for name in own + STEP_SETTINGS},
            **({} if request.image is None else {"strength": request.strength}),
            **({"noise_level": request.noise_level} if self.bundle.enlarges else {}),
            **self.bundle.schedule.changes,
            **(request.sizes.told() if self.bundle.num_add_time_ids else {}),
            **{"prompt": request.pictures[number], "number": number, "height": height, "width": width},
        }

    @property
    def denoiser(self) -> nn.Cell:
        """The network that predicts, with the adapters on it."""
        if self._unet is None:
            self._unet = self.bundle.denoiser.load()
            self._attached = attach({"unet": self._unet}, self.adapters.opened)
            compute_in(self._unet, compute_dtype(self._mixed_precision))
        return self._unet

    def load(self) -> None:
        """Load what denoises and decodes, so that what is wrong with it is said before a step is taken."""
        _ = self.denoiser, self._codec.decoders

    def release(self) -> None:
        """Give back the memory of what it loaded; it is loaded again when it is needed."""
        self._unet, self._attached, self._denoisers = self._lent, AttachedAdapters(), {}
        self._codec = PictureCodec(self.bundle.codec)
        self._text.release()
        gc.collect()

    def _small(self, request: SampleRequest, height: int, width: int) -> np.ndarray:
        """The pictures (N, 3, h, w) that a second stage enlarges to this size."""
        if request.small is not None:
            return request.small
        assert request.image is not None, "rows looks for it"
        small = fitted(request.image, height // ENLARGED, width // ENLARGED)
        return np.repeat(small[None], len(request.pictures), axis=0)

    def _check_mask(self, request: SampleRequest) -> None:
        image, mask = request.image, request.mask
        if mask is None:
            return
        if not self.bundle.inpaints:
            raise ConfigError(
                f"--mask: {self.bundle.path} is no base for inpainting, its UNet takes "
                f"{self.bundle.denoiser.spec.in_channels} channels and not 9; name one that is, or leave out --mask"
            )
        if image is None or image.size != mask.size:
            sizes = ["{}x{}".format(*one.size) if one else "none" for one in (mask, image)]
            raise ConfigError("--mask: {} pixels, its --image {}; give both in the same size".format(*sizes))

    def _prediction(self, request: SampleRequest, rows: Rows, batch: np.ndarray) -> Callable[[Tensor, float], Tensor]:
        """What predicts of the noisy latents (B, C, h, w) of some rows at a timestep, with the adapters' strengths."""
        network, guided = self.denoiser, request.guidance_scale > 1
        self._attached.set_scales(self.adapters.scales(request))
        key = guided, guided and request.guidance_rescale > 0
        if key not in self._denoisers:
            self._denoisers[key] = Denoiser(network, *key, self.bundle.predicts_variance)
        denoiser = self._denoisers[key]
        read = tuple(map(Tensor, self._conditioning(request, rows, batch, guided).values()))
        guidance = Tensor([request.guidance_scale, request.guidance_rescale], ms.float32)
        beside = None if rows.beside is None else Tensor(rows.beside[batch])

        def predict(latents_BChw: Tensor, timestep: float) -> Tensor:
            timesteps_B = Tensor(np.full(len(batch), timestep, np.float32))
            sample = latents_BChw if beside is None else ops.concat((latents_BChw, beside), 1)
            return denoiser(sample, timesteps_B, guidance, *read)

        return predict

    def _conditioning(
        self, request: SampleRequest, rows: Rows, batch: np.ndarray, guided: bool
    ) -> dict[str, np.ndarray]:
        """Prompts and the sizes of their pictures; where it is guided, behind the same of the negative prompt."""
        sizes, factor = request.sizes, self.bundle.codec.spec.downsampling
        height, width = (side * factor for side in rows.noise.shape[2:])
        original = sizes.orig_width or width, sizes.orig_height or height
        target = sizes.target_width or width, sizes.target_height or height
        crop = sizes.crop_coords_top, sizes.crop_coords_left
        scored = [(rows.negative, sizes.negative_aesthetic_score)] * len(batch) if guided else []
        scored += [(rows.prompts[row], sizes.aesthetic_score) for row in batch]
        ids_with = partial(add_time_ids, self.bundle.num_add_time_ids, original, crop, target)
        read = conditioning([prompt for prompt, _ in scored], [ids_with(score) for _, score in scored])
        if rows.class_labels is not None:
            read["class_labels"] = np.tile(rows.class_labels[batch], 1 + guided)
        return read


def sample_refined(
    base: SamplingModel,
    refiner: SamplingModel,
    request: SampleRequest,
    refinement: RefinerConfig,
    on_step: OnStep | None = None,
    stopped: Stopped | None = None,
    release: bool = True,
) -> Iterator[Sample]:
    """The pictures of a request, sampled by SDXL's base and refined (Podell et al., 2023, section 2.5).

    The refiner goes on from the base's latents, with the same prompts; with `release`, the memory of the base's
    networks is given back before. Raises ConfigError if the two have different latents, or one has another noise than
    the scheduler's."""
    if _MEANING(base.bundle.codec.spec) != _MEANING(refiner.bundle.codec.spec):
        raise ConfigError(
            f"--refiner {refiner.bundle.path}: its latents are not those of {base.bundle.path}; give the refiner of "
            "the same family"
        )
    check_scheduler(request.scheduler, refiner.bundle.schedule.config, request.num_inference_steps)
    end = refinement.base_share
    begun = replace(request, denoising_end=end)
    start = _begun(base, begun, base.rows(begun), on_step, stopped, release)
    if start is None:
        return
    height, width = base.size(request)
    own = replace(
        request,
        image=None,
        mask=None,
        strength=refinement.refiner_strength or request.strength,
        denoising_start=end,
        height=height,
        width=width,
        lora_scales=None,
        # Other noise than the one that the base has just taken away.
        purpose=f"{request.purpose}, refined",
    )
    rows = replace(refiner.rows(own), start=start)
    more = {"refiner": str(refiner.bundle.path), "denoising_end": end}
    more |= {"refiner_strength": refinement.refiner_strength} if end is None else {}
    for number, picture in _pictures(refiner, own, rows, "refiner", on_step, stopped):
        yield Sample(number, picture, base.picture_settings(request, number) | more)


def sample_enlarged(
    base: SamplingModel,
    second: SamplingModel,
    request: SampleRequest,
    wanted: SuperResolutionConfig,
    on_step: OnStep | None = None,
    stopped: Stopped | None = None,
    release: bool = True,
) -> Iterator[Sample]:
    """The pictures of a request, sampled by a first stage that denoises pixels and enlarged by a second one, as with
    DeepFloyd IF. Prompts are read by the first one; with `release`, its memory is given back after that. Raises
    ConfigError if the two do not go together."""
    first, last = base.bundle, second.bundle
    if not last.enlarges or first.enlarges or first.codec.spec != last.codec.spec:
        raise ConfigError(
            f"--super_resolution {last.path}: expected a second stage, which enlarges pictures, and {first.path} as a "
            "first one, which samples pixels; give two models as DeepFloyd IF's"
        )
    if first.denoiser.spec.text_width != last.denoiser.spec.text_width:
        raise ConfigError(f"--super_resolution {last.path}: reads text of another width than {first.path}")
    prompt, (height, width) = wanted.super_resolution_prompt, (ENLARGED * side for side in base.size(request))
    own = replace(
        request,
        prompts=(prompt,) * len(request.prompts) if prompt else request.prompts,
        image=None,
        height=height,
        width=width,
        num_inference_steps=wanted.super_resolution_steps,
        guidance_scale=wanted.super_resolution_guidance_scale,
        noise_level=wanted.noise_level,
        lora_scales=None,
        purpose=f"{request.purpose}, enlarged",
    )
    last.latent_shape(height, width)
    second_stage.check_level(wanted.noise_level, last.noise_of_small)
    check_scheduler(own.scheduler, last.schedule.config, own.num_inference_steps, last.predicts_variance)
    # All at once, because the text encoders are loaded anew each time.
    texts = base.embeddings(replace(request, prompts=(*request.prompts, *own.prompts)))
    small = _begun(base, request, base.rows(request, texts), on_step, stopped, release)
    if small is None:
        return
    rows = second.rows(replace(own, small=small), texts)
    more = vars(wanted) | {"super_resolution": str(last.path), "height": height, "width": width}
    for number, picture in _pictures(second, own, rows, "second stage", on_step, stopped):
        yield Sample(number, picture, base.picture_settings(request, number) | more)


def _begun(
    first: SamplingModel,
    request: SampleRequest,
    rows: Rows,
    on_step: OnStep | None,
    stopped: Stopped | None,
    release: bool,
) -> np.ndarray | None:
    """The latents (N, C, h, w) that another model goes on from; None if it was stopped."""
    latents = [own for _, own in first.latents(request, rows, "base", on_step, stopped)]
    if release:
        first.release()
    return np.stack(latents) if len(latents) == len(request.pictures) else None


def _pictures(
    model: SamplingModel,
    request: SampleRequest,
    rows: Rows,
    stage: str,
    on_step: OnStep | None,
    stopped: Stopped | None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Number and picture of what a model makes of rows."""
    model.load()
    for number, latents in model.latents(request, rows, stage, on_step, stopped):
        yield number, model.picture(latents, number, request.whole_up_to)


def starting_noise(numbers: Iterable[int], latent_shape: tuple[int, int, int], seed: int, purpose: str) -> np.ndarray:
    """Standard normal (N, C, h, w); a picture's noise depends on the seed, the purpose and its own number alone."""
    return np.stack([standard_normal(latent_shape, seed, purpose, row=number) for number in numbers])
