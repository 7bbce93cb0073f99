"""What a LoRA says of its training, under the names that other programs look for: kohya's `ss_…` and the Stability
ModelSpec's. No times, no random ids and nothing of the run's folder: what a run writes is the same to the bit,
wherever and however often it was stopped."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dreambooth_ms.atomic import file_digest
from dreambooth_ms.config.train import TrainConfig, words_in
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Source
from dreambooth_ms.models.specs import FAMILIES, Family
from dreambooth_ms.weights.bundle import ModelBundle
from dreambooth_ms.weights.model_writing import model_spec


def run_metadata(
    config: TrainConfig, base: ModelBundle, sources: Sequence[Source], concepts: Sequence[Concept]
) -> dict[str, str]:
    """Of a run of any length on a base, as it is denoised after it. Reads a base that is one file, for its hash."""
    family, rate, skipped = base.opened().spec.family, config.learning_rate, config.method.clip_skip
    held = {one.name: one for one in concepts}
    tags, folders, counts = dict[str, Counter[str]](), dict[str, dict[str, float]](), Counter[str]()
    for source in sources:
        one, folder = held[source.concept.name], source.folder.name
        if not one.drawn_as:  # That has a subject's pictures again.
            counts[one.group] += int(len(one.records) * one.repeats)
        if one.group == INSTANCE:
            captions = ",".join(caption for record in one.records for caption in record.captions)
            tags.setdefault(folder, Counter()).update(tag.strip() for tag in captions.split(",") if tag.strip())
            repeats = int(one.repeats) if one.repeats.denominator == 1 else float(one.repeats)
            folders[folder] = {"n_repeats": repeats, "img_count": len(one.records)}
    values = {
        "sd_model_name": Path(config.model.pretrained_model_name_or_path).name,
        **({"new_sd_model_hash": file_digest(base.path)} if base.path.is_file() else {}),
        **({"base_model_version": FAMILIES[family.value]["kohya"]} if family.value in FAMILIES else {}),
        "v2": family is Family.SD2,
        "resolution": (config.data.resolution, config.data.resolution),
        "num_train_images": counts[INSTANCE],
        "num_reg_images": counts[CLASS],
        "learning_rate": rate,
        "unet_lr": rate,
        "text_encoder_lr": (config.optimiser.text_encoder_lr or rate) if config.encodes_text else None,
        "lr_scheduler": config.optimiser.lr_scheduler,
        "optimizer": config.optimiser.optimizer + "8bit" * config.optimiser.use_8bit_adam,
        "mixed_precision": config.device.mixed_precision or "no",
        "seed": config.run.seed,
        "clip_skip": skipped + 1 if skipped else None,
        "tag_frequency": json.dumps(tags, ensure_ascii=False),
        "dataset_dirs": json.dumps(folders, ensure_ascii=False),
    }
    own = {f"ss_{name}": str(value) for name, value in values.items()}
    return own | (_model_spec(config, base, sources) if family.value in FAMILIES else {})


def _model_spec(config: TrainConfig, base: ModelBundle, sources: Sequence[Source]) -> dict[str, str]:
    """Tags are new words, and the words of the subjects' prompts that the classes' have not, if there are such."""
    schedule, loss, side = base.schedule.config, config.loss, config.data.resolution
    prompts = dict.fromkeys(one.prompt for one in sources if one.concept.group == INSTANCE and one.prompt)
    classes = [one.prompt for one in sources if one.concept.group == CLASS]
    of_class = words_in(" ".join([config.prior.class_prompt or "", *classes]))
    named = [word for word in words_in(" ".join(prompts)) if of_class and word not in of_class]
    phrase = ", ".join(prompts or config.words.words)
    values = {
        "title": phrase,
        "implementation": "diffusers",
        "resolution": f"{side}x{side}",
        "trigger_phrase": phrase,
        "timestep_range": f"{loss.min_timestep},{loss.max_timestep or schedule.get('num_train_timesteps', 1000)}",
        "encoder_layer": str(config.method.clip_skip + 1),
        "tags": ", ".join(dict.fromkeys([*config.words.words, *named])),
    }
    family, predicts = base.opened().spec.family, schedule.get("prediction_type", "epsilon")
    return model_spec(family, predicts, "/lora") | {f"modelspec.{name}": own for name, own in values.items() if own}
