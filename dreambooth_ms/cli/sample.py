"""`dreambooth-ms sample`: base model, adapters and prompts -> PNG files."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.atomic import check_writable
from dreambooth_ms.cli.device import found_adapters, load_with_weights, open_base, set_up
from dreambooth_ms.cli.output import progress, tell
from dreambooth_ms.config.sample import SD_XL_BASE_RATIOS, SampleConfig
from dreambooth_ms.config.shared import BaseModelConfig
from dreambooth_ms.data.pictures import open_picture, read_picture
from dreambooth_ms.errors import ConfigError, DataError, count_of, near, show_names
from dreambooth_ms.sampling.model import SamplingModel, sample_enlarged, sample_refined
from dreambooth_ms.sampling.picture_file import first_free_number, grid, write_picture
from dreambooth_ms.sampling.picture_text import PictureText, read_picture_text
from dreambooth_ms.sampling.request import Sample, SampleRequest, StepReport


def run(argv: Sequence[str]) -> int:
    """Sample the pictures of a command line; returns the exit status."""
    repeated: list[PictureText] = []

    def read_like(path: str) -> Mapping[str, Any]:
        repeated.append(read_picture_text(Path(path)))
        for note in repeated[-1].notes:
            tell(f"--like {path}: {note}")
        return repeated[-1].values

    config = load_with_weights(SampleConfig, argv, read_like)
    weights, output = config.weights, Path(config.pictures.output_dir)
    request = request_of(config, read_prompts(config.pictures.prompt))
    if repeated:
        numbers = range(repeated[-1].number, repeated[-1].number + len(request.pictures))
        request = replace(request, numbers=tuple(numbers), purpose=repeated[-1].purpose, fills_batch=True)
    device = set_up(config.device)
    bundle = open_base(weights).with_schedule(config.timesteps.changes)
    if bundle.inpaints and request.mask is None:
        raise ConfigError(
            f"--mask: missing; {bundle.path} inpaints: name a picture with --image, and with --mask one of its size "
            "that is white where it is drawn anew"
        )
    loras, words = found_adapters(weights.lora), found_adapters(weights.embedding)
    model = SamplingModel(bundle, loras, words=words, mixed_precision=device.mixed_precision)
    for path, own in model.adapters.words_alone.items():
        if not any(word in prompt for word in own for prompt in (*request.prompts, request.negative_prompt)):
            tell(f"--embedding {path}: no prompt holds {show_names([*own])}")
    bundle.latent_shape(*model.size(request))  # An impossible size ends here, before any work.
    enlargement, second = config.enlargement, config.refinement.refiner or config.enlargement.super_resolution
    if second is not None:
        opened = open_base(BaseModelConfig(pretrained_model_name_or_path=second, variant=weights.variant))
        on_it = enlargement.super_resolution_lora if enlargement.super_resolution else ()
        follower = SamplingModel(opened, found_adapters(on_it), mixed_precision=device.mixed_precision)
    for note in (*model.adapters.notes, *(follower.adapters.notes if second else ())):
        tell(note)
    check_writable(output)

    with progress(total=0, desc="sampling", unit="step") as bar:

        def show(report: StepReport) -> None:
            if report.step == 1 and report.rows.start == 0:
                bar.total += -(-report.total // request.batch_size) * report.steps
                doing = {"refiner": "refining", "second stage": "enlarging"}
                bar.set_description(doing.get(report.stage, "sampling"))
            bar.update()

        if second is None:
            samples = model.sample(request, show)
        elif enlargement.super_resolution:
            samples = sample_enlarged(model, follower, request, enlargement, show)
        else:
            samples = sample_refined(model, follower, request, config.refinement, show)
        written = _write_pictures(replace(config, device=device), samples)
    names = " to ".join(dict.fromkeys((written[0].name, written[-1].name)))
    tell(f"wrote {count_of(len(written), 'picture')} to {output}, {names}")
    return 0


def request_of(config: SampleConfig, prompts: Sequence[str]) -> SampleRequest:
    """What a configuration asks for. Raises DataError if the picture to start from is none."""
    wanted, start = config.pictures, config.start
    width, height = SD_XL_BASE_RATIOS.get(wanted.sd_xl_base_ratios or "", (wanted.width, wanted.height))
    opened = read_picture(start.image, start.transparent_background) if start.image else None
    for note in opened.notes if opened else ():
        tell(f"{start.image}: {note}")
    return SampleRequest.of(
        wanted,
        prompts=tuple(prompts),
        num_images_per_prompt=config.num_images_per_prompt,
        height=height,
        width=width,
        image=opened.picture if opened else None,
        mask=open_picture(start.mask, "black").convert("L") if start.mask else None,
        strength=start.strength or (1.0 if start.mask else SampleRequest.strength),
        lora_scales=tuple(config.weights.lora_scale) if config.weights.lora else None,
        sizes=config.sizes,
        noise_level=config.enlargement.noise_level,
        whole_up_to=wanted.vae_whole_up_to,
    )


def read_prompts(text_or_path: str, flag: str = "--prompt") -> list[str]:
    """The prompt itself, or the lines of the text file that it names. Raises DataError if that is missing, not UTF-8
    text, or has no line with a prompt."""
    # Of os.path, because that of pathlib raises on what is too long for a name.
    path = os.path.expanduser(text_or_path)
    if not os.path.isfile(path):
        if text_or_path.endswith(".txt"):
            raise DataError(f"{flag} {text_or_path}: no such file{near(text_or_path)}")
        return [text_or_path]
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{flag} {text_or_path}: not readable as UTF-8 text ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{flag} {text_or_path}: the file holds no prompt; write one per line")
    return prompts


def _write_pictures(config: SampleConfig, samples: Iterable[Sample]) -> list[Path]:
    """Write pictures as files numbered on from what is there, and the sheet of each prompt after its last picture."""
    wanted, per_prompt = config.pictures, config.num_images_per_prompt
    folder, columns = Path(wanted.output_dir), wanted.num_cols or (1 if wanted.num_rows else None)
    inputs = {name: getattr(config.start, name) for name in ("image", "mask", "transparent_background")}
    inputs |= {"mixed_precision": config.device.mixed_precision, **vars(config.weights)}
    first, written, sheet = first_free_number(folder), list[Path](), list[np.ndarray]()
    for sample in samples:
        number, settings = first + len(written), {**sample.settings, **inputs}
        written.append(folder / f"{number:05d}.png")
        write_picture(written[-1], sample.picture, settings)
        sheet.append(sample.picture)
        if len(sheet) == per_prompt:
            if columns:
                path = folder / f"grid-{number + 1 - per_prompt:05d}.png"
                of_sheet = {"num_rows": per_prompt // columns, "num_cols": columns}
                of_sheet["number"] = sample.number + 1 - per_prompt
                write_picture(path, grid(sheet, columns), settings | of_sheet)
            sheet = []
    return written
