"""`dreambooth-ms prepare SOURCE TARGET`: pictures of the sizes of a training, each once, with what lies beside them."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dreambooth_ms.atomic import TEMPORARY_PREFIX, atomic_path, check_free, check_writable, sync, write_bytes
from dreambooth_ms.cli.output import tell, with_progress
from dreambooth_ms.config.commands import PrepareConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.data.captions import FILE_NAME, Captioning, caption_files, read_rows
from dreambooth_ms.data.looks import near_duplicates
from dreambooth_ms.data.pictures import CAPTION_FILES, frame_of, open_picture, resize_and_crop
from dreambooth_ms.data.plan import least_losing, of_records, sizes_of
from dreambooth_ms.data.records import Source
from dreambooth_ms.errors import DataError, count_of


def run(argv: Sequence[str]) -> int:
    """Prepare by a command line; returns the exit status. The target takes its name when it is whole. What a killed
    command has written, the same command uses."""
    wanted = load(PrepareConfig, argv, tell).preparation
    source, target, background = Path(wanted.source), Path(wanted.target).absolute(), wanted.transparent_background
    check_free(target)
    check_writable(target)
    # Captions are copied, so that nothing need be said of them.
    found = Source(source, "", captioning=Captioning(from_names=True), background=background)
    records = found.records(tell)
    # Of near-duplicates the largest stays.
    ordered = sorted(records, key=lambda record: -record.size[0] * record.size[1])
    like = {ordered[at].path: ordered[of].path for at, of in near_duplicates([one.looks for one in ordered]).items()}
    kept = [record for record in records if record.path not in like]
    for path, other in like.items():
        tell(f"{path}: left out, a near-duplicate of {other.name}")
    names = {record.path: f"{record.path.stem}.png" for record in kept}
    times = Counter(names.values())
    if twice := [str(path) for path, name in names.items() if times[name] > 1]:
        raise DataError(f"{', '.join(twice)}: would become the same file; rename them")

    beside = _beside(source, names)
    work = wanted, [(record.path.name, record.digest) for record in kept], beside
    of_target, of_work = (hashlib.sha256(repr(one).encode()).hexdigest()[:8] for one in (target, work))
    partial = target.with_name(f"{TEMPORARY_PREFIX}{of_target}-{of_work}")
    for other in set(target.parent.glob(f"{TEMPORARY_PREFIX}{of_target}-*")) - {partial}:
        shutil.rmtree(other, ignore_errors=True)  # Of another command for this target.
    sizes = sizes_of(wanted.resolution) if wanted.use_aspect_ratio_bucket else [(wanted.resolution, wanted.resolution)]
    if wanted.max_buckets:
        sizes = least_losing(sizes, [record.size for record in kept], wanted.max_buckets)
    for record in with_progress(kept, len(kept), desc="writing", unit="picture"):
        path, (size,) = partial / names[record.path], of_records(sizes, [record])
        if not path.exists():
            crop = resize_and_crop(open_picture(record.path, background), frame_of(record.size, size), "lanczos")
            crop.info.clear()  # A colour profile that was followed, or a transparent colour.
            with atomic_path(path) as file:
                crop.save(file, format="PNG")
    for name, content in beside.items():
        write_bytes(partial / name, content)
    partial.replace(target)
    sync(target.parent)
    tell(f"wrote {target}: {count_of(len(kept), 'picture')}, {len(like)} left out")
    return 0


def _beside(source: Path, names: Mapping[Path, str]) -> dict[str, bytes]:
    """Caption files, and metadata as JSON lines, by the pictures' new names."""
    found = {}
    for path, name in names.items():
        for file in caption_files(path):
            found[name + file.suffix if file.stem == path.name else file.name] = file.read_bytes()
    new = {path.name: name for path, name in names.items()}
    for file in [source / name for name in CAPTION_FILES if (source / name).is_file()][:1]:
        rows = [row | {FILE_NAME: new[row[FILE_NAME]]} for row in read_rows(file) if row.get(FILE_NAME) in new]
        found[CAPTION_FILES[0]] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return found
