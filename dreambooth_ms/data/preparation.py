"""From a folder of pictures to one of the sizes of a training, with the captions that are beside them."""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from dreambooth_ms.atomic import TEMPORARY_PREFIX, atomic_path, check_free, check_writable, sync, write_bytes
from dreambooth_ms.config.prepare import PreparationConfig
from dreambooth_ms.data.buckets import least_losing, nearest, sizes_of
from dreambooth_ms.data.captions import FILE_NAME, Captioning, caption_files, read_rows
from dreambooth_ms.data.looks import near_duplicates
from dreambooth_ms.data.pictures import CAPTION_FILES, frame_of, open_picture, resize_and_crop
from dreambooth_ms.data.records import Record, Source
from dreambooth_ms.errors import DataError, WeightError, count_of

Progress = Callable[[Sequence[tuple[Record, Path]]], Iterable[tuple[Record, Path]]]


def prepare(wanted: PreparationConfig, tell: Callable[[str], object], progress: Progress) -> None:
    """Write the target folder. It takes its name when it is whole; what a killed command has done is used again.

    Raises:
        DataError: the source holds no pictures, damaged ones, or two whose names differ in the suffix alone.
        WeightError: the target is there already, or cannot be written.
    """
    source, target = Path(wanted.source), Path(wanted.target).absolute()
    check_free(target)
    check_writable(target)
    # No captions are read here, and nothing is said of those that lie beside.
    records = Source(source, "", Captioning(from_names=True), background=wanted.transparent_background).records(tell)
    # Of near-duplicates the largest stays.
    ordered = sorted(records, key=lambda record: -record.size[0] * record.size[1])
    twins = {ordered[at].path: ordered[of].path for at, of in near_duplicates([one.looks for one in ordered]).items()}
    kept = [record for record in records if record.path not in twins]
    _check_names([record.path for record in kept])
    for path, like in twins.items():
        tell(f"{path}: left out, a near-duplicate of {like.name}")
    every = sizes_of(wanted.resolution) if wanted.use_aspect_ratio_bucket else [(wanted.resolution, wanted.resolution)]
    pictures = [record.size for record in kept]
    sizes = least_losing(every, pictures, wanted.max_buckets) if wanted.max_buckets else every

    work = wanted, [(record.path.name, record.digest) for record in kept]
    of_target, of_work = (hashlib.sha256(repr(one).encode()).hexdigest()[:8] for one in (target, work))
    partial = target.with_name(f"{TEMPORARY_PREFIX}{of_target}-{of_work}")
    for other in set(target.parent.glob(f"{TEMPORARY_PREFIX}{of_target}-*")) - {partial}:
        shutil.rmtree(other, ignore_errors=True)  # Of a command with other settings.
    partial.mkdir(parents=True, exist_ok=True)
    names = {record.path: partial / f"{record.path.stem}.png" for record in kept}
    of_size = dict(zip(names, nearest(sizes, pictures), strict=True))
    for record, path in progress([(record, names[record.path]) for record in kept]):
        if not path.exists():
            frame = frame_of(record.size, sizes[of_size[record.path]])
            crop = resize_and_crop(open_picture(record.path, record.background), frame, "lanczos")
            with atomic_path(path) as file:
                crop.save(file, format="PNG")
    _write_captions(source, names, partial)
    try:
        partial.replace(target)
    except OSError as error:
        raise WeightError(f"{target}: cannot be written ({error.strerror}); choose another place") from error
    sync(target.parent)
    tell(f"wrote {target}: {count_of(len(kept), 'picture')}, {len(twins)} left out")


def _check_names(pictures: Sequence[Path]) -> None:
    by_stem: dict[str, list[str]] = {}
    for path in pictures:
        by_stem.setdefault(path.stem, []).append(path.name)
    if both := [" and ".join(names) for names in by_stem.values() if len(names) > 1]:
        raise DataError(f"{pictures[0].parent}: both would become one PNG: {'; '.join(both)}; rename one")


def _write_captions(source: Path, names: Mapping[Path, Path], folder: Path) -> None:
    """Caption files and metadata, by the pictures' new names."""
    for path, new in names.items():
        for file in caption_files(path):
            shutil.copyfile(file, folder / (new.name + file.suffix if file.stem == path.name else file.name))
    of_old = {path.name: new.name for path, new in names.items()}
    for file in (source / name for name in CAPTION_FILES if (source / name).is_file()):
        rows = [row | {FILE_NAME: of_old[row[FILE_NAME]]} for row in read_rows(file) if row.get(FILE_NAME) in of_old]
        text = io.StringIO("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        if file.suffix == ".csv":
            table = csv.DictWriter(text := io.StringIO(), list(rows[0]) if rows else [FILE_NAME])
            table.writeheader()
            table.writerows(rows)
        write_bytes(folder / file.name, text.getvalue().encode())
