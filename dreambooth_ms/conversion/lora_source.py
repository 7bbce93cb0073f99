"""A LoRA that is converted or inspected: for the base that is named, a published one, or the one it was trained on."""

import os
from pathlib import Path

from dreambooth_ms.adapters.file import PEFT_CONFIG, OpenedAdapter, open_adapter
from dreambooth_ms.config.sources import Setting, read_file
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.folder_layout import read_json
from dreambooth_ms.models.specs import PUBLISHED_MODELS, ModelSpec
from dreambooth_ms.weights.opened_model import open_model

RUN_CONFIG = "config.yaml"
"""The configuration of a run, beside what it writes."""


def open_lora(path: Path, base: str | None) -> OpenedAdapter:
    """Open a LoRA; `base` is the model that it is for, None if that is published or what trained it says it.

    Raises:
        WeightError: as `open_adapter`; or the base cannot be opened.
    """
    if base:
        return open_adapter(path, [open_model(Path(base)).spec], base)
    models: tuple[ModelSpec, ...] = PUBLISHED_MODELS
    said, otherwise = trained_base(path), "if its base has sizes of its own, name it with --base"
    if said and os.path.exists(said):
        models = tuple(dict.fromkeys((*models, open_model(Path(said)).spec)))
    elif said:
        otherwise = f"its own base, {said}, is not on this machine; name one of the same sizes with --base"
    return open_adapter(path, models, otherwise=otherwise)


def trained_base(path: Path) -> str | None:
    """The base of an adapter's file or folder, a path or the name on a hub: of the run that it is of, or PEFT's."""
    folder = path if os.path.isdir(path) else path.parent
    if os.path.isfile(folder / RUN_CONFIG):
        settings = read_file(Setting("config", str(folder / RUN_CONFIG)), TrainConfig)
        said = next((one.value for one in settings if one.name == "pretrained_model_name_or_path"), None)
    else:
        try:
            said = read_json(folder / PEFT_CONFIG).get("base_model_name_or_path")
        except WeightError:
            return None
    return said if said and isinstance(said, str) else None
