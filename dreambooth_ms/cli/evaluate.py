"""`dreambooth-ms evaluate`: the same prompts and noise through the base and the adapted model -> sheet and figures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dreambooth_ms.atomic import atomic_path, check_writable, write_bytes
from dreambooth_ms.cli.assemble import load_adapted, open_base
from dreambooth_ms.cli.output import tell
from dreambooth_ms.cli.sample import read_prompts
from dreambooth_ms.config.evaluate import EvaluateConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.pictures import find_pictures, open_picture
from dreambooth_ms.evaluation.fidelity import Fidelity, load_image_embedder, measure, metrics_json
from dreambooth_ms.evaluation.sheet import Row, draw_sheet
from dreambooth_ms.sampling.pipeline import Sampler, SamplingSettings, starting_noise

PURPOSE = "evaluation"
SHEET, METRICS = "before_after.png", "metrics.json"
SHOWN = 6
"""Pictures of each kind on the sheet."""


def run(argv: Sequence[str]) -> int:
    """Compare base and adapted model by a command line; returns the exit status."""
    loaded = load(EvaluateConfig, argv)
    for note in loaded.notes:
        tell(note)
    before, after = evaluate(loaded.config)
    for name, value in vars(before).items():
        print(f"{name.replace('_', ' '):26} {value:.3f} -> {vars(after)[name]:.3f}")
    return 0


def evaluate(config: EvaluateConfig) -> tuple[Fidelity, Fidelity]:
    """Write the sheet and the figures into the output folder; returns the figures before and after."""
    wanted = config.comparison
    weights = config.weights
    folder = open_base(
        config.device, weights.pretrained_model_name_or_path, vae=weights.pretrained_vae_model_name_or_path
    )
    photographs = [np.asarray(open_picture(p)) for p in find_pictures(wanted.instance_data_dir).pictures]
    embed = load_image_embedder(Path(wanted.clip) if wanted.clip else folder.path / "clip")
    subject_prompts = [p for p in read_prompts(wanted.prompt) for _ in range(wanted.num_images_per_prompt)]
    output = Path(wanted.output_dir)
    check_writable(output)
    class_prompts = [wanted.class_prompt] * len(subject_prompts)
    prompts = [*subject_prompts, *class_prompts]

    model = load_adapted(folder, weights, prompts, config.device.mixed_precision)
    settings = SamplingSettings(
        wanted.scheduler, wanted.num_inference_steps, wanted.guidance_scale, min(wanted.batch_size, len(prompts))
    )
    sampler = Sampler(model.unet, folder.load_vae(encodes=False), folder.scheduler_config, settings)
    size = folder.picture_size
    noise = starting_noise(len(prompts), folder.latent_shape(size, size), wanted.seed, PURPOSE)

    def pictures(
        scales: Sequence[float], embeddings: dict[str, PromptText], name: str
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        model.adapters.set_scales(scales)
        drawn = sampler.pictures(noise, [embeddings[prompt] for prompt in prompts], embeddings[""])
        kept = list(tqdm(drawn, desc=name, total=len(prompts), unit="picture"))
        return kept[: len(subject_prompts)], kept[len(subject_prompts) :]

    base_subject, base_class = pictures([0.0], model.base_embeddings, "before")
    now_subject, now_class = pictures(weights.lora_scale, model.embeddings, "after")
    before = measure(embed, photographs, base_subject, base_class, base_class)
    after = measure(embed, photographs, now_subject, now_class, base_class)
    rows = [
        Row("photographs", photographs[:SHOWN]),
        Row("base", base_subject[:SHOWN]),
        Row("adapted", now_subject[:SHOWN], subject_prompts[:SHOWN]),
        Row("class, base", base_class[:SHOWN]),
        Row("class,\nadapted", now_class[:SHOWN], class_prompts[:SHOWN]),
    ]
    title = (
        f"Same prompts, same noise.   subject similarity {before.subject_similarity:.3f} -> "
        f"{after.subject_similarity:.3f}   class drift {after.class_drift:.3f}"
    )
    with atomic_path(output / SHEET) as partial:
        draw_sheet(title, rows).save(partial, format="PNG")
    write_bytes(output / METRICS, metrics_json(before, after).encode())
    tell(f"wrote {output / SHEET} and {output / METRICS}")
    return before, after
