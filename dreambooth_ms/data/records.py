"""From folders to concepts: each a set of pictures that is learnt as one thing, with all that a row needs of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from dreambooth_ms.config.train import PriorConfig
from dreambooth_ms.data.captions import PROMPT_ALONE, Captioning, Wording
from dreambooth_ms.data.looks import NOT_MEASURED, Looks, looks_of
from dreambooth_ms.data.masks import Mask, find_mask
from dreambooth_ms.data.pictures import CAPTIONS, MIN_SIDE, Size, digest, find_pictures, read_picture, told
from dreambooth_ms.errors import DataError, Tell, count_of, near, show_names

INSTANCE, CLASS = "instance", "class"


@dataclass(frozen=True, slots=True)
class Record:
    """A picture with its own captions."""

    path: Path
    digest: str
    """SHA-256 of the file, and of what else decides its pixels: what caches are keyed by."""
    size: Size
    """Upright, in pixels."""
    captions: tuple[str, ...]
    """One, or several of which each row draws one."""
    mask: Mask | None = None
    """Where the error counts; None: everywhere."""
    background: str = "white"
    """What it is put on where it is transparent."""
    looks: Looks = field(default=NOT_MEASURED, compare=False)
    """What is measured of it."""


@dataclass(frozen=True)
class Concept:
    """What is learnt as one thing: a subject, or its class."""

    name: str
    """Names the loss in logs, and the draws of its rows: INSTANCE, CLASS or another."""
    records: tuple[Record, ...]
    weight: float = 1.0
    """Of its rows' mean error in the loss."""
    group: str = ""
    """Concepts of one group share the rows that it has in every batch. Empty: it has as many by itself."""
    repeats: Fraction = Fraction(1)
    """How often its pictures come up beside those of the other concepts in the group."""
    wording: Wording | None = None
    """How rows vary its prompts."""
    drawn_as: str = ""
    """The concept with the same pictures whose draws its rows have too, under a prompt of its own; empty: none."""

    @property
    def has_captions(self) -> bool:
        """Whether its pictures have prompts of their own."""
        return len({record.captions for record in self.records}) > 1


@dataclass(frozen=True)
class Source:
    """Where a concept's pictures and prompts come from."""

    folder: Path
    prompt: str
    concept: Concept = Concept(INSTANCE, ())
    """As it is but for its pictures."""
    captioning: Captioning = PROMPT_ALONE
    generated: PriorConfig | None = None
    """Of a class how its pictures are generated, and how many of the folder's are used; None: all that are there."""
    count: int | None = None
    """How many pictures there must be, of which no more are used; None: as many as there are."""
    background: str = "white"
    """What transparent pictures are put on."""
    masked: bool = False
    """Whether each picture has a mask,"""
    mask_folder: Path | None = None
    """in this folder; None: its opacity."""

    @property
    def settings(self) -> dict[str, str]:
        """What decides its rows beside its pictures, under names for people."""
        one = self.concept
        values = {"prompt": self.prompt, "weight": one.weight, "repeats": one.repeats, "wording": one.wording}
        return {f"{key} of {one.name}": f"{key} of {one.name}: {value}" for key, value in values.items()}

    def records(self, tell: Tell) -> tuple[Record, ...]:
        """Its pictures in natural order. Every one is opened once, so that a damaged file is found before the training
        starts; what is not used, or not as it is, is told in one line for each kind. Raises DataError if there is no
        usable folder, or of damaged pictures and missing captions, one line each."""
        found, notes = find_pictures(self.folder)
        if self.mask_folder and not self.mask_folder.is_dir():
            raise DataError(f"--mask_dir {self.mask_folder}: no such folder{near(self.mask_folder)}")
        pictures = found[: self.generated.num_class_images if self.generated else self.count]
        if len(pictures) < (self.count or 0):
            raise DataError(
                f"{self.folder}: {count_of(len(pictures), 'picture')}, expected --num_class_images {self.count} for "
                "--real_prior; put more there with their captions, or lower it"
            )
        notes |= {} if self.captioning == PROMPT_ALONE else {CAPTIONS: []}
        records, problems = list[Record](), list[str]()
        prompts: list[tuple[str, ...]] = [(self.prompt,)] * len(pictures)
        try:
            prompts = self.captioning.prompts(pictures, self.prompt)
        except DataError as error:
            problems.append(str(error))
        for path, captions in zip(pictures, prompts, strict=True):
            try:
                opened = read_picture(path, self.background)
                sha256, (width, height) = digest(path, opened.reading), opened.picture.size
                if min(width, height) < MIN_SIDE:
                    raise DataError(
                        f"{path}: {width}x{height} pixels are too few to learn from; use a larger picture or remove it"
                    )
                mask = find_mask(path, self.mask_folder, (width, height)) if self.masked else None
                looks = looks_of(opened.picture)
                records.append(Record(path, sha256, (width, height), captions, mask, self.background, looks))
                for note in opened.notes:
                    notes.setdefault(note, []).append(path)
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError("\n".join(problems))
        for line in told(notes):
            tell(line)
        return tuple(records)


def photographs_in(folders: Mapping[str, str], background: str, tell: Tell) -> dict[str, tuple[Record, ...]]:
    """Photographs by the flags of their folders. Raises DataError if a folder has none, or damaged ones; or if some are
    in the first folder, too."""
    found = {flag: Source(Path(own), "", background=background).records(tell) for flag, own in folders.items()}
    given, *others = found
    digests = {record.digest for record in found[given]}
    for flag in others:
        if twice := [record.path.name for record in found[flag] if record.digest in digests]:
            raise DataError(f"--{flag}: {show_names(twice)} is in --{given}, too; take it out of one of them")
    return found
