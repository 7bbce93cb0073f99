"""What users bring from other programs: the same thing under another name, or with its value written in another way;
and what is not here at all: refused with a reason, or harmless and ignored with one. Each serves every command that has
its field."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth_ms.config.choices import read_table
from dreambooth_ms.errors import ConfigError

_TABLES, _NOT_HERE = (read_table(Path(__file__).with_name(f"{name}.yaml")) for name in ("spellings", "refusals"))

SPELLINGS: dict[str, tuple[str, ...]] = {}
"""Another name -> the fields that it may stand for: the one that the command has."""
for _field, _others in _TABLES["names"].items():
    for _other in _others.split():
        SPELLINGS[_other] = (*SPELLINGS.get(_other, ()), _field)

BASE_THEN_ADAPTERS = "weight"
"""`--weight base,adapter,adapter`: a list whose first entry is the base model and whose others are adapters."""
LISTS = (BASE_THEN_ADAPTERS, "timestep_range")
"""Names of no field that several values may follow."""


def _true(value: Any) -> bool:
    return str(value).lower() not in ("false", "none", "no", "0", "")


def _whole(value: Any, change: Callable[[int], int]) -> Any:
    """A whole number, changed; anything else as it is, for the field to refuse."""
    return change(int(value)) if re.fullmatch(r"-?\d+", str(value)) else value


CONVERTED: dict[str, Callable[[Any], dict[str, Any]]] = {
    **{name: partial(lambda sides, value: sides[_true(value)], own) for name, own in _TABLES["switches"].items()},
    "clip_stop_at_last_layers": lambda value: {"clip_skip": _whole(value, lambda count: count - 1)},
    "huggingface_repo_id": lambda value: {"hub_model_id": value, "push_to_hub": _true(value)},
    "huggingface_repo_visibility": lambda value: {"hub_private_repo": squeezed(value) != "public"},
    "optimizer": lambda value: (
        {"optimizer": "AdamW", "use_8bit_adam": True} if squeezed(value) == "adamw8bit" else {"optimizer": value}
    ),
    "prior_preservation": lambda value: (
        {"with_prior_preservation": squeezed(value) != "false"}
        if squeezed(value) in ("true", "false", "classimages")
        else {"prior_preservation": value} | ({"with_prior_preservation": False} if _true(value) else {})
    ),
    "reg_data_dir": lambda value: {"reg_data_dir": value} | ({"with_prior_preservation": True} if _true(value) else {}),
    "report_to": lambda value: {"report_to": re.findall(r"[\w-]+", str(value).lower())},
    "resolution": lambda value: {
        "resolution": re.sub(r"^\[?(\d+), ?\1\]?$", r"\1", str(value)) if isinstance(value, str | list) else value
    },
    "stop_at_clip_layer": lambda value: {"clip_skip": _whole(value, lambda layer: -layer - 1)},
    "timestep_range": lambda value: (
        dict(zip(("min_timestep", "max_timestep"), both, strict=True))
        if len(both := re.findall(r"[\w.-]+", str(value))) == 2
        else {"min_timestep": value}
    ),
}
"""A flag whose value says it in another way -> what it sets here. A1111 counts the text encoder's layers from 1,
ComfyUI from -1; kohya's sides of a square are two numbers, and its range of timesteps two flags."""

SWITCHES = ("prior_preservation",)
"""Fields with choices that others give without a value."""

_STYLES = re.compile("(cfgpp|exponential|gpu|karras)+$")
"""What A1111 and ComfyUI add to the name of a scheduler."""


def squeezed(value: object) -> str:
    """A choice without what people write differently: `DPM++ 2M Karras`, `dpmpp_2m_karras`, `dpm++_2m_karras`."""
    return re.sub(r"[\W_]", "", str(value).lower().replace("++", "pp"))


def choice_of(field: str, choices: tuple[str, ...], value: object) -> str:
    """The choice that the value spells. Raises ConfigError if it spells something that is not here, but has a neighbour
    that is, and ValueError if it spells none."""
    spelled = {squeezed(choice): choice for choice in choices} | _named("choices", field, choices)
    near = _named("neighbours", field, choices)
    text = squeezed(value) if isinstance(value, bool | str) else ""
    if text in spelled:
        return spelled[text]
    stem = _STYLES.sub("", text)
    neighbour = near.get(text) or near.get(stem) or (spelled.get(stem) if stem != text else None)
    if neighbour:
        raise ConfigError(f"{value} is not in this version; the nearest is {neighbour}")
    raise ValueError


def _named(table: str, field: str, choices: tuple[str, ...]) -> dict[str, str]:
    """What a table has for the choices of a field, squeezed -> the choice."""
    others = _TABLES[table].get(field, {})
    return {squeezed(name): choice for choice in choices for name in others.get(choice, "").split()}


class Refusal(NamedTuple):
    """Why a flag is refused."""

    reason: str
    unless: tuple[str, ...]
    """Values for which there is nothing to refuse, beside those of NOTHING."""
    gives: tuple[str, ...]
    """Fields that it would have given, or ALL: they are not also reported as missing."""


NOTHING = ("false", "none", "no", "", "0", "0.0", "-1")
"""Values that turn any of these flags off."""
ALL = ("*",)


def _by_name(rows: Iterable[Mapping[str, Any]]) -> dict[str, Refusal]:
    """Each row is an answer to several names; texts are lists of words."""
    answers: dict[str, Refusal] = {}
    for row in rows:
        reason = row.get("reason") or f"not in this version: {row['not_yet']}"
        unless, gives = (tuple(str(row.get(key, "")).split()) for key in ("unless", "gives"))
        answers |= dict.fromkeys(row["names"].split(), Refusal(reason, unless, gives))
    return answers


def _reasons(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {name: answer.reason for name, answer in _by_name(rows).items()}


REFUSED = _by_name(_NOT_HERE["refused"])
"""Flags that are not here -> why, and what to do."""

HARMLESS = _reasons(_NOT_HERE["harmless"])
"""Flags that are accepted and ignored -> why nothing is lost."""

VALUES = {field: _reasons(rows) for field, rows in _NOT_HERE["values"].items()}
"""Field -> values that are refused by name, in lower case -> why."""
