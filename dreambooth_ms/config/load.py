"""From YAML files and flags to one frozen configuration, or to every mistake in them at once.

The layers are merged in this order: the defaults of the schema, the files given by `--config`, the flags. A file names
its values flat (`rank: 8`) or by section (`method: {rank: 8}`), and a resolved configuration, as `to_yaml` writes it,
loads again. `${…}` is plain text in a flag; in a file it refers to that file, or to `${oc.env:NAME}`.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Generic, Protocol, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth_ms.config.describe import Field, schema_fields, sections
from dreambooth_ms.config.given import Given, Report, canonical, nearest, read_file, read_flags
from dreambooth_ms.config.ranges import Findings
from dreambooth_ms.config.sample import SampleConfig
from dreambooth_ms.config.spellings import (
    BASE_THEN_ADAPTERS,
    HARMLESS,
    METHODS_NOT_YET,
    REFUSED,
    SPELLINGS,
    VALUE_SPELLINGS,
)
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError


class Schema(Protocol):
    """A frozen dataclass whose fields are sections, themselves frozen dataclasses of values."""

    def check(self) -> Findings:
        """Ranges, and rules between fields. A problem names the fields it is about, as `--name`."""


Config = TypeVar("Config", bound=Schema)

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""What no file can hold as text: Python's stand-ins for bytes that are not UTF-8, and the null character."""


@dataclass(frozen=True)
class Loaded(Generic[Config]):
    """A configuration that holds together, and what the user should be told about it, one line per note."""

    config: Config
    notes: tuple[str, ...]


def load_train_config(argv: Sequence[str], tell: Callable[[str], object] | None = None) -> TrainConfig:
    """The configuration of `dreambooth-ms train`; see `load`. Notes go to `tell`, one by one, or else to stderr."""
    return _told(load(TrainConfig, argv), tell)


def load_sample_config(argv: Sequence[str], tell: Callable[[str], object] | None = None) -> SampleConfig:
    """The configuration of `dreambooth-ms sample`; see `load`. Notes go to `tell`, one by one, or else to stderr."""
    return _told(load(SampleConfig, argv), tell)


def _told(loaded: Loaded[Config], tell: Callable[[str], object] | None) -> Config:
    for note in loaded.notes:
        if tell is None:
            sys.stderr.write(f"dreambooth-ms: note: {note}\n")
        else:
            tell(note)
    return loaded.config


def load(schema: type[Config], argv: Sequence[str]) -> Loaded[Config]:
    """Read the flags and the files that they name.

    Args:
        schema: TrainConfig, SampleConfig or another dataclass of sections with a `check`.
        argv: flags, without the names of the program and the command. Booleans: `--flag`, `--flag True`, `--no-flag`.
            Lists: `--name a b`, `--name a,b`, or the flag once more. A hyphen in a name stands for an underscore.

    Raises:
        ConfigError: every mistake found, one line each.
    """
    known, report = schema_fields(schema), Report()
    flags = read_flags(argv, known, report, getattr(schema, "POSITIONAL", ()))
    values: dict[str, Any] = {}
    for given in flags:
        if given.name == "config":
            values |= _values(read_file(given.value, schema, report), known, report)
    values |= _values([given for given in flags if given.name != "config"], known, report)

    absent = [name for name, one in known.items() if one.default is MISSING and name not in values]
    if report.unread_file:
        report.undecided |= known.keys() - values.keys()
    report.problems += [f"--{name}: required" for name in absent if name not in report.undecided]
    report.undecided.update(absent)
    config = _merged(schema, {name: _stand_in(known[name]) for name in absent} | values)
    findings = config.check()
    report.problems += [line for line in findings.problems if report.undecided.isdisjoint(re.findall(r"--(\w+)", line))]
    if report.problems:
        raise ConfigError("\n".join(report.problems))
    return Loaded(config, (*report.notes, *findings.warnings))


def to_yaml(config: Any) -> str:
    """The resolved configuration by section, as text that loads again to an equal configuration."""
    return OmegaConf.to_yaml({one.name: _literal(vars(getattr(config, one.name))) for one in fields(config)})


def _values(layer: Iterable[Given], known: Mapping[str, Field], report: Report) -> dict[str, Any]:
    """Field name -> value of the field's type, for one file or for the flags."""
    values: dict[str, Any] = {}
    first: dict[str, Given] = {}
    for given in layer:
        for name, value in _targets(given, known, report):
            one = known[name]
            if given.section not in (None, one.section):
                report.problems.append(f"{given.label}: belongs to section {one.section}")
                report.undecided.add(name)
            elif first.setdefault(name, given).name != given.name:
                report.problems.append(f"{given.label}: means the same as {first[name].label}; give one of them")
            else:
                try:
                    converted = _converted(one, value, is_flag=not given.source)
                    values[name] = values[name] + converted if one.kind is list and name in values else converted
                except ConfigError as error:
                    report.problems.append(f"{given.label}: {error}")
                    report.undecided.add(name)
    return values


def _targets(given: Given, known: Mapping[str, Field], report: Report) -> list[tuple[str, Any]]:
    """The fields that one given value sets; none if it is ignored, refused or unknown, which is reported."""
    name = canonical(given.name, known)
    if name is not None:
        return [(name, given.value)]
    if given.name == BASE_THEN_ADAPTERS and "pretrained_model_name_or_path" in known:
        return _base_and_adapters(given, known, report)
    value = str(given.value).lower()
    asks_for_nothing = value in ("false", "none", "no", "")
    if given.name in HARMLESS:
        if not asks_for_nothing:
            report.notes.append(f"{given.label} is accepted and ignored: {HARMLESS[given.name]}")
    elif given.name in REFUSED:
        if not asks_for_nothing and value not in REFUSED[given.name].unless:
            report.problems.append(f"{given.label}: {REFUSED[given.name].reason}")
    else:
        _report_unknown(given, known, report)
    return []


def _base_and_adapters(given: Given, known: Mapping[str, Field], report: Report) -> list[tuple[str, Any]]:
    base, *adapters = _split(given.value) or [""]
    if not adapters:
        return [("pretrained_model_name_or_path", base)]
    if "lora" not in known:
        report.problems.append(f"{given.label}: expected one base model, got also {', '.join(adapters)}")
        return [("pretrained_model_name_or_path", base)]
    return [("pretrained_model_name_or_path", base), ("lora", adapters)]


def _report_unknown(given: Given, known: Mapping[str, Field], report: Report) -> None:
    what, dashes = ("key", "") if given.source else ("flag", "--")
    spellings = [name for name in SPELLINGS if canonical(name, known)]
    names = [*known] if given.source else [*known, "config"]
    close = nearest(given.name, names) or nearest(given.name, spellings)
    hint = f"; did you mean {dashes}{close}?" if close else ""
    report.problems.append(f"{given.label}: unknown {what}{hint}")
    meant = canonical(close or "", known)
    report.undecided.update([meant] if meant else [])


def _converted(one: Field, value: Any, is_flag: bool) -> Any:
    """The value in the field's type, as OmegaConf's structured merge converts it. ConfigError if it is not one."""
    if one.name == "method" and isinstance(value, str) and value in METHODS_NOT_YET:
        raise ConfigError(f"{value}: {METHODS_NOT_YET[value]}")
    plain = _unwrapped(one, value, is_flag)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(one.owner), {one.name: _literal(plain)})
        result = OmegaConf.select(merged, one.name)
    except (OmegaConfBaseException, TypeError):
        raise ConfigError(f"expected {one.expected}, got {value!r}") from None
    return OmegaConf.to_object(result) if one.kind is list else result


def _unwrapped(one: Field, value: Any, is_flag: bool) -> Any:
    """What OmegaConf would read too freely, read as the user means it: None, lists as text, choices in any case."""
    texts = value if isinstance(value, list) else [value]
    if "???" in texts:
        raise ConfigError("??? stands for a value that is still to be given")
    if any(isinstance(text, str) and _NO_TEXT.search(text) for text in texts):
        raise ConfigError(f"expected text in UTF-8, got {value!r}; rename a file or folder that is called so")
    if value is None or (one.optional and value in ("None", "null")):
        return None
    if one.kind is list:
        if any(isinstance(entry, dict | list) for entry in texts):
            raise ConfigError(f"expected {one.expected}, got {value!r}")
        if one.of_numbers and isinstance(value, int | float):
            return [value]
        return _split(value) if isinstance(value, str) or is_flag else value
    if one.kind is str and not isinstance(value, str):
        raise ConfigError(f"expected text, got {value!r}; put it in quotes")
    if one.kind is bool and not isinstance(value, bool | str):
        raise ConfigError(f"expected {one.expected}, got {value!r}")
    if isinstance(one.kind, tuple) and isinstance(value, bool | str):
        text = str(value).lower()
        text = VALUE_SPELLINGS.get(one.name, {}).get(text, text)
        return next((choice for choice in one.kind if choice.lower() == text), value)
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


def _stand_in(one: Field) -> Any:
    """A value for a required field that was not given, so that the rest can still be checked."""
    return one.kind[0] if isinstance(one.kind, tuple) else one.kind()


def _merged(schema: type[Config], values: Mapping[str, Any]) -> Config:
    """The schema's defaults with the values over them, as frozen dataclasses."""
    known = schema_fields(schema)
    parts = {}
    for section, owner in sections(schema).items():
        own = {name: _literal(value) for name, value in values.items() if known[name].section == section}
        parts[section] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(owner), own))
    return schema(**parts)
