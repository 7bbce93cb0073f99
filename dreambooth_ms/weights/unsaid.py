"""What a single file does not say of its model, so that its readers take the published model's."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dreambooth_ms.errors import UserError
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.folder_configs import folder_configs
from dreambooth_ms.formats.folder_layout import SCHEDULER
from dreambooth_ms.formats.model_config import NETWORK_READERS, Config, read_scheduler_config
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.infer import infer_model
from dreambooth_ms.formats.naming.plan import unwrapped
from dreambooth_ms.models.specs import PLAYGROUND_25_VAE
from dreambooth_ms.weights.opened_model import LATENT_STATISTICS, ZERO_SNR, OpenedModel


def unsaid(
    model: OpenedModel, form: Format, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Config], tuple[str, ...]]:
    """What readers of a file in a format, with these tensors and nothing else, would take otherwise of the model.

    Returns:
        Its configurations that are not told by the file, by their paths in a folder; and the keys of them that matter,
        each behind its part.
    """
    read = infer_model({unwrapped(name): one.shape for name, one in tensors.items()}, form, model.spec.family)
    if tensors.keys() >= set(LATENT_STATISTICS):
        vae = replace(model.spec.vae, scaling_factor=PLAYGROUND_25_VAE.scaling_factor)
        read = replace(read, vae=replace(vae, norm_num_groups=read.vae.norm_num_groups))
    guessed = folder_configs(read, model.parts, model.assumed_prediction, ZERO_SNR in tensors)
    readers = {f"{part}/config.json": NETWORK_READERS[part] for part in model.parts}
    readers |= {SCHEDULER: read_scheduler_config} if model.scheduler() else {}
    kept: dict[str, Config] = {}
    keys: list[str] = []
    for name, reader in readers.items():
        own, other = model.configuration(name), guessed[name]
        differing = _differing(reader, own, other) if _settings(own) != _settings(other) else []
        # Schedulers have a class, and settings that no spec holds.
        if differing or (name == SCHEDULER and own != other):
            kept[name] = own
        keys += [f"{name.partition('/')[0]} {key}" for key in differing]
    return kept, tuple(keys)


def _differing(read: Callable[[Config], Any], own: Config, guessed: Config) -> list[str]:
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
