"""What a single file does not say of its model, so that its readers take the published model's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dreambooth_ms.errors import UserError
from dreambooth_ms.formats.files.stored import TensorFile
from dreambooth_ms.formats.folder_layout import SCHEDULER
from dreambooth_ms.formats.model_config import NETWORK_READERS, Config, read_scheduler_config
from dreambooth_ms.weights.opened_model import OpenedModel, model_of


def unsaid(model: OpenedModel, file: TensorFile) -> tuple[dict[str, Config], tuple[str, ...]]:
    """What readers of a file would take otherwise of the model in it.

    Returns:
        Its configurations that are not told by the file, by their paths in a folder; and the keys of them that matter,
        each behind its part.
    """
    read = model_of(file)
    # Where a file does not tell what it predicts, readers are told so.
    read = replace(read, prediction_type=read.prediction_type or model.assumed_prediction)
    kept: dict[str, Config] = {}
    keys: list[str] = []
    for name in model.configuration_names:
        part = name.partition("/")[0]
        own, other = model.configuration(name), read.configuration(name)
        differing = _differing(NETWORK_READERS.get(part, read_scheduler_config), own, other)
        # Schedulers have a class, and settings that no spec holds.
        if differing or (name == SCHEDULER and own != other):
            kept[name] = own
        keys += [f"{part} {key}" for key in differing]
    return kept, tuple(keys)


def _differing(read: Callable[[Config], Any], own: Config, guessed: Config) -> list[str]:
    if _settings(own) == _settings(guessed):
        return []
    try:
        one, other = (_flat(read(config)) for config in (own, guessed))
    except (UserError, KeyError):
        return ["config.json"]
    # The number of the end token is told by the vocabulary; old configurations say 2.
    keys = [key for key in one if one[key] != other[key] and key != "eos_token_id"]
    spacings = [config.get("timestep_spacing", "leading") for config in (own, guessed)]
    return keys if spacings[0] == spacings[1] else [*keys, "timestep_spacing"]


def _flat(spec: Any) -> dict[str, Any]:
    values = dict(vars(spec))
    return values | vars(values.pop("transformer")) if "transformer" in values else values


def _settings(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}
