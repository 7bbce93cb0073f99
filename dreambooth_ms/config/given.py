"""What the user gave, before it is understood: flags and YAML files as named values that know where they came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth_ms.config.describe import Field, schema_fields, sections
from dreambooth_ms.config.spellings import BASE_THEN_ADAPTERS, SPELLINGS


@dataclass(frozen=True)
class Given:
    """One value as the user gave it. `source` is the file, or empty for a flag."""

    name: str
    value: Any
    source: str = ""
    section: str | None = None

    @property
    def label(self) -> str:
        """How messages name it: `--rank`, or `run.yaml: method.rank`."""
        if not self.source:
            return f"--{self.name}"
        return f"{self.source}: {self.section}.{self.name}" if self.section else f"{self.source}: {self.name}"


@dataclass
class Report:
    """The mistakes and notes of one load, and the fields whose values are not known because of a mistake."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    undecided: set[str] = field(default_factory=set)
    unread_file: bool = False


def canonical(name: str, known: Mapping[str, Field]) -> str | None:
    """The field that a name or another spelling of it stands for; None if there is none."""
    return next((one for one in (name, *SPELLINGS.get(name, ())) if one in known), None)


def nearest(name: str, candidates: Sequence[str]) -> str | None:
    """The candidate that is spelled most like the name; None if none is close."""
    return next(iter(get_close_matches(name, candidates, n=1, cutoff=0.7)), None)


def read_flags(
    argv: Sequence[str], known: Mapping[str, Field], report: Report, positional: Sequence[str] = ()
) -> list[Given]:
    """Split the command line at its flags. A value is a text, a list of texts, or True for a flag that stands alone.

    Fields in `positional` may stand at the beginning without their flags, in this order.
    """
    flags: list[Given | None] = []
    rest = list(argv)
    while len(flags) < len(positional) and rest and not rest[0].startswith("--"):
        flags.append(Given(positional[len(flags)], rest.pop(0)))
    while rest:
        first = rest.pop(0)
        if not first.startswith("--"):
            report.problems.append(f"unexpected {first!r}: a value follows its flag, as in --seed 1")
            continue
        name, equals, value = first[2:].partition("=")
        texts = [value] if equals else []
        while rest and not rest[0].startswith("--"):
            texts.append(rest.pop(0))
        flags.append(_flag(name.replace("-", "_"), texts, known, report))
    return [flag for flag in flags if flag is not None]


def _flag(name: str, texts: list[str], known: Mapping[str, Field], report: Report) -> Given | None:
    target = canonical(name, known)
    denied = canonical(name.removeprefix("no_"), known)
    if target is None and name.startswith("no_") and denied is not None and known[denied].kind is bool:
        if texts:
            report.problems.append(f"--{name}: expected no value, got {texts[0]!r}")
        return Given(name.removeprefix("no_"), "False")
    kind = known[target].kind if target is not None else {"config": str, BASE_THEN_ADAPTERS: list}.get(name, bool)
    if not texts and kind is not bool:
        expected = "a YAML file" if target is None and name == "config" else "a value"
        report.problems.append(f"--{name}: expected {known[target].expected if target else expected}, got nothing")
        report.undecided.update([target] if target else [])
        return None
    if len(texts) > 1 and kind is not list and (target is not None or name == "config"):
        report.problems.append(f"--{name}: unexpected {texts[1]!r} after its value; put text with spaces in quotes")
    return Given(name, texts if kind is list else texts[0] if texts else True)


def read_file(path: str, schema: type, report: Report) -> list[Given]:
    """The values of one YAML file, flat or by section. `${…}` is resolved within the file."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        if not isinstance(content, dict):
            raise OSError("expected lines such as `rank: 4`")
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        report.problems.append(f"--config {path}: {_in_one_line(error)}")
        report.unread_file = True
        return []
    owners, known = sections(schema), schema_fields(schema)
    values = []
    for key, value in content.items():
        name = str(key)
        if name in owners and isinstance(value, dict):
            values += [Given(str(inner), item, path, name) for inner, item in value.items()]
        elif isinstance(value, dict) and ((close := nearest(name, list(owners))) or canonical(name, known) is None):
            report.problems.append(f"{path}: {name}: unknown section" + (f"; did you mean {close}?" if close else ""))
        elif name in known or name not in owners or value is not None:
            values.append(Given(name, value, path))
    return values


def _in_one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]
