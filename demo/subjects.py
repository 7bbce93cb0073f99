"""The subjects of a training: as they are filled in, and as the files and settings that `dreambooth-ms train` reads."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

CONCEPTS = "concepts.json"


class Pictures(NamedTuple):
    """A subject's photographs, and what of them counts."""

    folder: Path
    masked: bool = False
    """Whether each has a mask,"""
    masks: Path | None = None
    """in this folder; None: its opacity."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is filled in about one."""

    pictures: Pictures
    prompt: str
    class_prompt: str | None = None
    """None: without prior preservation."""
    captions: Mapping[str, str] = field(default_factory=dict)
    """By the names of the photographs; none: all have the prompt."""
    is_uploaded: bool = False


def settings(subjects: Sequence[Subject], target: Path) -> list[dict[str, Any]]:
    """Of each subject the settings in a run's folder, by the names of flags; None for one that is left out."""
    # Subjects of one class share its pictures.
    classes = [subject.class_prompt for subject in subjects]
    return [_settings(one, target, number, classes.index(one.class_prompt)) for number, one in enumerate(subjects)]


def _settings(subject: Subject, target: Path, number: int, of_class: int) -> dict[str, Any]:
    own = subject.pictures
    return {
        "instance_data_dir": _in(target, "photographs", number) if _is_copied(subject) else own.folder,
        "instance_prompt": subject.prompt,
        "class_data_dir": None if subject.class_prompt is None else _in(target, "class_images", of_class),
        "class_prompt": subject.class_prompt,
        "use_txt_as_label": True if subject.captions else None,
        "mask_dir": _in(target, "masks", number) if own.masks else None,
        "alpha_mask": True if own.masked and not own.masks else None,
    }


def write(subjects: Sequence[Subject], target: Path) -> None:
    """Copy into a run's folder what was uploaded or written, and the list of the subjects if they are several."""
    target.mkdir(parents=True, exist_ok=True)
    for number, subject in enumerate(subjects):
        if _is_copied(subject):
            _copy(subject, _in(target, "photographs", number))
        if subject.pictures.masks:
            shutil.copytree(subject.pictures.masks, _in(target, "masks", number))
    if len(subjects) > 1:
        listed = [
            {name: value if isinstance(value, bool) else str(value) for name, value in own.items() if value is not None}
            for own in settings(subjects, target)
        ]
        (target / CONCEPTS).write_text(json.dumps(listed, indent=1, ensure_ascii=False), encoding="utf-8")


def _is_copied(subject: Subject) -> bool:
    """What is uploaded is gone with the page, and no caption is written into a folder of the user's own."""
    return subject.is_uploaded or bool(subject.captions)


def _copy(subject: Subject, folder: Path) -> None:
    """The photographs with their captions beside them; one without has the subject's prompt."""
    if not subject.captions:
        shutil.copytree(subject.pictures.folder, folder)
        return
    folder.mkdir(parents=True)
    for name, caption in subject.captions.items():
        shutil.copyfile(subject.pictures.folder / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption.strip() or subject.prompt, encoding="utf-8")


def _in(target: Path, name: str, number: int) -> Path:
    return target / (name if number == 0 else f"{name}-{number + 1}")
