"""The model card of what a run has trained: a README.md for people, with data for the hub in front."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING
from hashlib import sha256
from pathlib import Path
from typing import Any

from dreambooth_ms.adapters.file import holds_adapter
from dreambooth_ms.config.choices import read_table
from dreambooth_ms.config.concepts import concept_configs
from dreambooth_ms.config.schema import schema_fields
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.conversion import open_lora
from dreambooth_ms.errors import UserError, WeightError, count_of
from dreambooth_ms.training.checkpoint import Result
from dreambooth_ms.weights.hub import is_hub_name
from dreambooth_ms.weights.opened_model import open_model

_TABLES = read_table(Path(__file__).with_name("model_card.yaml"))
_MARK = re.compile(r"\n<!-- dreambooth-ms wrote this card: (\w{16}) -->\n$")
_TOLD = ("data", "captions", "method", "words", "run", "optimiser", "prior", "loss", "device")
"""Sections of the configuration whose settings a card has, where they differ from the defaults."""


def card_of(repository: str, config: TrainConfig, result: Result, pictures: Mapping[str, str]) -> str:
    """The card as Markdown, without a path of this machine, and the same for the same run. `repository` is its whole
    name; `pictures` are names of pictures in it, and the prompts that they were made of."""
    from huggingface_hub import ModelCardData

    method, prompts = _TABLES["methods"][config.method.method], _prompts(config)
    base, family = config.model.pretrained_model_name_or_path, _family(result.path)
    of_family = _TABLES["families"].get(family, {"tags": []})
    # Whose a base on this machine is, nobody says.
    published: dict[str, Any] = {"base_model": base, **of_family} if is_hub_name(base) else {}
    data = ModelCardData(
        base_model=published.get("base_model"),
        license=published.get("license"),
        license_name=published.get("license_name"),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "dreambooth", "mindspore", "diffusers", *method["tags"], *of_family["tags"]],
        instance_prompt=prompts[0] if prompts else None,
        widget=[{"text": text, "output": {"url": name}} for name, text in pictures.items()] or None,
    )
    names = {
        "base": base if is_hub_name(base) else Path(base).name,
        "repository": repository,
        "file": result.path.name,
        "prompt": prompts[0].replace('"', "'") if prompts else "…",
    }
    text = _TABLES["text"].format(
        **names,
        name=repository.partition("/")[2],
        title=method["title"],
        steps=count_of(result.steps, "step"),
        gallery="\n<Gallery />\n" if pictures else "",
        triggers="\n".join(f"- `{prompt}`" for prompt in prompts) or "Those of the captions it was trained with.",
        load=method["load"].format(**names),
        flags=method["flags"].format(**names),
        settings="\n".join(_settings(config)),
        licence=f"That of the base model{f' ({family})' if family else ''}; look it up there.",
    )
    return marked(f"---\n{data.to_yaml()}\n---\n\n{text}")


def marked(text: str) -> str:
    """A card with a mark at its end, by which a later change is seen."""
    return f"{text}\n<!-- dreambooth-ms wrote this card: {_digest(text)} -->\n"


def is_edited(card: str) -> bool:
    """Whether a person wrote a card, or changed one that was written here."""
    mark = _MARK.search(card)
    return mark is None or mark[1] != _digest(card[: mark.start()])


def _digest(text: str) -> str:
    return sha256(text.replace("\r\n", "\n").encode()).hexdigest()[:16]


def _prompts(config: TrainConfig) -> Sequence[str]:
    """What names the subjects; nothing of a list that is no longer there."""
    with suppress(UserError, OSError):
        subjects = [one for one in concept_configs(config, lambda note: None) if not one.concept.is_reg]
        return [one.data.instance_prompt for one in subjects if one.data.instance_prompt]
    return []


def _family(result: Path) -> str:
    """Of the model that a result is, or is for; empty if the file alone does not tell."""
    folder = result.parent.parent if result.parent.name == "unet" else result.parent
    with suppress(WeightError):
        return open_lora(result, None).families if holds_adapter(folder) else open_model(folder).spec.family.value
    return ""


def _settings(config: TrainConfig) -> list[str]:
    """Rows of a table, of what is not as it is by default and no path."""
    rows: dict[str, Any] = {}
    for name, one in schema_fields(TrainConfig).items():
        value = getattr(getattr(config, one.section), name)
        is_default = one.default is MISSING or value == one.default or value is None
        if one.section in _TOLD and not (is_default or one.is_path or one.is_secret):
            rows[name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return [f"| {name} | {str(value).replace('|', chr(92) + '|')} |".replace("\n", " ") for name, value in rows.items()]
