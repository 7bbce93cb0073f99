"""What a training will see of a folder of photographs, and what is wrong with them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageEnhance

from demo.subjects import Pictures
from dreambooth_ms.data.masks import find_mask, read_mask
from dreambooth_ms.data.pictures import (
    CAPTION_SUFFIXES,
    CAPTIONS,
    MIN_SIDE,
    Frame,
    digest,
    find_pictures,
    open_picture,
    told,
)
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import INSTANCE, Concept, Record
from dreambooth_ms.errors import DataError

THUMBNAIL_SIDE = 360
RED = (200, 40, 40)
FEW, MANY = 3, 40
LOST_SHARE = 0.4
"""Above it, so much of a photograph is cut off that the subject may be."""


@dataclass(frozen=True)
class Photograph:
    """A picture of a subject, as the first pass of a training sees it."""

    path: Path
    size: tuple[int, int]
    thumbnail: Image.Image | None
    """The whole picture, dimmed where the crop leaves it out and red where its mask does; None if it cannot be opened.
    """
    caption: str
    """What lies beside it; empty if nothing does."""
    problems: tuple[str, ...]
    usable: bool


@dataclass(frozen=True)
class Look:
    """A subject's folder, looked at."""

    photographs: tuple[Photograph, ...]
    remarks: tuple[str, ...]
    """On the folder as a whole."""

    @property
    def usable(self) -> bool:
        """Whether a training would start with it: `train` stops at the first picture that it cannot read."""
        return all(photograph.usable for photograph in self.photographs)


def look_at(subjects: Sequence[Pictures], framing: Framing, seed: int) -> tuple[list[Look], Plan | None]:
    """Open every photograph of the subjects of a training.

    Args:
        subjects: where they are.
        framing: which sizes the training has, and whether the middle is taken or a random part.
        seed: the run's, which decides where random crops are.

    Returns:
        A look at each subject, and the run's plan, None without a picture that can be used.

    Raises:
        DataError: no such folder, or no picture in it.
    """
    found = [find_pictures(subject.folder) for subject in subjects]
    opened = [{path: _open(path, own) for path in paths} for own, (paths, _) in zip(subjects, found, strict=True)]
    plan = plan_of([[one.record for one in own.values() if not isinstance(one, str)] for own in opened], framing, seed)
    frames = first_frames(plan) if plan else {}
    looks = []
    for number, ((_, notes), own) in enumerate(zip(found, opened, strict=True)):
        seen = dict[str, str]()
        photographs = [
            Photograph(path, (0, 0), None, "", (one,), usable=False)
            if isinstance(one, str)
            else _photograph(one, frames[concept_name(number), path], seen)
            for path, one in own.items()
        ]
        remarks = _remarks(sum(photograph.usable for photograph in photographs), told(notes | {CAPTIONS: []}))
        looks.append(Look(tuple(photographs), tuple(remarks)))
    return looks, plan


def concept_name(subject: int) -> str:
    """How a run calls a subject, counted from 0."""
    return INSTANCE if subject == 0 else f"{INSTANCE}_{subject + 1}"


def plan_of(subjects: Sequence[Sequence[Record]], framing: Framing, seed: int) -> Plan | None:
    """The plan of a run, a picture in each batch; None if there is no picture."""
    concepts = [Concept(concept_name(n), tuple(own), group=INSTANCE) for n, own in enumerate(subjects) if own]
    return Plan(tuple(concepts), 1, framing, seed) if concepts else None


def first_frames(plan: Plan) -> dict[tuple[str, Path], Frame]:
    """How each picture of each subject is cropped when it comes up first, by the subject's name and its path."""
    frames = dict[tuple[str, Path], Frame]()
    numbers = itertools.count()
    while len(frames) < sum(len(concept.records) for concept in plan.concepts):
        for row in plan.rows(next(numbers)):
            frames.setdefault((row.concept.name, row.view.record.path), row.view.frame)
    return frames


class _Opened(NamedTuple):
    image: Image.Image
    record: Record


def _open(path: Path, pictures: Pictures) -> _Opened | str:
    """A photograph, or what is wrong with it."""
    try:
        image = open_picture(path)
        if min(image.size) < MIN_SIDE:
            return f"{image.width}x{image.height} pixels are too few to learn from"
        if pictures.masks and not any(one.stem == path.stem for one in pictures.masks.glob("*")):
            return "no mask of its name"
        mask = find_mask(path, pictures.masks, image.size) if pictures.masked else None
        return _Opened(image, Record(path, digest(path), image.size, captions=("",), mask=mask))
    except DataError as error:
        text = str(error).replace(f"{path}: ", "", 1)
        return text.replace(f"{pictures.masks}/", "the mask ")


def _photograph(opened: _Opened, frame: Frame, seen: dict[str, str]) -> Photograph:
    (image, record), name = opened, opened.record.path.name
    problems = _problems(image.size, frame)
    if (twin := seen.setdefault(record.digest, name)) != name:
        problems.append(f"the same picture as {twin}: it will count twice")
    thumbnail = _thumbnail(image, frame, read_mask(record.mask) if record.mask else None)
    return Photograph(record.path, image.size, thumbnail, _caption(record.path), tuple(problems), usable=True)


def _caption(path: Path) -> str:
    beside = [make for suffix in CAPTION_SUFFIXES for make in (path.with_suffix(suffix), Path(f"{path}{suffix}"))]
    file = next((one for one in beside if one.is_file()), None)
    return file.read_text(encoding="utf-8-sig", errors="replace").strip() if file else ""


def _problems(size: tuple[int, int], frame: Frame) -> list[str]:
    problems, (width, height) = [], frame.resized
    if width > size[0]:
        smallest = min(frame.size)
        problems.append(f"smaller than {smallest} pixels: enlarged {width / size[0]:.1f} times, it will be soft")
    lost = 1 - frame.size[0] * frame.size[1] / (width * height)
    if lost > LOST_SHARE:
        problems.append(f"{lost:.0%} of it is cut off; crop it to the subject yourself")
    return problems


def _remarks(count: int, unused: Sequence[str]) -> list[str]:
    remarks = []
    if count < FEW:
        remarks.append(f"Only {count} usable: three to ten photographs from several sides teach more.")
    if count > MANY:
        remarks.append(f"{count} photographs are many for one subject; ten good ones are enough.")
    return remarks + [line.partition(": ")[2].capitalize() + "." for line in unused]


def _thumbnail(image: Image.Image, frame: Frame, mask: Image.Image | None) -> Image.Image:
    """The picture in small, dimmed outside its crop, with a line around it, and red where the mask has it not count."""
    (width, height), (across, down) = frame.resized, frame.size
    scale = THUMBNAIL_SIDE / max(width, height)
    small = image.resize((max(round(width * scale), 1), max(round(height * scale), 1)), Image.Resampling.LANCZOS)
    if mask is not None:
        tinted = Image.blend(small, Image.new("RGB", small.size, RED), 0.6)
        small = Image.composite(small, tinted, mask.resize(small.size))
    left, top = round(frame.left * scale), round(frame.top * scale)
    right, bottom = round((frame.left + across) * scale), round((frame.top + down) * scale)
    shown = ImageEnhance.Brightness(small).enhance(0.35)
    shown.paste(small.crop((left, top, right, bottom)), (left, top))
    ImageDraw.Draw(shown).rectangle((left, top, right - 1, bottom - 1), outline="white", width=2)
    return shown
