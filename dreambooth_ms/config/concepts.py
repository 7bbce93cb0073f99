"""Several subjects: each has the run's configuration, with what `--concepts_list` says of it in place."""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import yaml

from dreambooth_ms.config.load import Setting, build, canonical, in_one_line
from dreambooth_ms.config.ranges import at_least
from dreambooth_ms.config.schema import schema_fields
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError, Tell, near

_OWN = ("instance_data_dir", "instance_prompt", "repeats", "mask_dir", "alpha_mask")
_OWN_SECTIONS = ("captions", "prior", "concept")
"""What may differ from subject to subject."""
_FOLDER = re.compile(r"(\d+)_(.+)")
"""kohya's names of folders: repeats and prompt."""
_OF_KOHYA = {"use_txt_as_label": True, "may_lack_captions": True, "with_prior_preservation": False}
"""There classes stand by themselves, and captions are read where they are."""


@dataclass(frozen=True, kw_only=True)
class ShareConfig:
    """What only a list says of a subject, and no flag."""

    weight: Annotated[float, at_least(0)] = 1.0
    """Of its rows' error in the loss."""
    generates: bool = True
    """Whether class pictures that are missing are generated."""
    is_reg: bool = False
    """Whether it is a class, by itself."""
    may_lack_captions: bool = False
    """Whether a picture without a caption has the prompt."""


@dataclass(frozen=True, kw_only=True)
class ConceptConfig(TrainConfig):
    """A run's configuration as it is for one subject."""

    concept: ShareConfig = field(default_factory=ShareConfig)


def concept_configs(config: TrainConfig, tell: Tell) -> list[ConceptConfig]:
    """Of each subject the configuration; without a list of the only one. Pictures are not looked for. Raises
    ConfigError if the list cannot be read, or of every mistake in it, one line each."""
    if not config.data.concepts_list:
        return [ConceptConfig(**vars(config))]
    path, problems, notes = Path(config.data.concepts_list), list[str](), list[str]()
    reg_data_dir = config.prior.reg_data_dir
    entries = _of_folders(path, reg_data_dir, notes) if path.is_dir() else _of_file(path)
    if reg_data_dir and not path.is_dir():
        problems.append(f"--reg_data_dir {reg_data_dir}: goes with a folder of folders; classes stand in {path}")
    found = [_concept(config, path.parent, *entry, problems, notes) for entry in entries]
    paired, alone = [one for one in found if one.prior.folder], [one for one in found if one.concept.is_reg]
    if not problems and (len(alone) == len(found) or (paired and len(paired) < len(found))):
        problems = [f"{path}: expected subjects, each with a class or none of them; or is_reg marks the classes"]
    if not problems and bool(paired or alone) != config.prior.with_prior_preservation:
        problems = [f"{path}: class pictures go with --with_prior_preservation; give both, or none of them"]
    if problems:
        raise ConfigError("\n".join(problems))
    for note in notes:
        tell(note)
    return found


def _concept(
    config: TrainConfig, folder: Path, where: str, values: Mapping[str, Any], problems: list[str], notes: list[str]
) -> ConceptConfig:
    """What an entry makes of the run's configuration; paths are in the list's folder, or else in the current one."""
    known, base = schema_fields(ConceptConfig), config.values() | {"concepts_list": None, "reg_data_dir": None}
    settings = [Setting(key, value, where) for key, value in values.items()]
    for one in settings:
        name, path = canonical(one.name, known), one.value
        if name and known[name].is_path and isinstance(path, str) and path[:1] not in ("", "~"):
            beside = folder / path
            one.value = str(beside if beside.exists() or not Path(path).exists() else path)
    own, wrong, said = build(ConceptConfig, [settings], base)
    changed = {name: value for name, value in own.values().items() if value != base.get(name, value)}
    wrong += [
        f"{name} {value!r} is not the run's {base[name]!r}, which all share; give --{name}"
        for name, value in changed.items()
        if name == "prior_preservation" or (name not in _OWN and known[name].section not in _OWN_SECTIONS)
    ]
    # What the run's flags cannot do was said of them.
    said = [line for line in said if line.startswith(where) or re.split(r"\W+", line)[1] in changed]
    for lines, of_all in ((wrong, problems), (said, notes)):
        of_all += [line if line.startswith(where) else f"{where}: {line.lstrip('-')}" for line in lines]
    return own


def _of_file(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The subjects of a file: how messages name each, and its values by their own keys."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".toml":
            # Python 3.10 has no reader of its own; streamlit comes with one.
            content = import_module("tomllib" if sys.version_info >= (3, 11) else "toml").loads(text)
        else:
            content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--concepts_list {path}: {in_one_line(error)}{near(path)}") from error
    shared, kind = {}, "concept"
    try:
        match content:
            case {"datasets": datasets}:
                shared, kind = _OF_KOHYA, "subset"
                found = _entries({**content.get("general", {}), "datasets": datasets}, "datasets", "subsets")
            case {"data": {"concepts": _} as data}:
                found = _entries(data, "concepts")
            case _:
                found = _entries(content if isinstance(content, dict) else {"concepts": content}, "concepts")
    except (KeyError, TypeError):
        found = []
    if not found:
        raise ConfigError(f"{path}: expected a list of subjects as in docs/data.md, in JSON, YAML or kohya's TOML")
    return [(f"{path}: {kind} {number}", shared | _of_one(one)) for number, one in enumerate(found, 1)]


def _entries(values: Mapping[str, Any], key: str, *inner: str) -> list[dict[str, Any]]:
    """The entries of a list, or of lists within it, with what stands above them and not in them."""
    above_it = {name: value for name, value in values.items() if name != key}
    found = [{**above_it, **entry} for entry in values[key]]
    return [leaf for entry in found for leaf in _entries(entry, *inner)] if inner else found


def _flat(values: Mapping[str, Any], above_it: str = "") -> dict[str, Any]:
    """Values by their names, with a dot between those of a value in a value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inside = isinstance(value, dict) and value
        flat |= _flat(value, f"{above_it}{name}.") if inside else {f"{above_it}{name}": value}
    return flat


def _of_one(values: Mapping[str, Any]) -> dict[str, Any]:
    """An entry's values by fields or spellings; crosstyan's scripts say of subject and class if captions are read."""
    flat = _flat(values)
    if "batch_size" in flat:  # No spelling, since `sample` has a flag of that name.
        flat["train_batch_size"] = flat.pop("batch_size")
    combined = [role for role in ("instance", "class") if flat.pop(f"{role}_set.combine_prompt_from_txt", False)]
    return flat | ({"read_prompt_from_txt": combined[0] if len(combined) == 1 else "both"} if combined else {})


def _of_folders(path: Path, reg_data_dir: str | None, notes: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """The subjects and classes of folders named "10_sks dog", the same way."""
    found = []
    for folder in (path, *([Path(reg_data_dir)] if reg_data_dir else [])):
        inside = sorted(folder.glob("[!.]*/"))
        named = {one: match for one in inside if (match := _FOLDER.fullmatch(one.name))}
        if not named:
            raise ConfigError(f"{folder}: no folder named as 10_sks dog in it; of one subject give --instance_data_dir")
        if others := ", ".join(one.name for one in inside if one not in named):
            notes.append(f"{folder}: folders that are not named as 10_sks dog are left out: {others}")
        for one, (repeats, prompt) in ((one, match.groups()) for one, match in named.items()):
            own = {"image_dir": str(one), "num_repeats": repeats, "class_tokens": prompt, "is_reg": folder != path}
            found.append((str(one), _OF_KOHYA | own))
    return found
