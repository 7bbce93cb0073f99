"""From YAML files and flags to one frozen configuration, or to every mistake in them at once.

The layers are merged in this order: the defaults of the schema, the files given by `--config`, the flags. A file names
its values flat (`rank: 8`) or by section (`method: {rank: 8}`), and a resolved configuration, as `to_yaml` writes it,
loads again. `${…}` is plain text in a flag; in a file it refers to that file, or to `${oc.env:NAME}`.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import chain
from typing import Any, TypeVar, cast, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth_ms.config import refusals, spellings
from dreambooth_ms.config.describe import Field, schema_fields
from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.sources import Setting, at_home, canonical, read_file, read_flags, suggestions
from dreambooth_ms.errors import ConfigError

Config = TypeVar("Config", bound=Schema)

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""What no file can hold as text: Python's stand-ins for bytes that are not UTF-8, and the null character."""


@dataclass
class _Entry:
    """What a setting means: a field's value as written, and as OmegaConf is to convert it."""

    setting: Setting
    field: Field
    value: Any
    plain: Any


def _print(note: str) -> None:
    sys.stderr.write(f"dreambooth-ms: note: {note}\n")


def load(schema: type[Config], argv: Sequence[str], tell: Callable[[str], object] = _print) -> Config:
    """A configuration from the flags and the files that they name.

    Args:
        schema: TrainConfig, SampleConfig or another Schema.
        argv: flags, without the names of the program and the command. Booleans: `--flag`, `--flag True`, `--no-flag`.
            Lists: `--name a b`, `--name a,b`, or the flag once more. A hyphen in a name stands for an underscore.
        tell: takes what the user should know about it, one line per note.

    Raises:
        ConfigError: every mistake found, one line each.
    """
    known = schema_fields(schema)
    flags = read_flags(argv, known, schema.POSITIONAL)
    files = [one for one in flags if one.name == "config"]
    layers = [read_file(one, schema) for one in files if one.value is not MISSING]
    layers.append([one for one in flags if one.name != "config"])
    entries = [entry for layer in layers for entry in _entries(layer, known)]
    config = _merged(schema, entries, known)

    settings = [*files, *chain(*layers)]
    decided = {entry.field.name for entry in entries if entry.field.name not in entry.setting.undecided}
    # An unread file may have given whatever the others did not.
    undecided = _undecided(settings[len(files) :]) | (_undecided(files) - decided)
    absent = [name for name, one in known.items() if one.default is MISSING and name not in decided]
    problems = [line for one in settings for line in one.problems]
    problems += [f"--{name}: required" for name in absent if name not in undecided]
    undecided.update(absent)
    broken, notes = config.check()
    problems += [line for line in broken if undecided.isdisjoint(re.findall(r"--(\w+)", line))]
    if problems:
        raise ConfigError("\n".join(problems))
    for note in (*(one.note for one in settings if one.note), *notes):
        tell(note)
    return config


def to_yaml(config: Any) -> str:
    """The resolved configuration by section, as text that loads again to an equal configuration."""
    return OmegaConf.to_yaml({one.name: _literal(vars(getattr(config, one.name))) for one in fields(config)})


def _undecided(settings: Iterable[Setting]) -> set[str]:
    return set().union(*(one.undecided for one in settings))


def _merged(schema: type[Config], entries: Sequence[_Entry], known: Mapping[str, Field]) -> Config:
    """The schema's defaults with the values over them; a value that does not fit its field is reported and left out."""
    # What is required gets a stand-in, so that the rest can be checked even without it.
    required = [_tree(one, one.kind()) for one in known.values() if one.default is MISSING]
    defaults = OmegaConf.merge(OmegaConf.structured(schema), *required)
    try:
        merged = OmegaConf.merge(defaults, *(_tree(one.field, one.plain) for one in entries))
    except (OmegaConfBaseException, TypeError):
        fitting = [one for one in entries if _fits(one, defaults)]
        merged = OmegaConf.merge(defaults, *(_tree(one.field, one.plain) for one in fitting))
    return cast(Config, OmegaConf.to_object(merged))


def _tree(one: Field, value: Any) -> dict[str, dict[str, Any]]:
    """A value in its place in a configuration."""
    return {one.section: {one.name: _literal(value)}}


def _fits(entry: _Entry, defaults: Any) -> bool:
    """Whether OmegaConf can convert one value; what it cannot convert is reported."""
    try:
        OmegaConf.merge(defaults, _tree(entry.field, entry.plain))
    except (OmegaConfBaseException, TypeError):
        entry.setting.complain(f"expected {entry.field.expected}, got {entry.value!r}", entry.field.name)
        return False
    return True


def _entries(layer: Iterable[Setting], known: Mapping[str, Field]) -> list[_Entry]:
    """What the settings of one file, or all flags, mean. Mistakes are noted at the settings."""
    entries: list[_Entry] = []
    first: dict[str, Setting] = {}
    for setting in layer:
        for name, value in _targets(setting, known):
            one = known[name]
            if setting.section not in (None, one.section):
                setting.complain(f"belongs to section {one.section}", name)
                continue
            try:
                plain = _plain(one, value, is_flag=not setting.source)
                entry = _Entry(setting, one, value, at_home(plain) if one.is_path else plain)
            except ConfigError as error:
                setting.complain(str(error), name)
                continue
            earlier = next((other for other in entries if other.field is one), None)
            if first.setdefault(name, setting).name != setting.name:
                if not earlier or earlier.plain != entry.plain:
                    setting.complain(f"means the same as {first[name].label}; give one of them")
            elif earlier and isinstance(earlier.plain, list) and isinstance(entry.plain, list):
                earlier.value = earlier.plain = earlier.plain + entry.plain
            else:
                entries.append(entry)
    return entries


def _targets(setting: Setting, known: Mapping[str, Field]) -> list[tuple[str, Any]]:
    """The fields that one setting sets; none if it is ignored, refused or unknown, which is noted there."""
    if setting.value is MISSING:
        return []
    name = canonical(setting.name, known) or setting.name
    values = spellings.CONVERTED[name](setting.value) if name in spellings.CONVERTED else {name: setting.value}
    if values.keys() <= known.keys():
        return list(values.items())
    if name == spellings.BASE_THEN_ADAPTERS and "pretrained_model_name_or_path" in known:
        base, *adapters = _split(setting.value) or [""]
        if adapters and "lora" not in known:
            setting.complain(f"expected one base model, got also {', '.join(adapters)}")
        more = [("lora", adapters)] if adapters and "lora" in known else []
        return [("pretrained_model_name_or_path", base), *more]
    _answer_what_is_not_here(setting, known)
    return []


def _answer_what_is_not_here(setting: Setting, known: Mapping[str, Field]) -> None:
    """Note at the setting why it is ignored or refused, or that nobody knows it."""
    name, value = setting.name, str(setting.value).lower()
    if name in refusals.HARMLESS:
        if value not in refusals.NOTHING:
            setting.note = f"{setting.label} is accepted and ignored: {refusals.HARMLESS[name]}"
    elif name in refusals.REFUSED:
        reason, unless, gives = refusals.REFUSED[name]
        if value not in (*refusals.NOTHING, *unless):
            setting.complain(reason, *(known if gives == refusals.ALL else gives))
    else:
        kind, dashes, others = ("key", "", []) if setting.source else ("flag", "--", ["config"])
        spelt = [one for one in spellings.SPELLINGS if canonical(one, known)]
        close = suggestions(name.removeprefix("no_"), [*known, *others]) or suggestions(name, spelt)
        hint = f"; did you mean {' or '.join(dashes + one for one in close)}?" if close else ""
        setting.complain(f"unknown {kind}{hint}", *(canonical(one, known) or "" for one in close))


def _plain(one: Field, value: Any, is_flag: bool) -> Any:
    """The value for OmegaConf, which knows no None, list or choice as users write them, and takes too much for text.

    Raises:
        ConfigError: OmegaConf would accept it, and the field should not.
    """
    texts = value if isinstance(value, list) else [value]
    if reason := refusals.VALUES.get(one.name, {}).get(str(value).lower()):
        raise ConfigError(f"{value}: {reason}")
    if "???" in texts:
        raise ConfigError("??? stands for a value that is still to be given")
    if any(isinstance(text, str) and _NO_TEXT.search(text) for text in texts):
        raise ConfigError(f"expected text in UTF-8, got {value!r}; rename a file or folder that is called so")
    if value is None or (one.optional and value in ("None", "null")):
        return None
    if one.kind is str and not isinstance(value, str):
        raise ConfigError(f"expected text, got {value!r}; put it in quotes")
    is_list = get_origin(one.kind) is list
    is_nested = is_list and any(isinstance(entry, dict | list) for entry in texts)
    # OmegaConf would find out too late that this is text.
    is_reference = one.kind not in (str, list[str]) and any("${" in text for text in texts if isinstance(text, str))
    if is_nested or is_reference or (one.kind is bool and not isinstance(value, bool | str)):
        raise ConfigError(f"expected {one.expected}, got {value!r}")
    if is_list:
        if one.kind == list[float] and isinstance(value, int | float):
            return [value]
        return _split(value) if isinstance(value, str) or is_flag else value
    if isinstance(one.kind, tuple) and isinstance(value, bool | str):
        return spellings.choice_of(one.name, one.kind, value) or value
    return value


def _split(value: Any) -> list[str]:
    """The entries of comma-separated text, or of several of them."""
    texts = value if isinstance(value, list) else [value]
    return [entry.strip() for text in texts for entry in str(text).split(",") if entry.strip()]


def _literal(value: Any) -> Any:
    """The same value, with text escaped so that OmegaConf reads no interpolation into it."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, list):
        return [_literal(entry) for entry in value]
    return {name: _literal(entry) for name, entry in value.items()} if isinstance(value, dict) else value
