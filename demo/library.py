"""The models, LoRAs and runs that a page may use: those in the folders of its command line, and nothing else."""

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from demo.messages import ModelChoice
from dreambooth_ms.adapters.file import CUSTOM_DIFFUSION, FILE_NAME, PEFT_CONFIG, holds_adapter
from dreambooth_ms.adapters.word_files import read_words
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.pictures import looks_like_a_picture
from dreambooth_ms.errors import DataError, UserError, WeightError
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.folder_layout import INDEX
from dreambooth_ms.formats.naming.recognise import word_in
from dreambooth_ms.models.specs import Family
from dreambooth_ms.weights.opened_model import open_model

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
RUN_CONFIG = "config.yaml"
ADAPTERS = (FILE_NAME, CUSTOM_DIFFUSION, PEFT_CONFIG)
"""What a folder is an adapter by."""
DEPTH, ENTRIES = 4, 20_000
"""How deep and how wide folders are searched, so that a page opens soon whatever they hold."""

_WITHOUT_RESULTS = ("checkpoint-", "cache", "logs", "validation", "class_images", "photographs", "masks", "__pycache__")
"""How the folders of a run begin that hold no result, but what it was made of."""


@dataclass(frozen=True)
class Places:
    """The folders of a page."""

    readable: tuple[Path, ...]
    """Where models, LoRAs and photographs may be."""
    runs: Path
    """Where trainings are written; readable too."""

    @classmethod
    def of(cls, folders: list[Path], runs: Path) -> "Places":
        """Folders as they are named on a command line."""
        resolved = dict.fromkeys(folder.expanduser().resolve() for folder in [*folders, runs])
        return cls(tuple(resolved), runs.expanduser().resolve())

    def confined(self, name: str) -> Path:
        """The path that a user wrote, if it is in one of the folders after links and `..` are followed.

        Raises:
            DataError: it is outside, or there is no such file or folder.
        """
        try:
            path = Path(os.path.expanduser(name.strip())).resolve()
            inside = any(path.is_relative_to(folder) for folder in self.readable)
            exists = inside and path.exists()
        except (OSError, ValueError, RuntimeError):
            raise DataError(f"{name}: not a path; give one in {self.listed()}") from None
        if not inside:
            folder = path.parent if path.suffix else path
            raise DataError(
                f"{name}: outside the folders of this page ({self.listed()}); to add it, start the page with "
                f"`streamlit run demo/sampling.py -- --folder {shlex.quote(str(folder))}`"
            )
        if not exists:
            raise DataError(f"{name}: no such file or folder")
        return path

    def listed(self) -> str:
        """The folders, for a sentence."""
        return ", ".join(map(str, self.readable))

    def label(self, path: Path) -> str:
        """A path as a page shows it: without the page's folder that it is in, but for runs; as the hub calls it."""
        if path.is_relative_to(self.runs) and path != self.runs:
            return str(Path(self.runs.name) / path.relative_to(self.runs))
        for folder in self.readable:
            if path.is_relative_to(folder) and path != folder:
                top, *others = path.relative_to(folder).parts
                is_of_hub = top.startswith("models--") and others[:1] == ["snapshots"]
                return "/".join([*top.split("--")[1:], *others[2:]] if is_of_hub else [top, *others])
        return path.name


@dataclass(frozen=True)
class Shelf:
    """What was found."""

    models: tuple[Path, ...]
    loras: tuple[Path, ...]
    """The newest first."""
    embeddings: tuple[Path, ...] = ()
    """Of new words alone, the newest first."""

    @property
    def adapters(self) -> tuple[Path, ...]:
        """All that is put on a model, the newest first."""
        return tuple(sorted(self.loras + self.embeddings, key=_time, reverse=True))


def find(places: Places) -> Shelf:
    """The models, LoRAs and embeddings in a page's folders. Whether they are whole shows when they are opened."""
    kinds = dict.fromkeys(item for folder in places.readable for item in _search(folder, DEPTH, [ENTRIES]))
    models = [path for kind, path in kinds if kind == "model"]
    loras, words = (
        tuple(sorted((path for kind, path in kinds if kind == wanted), key=_time, reverse=True))
        for wanted in ("lora", "words")
    )
    return Shelf(tuple(models), loras, words)


def find_photographs(places: Places) -> list[Path]:
    """The folders that hold pictures, but for what runs have sampled."""
    return [folder for place in places.readable for folder in _picture_folders(place, 2)]


def _picture_folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())[:ENTRIES]
    except OSError:
        return
    if (folder / INDEX).exists() or (folder / RUN_CONFIG).exists():
        return
    if any(looks_like_a_picture(path) for path in entries):
        yield folder
    for path in entries if depth else []:
        if path.is_dir() and not path.is_symlink() and not path.name.startswith((".", *_WITHOUT_RESULTS)):
            yield from _picture_folders(path, depth - 1)


def _search(folder: Path, depth: int, left: list[int]) -> Iterator[tuple[str, Path]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    names = {entry.name for entry in entries}
    if INDEX in names:
        yield "model", folder
        return
    is_adapter = not names.isdisjoint(ADAPTERS)
    # Of a run the folder, in which all its words are.
    is_run_of_words = not is_adapter and RUN_CONFIG in names and bool(words_of(folder))
    if is_adapter or is_run_of_words:
        yield ("lora" if is_adapter else "words"), folder
    for entry in entries[: left[0]]:
        left[0] -= 1
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth and not entry.name.startswith(_WITHOUT_RESULTS):
                yield from _search(folder / entry.name, depth - 1, left)
        elif entry.name.endswith(WEIGHT_SUFFIXES) and entry.name not in ADAPTERS and PEFT_CONFIG not in names:
            kind = kind_of(folder / entry.name)
            # Words beside an adapter come with it.
            if kind and not (kind == "words" and (is_adapter or is_run_of_words)):
                yield kind, folder / entry.name


def kind_of(path: Path) -> str:
    """What a file or folder holds: "model", "lora", "words" alone, or nothing that is known, ""."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return _kind(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _kind(path: Path, changed: int, size: int) -> str:
    """What a file holds; asked again when it has changed."""
    if holds_adapter(path):
        return "words" if _is_of_words(path) else "lora"
    try:
        open_model(path)
    except WeightError:
        return ""
    return "model"


def _is_of_words(path: Path) -> bool:
    """Whether it holds vectors of words and nothing else."""
    return path.is_file() and all(word_in(name, path.stem) for name in open_tensor_file(path).tensors)


def words_of(path: Path) -> list[str]:
    """The new words of an adapter or embedding: in the file, or in the files of the folder."""
    try:
        return _words(path, _time(path))
    except OSError:
        return []


@lru_cache(maxsize=256)
def _words(path: Path, changed: int) -> list[str]:
    """Looked for again when it has changed."""
    files = [file for file in sorted(path.iterdir()) if file.suffix in WEIGHT_SUFFIXES] if path.is_dir() else [path]
    found: dict[str, None] = {}
    for file in files:
        with suppress(WeightError):
            found |= dict.fromkeys(read_words(open_tensor_file(file)))
    return list(found)


def _time(path: Path) -> int:
    """When a model or adapter was changed, in nanoseconds; of a folder, the file that is written last."""
    if path.is_dir():
        names = (FILE_NAME, CUSTOM_DIFFUSION, INDEX, PEFT_CONFIG)
        path = next((path / name for name in names if (path / name).is_file()), path)
    return path.stat().st_mtime_ns


def choose(base: str, loras: Sequence[str], refiner: str | None, embeddings: Sequence[str] = ()) -> ModelChoice:
    """These networks and words as they are now."""
    paths = [base, *loras, *embeddings, *filter(None, [refiner])]
    changed = frozenset((path, _time(Path(path))) for path in paths)
    return ModelChoice(base, tuple(loras), refiner, changed, tuple(embeddings))


@dataclass(frozen=True)
class ModelFacts:
    """What a page needs to know of a model before it is loaded."""

    path: Path
    family: Family
    picture_size: int
    """Height and width it was trained at, in pixels."""
    side_step: int
    """Sides must be multiples of it."""
    tokenizer: Path | None
    """The folder of its tokenizer; None for a single file, whose words are CLIP's."""
    inpaints: bool = False
    """Whether it draws a part of a picture anew."""
    enlarges: bool = False
    """Whether it is a second stage, which enlarges pictures."""

    @property
    def guidance(self) -> float:
        """Where the slider of the guidance starts. The embedded base was measured best at 3 (its README)."""
        if self.family is Family.IF:
            return 4.0 if self.enlarges else 7.0
        return 3.0 if self.is_small else 5.0 if self.family is Family.SDXL else 7.5

    @property
    def is_small(self) -> bool:
        """Whether it is as small as the embedded base."""
        return self.picture_size <= 64 and self.family is not Family.IF

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(width, height) by name: of about as many pixels as the model was trained at, for each shape."""
        shapes = {"Square": (1, 1), "Portrait": (3, 4), "Landscape": (4, 3), "Tall": (9, 16), "Wide": (16, 9)}
        area = self.picture_size**2
        sizes = {
            name: (self._fit((area * across / down) ** 0.5), self._fit((area * down / across) ** 0.5))
            for name, (across, down) in shapes.items()
        }
        small = self._fit(self.picture_size * 0.75)
        # Models of few pixels have few sizes: of equal ones, the first name stays.
        names = {size: name for name, size in reversed((sizes | {"Small": (small, small)}).items())}
        return {name: size for size, name in reversed(names.items())}

    def _fit(self, side: float) -> int:
        return max(round(side / self.side_step), 1) * self.side_step


def describe(path: Path) -> ModelFacts:
    """Look at a model without reading its weights.

    Raises:
        WeightError: it is no model of a family that is known.
    """
    return _described(path, _time(path))


@lru_cache(maxsize=64)
def _described(path: Path, changed: int) -> ModelFacts:
    """Described anew when it has changed."""
    spec = open_model(path).spec
    sample_size = spec.unet.sample_size
    tokenizer = None
    if path.is_dir():
        try:
            sample_size = int(json.loads((path / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightError(f"{path / 'unet' / 'config.json'}: missing or not readable ({error})") from error
        tokenizer = next((path / name for name in ("tokenizer", "tokenizer_2") if (path / name).is_dir()), None)
    factor = spec.vae.downsampling
    step = factor * 2 ** (len(spec.unet.block_out_channels) - 1)
    inpaints = spec.unet.in_channels == 2 * spec.vae.latent_channels + 1
    enlarges = spec.unet.class_embed_type is not None
    return ModelFacts(path, spec.family, sample_size * factor, step, tokenizer, inpaints, enlarges)


@dataclass(frozen=True)
class Run:
    """A training that has left a configuration."""

    folder: Path
    base: str
    instance_prompt: str
    class_prompt: str | None


def read_run(folder: Path) -> Run | None:
    """The run in a folder; None if there is none."""
    try:
        config = load(TrainConfig, ["--config", str(folder / RUN_CONFIG)], tell=lambda note: None)
    except (UserError, OSError):
        return None
    # A run of several subjects has no prompt of its own.
    prompt = config.data.instance_prompt or (config.validation.validation_prompt or ("",))[0]
    return Run(folder, config.model.pretrained_model_name_or_path, prompt, config.prior.class_prompt)


def find_followers(facts: ModelFacts, shelf: Shelf) -> list[Path]:
    """The models that go on from a model's pictures: SDXL's refiners, or of IF the second stages."""
    is_first_stage = facts.family is Family.IF and not facts.enlarges
    # A refiner would change what a mask keeps.
    if not is_first_stage and (facts.family is not Family.SDXL or facts.inpaints):
        return []
    known = {path: own for path in shelf.models if (own := _facts(path))}
    return [
        path for path, own in known.items() if (own.enlarges if is_first_stage else own.family is Family.SDXL_REFINER)
    ]


def _facts(path: Path) -> ModelFacts | None:
    try:
        return describe(path)
    except (WeightError, OSError):
        return None


def newest_run(places: Places, shelf: Shelf) -> Run | None:
    """The newest run that has a result and whose base is here."""
    for lora in shelf.adapters:
        if lora.is_relative_to(places.runs) and (run := read_run(lora)) and Path(run.base).resolve() in shelf.models:
            return run
    return None
