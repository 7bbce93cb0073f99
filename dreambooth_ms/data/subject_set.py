"""Sets of subjects: a folder of photographs of each, its class, and prompts."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dreambooth_ms.config.load import in_one_line
from dreambooth_ms.errors import ConfigError, near

TOKEN, CLASS_NAME = "{token}", "{class}"
LISTS = ("prompts_and_classes.txt", "subjects.yaml", "subjects.json")
LIVE = ("cat", "dog")
"""Classes of google/dreambooth that have the prompts for live subjects."""


class Subject(NamedTuple):
    """A subject of a set, with prompts in which TOKEN stands for its name, and CLASS_NAME for that of its class."""

    name: str
    folder: Path
    class_name: str
    prompts: tuple[str, ...]

    def filled(self, text: str, token: str) -> str:
        """A text with both names in their places."""
        return text.replace(TOKEN, token).replace(CLASS_NAME, self.class_name)


def read_subjects(folder: Path, chosen: Sequence[str], prompts: Sequence[str] | None) -> list[Subject]:
    """The subjects of a set, all or those that are chosen, with these prompts or those of the set. Its list is as in
    google/dreambooth, there or in `dataset`, or has `classes`, subject: class, and `prompts`, for all or subject:
    prompts. Photographs are not looked for. Raises ConfigError if there is no such list."""
    files = [place / name for place in (folder, folder / "dataset") for name in LISTS]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        raise ConfigError(f"--subjects_dir {folder}: expected one of {', '.join(LISTS)} in it{near(folder)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = _published(text) if file.suffix == ".txt" else yaml.safe_load(text)
        classes, own = {str(name): str(one) for name, one in content["classes"].items()}, content.get("prompts") or ()
        named = {name: tuple(prompts or (own.get(name) if isinstance(own, dict) else own) or ()) for name in classes}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: no classes and prompts as in docs/learning.md ({in_one_line(error)})") from error
    if unknown := [name for name in chosen if name not in classes] or (not classes and ["any subject"]):
        raise ConfigError(f"--subjects: {file} has not {', '.join(unknown)}; it has {', '.join(classes) or 'none'}")
    found = [Subject(name, file.parent / name, classes[name], named[name]) for name in chosen or classes]
    for one in found:
        if not one.prompts or any(TOKEN not in str(prompt) for prompt in one.prompts):
            raise ConfigError(f"{file}: expected prompts of {one.name} with {TOKEN} in each, got {one.prompts}")
    return found


def _published(text: str) -> dict[str, Any]:
    """google/dreambooth's list: a table, and as Python its prompts for objects and for live subjects."""
    classes = dict(re.findall(r"(?m)^(\w+),(.+?)\s*$", text.partition("subject_name,class")[2]))
    objects, live = (
        [prompt.replace("{0}", TOKEN).replace("{1}", CLASS_NAME) for prompt in re.findall(r"'(.+)'\.format", part)]
        for part in text.split("Live Subject Prompts")
    )
    return {"classes": classes, "prompts": {name: live if one in LIVE else objects for name, one in classes.items()}}
