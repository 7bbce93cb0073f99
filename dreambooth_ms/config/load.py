"""From YAML files and flags to one frozen configuration, or to every mistake in them at once.

The layers are merged in this order: the defaults of the schema, the files given by `--config`, the flags. A file names
its values flat (`rank: 8`) or by section (`method: {rank: 8}`), and a resolved configuration, as `to_yaml` writes it,
loads again. `${…}` is plain text in a flag; in a file it refers to that file, or to `${oc.env:NAME}`.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from itertools import chain, pairwise
from typing import Any, TypeAlias, TypeVar, get_args, get_origin

import yaml
from omegaconf import BooleanNode, FloatNode, IntegerNode, OmegaConf, StringNode, ValueNode
from omegaconf.errors import OmegaConfBaseException

from dreambooth_ms.config import spellings
from dreambooth_ms.config.schema import Field, Schema, schema_fields, sections
from dreambooth_ms.errors import ConfigError, Tell

Config = TypeVar("Config", bound=Schema)
Reads: TypeAlias = Callable[[str], Mapping[str, Any]]

_MINDONE = (("env", {"mode"}), ("model", {"params", "pretrained", "target"}), ("optim", {"base_learning_rate"}))
"""Sections of mindone's own files, and what stands in them."""

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""What no file can hold as text: Python's stand-ins for bytes that are not UTF-8, and the null character."""

_NODES: dict[Any, ValueNode] = {
    bool: BooleanNode(False, is_optional=False),
    int: IntegerNode(0, is_optional=False),
    float: FloatNode(0.0, is_optional=False),
    str: StringNode("", is_optional=False),
}
"""What OmegaConf converts values with."""


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


def _print(note: str) -> None:
    sys.stderr.write(f"dreambooth-ms: note: {note}\n")


def load(schema: type[Config], argv: Sequence[str], tell: Tell = _print, read: Reads | None = None) -> Config:
    """A configuration from flags and the files that they name; `tell` takes what the user should know about it. `argv`
    has no names of program and command. Booleans: `--flag`, `--flag True`, `--no-flag`. Lists: `--name a b`, `--name
    a,b`, or the flag once more, which alone makes a list of texts with commas. `read` gives the values of the picture
    that --like names, which stand beneath all others. Raises ConfigError of all mistakes, a line each."""
    known = schema_fields(schema)
    flags = read_flags(argv, known, schema.POSITIONAL)
    layers = [read_file(one, schema) for one in flags if one.name == "config"]
    layers.append([one for one in flags if one.name != "config"])
    named = [one.value for layer in layers for one in layer if one.name == "like" and isinstance(one.value, str)]
    if read and named:
        given = {canonical(one.name, known) for layer in layers for one in layer}
        values = read(at_home(named[-1]))
        layers.insert(0, [Setting(name, own, named[-1]) for name, own in values.items() if name not in given])
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
    config = schema(**owned)

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
    """The resolved configuration by section, as text that loads again to an equal configuration, without secrets."""
    values: dict[str, dict[str, Any]] = {section: {} for section in sections(type(config))}
    for name, one in schema_fields(type(config)).items():
        if not one.is_secret:
            values[one.section][name] = _escaped(getattr(getattr(config, one.section), name))
    return OmegaConf.to_yaml(values)


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


def canonical(name: str, known: Mapping[str, Field]) -> str | None:
    """The field that a name or another spelling of it stands for; None for any other name."""
    return next((one for one in (name, *spellings.SPELLINGS.get(name, ())) if one in known), None)


def suggestions(name: str, candidates: Iterable[str]) -> list[str]:
    """What a mistyped name may have meant: up to three that hold its words, which may be cut short, or the one spelled
    most like it."""
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
    """Split the command line at its flags; fields in `positional` may stand before them. A value is a text, a list of
    texts, or True for a flag that stands alone."""
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
    others = (spellings.REFUSED, spellings.HARMLESS, spellings.CONVERTED, ("config", spellings.BASE_THEN_ADAPTERS))
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
    others = {"config": str, **dict.fromkeys(spellings.LISTS, list[str])}
    kind = known[target].kind if target else others.get(name, bool)
    is_list = get_origin(kind) is list
    if not texts and kind is not bool and name not in spellings.SWITCHES:
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


def answer_unknown(setting: Setting, known: Mapping[str, Field]) -> None:
    """Note at the setting why it is ignored or refused, or that nobody knows it."""
    name, value = setting.name, str(setting.value).lower()
    if name in spellings.HARMLESS:
        if value not in spellings.NOTHING:
            setting.note = f"{setting.label} is accepted and ignored: {spellings.HARMLESS[name]}"
    elif name in spellings.REFUSED:
        reason, unless, gives = spellings.REFUSED[name]
        if value not in (*spellings.NOTHING, *unless):
            setting.complain(reason, *(known if gives == spellings.ALL else gives))
    else:
        kind, dashes, others = ("key", "", []) if setting.source else ("flag", "--", ["config"])
        spelt = [one for one in spellings.SPELLINGS if canonical(one, known)]
        close = suggestions(name.removeprefix("no_"), [*known, *others]) or suggestions(name, spelt)
        setting.complain(
            f"unknown {kind}{did_you_mean(close, dashes)}", *(canonical(one, known) or "" for one in close)
        )


def in_one_line(error: Exception) -> str:
    """What is wrong with a file, for a message."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]


def read_value(one: Field, written: Any, is_flag: bool) -> Any:
    """The value of a field; None, lists and choices as users write them, ~ in a path as the home folder. Raises
    ConfigError if it is none."""
    texts = [text for text in (written if isinstance(written, list) else [written]) if isinstance(text, str)]
    if reason := spellings.VALUES.get(one.name, {}).get(str(written).lower()):
        raise ConfigError(f"{written}: {reason}")
    if "???" in texts:
        raise ConfigError("??? stands for a value that is still to be given")
    if any(map(_NO_TEXT.search, texts)):
        raise ConfigError(f"expected text in UTF-8, got {written!r}; rename a file or folder that is called so")
    if one.optional and (written is None or written in ("None", "null", ["None"])):
        return None
    if one.kind is str and not isinstance(written, str | None):
        raise ConfigError(f"expected text, got {written!r}; put it in quotes")
    try:
        value = _converted(one, written, is_flag)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"expected {one.expected}, got {written!r}") from error
    return at_home(value) if one.is_path else value


def _converted(one: Field, written: Any, is_flag: bool) -> Any:
    if isinstance(one.kind, tuple):
        return spellings.choice_of(one.name, one.kind, written)
    if get_origin(one.kind) is list:
        (kind,) = get_args(one.kind)
        if is_flag or isinstance(written, str):
            written = split(written)
        elif kind is float and isinstance(written, int | float):
            written = [written]
        if not isinstance(written, list):
            raise ValueError
        return [_NODES[kind].validate_and_convert(entry) for entry in written]
    if get_origin(one.kind) is tuple:
        texts = written if isinstance(written, list) else [written]
        return tuple(_NODES[str].validate_and_convert(text) for text in texts)
    if one.kind is bool and not isinstance(written, bool | str):
        raise ValueError
    if get_origin(one.kind) is dict:
        if not isinstance(written, dict):
            raise ValueError
        return {str(name): value for name, value in written.items()}
    return _NODES[one.kind].validate_and_convert(written)


def split(value: Any) -> list[str]:
    """The entries of comma-separated text, or of several of them."""
    texts = value if isinstance(value, list) else [value]
    return [entry.strip() for text in texts for entry in str(text).split(",") if entry.strip()]


def at_home(path: Any) -> Any:
    """A path or a list of paths with ~ as the home folder; None stays as it is. Raises ConfigError if there is none."""
    if isinstance(path, list):
        return [at_home(one) for one in path]
    whole = os.path.expanduser(path) if path else path
    if whole and whole.startswith("~"):
        raise ConfigError(
            f"{path}: no home folder is known for {whole.partition('/')[0]}; write the whole path, "
            f"or ./{path} for a name that begins so"
        )
    return whole
