"""What a single file does not say of its model, so that its readers take the published model's."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dreambooth_ms.errors import UserError
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.folder_configs import folder_configs
from dreambooth_ms.formats.folder_layout import SCHEDULER
from dreambooth_ms.formats.model_config import NETWORK_READERS, Config, is_edm, read_scheduler_config
from dreambooth_ms.formats.naming import mindone
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.infer import infer_model
from dreambooth_ms.models.specs import PLAYGROUND_25_VAE
from dreambooth_ms.weights.opened_model import LATENT_STATISTICS, ZERO_SNR, OpenedModel


@dataclass(frozen=True)
class Unsaid:
    """Configurations of a model that the names, shapes and marks of a file do not tell."""

    configurations: Mapping[str, Config] = field(default_factory=dict)
    """By their paths in a folder."""
    settings: tuple[str, ...] = ()
    """Which of their keys matter, each behind its part."""


def unsaid(model: OpenedModel, form: Format, tensors: Mapping[str, StoredTensor]) -> Unsaid:
    """What readers of a file in a format, with these tensors and nothing else, would take otherwise of the model."""
    shapes = {mindone.clean(name): tensor.shape for name, tensor in tensors.items()}
    read = infer_model(shapes, form, model.spec.family)
    if tensors.keys() >= set(LATENT_STATISTICS):
        own = {name: getattr(model.spec.vae, name) for name in ("latents_mean", "latents_std")}
        read = replace(read, vae=replace(read.vae, scaling_factor=PLAYGROUND_25_VAE.scaling_factor, **own))
    guessed = folder_configs(read, model.parts, model.assumed_prediction, ZERO_SNR in tensors)
    found = {f"{part}/config.json": list(_differences(part, model, guessed)) for part in model.parts}
    kept = {name: model.configuration(name) for name, keys in found.items() if keys}
    settings = [key for keys in found.values() for key in keys]
    scheduler = model.scheduler()
    if scheduler and _without_bookkeeping(scheduler) != _without_bookkeeping(guessed[SCHEDULER]):
        kept[SCHEDULER] = scheduler
        settings += _scheduler_differences(scheduler, guessed[SCHEDULER])
    return Unsaid(kept, tuple(settings))


def _differences(part: str, model: OpenedModel, guessed: Mapping[str, Config]) -> Iterator[str]:
    name = f"{part}/config.json"
    return _differing(part, NETWORK_READERS[part], model.configuration(name), guessed[name])


def _scheduler_differences(own: Config, guessed: Config) -> Iterator[str]:
    if is_edm(own) and is_edm(guessed):
        return
    yield from _differing("scheduler", read_scheduler_config, own, guessed)
    spacings = [config.get("timestep_spacing", "leading") for config in (own, guessed)]
    if spacings[0] != spacings[1]:
        yield "scheduler timestep_spacing"


def _differing(part: str, read: Callable[[Config], Any], own: Config, guessed: Config) -> Iterator[str]:
    if _without_bookkeeping(own) == _without_bookkeeping(guessed):
        return
    try:
        one, other = (_flat(read(config)) for config in (own, guessed))
    except (UserError, KeyError):
        yield f"{part} config.json"
    else:
        # The number of the end token is told by the vocabulary; old configurations say 2.
        yield from (f"{part} {key}" for key in one if one[key] != other[key] and key != "eos_token_id")


def _flat(spec: Any) -> dict[str, Any]:
    values = dict(vars(spec))
    return values | vars(values.pop("transformer")) if "transformer" in values else values


def _without_bookkeeping(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}
