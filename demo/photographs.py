"""What a training will see of a folder of photographs, and what is wrong with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance

from dreambooth_ms.data.pictures import MIN_SIDE, Frame, digest, find_pictures, open_picture, told
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import INSTANCE, Concept, Record
from dreambooth_ms.errors import DataError

THUMBNAIL_SIDE = 360
FEW, MANY = 3, 40
LOST_SHARE = 0.4
"""Above it, so much of a photograph is cut off that the subject may be."""


@dataclass(frozen=True)
class Photograph:
    """A picture of the subject, as the first pass of a training sees it."""

    path: Path
    size: tuple[int, int]
    thumbnail: Image.Image | None
    """The whole picture, dimmed where the crop leaves it out; None if it cannot be opened."""
    problems: tuple[str, ...]
    usable: bool


@dataclass(frozen=True)
class Look:
    """A folder, looked at."""

    photographs: tuple[Photograph, ...]
    remarks: tuple[str, ...]
    """On the folder as a whole."""

    @property
    def usable(self) -> bool:
        """Whether a training would start with it: `train` stops at the first picture that it cannot read."""
        return all(photograph.usable for photograph in self.photographs)


def look_at(folder: Path, resolution: int, center_crop: bool, seed: int) -> Look:
    """Open every photograph of a folder.

    Args:
        folder: what will be --instance_data_dir.
        resolution: side of the training pictures.
        center_crop: whether the middle is taken, or a random part.
        seed: the run's, which decides where random crops are.

    Raises:
        DataError: no such folder, or no picture in it.
    """
    found = find_pictures(folder)
    opened: dict[Path, Image.Image | str] = {path: _open(path) for path in found.pictures}
    records = tuple(
        Record(path, digest(path), image.size, captions=("",))
        for path, image in opened.items()
        if not isinstance(image, str)
    )
    frames = first_frames(records, resolution, center_crop, seed)
    photographs, seen = [], dict[str, str]()
    for path, image in opened.items():
        if isinstance(image, str):
            photographs.append(Photograph(path, (0, 0), None, (image,), usable=False))
            continue
        twin = seen.setdefault(digest(path), path.name)
        problems = _problems(image.size, resolution)
        if twin != path.name:
            problems.append(f"the same picture as {twin}: it will count twice")
        photographs.append(Photograph(path, image.size, _thumbnail(image, frames[path]), tuple(problems), usable=True))
    return Look(tuple(photographs), tuple(_remarks(len(records), told(found.notes))))


def first_frames(records: Sequence[Record], resolution: int, center_crop: bool, seed: int) -> dict[Path, Frame]:
    """How each picture is cropped in the first pass of a run with this seed: the training's own plan."""
    if not records:
        return {}
    framing = Framing(((resolution, resolution),), center_crop, random_flip=False)
    plan = Plan((Concept(INSTANCE, tuple(records)),), 1, framing, seed)
    return {view.record.path: view.frame for view in plan.views(0, len(records))}


def _open(path: Path) -> Image.Image | str:
    try:
        image = open_picture(path)
    except DataError as error:
        return str(error).replace(f"{path}: ", "", 1)
    if min(image.size) < MIN_SIDE:
        return f"{image.width}x{image.height} pixels are too few to learn from"
    return image


def _problems(size: tuple[int, int], resolution: int) -> list[str]:
    problems = []
    if min(size) < resolution:
        factor = resolution / min(size)
        problems.append(f"smaller than {resolution} pixels: enlarged {factor:.1f} times, it will be soft")
    lost = 1 - min(size) / max(size)
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


def _thumbnail(image: Image.Image, frame: Frame) -> Image.Image:
    """The picture in small, dimmed outside its crop, with a line around it."""
    (width, height), (across, down) = frame.resized, frame.size
    scale = THUMBNAIL_SIDE / max(width, height)
    small = image.resize((max(round(width * scale), 1), max(round(height * scale), 1)), Image.Resampling.LANCZOS)
    left, top = round(frame.left * scale), round(frame.top * scale)
    right, bottom = round((frame.left + across) * scale), round((frame.top + down) * scale)
    shown = ImageEnhance.Brightness(small).enhance(0.35)
    shown.paste(small.crop((left, top, right, bottom)), (left, top))
    ImageDraw.Draw(shown).rectangle((left, top, right - 1, bottom - 1), outline="white", width=2)
    return shown
