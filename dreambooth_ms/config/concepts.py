"""Several subjects: each has the run's configuration, with what `--concepts_list` says of it in place."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml

from dreambooth_ms.config.describe import schema_fields
from dreambooth_ms.config.load import build
from dreambooth_ms.config.ranges import above, at_least
from dreambooth_ms.config.sources import Setting, canonical, in_one_line
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError, near

_OWN_SECTIONS = ("captions", "prior", "concept")
_OWN = ("instance_data_dir", "instance_prompt", "mask_dir", "alpha_mask")
"""What may differ from subject to subject, with those sections but for with_prior_preservation."""

_FOLDER = re.compile(r"(\d+)_(.+)")
"""kohya's names of folders: repeats and prompt."""
_OF_KOHYA = {
    "batch_size": "train_batch_size",
    "class_tokens": "instance_prompt",
    "image_dir": "instance_data_dir",
    "num_repeats": "repeats",
}
_OF_SET = {"path": "{}_data_dir", "prompt": "{}_prompt", "prompt_combine_template": "prompt_template"}
_OF_GENERATOR = {
    "batch_size": "sample_batch_size",
    "cfg_scale": "guidance_scale",
    "negative_prompt": "class_negative_prompt",
    "num_target": "num_class_images",
    "steps": "infer_steps",
}
"""Keys in the files of kohya's and of crosstyan's scripts -> the fields that they are here."""


@dataclass(frozen=True, kw_only=True)
class ShareConfig:
    """What only a list says of a subject, and no flag."""

    repeats: Annotated[float, above(0)] = 1.0
    """How often its pictures come up beside those of the other subjects."""
    weight: Annotated[float, at_least(0)] = 1.0
    """Of its rows' error in the loss."""
    is_reg: bool = False
    """Whether it is a class, by itself."""
    may_lack_captions: bool = False
    """Whether a picture without a caption has the prompt."""


@dataclass(frozen=True, kw_only=True)
class ConceptConfig(TrainConfig):
    """A run's configuration as it is for one subject."""

    concept: ShareConfig = field(default_factory=ShareConfig)


class _Entry(NamedTuple):
    """What a list says of a subject."""

    where: str
    """File and place: how messages name it."""
    values: Mapping[str, Any]
    """By the list's own keys."""
    names: Mapping[str, str] = {}
    """Key -> the field that it is, where that has another name."""
    is_kohya: bool = False
    """Whether classes are entries of their own, and captions are read where they are."""


def concept_configs(config: TrainConfig, tell: Callable[[str], object]) -> list[ConceptConfig]:
    """Of each subject the configuration; without a list of the only one. Folders are not looked into.

    Raises:
        ConfigError: the list cannot be read, or every mistake in it, one line each.
    """
    if not config.data.concepts_list:
        return [ConceptConfig(**vars(config))]
    path, problems, notes = Path(config.data.concepts_list), list[str](), list[str]()
    found = []
    for entry in _entries(path, config.prior.reg_data_dir, notes):
        own, wrong, more = _of_entry(config, path.parent, entry)
        found.append(own)
        problems += wrong
        notes += more
    has_class = any(one.concept.is_reg or one.prior.folder for one in found)
    if has_class and not config.prior.with_prior_preservation:
        problems.append(f"{path}: has class pictures (is_reg); give --with_prior_preservation, or leave them out")
    if config.prior.with_prior_preservation and not (has_class or problems):
        problems.append(f"{path}: no class pictures for --with_prior_preservation; is_reg marks them in a file")
    if all(one.concept.is_reg for one in found):
        problems.append(f"{path}: expected a subject, got class pictures (is_reg) alone")
    if problems:
        raise ConfigError("\n".join(problems))
    for note in notes:
        tell(note)
    return found


def _of_entry(config: TrainConfig, folder: Path, entry: _Entry) -> tuple[ConceptConfig, list[str], list[str]]:
    """An entry's configuration, problems and notes; its paths are relative to the list's folder, or to the current."""
    known, where = schema_fields(ConceptConfig), entry.where
    settings = [Setting(entry.names.get(key, key), value, where) for key, value in entry.values.items()]
    for one in settings:
        name, path = canonical(one.name, known), str(one.value)
        if name and known[name].is_path and path[:1] not in ("", "~"):
            beside = folder / path
            one.value = str(beside if beside.exists() or not Path(path).exists() else path)
    base = config.values() | {"concepts_list": None, "reg_data_dir": None, "may_lack_captions": entry.is_kohya}
    if entry.is_kohya:
        base |= {"with_prior_preservation": False, "use_txt_as_label": True}
    own, problems, notes = build(ConceptConfig, [settings], base)
    values = own.values()
    changed = {name: value for name, value in values.items() if name in base and value != base[name]}
    problems += [
        f"{where}: {name} {value!r} is not the run's {base[name]!r}, which all share; give --{name}"
        for name, value in changed.items()
        if name == "with_prior_preservation" or not (name in _OWN or known[name].section in _OWN_SECTIONS)
    ]
    problems = [line if line.startswith(where) else f"{where}: {line}" for line in problems]
    for key, name in entry.names.items():
        problems = [re.sub(rf"(?<=: )(--)?{name}(?!\w)", key, line) for line in problems]
    # What the run's own flags cannot do was said before.
    notes = [line for line in notes if line.startswith(where) or line.lstrip("-").split()[0].rstrip(":") in changed]
    return own, problems, [line if line.startswith(where) else f"{where}: {line}" for line in notes]


def _entries(path: Path, reg_data_dir: str | None, notes: list[str]) -> list[_Entry]:
    """What a list has of each subject, whatever it is."""
    if path.is_dir():
        classes = _of_folders(Path(reg_data_dir), True, notes) if reg_data_dir else []
        return [*_of_folders(path, False, notes), *classes]
    if reg_data_dir:
        raise ConfigError(f"--reg_data_dir {reg_data_dir}: only goes with a folder of folders, and {path} is a file")
    content = _read(path)
    if isinstance(content, dict) and "datasets" in content:
        return _of_kohya(path, content)
    for key in ("data", "concepts"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not (isinstance(content, list) and content and all(isinstance(one, dict) for one in content)):
        raise ConfigError(
            f"{path}: expected a list of subjects, each with instance_data_dir and instance_prompt; "
            "docs/data.md shows what it may hold"
        )
    places = [f"{path}: concept {number}" for number in range(1, len(content) + 1)]
    return [_Entry(where, _of_sets(where, one)) for where, one in zip(places, content, strict=True)]


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".toml":
            # Python 3.10 has none of its own; streamlit comes with one.
            return import_module("tomllib" if sys.version_info >= (3, 11) else "toml").loads(text)
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--concepts_list {path}: {in_one_line(error)}{near(path)}") from error


def _of_folders(folder: Path, is_reg: bool, notes: list[str]) -> list[_Entry]:
    """Folders named "10_sks dog" in a folder."""
    if not folder.is_dir():
        raise ConfigError(f"--reg_data_dir {folder}: no such folder{near(folder)}")
    inside = sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    named = [(one, match) for one in inside if (match := _FOLDER.fullmatch(one.name))]
    if not named:
        raise ConfigError(f"{folder}: no folder named as 10_sks dog in it; of one subject give --instance_data_dir")
    if others := [one.name for one in inside if not _FOLDER.fullmatch(one.name)]:
        notes.append(f"{folder}: left out folders that are not named as 10_sks dog: {', '.join(others)}")
    return [
        _Entry(str(one), {"image_dir": one, "num_repeats": match[1], "class_tokens": match[2], "is_reg": is_reg},
               _OF_KOHYA, True)
        for one, match in named
    ]  # fmt: skip


def _of_kohya(path: Path, content: Mapping[str, Any]) -> list[_Entry]:
    """The subsets of a dataset_config: what stands at one wins over its data set, and that over [general]."""
    try:
        subsets = [
            {**content.get("general", {}), **{key: dataset[key] for key in dataset if key != "subsets"}, **subset}
            for dataset in content["datasets"]
            for subset in dataset["subsets"]
        ]
    except (AttributeError, KeyError, TypeError):
        subsets = []
    if not subsets:
        raise ConfigError(f"{path}: expected [[datasets]] with [[datasets.subsets]] in each")
    return [
        _Entry(f"{path}: subset {number}", {key: _sides(value) for key, value in one.items()}, _OF_KOHYA, True)
        for number, one in enumerate(subsets, 1)
    ]


def _sides(value: Any) -> Any:
    """[512, 512] as a flag has it."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _of_sets(where: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry by the names of flags; crosstyan's scripts have a set of pictures and one of the class in it."""
    values, combined = dict(entry), []
    for role in ("instance", "class"):
        own = values.pop(f"{role}_set", None) or {}
        if not isinstance(own, dict) or not isinstance(own.get("auto_generate", {}), dict):
            raise ConfigError(f"{where}: {role}_set: expected keys such as path and prompt")
        generator = own.pop("auto_generate", {})
        if not generator.pop("enabled", True):
            raise ConfigError(f"{where}: {role}_set: expected auto_generate.enabled true; what is missing is generated")
        combined += [role] if own.pop("combine_prompt_from_txt", False) else []
        named = [(_OF_SET.get(key, f"{role}_set.{key}").format(role), value) for key, value in own.items()]
        named += [(_OF_GENERATOR.get(key, f"auto_generate.{key}"), value) for key, value in generator.items()]
        for name, value in named:
            if values.setdefault(name, value) != value:
                raise ConfigError(f"{where}: {name} is {values[name]!r} and {value!r}; there is one for both sets")
    if combined:
        values["read_prompt_from_txt"] = "both" if len(combined) == 2 else combined[0]
    return values
