"""Sets of subjects: a folder of photographs of each, its class, and prompts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dreambooth_ms.config.load import did_you_mean, in_one_line, suggestions
from dreambooth_ms.errors import ConfigError, near

TOKEN, CLASS_NAME = "{token}", "{class}"
"""What stands in a prompt for the name of a subject and for that of its class."""
LISTS = ("prompts_and_classes.txt", "subjects.yaml", "subjects.json")
LIVE = ("cat", "dog")
"""Classes of google/dreambooth that have the prompts for live subjects."""


@dataclass(frozen=True)
class Subject:
    """A subject of a set, whose prompts are still to be filled in."""

    name: str
    folder: Path
    class_name: str
    prompts: tuple[str, ...]

    def filled(self, text: str, token: str) -> str:
        """A text with both names in their places."""
        return text.replace(TOKEN, token).replace(CLASS_NAME, self.class_name)


def read_subjects(folder: Path, chosen: Sequence[str], prompts: Sequence[str] | None) -> list[Subject]:
    """The subjects of a set, all or those that are chosen, with these prompts or those of the set.

    Its list is as in google/dreambooth, there or in `dataset`, or has `classes`, subject: class, and `prompts`, for all
    or subject: prompts. Photographs are not looked for. Raises ConfigError if there is no list, or of every mistake in
    it, one line each.
    """
    files = [place / name for place in (folder, folder / "dataset") for name in LISTS]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        raise ConfigError(f"--subjects_dir {folder}: expected one of {', '.join(LISTS)} in it{near(folder)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = _published(text) if file.suffix == ".txt" else yaml.safe_load(text)
        classes, listed = {str(name): str(one) for name, one in content["classes"].items()}, content.get("prompts", ())
        found = [
            Subject(name, file.parent / name, classes[name], tuple(prompts or own or ()))
            for name in chosen or classes
            if name in classes
            for own in [listed.get(name) if isinstance(listed, dict) else listed]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = in_one_line(error)
        raise ConfigError(f"{file}: expected classes and prompts as docs/learning.md has them ({reason})") from error
    unknown = [name for name in chosen if name not in classes]
    problems = [f"--subjects {name}: {file} has none{did_you_mean(suggestions(name, classes))}" for name in unknown]
    problems += [
        f"{file}: expected prompts of {one.name} with {TOKEN} in each, got {one.prompts}"
        for one in found
        if not one.prompts or any(TOKEN not in str(prompt) for prompt in one.prompts)
    ]
    if problems or not found:
        raise ConfigError("\n".join(problems) or f"{file}: there is no subject in it")
    return found


def _published(text: str) -> dict[str, Any]:
    """google/dreambooth's list: a table, and as Python its prompts for objects and for live subjects."""
    classes = dict(re.findall(r"(?m)^(\w+),(.+?)\s*$", text.partition("subject_name,class")[2]))
    objects, live = (
        [prompt.replace("{0}", TOKEN).replace("{1}", CLASS_NAME) for prompt in re.findall(r"'(.+)'\.format", part)]
        for part in text.split("Live Subject Prompts")
    )
    return {"classes": classes, "prompts": {name: live if one in LIVE else objects for name, one in classes.items()}}
