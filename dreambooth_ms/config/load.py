"""From YAML files and flags to one frozen configuration, or to every mistake in them at once.

The layers are merged in this order: the defaults of the schema, the files given by `--config`, the flags. A file names
its values flat (`rank: 8`) or by section (`method: {rank: 8}`), and a resolved configuration, as `to_yaml` writes it,
loads again. `${…}` is plain text in a flag; in a file it refers to that file, or to `${oc.env:NAME}`.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import chain
from typing import Any, TypeVar

from omegaconf import OmegaConf

from dreambooth_ms.config import spellings
from dreambooth_ms.config.schema import Field, Schema, schema_fields, sections
from dreambooth_ms.config.sources import Setting, answer_unknown, canonical, read_file, read_flags, read_value, split
from dreambooth_ms.errors import ConfigError, Tell

Config = TypeVar("Config", bound=Schema)


def _print(note: str) -> None:
    sys.stderr.write(f"dreambooth-ms: note: {note}\n")


def load(schema: type[Config], argv: Sequence[str], tell: Tell = _print) -> Config:
    """A configuration from the flags and the files that they name.

    Args:
        schema: TrainConfig, SampleConfig or another Schema.
        argv: flags, without the names of the program and the command. Booleans: `--flag`, `--flag True`, `--no-flag`.
            Lists: `--name a b`, `--name a,b`, or the flag once more, which alone makes a list of texts with commas. A
            hyphen in a name stands for an underscore.
        tell: takes what the user should know about it, one line per note.

    Raises:
        ConfigError: every mistake found, one line each.
    """
    known = schema_fields(schema)
    flags = read_flags(argv, known, schema.POSITIONAL)
    layers = [read_file(one, schema) for one in flags if one.name == "config"]
    layers.append([one for one in flags if one.name != "config"])
    config, problems, notes = build(schema, layers)
    if problems:
        raise ConfigError("\n".join(problems))
    for note in notes:
        tell(note)
    return config


def build(
    schema: type[Config], layers: Sequence[Sequence[Setting]], base: Mapping[str, Any] | None = None
) -> tuple[Config, list[str], list[str]]:
    """A configuration of these layers, over the values of another one; its problems and its notes."""
    known = schema_fields(schema)
    given = {name: value for layer in layers for name, value in _read_layer(layer, known).items()}
    values = dict(base or {}) | given
    absent = {name: one.kind() for name, one in known.items() if one.default is MISSING and name not in values}
    # What is required has a stand-in, so that the rest can be checked even without it.
    values |= absent
    owned = {
        section: owner(**{one.name: values[one.name] for one in fields(owner) if one.name in values})
        for section, owner in sections(schema).items()
    }
    make: Any = schema
    config: Config = make(**owned)

    settings = list(chain(*layers))
    problems = [line for one in settings for line in one.problems]
    # A value that is wrong in one place may be right in another.
    undecided = set(chain.from_iterable(one.undecided for one in settings)) - given.keys()
    required = {*absent, *config.missing()} - undecided
    problems += [f"--{name}: required" for name in known if name in required]
    undecided.update(absent)
    broken, notes = config.check()
    problems += [line for line in broken if undecided.isdisjoint(re.findall(r"--(\w+)", line))]
    return config, problems, [*(one.note for one in settings if one.note), *notes]


def to_yaml(config: Any) -> str:
    """The resolved configuration by section, as text that loads again to an equal configuration."""
    return OmegaConf.to_yaml(
        {
            section: {name: _escaped(value) for name, value in vars(getattr(config, section)).items()}
            for section in sections(type(config))
        }
    )


def _escaped(value: Any) -> Any:
    """The same value, with text escaped so that OmegaConf reads no reference into it."""
    if isinstance(value, list | tuple):
        return [_escaped(entry) for entry in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _read_layer(layer: Iterable[Setting], known: Mapping[str, Field]) -> dict[str, Any]:
    """Field -> value, by the settings of one file, or by all flags. Mistakes are noted at the settings."""
    values: dict[str, Any] = {}
    givers: dict[str, Setting] = {}
    for setting in layer:
        for name, written in _targets(setting, known).items():
            if setting.section not in (None, known[name].section):
                setting.complain(f"belongs to section {known[name].section}", name)
                continue
            earlier, giver = values.get(name, MISSING), givers.setdefault(name, setting)
            try:
                value = read_value(known[name], written, is_flag=not setting.source)
            except ConfigError as error:
                setting.complain(str(error), name)
                continue
            if giver.name != setting.name and earlier != value:
                setting.complain(f"means the same as {giver.label}; give one of them")
            elif giver.name == setting.name and isinstance(earlier, list | tuple) and value:
                values[name] = earlier + value
            else:
                values[name] = value
    return values


def _targets(setting: Setting, known: Mapping[str, Field]) -> dict[str, Any]:
    """The fields that one setting sets; none if it is ignored, refused or unknown, which is noted there."""
    if setting.value is MISSING:
        return {}
    name = canonical(setting.name, known) or setting.name
    values = spellings.CONVERTED[name](setting.value) if name in spellings.CONVERTED else {name: setting.value}
    if values.keys() <= known.keys():
        return values
    if name == spellings.BASE_THEN_ADAPTERS and "pretrained_model_name_or_path" in known:
        base, *adapters = split(setting.value) or [""]
        if adapters and "lora" not in known:
            setting.complain(f"expected one base model, got also {', '.join(adapters)}")
        more = {"lora": adapters} if adapters and "lora" in known else {}
        return {"pretrained_model_name_or_path": base, **more}
    answer_unknown(setting, known)
    return {}
