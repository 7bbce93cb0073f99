"""`dreambooth-ms evaluate`: the same prompts and noise through the base and the adapted model -> sheet and figures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.atomic import check_writable
from dreambooth_ms.cli.device import found_adapters, load_with_weights, open_base, set_up
from dreambooth_ms.cli.output import tell, with_progress
from dreambooth_ms.cli.sample import read_prompts
from dreambooth_ms.config.commands import EvaluateConfig
from dreambooth_ms.data.pictures import open_picture
from dreambooth_ms.data.records import photographs_in
from dreambooth_ms.evaluation import Drawn, Embedder, Measure, load_clip_embedder, load_dino_embedder, measures
from dreambooth_ms.formats.folder_layout import write_json
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.picture_file import Row, write_sheet
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import ModelBundle, open_bundle
from dreambooth_ms.weights.hub import find_clip, find_encoder, find_model

PURPOSE = "evaluation"
SHEET, METRICS = "before_after.png", "metrics.json"
SHOWN = 6
"""Pictures of each kind on the sheet."""
PHOTOGRAPHS = {"instance_data_dir": "photographs", "held_out_data_dir": "held out", "other_data_dir": "other subject"}
"""Flags that name folders with photographs, and what their rows on the sheet are called."""
SUMMARY = {"subject_similarity": "CLIP-I", "class_drift": "class drift, CLIP", "class_subject_similarity": "PRES, CLIP"}
"""Figures that stand at the top of the file, and which measures they are."""

Pictures = list[np.ndarray]


def run(argv: Sequence[str]) -> int:
    """Compare base and adapted model by a command line; returns the exit status."""
    config = load_with_weights(EvaluateConfig, argv)
    wanted, weights, output = config.comparison, config.weights, Path(config.comparison.output_dir)
    device = set_up(config.device)
    bundle = open_base(weights)
    folders = {flag: own for flag in PHOTOGRAPHS if (own := getattr(wanted, flag))}
    found = photographs_in(folders, wanted.transparent_background, tell).items()
    photographs = {flag: [np.asarray(open_picture(one.path, one.background)) for one in own] for flag, own in found}
    embedders = _load_embedders(config, bundle)
    subject_prompts = read_prompts(wanted.prompt)
    check_writable(output)

    loras, words = found_adapters(weights.lora), found_adapters(weights.embedding)
    tuned = open_bundle(find_model(wanted.tuned)) if wanted.tuned else bundle
    model = SamplingModel(tuned, loras, words=words, mixed_precision=device.mixed_precision)
    for note in model.adapters.notes:
        tell(note)
    of_subject = [prompt for prompt in subject_prompts for _ in range(wanted.num_images_per_prompt)]
    prompts = (*of_subject, *[wanted.class_prompt] * wanted.num_class_images)
    request = SampleRequest.of(wanted, prompts=prompts, num_images_per_prompt=1, purpose=PURPOSE)
    requests = [replace(request, seed=(request.seed + number) % 2**64) for number in range(wanted.num_seeds)]
    # New words are ordinary text to the base.
    of_base = SamplingModel(bundle, mixed_precision=device.mixed_precision) if wanted.tuned else model
    reader = SamplingModel(bundle) if model.adapters.words else of_base
    base = [_pictures(of_base, replace(one, lora_scales=(0.0,)), "before", reader) for one in requests]
    adapted = [_pictures(model, replace(one, lora_scales=(*weights.lora_scale,)), "after", model) for one in requests]

    # CLIP does not know new words.
    unknown = re.compile("|".join(map(re.escape, [*model.adapters.words, *filter(None, [wanted.token])])))
    texts = [" ".join(unknown.sub("", prompt).split()) for prompt in of_subject]
    measured = [one for own in embedders for one in _measure(own, photographs, (base, adapted), texts)]
    by_name = {one.name: asdict(one) for one in measured}
    metrics = {
        side: {key: by_name[name][of_model]["mean"] for key, name in SUMMARY.items()}
        for side, of_model in (("before", "base"), ("after", "adapted"))
    }
    count = len(of_subject)
    rows = [
        *(Row(PHOTOGRAPHS[flag], own[:SHOWN]) for flag, own in photographs.items()),
        Row("base", base[0][:count][:SHOWN]),
        Row("adapted", adapted[0][:count][:SHOWN], prompts[:count][:SHOWN]),
        Row("class, base", base[0][count:][:SHOWN]),
        Row("class,\nadapted", adapted[0][count:][:SHOWN], prompts[count:][:SHOWN]),
    ]
    shown = *(own["subject_similarity"] for own in metrics.values()), metrics["after"]["class_drift"]
    title = "Same prompts, same noise.   subject similarity {:.3f} -> {:.3f}   class drift {:.3f}".format(*shown)
    write_sheet(output / SHEET, title, rows)
    write_json(output / METRICS, {**metrics, "seeds": [one.seed for one in requests], "measures": by_name})
    tell(f"wrote {output / SHEET} and {output / METRICS}")
    print(table(measured))
    return 0


def _load_embedders(config: EvaluateConfig, bundle: ModelBundle) -> list[Embedder]:
    """What measures: DINO if it is named, and CLIP."""
    wanted = config.comparison
    clip = load_clip_embedder(find_clip(wanted.clip, bundle.path, config.weights.pretrained_model_name_or_path))
    if not clip.texts:
        tell("CLIP-T is left out: --clip has no tokenizer")
    return [*([load_dino_embedder(find_encoder(wanted.dino))] if wanted.dino else []), clip]


def _pictures(model: SamplingModel, request: SampleRequest, name: str, reader: SamplingModel) -> Pictures:
    rows = reader.rows(request)
    model.load()
    # The noise that steps draw is that of seed 0, whatever the seed of the noise that pictures start from.
    finished = model.latents(replace(request, seed=0), rows)
    shown = with_progress(finished, len(request.pictures), desc=f"{name}, seed {request.seed}", unit="picture")
    return [model.picture(latents, number) for number, latents in shown]


def _measure(
    embedder: Embedder, photographs: Mapping[str, Pictures], drawn: Sequence[Sequence[Pictures]], texts: Sequence[str]
) -> list[Measure]:
    """What can be measured of pictures of either model: from each seed one by each text, then those of the class."""
    named: list[Any] = [embedder.pictures(photographs[flag]) if flag in photographs else None for flag in PHOTOGRAPHS]
    vectors = ([embedder.pictures(own) for own in of_seeds] for of_seeds in drawn)
    before, after = ([Drawn(own[: len(texts)], own[len(texts) :]) for own in of_seeds] for of_seeds in vectors)
    return measures(embedder.space, before, after, embedder.texts(texts) if embedder.texts else None, *named)


def table(found: Sequence[Measure]) -> str:
    """Measures as text: means of the seeds, with their spread behind ±, in columns."""
    rows: list[tuple[str, ...]] = [("", "better", "base", "adapted", "ceiling", "floor")]
    for one in found:
        bounds = ("-" if bound is None else f"{bound:.3f}" for bound in (one.ceiling, one.floor))
        rows.append((one.name, one.better, str(one.base), str(one.adapted), *bounds))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows)
