"""Which prompts a picture has, by what lies beside it; and what of its prompt each row reads."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.config.train import CAPTIONS
from dreambooth_ms.data.pictures import CAPTION_FILES, CAPTION_SUFFIXES, told
from dreambooth_ms.errors import DataError

PROMPT = "{PROMPT}"
"""What stands in a template for the concept's prompt."""
FILE_NAME = "file_name"
"""The column of metadata that names the picture, as in data sets of the hub."""


@dataclass(frozen=True)
class Captioning:
    """Where the prompts of a concept's pictures come from: captions beside them, then their names, then its prompt."""

    from_files: bool = False
    """dog.txt, dog.png.txt or dog.caption beside dog.png, with a caption in each line."""
    from_lists: bool = False
    """Those files are caption.txt above the folder, and images.txt beside it, which names the picture of each line."""
    column: str | None = None
    """Of metadata.jsonl or metadata.csv in the folder, which has a row for each picture; in place of files."""
    from_names: bool = False
    """A picture's name without its suffix."""
    template: str = CAPTIONS[0]
    """How a caption becomes a prompt."""
    may_lack: bool = False
    """Whether a picture without a caption has the concept's prompt."""

    def prompts(self, pictures: Sequence[Path], prompt: str) -> list[tuple[str, ...]]:
        """Of each picture of a folder its prompts, of which each row draws one. Raises DataError if captions are
        missing, empty or no text, or there is no such metadata."""
        captions = {path: [path.stem] for path in pictures} if self.from_names else {}
        if self.column or self.from_files:
            where, read = "a text such as dog.txt beside dog.png", _captions_of_files
            if self.from_lists:
                where, read = "a line in images.txt", _captions_of_lists
            if self.column:
                where, read = f"a {self.column!r} in the metadata", partial(_captions_of_metadata, column=self.column)
            captions |= read(pictures)
            without = [path for path in pictures if path not in captions and not (self.may_lack and prompt)]
            _refuse({f"no caption, expected {where}": without})
        filled = ([self._prompt(prompt, one) for one in captions.get(path, ())] for path in pictures)
        return [tuple(dict.fromkeys(own)) or (prompt,) for own in filled]

    def _prompt(self, prompt: str, caption: str) -> str:
        """The template filled in one go: what a caption holds is no place of it."""
        values = {PROMPT: prompt} | dict.fromkeys(CAPTIONS, caption)
        return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], self.template)


PROMPT_ALONE = Captioning()


@dataclass(frozen=True)
class Wording:
    """How rows vary the prompts that they read, as kohya's trainers do."""

    dropout: float = 0.0
    """Share of rows that read the empty prompt."""
    shuffles: bool = False
    """Whether the parts between commas come in an order of the row's own."""
    kept: int = 0
    """Parts at the beginning that stay where they are."""

    def of_row(self, prompt: str, rng: np.random.Generator) -> str:
        """What a row with this generator reads."""
        if rng.random() < self.dropout:
            return ""
        if not self.shuffles:
            return prompt
        parts = [part.strip() for part in prompt.split(",")]
        moved = parts[self.kept :]
        return ", ".join([*parts[: self.kept], *(moved[i] for i in rng.permutation(len(moved)))])


def caption_files(picture: Path) -> list[Path]:
    """The files beside a picture that hold captions of it; the first is read."""
    stems = picture.stem, picture.name
    beside = [picture.with_name(stem + suffix) for stem in stems for suffix in CAPTION_SUFFIXES]
    return [file for file in beside if file.is_file()]


def _captions_of_files(pictures: Sequence[Path]) -> dict[Path, list[str]]:
    files = {path: beside[0] for path in pictures if (beside := caption_files(path))}
    found = {path: [line.strip() for line in _text(file).splitlines() if line.strip()] for path, file in files.items()}
    _refuse({"empty captions": [file for path, file in files.items() if not found[path]]})
    return found


def _captions_of_lists(pictures: Sequence[Path]) -> dict[Path, list[str]]:
    files = [pictures[0].parents[1] / name for name in ("images.txt", "caption.txt")]
    names, captions = ([line.strip() for line in _text(file).strip().split("\n")] for file in files)
    if len(names) != len(captions):
        raise DataError(f"{files[1]}: {len(captions)} lines, {len(names)} in images.txt; each goes with one there")
    by_name = {Path(name).name: caption for name, caption in zip(names, captions, strict=True)}
    return {path: [by_name[path.name]] for path in pictures if by_name.get(path.name)}


def _captions_of_metadata(pictures: Sequence[Path], column: str) -> dict[Path, list[str]]:
    folder = pictures[0].parent
    # That of a data set may stand above its folders.
    places = (place / name for place in (folder, folder.parent) for name in CAPTION_FILES)
    file = next(filter(Path.is_file, places), None)
    if file is None:
        raise DataError(f"--caption_column {column}: {folder} has none of {', '.join(CAPTION_FILES)}")
    rows = read_rows(file)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if lacking := {FILE_NAME, column}.difference(columns):
        raise DataError(f"{file}: no column {', '.join(sorted(lacking))}; it has {', '.join(columns) or 'no rows'}")
    by_name = {str(row.get(FILE_NAME)): row.get(column) for row in rows}
    names = {path: path.relative_to(file.parent).as_posix() for path in pictures}
    values = {path: by_name[name] for path, name in names.items() if name in by_name}
    found = {path: value if isinstance(value, list) else [value] for path, value in values.items()}
    texts = {path: [one.strip() for one in own if isinstance(one, str) and one.strip()] for path, own in found.items()}
    odd = [path for path, own in found.items() if len(texts[path]) < max(len(own), 1)]
    _refuse({f"empty or not text in column {column} of {file.name}": odd})
    return texts


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of metadata.jsonl or metadata.csv, by their columns."""
    text = _text(file)
    if file.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}: line {number} is not an object of columns")
        rows += [row] if row else []
    return rows


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; save it again as UTF-8") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _refuse(problems: Mapping[str, Sequence[Path]]) -> None:
    if lines := told(problems):
        raise DataError("\n".join(lines))
