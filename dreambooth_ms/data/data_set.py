"""A data set, here or on the hub, as a folder of pictures: those in parquet files are written out once."""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from dreambooth_ms.atomic import check_room, file_digest, new_folder
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.cache import content_key
from dreambooth_ms.data.captions import FILE_NAME
from dreambooth_ms.data.pictures import CAPTION_FILES, CAPTION_SUFFIXES, SUFFIXES
from dreambooth_ms.errors import DataError, WeightError, show_names
from dreambooth_ms.weights.hub import find_data_set

PARQUET = ".parquet"
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|eval|val|dev)(?:ing|uation|id|idation)?(?![a-z])")
"""What the name of a file or folder says of its split, as on the hub."""


def with_folder_of_data_set(config: TrainConfig) -> TrainConfig:
    """The same configuration with the folder of its data set's pictures as --instance_data_dir, if it has a data set.
    Raises DataError if it has no such column, a row has no picture, or a parquet file cannot be read, and WeightError
    if it is not found or holds something else, or the disk lacks room."""
    data, captions = config.data, config.captions.caption_column
    if data.dataset_name is None:
        return config
    select = partial(_of_train_split, config_name=data.dataset_config_name)
    root, files = find_data_set(data.dataset_name, select, data.cache_dir)
    folder, columns = (root / files[0]).parent, [data.image_column, *([captions] if captions else [])]
    if files[0].endswith(PARQUET):
        folder = _written_out(config, [root / file for file in files], columns)
    return replace(config, data=replace(data, dataset_name=None, instance_data_dir=str(folder)))


def _written_out(config: TrainConfig, paths: Sequence[Path], columns: Sequence[str]) -> Path:
    """The folder with what stands in parquet files: pictures by the first column, captions by the second, if any."""
    for path in paths:
        with _errors_of(path):
            there = import_module("pyarrow.parquet").read_schema(path).names
        if lacking := [column for column in columns if column not in there]:
            raise DataError(f"{path}: no column {', '.join(lacking)}; it has {', '.join(there)}")
    cache = Path(config.data.cache_dir or config.output_dir / "cache")
    folder = cache / f"pictures-{content_key(files=[*map(file_digest, paths)], columns=columns)}"
    if not folder.is_dir():
        check_room(folder, sum(path.stat().st_size for path in paths))
        with new_folder(folder) as partial_folder:
            _write_pictures(str(config.data.dataset_name), _rows(paths, columns), columns, partial_folder)
            os.sync()
    return folder


def _of_train_split(names: Collection[str], config_name: str | None) -> list[str]:
    """Of all files of a data set its parquet files, or else its pictures and what may have their captions."""
    visible = [name for name in map(PurePosixPath, sorted(names)) if not any(one[0] == "." for one in name.parts)]
    inside = [name for name in visible if config_name in (None, *name.parts[:-1])]
    data = [name for name in inside if name.suffix == PARQUET]
    data = data or [name for name in inside if name.suffix.lower() in SUFFIXES]
    if not data:
        where = f" in a folder {config_name}" if config_name else ""
        kinds = show_names(sorted({name.suffix for name in inside if name.suffix}) or ["neither"])
        raise WeightError(f"expected pictures or parquet files{where}, found {kinds}; save it in one of these forms")
    # A picture may be called "test".
    found = {name: _SPLIT.search(str(name if name.suffix == PARQUET else name.parent).lower()) for name in data}
    split = {name: named[1] if named else "" for name, named in found.items()}
    own = [name for name in data if split[name] == ("train" if "train" in split.values() else "")]
    if not own:
        raise WeightError(f"expected a split train, found {show_names(sorted(set(split.values())))}")
    folder, *others = sorted({name.parent for name in own})
    if others:
        listed = show_names([str(one) for one in (folder, *others)])
        raise WeightError(f"expected data in one folder, found it in {listed}; name one by --dataset_config_name")
    beside = [name for name in visible if name.parent == folder and name.suffix in CAPTION_SUFFIXES]
    beside += [name for name in visible if name.parent in (folder, folder.parent) and name.name in CAPTION_FILES]
    return [str(name) for name in (own if own[0].suffix == PARQUET else own + beside)]


def _rows(paths: Iterable[Path], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with _errors_of(path), import_module("pyarrow.parquet").ParquetFile(path) as file:
            for batch in file.iter_batches(16, columns=list(columns)):
                yield from batch.to_pylist()


def _write_pictures(name: str, rows: Iterable[dict[str, Any]], columns: Sequence[str], folder: Path) -> None:
    """Write each row's picture as it is, and if there is a second column, metadata.jsonl with that of all."""
    captions = []
    for number, row in enumerate(rows):
        picture = row.pop(columns[0])
        # As in data sets of the hub: the bytes of a file, with its name or without.
        stored = picture if isinstance(picture, dict) else {"bytes": picture}
        if not isinstance(stored.get("bytes"), bytes):
            raise DataError(f"--dataset_name {name}: row {number} has no picture's bytes in column {columns[0]}")
        suffix = Path(stored.get("path") or "").suffix.lower()
        file = f"{number:08d}{suffix if suffix in SUFFIXES else SUFFIXES[0]}"
        (folder / file).write_bytes(stored["bytes"])
        captions.append(json.dumps({**row, FILE_NAME: file}, default=lambda value: None))
    if columns[1:]:
        (folder / CAPTION_FILES[0]).write_text("\n".join(captions), encoding="utf-8")


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Inside, what pyarrow raises is raised as what is wrong with a parquet file."""
    try:
        yield
    except ImportError:
        raise DataError(f"{path}: parquet files are read by pyarrow; pip install pyarrow") from None
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise DataError(f"{path}: no parquet file that can be read ({str(error).splitlines()[0]})") from error
