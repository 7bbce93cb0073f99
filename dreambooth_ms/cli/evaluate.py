"""`dreambooth-ms evaluate`: the same prompts and noise through the base and the adapted model -> sheet and figures."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dreambooth_ms.atomic import check_writable
from dreambooth_ms.cli.device import open_base, set_up
from dreambooth_ms.cli.output import tell, with_progress
from dreambooth_ms.cli.sample import read_prompts
from dreambooth_ms.config.commands import EvaluateConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.data.pictures import open_picture
from dreambooth_ms.data.records import Source
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.evaluation import load_image_embedder, measure
from dreambooth_ms.formats.folder_layout import write_json
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.picture_file import Row, write_sheet
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.hub import find_adapter, find_clip

PURPOSE = "evaluation"
SHEET, METRICS = "before_after.png", "metrics.json"
SHOWN = 6
"""Pictures of each kind on the sheet."""


def run(argv: Sequence[str]) -> int:
    """Compare base and adapted model by a command line; returns the exit status."""
    config = load(EvaluateConfig, argv, tell)
    wanted, weights, output = config.comparison, config.weights, Path(config.comparison.output_dir)
    device = set_up(config.device)
    bundle = open_base(weights)
    folder, background = Path(wanted.instance_data_dir), wanted.transparent_background
    pictures = Source(folder, wanted.prompt, background=background).records(tell)
    photographs = [np.asarray(open_picture(record.path, background)) for record in pictures]
    if not wanted.clip and not (bundle.path / "clip").is_dir():
        raise ConfigError(
            f"--clip: {weights.pretrained_model_name_or_path} has no CLIP model; name one, such as "
            "openai/clip-vit-base-patch32"
        )
    embed = load_image_embedder(find_clip(wanted.clip) if wanted.clip else bundle.path / "clip")
    subject_prompts = read_prompts(wanted.prompt)
    check_writable(output)

    loras, words = map(find_adapter, weights.lora), map(find_adapter, weights.embedding)
    model = SamplingModel(bundle, [*loras], words=[*words], mixed_precision=device.mixed_precision)
    for note in model.adapters.notes:
        tell(note)
    prompts = (*subject_prompts, *[wanted.class_prompt] * len(subject_prompts))
    request = SampleRequest.of(wanted, prompts=prompts, purpose=PURPOSE)
    # New words are ordinary text to the base.
    reader = SamplingModel(bundle) if model.adapters.words else model
    base = _pictures(model, replace(request, lora_scales=(0.0,)), "before", reader)
    adapted = _pictures(model, replace(request, lora_scales=tuple(weights.lora_scale)), "after", model)
    count = len(subject_prompts) * wanted.num_images_per_prompt
    before, after = (measure(embed, photographs, own[:count], own[count:], base[count:]) for own in (base, adapted))
    captions = list(request.pictures.values())
    rows = [
        Row("photographs", photographs[:SHOWN]),
        Row("base", base[:count][:SHOWN]),
        Row("adapted", adapted[:count][:SHOWN], captions[:count][:SHOWN]),
        Row("class, base", base[count:][:SHOWN]),
        Row("class,\nadapted", adapted[count:][:SHOWN], captions[count:][:SHOWN]),
    ]
    title = (
        f"Same prompts, same noise.   subject similarity {before.subject_similarity:.3f} -> "
        f"{after.subject_similarity:.3f}   class drift {after.class_drift:.3f}"
    )
    write_sheet(output / SHEET, title, rows)
    write_json(output / METRICS, {"before": vars(before), "after": vars(after)})
    tell(f"wrote {output / SHEET} and {output / METRICS}")
    for name, value in vars(before).items():
        print(f"{name.replace('_', ' '):26} {value:.3f} -> {vars(after)[name]:.3f}")
    return 0


def _pictures(model: SamplingModel, request: SampleRequest, name: str, reader: SamplingModel) -> list[np.ndarray]:
    rows = reader.rows(request)
    model.load()
    # The noise that steps draw is that of seed 0, whatever the seed of the noise that pictures start from.
    finished = model.latents(replace(request, seed=0), rows)
    shown = with_progress(finished, len(request.pictures), desc=name, unit="picture")
    return [model.picture(latents, number) for number, latents in shown]
