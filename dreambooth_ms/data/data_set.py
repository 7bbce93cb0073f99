"""A data set, here or on the hub, as a folder of pictures: what other programs take by --dataset_name.

Pictures that stand in parquet files are written out once, beside metadata.jsonl with their captions; from there on
there is nothing but a folder of pictures.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from dreambooth_ms.atomic import check_room, file_digest, new_folder
from dreambooth_ms.data.cache import content_key
from dreambooth_ms.data.captions import FILE_NAME
from dreambooth_ms.data.pictures import CAPTION_FILES, CAPTION_SUFFIXES, SUFFIXES
from dreambooth_ms.errors import DataError, WeightError
from dreambooth_ms.formats.naming.report import show_names
from dreambooth_ms.weights.hub import find_data_set

PARQUET = ".parquet"
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|eval|val|dev)(?:ing|uation|id|idation)?(?![a-z])")
"""What the name of a file or folder says of its split, as on the hub."""
ROWS = 16
"""Of a parquet file in memory at a time."""


@lru_cache(maxsize=1)
def folder_of_data_set(
    name: str, config_name: str | None, columns: tuple[str, ...], cache: str | None, own: Path
) -> Path:
    """The folder of the pictures of a data set's train split, with their captions beside them or in metadata.

    Args:
        name: its folder, or `owner/name` on the hub.
        config_name: the folder in it that is used, of a data set that has several.
        columns: of parquet files: the pictures' and, if they are used, the captions'.
        cache: the folder for what is downloaded and written out; None: that of huggingface_hub, and `own`.
        own: of the run.

    Raises:
        DataError: it has no such column, a row has no picture, or a parquet file cannot be read.
        WeightError: it is not found or holds something else, or the disk lacks room.
    """
    root, files = find_data_set(name, partial(_files_of_train_split, config_name=config_name), cache)
    paths = [root / file for file in files]
    if paths[0].suffix != PARQUET:
        return paths[0].parent
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"--dataset_name {name}: its parquet files need pyarrow; pip install pyarrow") from None
    for path in paths:
        with _errors_of(path):
            there = parquet.read_schema(path).names
        if lacking := [column for column in columns if column not in there]:
            raise DataError(f"{path}: no column {', '.join(lacking)}; it has {', '.join(there)}")
    key = content_key(files=list(map(file_digest, paths)), columns=columns)
    folder = Path(cache or own) / f"pictures-{key}"
    if not folder.is_dir():
        check_room(folder, sum(path.stat().st_size for path in paths))
        with new_folder(folder) as partial_folder:
            _write_pictures(partial_folder, (row for path in paths for row in _rows(parquet, path, columns)), columns)
            os.sync()
    return folder


def _files_of_train_split(names: Collection[str], config_name: str | None) -> list[str]:
    """Of all files of a data set its parquet files, or else its pictures and what may have their captions."""
    visible = [name for name in map(PurePosixPath, sorted(names)) if not any(one[0] == "." for one in name.parts)]
    inside = [name for name in visible if config_name in (None, *name.parts[:-1])]
    data = [name for name in inside if name.suffix == PARQUET]
    data = data or [name for name in inside if name.suffix.lower() in SUFFIXES]
    if not data:
        kinds = sorted({name.suffix for name in inside if name.suffix})
        raise WeightError(
            f"{f'folder {config_name}: ' if config_name else ''}expected pictures or parquet files, found "
            f"{show_names(kinds) if kinds else 'neither'}; save it in one of these forms"
        )
    # A picture may be called "test".
    found = {name: _SPLIT.search(str(name if name.suffix == PARQUET else name.parent).lower()) for name in data}
    split = {name: named[1] if named else "" for name, named in found.items()}
    own = [name for name in data if split[name] == ("train" if "train" in split.values() else "")]
    if not own:
        raise WeightError(f"expected a split train, found {show_names(sorted(set(split.values())))}")
    folder, *others = sorted({name.parent for name in own})
    if others:
        listed = show_names(list(map(str, (folder, *others))))
        raise WeightError(f"expected data in one folder, found it in {listed}; name one by --dataset_config_name")
    beside = [name for name in visible if name.parent == folder and name.suffix in CAPTION_SUFFIXES]
    beside += [name for name in visible if name.parent in (folder, folder.parent) and name.name in CAPTION_FILES]
    return [str(name) for name in (own if own[0].suffix == PARQUET else own + beside)]


def _rows(parquet: Any, path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a parquet file, beside what messages call it."""
    with _errors_of(path), parquet.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches(ROWS, columns=list(columns)) for row in batch.to_pylist())
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows))


def _write_pictures(folder: Path, rows: Iterator[tuple[str, dict[str, Any]]], columns: Sequence[str]) -> None:
    """Write each row's picture as it is, and if there is a second column, metadata.jsonl with that of all."""
    captions = []
    for number, (name, row) in enumerate(rows):
        picture = row.pop(columns[0])
        # As in data sets of the hub: the bytes of a file, with its name or without.
        stored = picture if isinstance(picture, dict) else {"bytes": picture}
        if not isinstance(stored.get("bytes"), bytes):
            raise DataError(f"{name}: expected the bytes of a picture in column {columns[0]}")
        suffix = Path(stored.get("path") or "").suffix.lower()
        file = f"{number:08d}{suffix if suffix in SUFFIXES else SUFFIXES[0]}"
        (folder / file).write_bytes(stored["bytes"])
        captions.append(json.dumps({**row, FILE_NAME: file}, default=lambda value: None))
    if columns[1:]:
        (folder / CAPTION_FILES[0]).write_text("\n".join(captions), encoding="utf-8")


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Inside, what pyarrow raises is raised as what is wrong with the file."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no parquet file that can be read ({str(error).splitlines()[0]})") from error
