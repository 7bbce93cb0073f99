"""The sources of values, flags and YAML files, as settings that know where they stand and what is wrong with them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth_ms.config.schema import Field, schema_fields, sections
from dreambooth_ms.config.spellings import BASE_THEN_ADAPTERS, CONVERTED, HARMLESS, REFUSED, SPELLINGS
from dreambooth_ms.config.values import at_home
from dreambooth_ms.errors import ConfigError

_MINDONE = (("env", {"mode"}), ("model", {"params", "pretrained", "target"}), ("optim", {"base_learning_rate"}))
"""Sections of mindone's own files, and what stands in them."""


@dataclass
class Setting:
    """One value as the user wrote it, MISSING if it cannot be used. `source` is the file, or empty for a flag."""

    name: str
    value: Any
    source: str = ""
    section: str | None = None
    problems: list[str] = field(default_factory=list)
    """What is wrong with it, one line each."""
    note: str = ""
    """What the user should know of it."""
    undecided: set[str] = field(default_factory=set)
    """Fields whose values are not known because of its problems."""

    @property
    def label(self) -> str:
        """How messages name it: `--rank`, or `run.yaml: method.rank`."""
        if not self.source:
            return f"--{self.name}"
        return f"{self.source}: {self.section}.{self.name}" if self.section else f"{self.source}: {self.name}"

    def complain(self, message: str, *undecided: str) -> None:
        """Note a problem, and the fields whose values are not known because of it."""
        self.problems.append(f"{self.label}: {message}")
        self.undecided.update(undecided)


def canonical(name: str, known: Mapping[str, Field]) -> str | None:
    """The field that a name or another spelling of it stands for; None for any other name."""
    return next((one for one in (name, *SPELLINGS.get(name, ())) if one in known), None)


def suggestions(name: str, candidates: Iterable[str]) -> list[str]:
    """What a mistyped name may have meant: up to three that hold its words, or the one spelled most like it.

    Words may be cut short: `num_image` is in `num_images_per_prompt`.
    """
    candidates = list(candidates)
    words = name.split("_")
    holding = [one for one in candidates if all(re.search(rf"(^|_){re.escape(word)}", one) for word in words)]
    if min(map(len, words)) >= 3 and 0 < len(holding) <= 3:
        return holding
    return get_close_matches(name, candidates, n=1, cutoff=0.75)


def did_you_mean(names: Sequence[str], dashes: str = "") -> str:
    """What to add to a message of an unknown name."""
    return f"; did you mean {' or '.join(dashes + name for name in names)}?" if names else ""


def read_flags(argv: Sequence[str], known: Mapping[str, Field], positional: Sequence[str]) -> list[Setting]:
    """Split the command line at its flags. A value is a text, a list of texts, or True for a flag that stands alone.

    Fields in `positional` may stand at the beginning without their flags, in this order.
    """
    starts = [place for place, word in enumerate(argv) if word.startswith("--") or _without_a_dash(word, known)]
    bounds = [*starts, len(argv)]
    before = argv[: bounds[0]]
    settings = [Setting(name, word) for name, word in zip(positional, before, strict=False)]
    for word in before[len(settings) :]:
        unexpected = f"unexpected {word!r}: a value follows its flag, as in --seed 1"
        settings.append(Setting("", MISSING, problems=[unexpected]))
    for start, end in pairwise(bounds):
        name, equals, value = argv[start].removeprefix("--").partition("=")
        if undashed := _without_a_dash(argv[start], known):
            problem = f"{name}: a flag begins with two dashes{did_you_mean([undashed], '--')}"
            settings.append(Setting("", MISSING, problems=[problem], undecided={canonical(undashed, known) or ""}))
        else:
            texts = [*([value] if equals else []), *argv[start + 1 : end]]
            settings.append(_flag(name.replace("-", "_"), texts, known))
    return settings


def _without_a_dash(word: str, known: Mapping[str, Field]) -> str | None:
    """The flag that lacks one of its dashes here, as in `-learning_rate`; None for any other word."""
    found = re.fullmatch(r"-(\w[\w-]+)(=.*)?", word, re.DOTALL)
    name = found[1].replace("-", "_") if found else ""
    others = (REFUSED, HARMLESS, CONVERTED, ("config", BASE_THEN_ADAPTERS))
    return name if canonical(name, known) or any(name in table for table in others) else None


def _flag(name: str, texts: list[str], known: Mapping[str, Field]) -> Setting:
    setting = Setting(name, MISSING)
    target = canonical(name, known)
    denied = canonical(name.removeprefix("no_"), known)
    if target is None and name.startswith("no_") and denied is not None and known[denied].kind is bool:
        if texts:
            setting.complain(f"expected no value, got {texts[0]!r}")
        setting.name, setting.value = name.removeprefix("no_"), "False"
        return setting
    kind = known[target].kind if target else {"config": str, BASE_THEN_ADAPTERS: list[str]}.get(name, bool)
    is_list = get_origin(kind) is list
    if not texts and kind is not bool:
        expected = known[target].expected if target else "a YAML file" if name == "config" else "a value"
        setting.complain(f"expected {expected}, got nothing", target or "")
        return setting
    if len(texts) > 1 and not is_list and (target or name == "config"):
        what = "put text with spaces in quotes" if texts[1].strip() else "a line that goes on ends in \\ and no space"
        setting.complain(f"unexpected {texts[1]!r} after its value; {what}")
    setting.value = texts if is_list else texts[0] if texts else True
    return setting


def read_file(named: Setting, schema: type) -> list[Setting]:
    """The values of the YAML file that a --config names, flat or by section, after the name itself, whose value is used
    then. `${…}` is resolved within the file."""
    owners, known, path = sections(schema), schema_fields(schema), named.value
    named.value = MISSING
    if path is MISSING:
        return [named]
    try:
        path = at_home(path)
        if path.lower().endswith(".toml"):
            raise OSError("expected YAML; of a TOML file, such as kohya's scripts have, give the values as flags")
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        if not isinstance(content, dict):
            raise OSError("expected lines such as `rank: 4`")
        if any(isinstance(content.get(section), dict) and keys & content[section].keys() for section, keys in _MINDONE):
            raise OSError("is of mindone's scripts; the file of its name in configs/ here has its values")
        unknown = [str(key) for key, value in content.items() if isinstance(value, dict) and key not in owners]
        if len(unknown) > 1 and not any(canonical(name, known) or suggestions(name, owners) for name in unknown):
            raise OSError(f"is for another command; sections {', '.join(unknown)} are unknown to this one")
    except (OSError, ValueError, ConfigError, yaml.YAMLError, OmegaConfBaseException) as error:
        named.problems.append(f"--config {path}: {in_one_line(error)}")
        named.undecided.update(known)
        return [named]
    settings = [named]
    for key, value in content.items():
        name = str(key)
        if name in owners and isinstance(value, dict):
            settings += [Setting(str(inner), item, path, name) for inner, item in value.items()]
        elif isinstance(value, dict) and ((close := suggestions(name, owners)) or canonical(name, known) is None):
            settings.append(Setting(name, MISSING, path))
            settings[-1].complain("unknown section" + did_you_mean(close))
        elif name in known or name not in owners or value is not None:
            settings.append(Setting(name, value, path))
    return settings


def in_one_line(error: Exception) -> str:
    """What is wrong with a file, for a message."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]
