"""safetensors: the length of a header in 8 bytes, the header as JSON, then the values of all tensors without a gap.

The format is described at https://github.com/huggingface/safetensors#format. A large model is in several files, and an
index says which tensor is in which: `<stem>.safetensors.index.json`.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from dreambooth_ms.atomic import TEMPORARY_PREFIX, atomic_path, check_room, sync, write_bytes
from dreambooth_ms.errors import WeightError, count_of
from dreambooth_ms.formats.files import stored
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.format_error import FormatError, quoted, seems_to_be, unread_type
from dreambooth_ms.formats.files.stored import Container, FileRange, Progress, StoredTensor, TensorFile

METADATA_NAME = "__metadata__"
WEIGHT_MAP = "weight_map"
LORA_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")

MAX_SHARD_BYTES = 10 * 10**9
"""diffusers' own."""

MAX_JSON_BYTES = 25_000_000
"""Parsed, `[],[],…` takes 24 times its size; the header of an SDXL model has 0.3 MB."""

_MAX_DIGITS = 20
_LEGACY_HASH = slice(0x100000, 0x110000)


def read_safetensors(source: FileRange) -> TensorFile:
    """A safetensors file, whose header is checked as a whole."""
    header, start = _read_header(source)
    metadata = header.pop(METADATA_NAME, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("its metadata is not text by name")
    if not stored.is_valid_text("".join((*metadata, *metadata.values()))):
        raise FormatError("its metadata is no valid text")
    stored.check_names(list(header))
    entries = {name: _checked_entry(name, entry) for name, entry in header.items()}
    _check_that_values_fill_the_file([span for _, _, span in entries.values()], source.size - start)
    tensors = {
        name: StoredTensor.in_files(shape, dtype, source.part(start + begin, end - begin))
        for name, (dtype, shape, (begin, end)) in entries.items()
    }
    return TensorFile(source.path, Container.SAFETENSORS, tensors, metadata)


def _read_header(source: FileRange) -> tuple[dict[str, Any], int]:
    """The header and where the values begin."""
    head = source.part(0, min(source.size, 512)).read()
    if len(head) < 9 or head[8:9] != b"{":
        raise FormatError(seems_to_be(head) or "its first bytes are no header")
    length = int.from_bytes(head[:8], "little")
    if length > source.size - 8:
        raise FormatError(f"cut short, or damaged: a header of {count_of(length, 'byte')} in a file of {source.size}")
    if length > MAX_JSON_BYTES:
        raise FormatError(f"a header of {length} bytes; at most {MAX_JSON_BYTES} are read")
    return parse_json_object(source.part(8, length).read()), 8 + length


def _checked_entry(name: str, entry: Any) -> tuple[DType, tuple[int, ...], tuple[int, int]]:
    """Type, shape and place of a tensor."""
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise FormatError(f"the entry of {quoted(name)} is damaged") from error
    if not isinstance(dtype_name, str) or dtype_name not in DType.__members__:
        raise unread_type(quoted(name), dtype_name)
    dtype = DType[dtype_name]
    if type(begin) is not int or type(end) is not int or end - begin != stored.checked_byte_count(shape, dtype):
        raise FormatError(f"{quoted(name)} has a size that does not fit its shape")
    return dtype, shape, (begin, end)


def _check_that_values_fill_the_file(spans: list[tuple[int, int]], size: int) -> None:
    """Without overlap and without a hole, so that no byte has two meanings or none."""
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise FormatError("damaged: tensors overlap, or leave a gap")
        position = end
    if position != size:
        raise FormatError("cut short" if position > size else "damaged: there are bytes after the last tensor")


def json_object(source: FileRange) -> dict[str, Any]:
    """The JSON object that a file is; FormatError if it is none."""
    if source.size > MAX_JSON_BYTES:
        raise FormatError(f"{source.size} bytes of JSON; at most {MAX_JSON_BYTES} are read")
    return parse_json_object(source.read())


def parse_json_object(content: bytes) -> dict[str, Any]:
    """A JSON object of few bytes, in which no name stands twice at any depth; FormatError if it is none."""
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repetition, parse_int=_parse_int)
    except ValueError as error:
        raise FormatError(f"no valid JSON: {error}") from error
    except RecursionError as error:
        raise FormatError("no valid JSON: nested too deeply") from error
    if not isinstance(parsed, dict):
        raise FormatError("expected a JSON object")
    return parsed


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise FormatError(f"the name {quoted(name)} stands in it twice")
        unique[name] = value
    return unique


def _parse_int(digits: str) -> int:
    """Older versions of Python take quadratic time for long numbers."""
    if len(digits) > _MAX_DIGITS:
        raise FormatError(f"impossible number {quoted(digits)}")
    return int(digits)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a file atomically; one tensor at a time is in memory.

    Tensors are written in the order given, but those of wider elements come first, as the safetensors library does
    it: so every value is aligned. WeightError if the disk lacks room, the folder cannot be written to, or a tensor
    cannot be read.
    """
    ordered = _ordered(tensors)
    header = _header(ordered, metadata or {})
    size = len(header) + stored.total_bytes(ordered)
    with atomic_path(path, size) as partial_path, partial_path.open("wb") as file:
        file.write(header)
        for tensor in ordered.values():
            tensor.write_to(file)
            if progress is not None:
                progress(tensor.byte_count)


def _ordered(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


def lora_hashes(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """What other programs know the file of a LoRA by, for its metadata: SHA-256 of its tensors' bytes, by kohya's name
    and by the Stability ModelSpec's; and A1111's older hash, of 64 KiB in the file without metadata but `ss_`."""
    ordered, whole = _ordered(tensors), hashlib.sha256()
    start = bytearray(_header(ordered, {name: own for name, own in metadata.items() if name.startswith("ss_")}))
    for tensor in ordered.values():
        values = stored.raw_bytes(tensor.read())
        whole.update(values)
        start += values[: max(_LEGACY_HASH.stop - len(start), 0)]
    legacy = hashlib.sha256(start[_LEGACY_HASH]).hexdigest()[:8]
    return dict(zip(LORA_HASHES, (whole.hexdigest(), legacy, f"0x{whole.hexdigest()}"), strict=True))


def _header(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON; spaces at its end align what follows."""
    entries: dict[str, Any] = {METADATA_NAME: dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        assert name != METADATA_NAME, "a name that the format keeps for itself"
        end = position + tensor.byte_count
        entries[name] = {"dtype": tensor.dtype.value, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    content = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # As the safetensors library aligns the values.
    return len(content).to_bytes(8, "little") + content


def write_sharded_safetensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Write tensors as diffusers does it: one file (`write_safetensors`) if they fit, otherwise several and an index.

    All files are whole before the first takes its name, and the index comes last; so an index never names a file that
    is not there. A tensor of more than `max_shard_bytes` has a file of its own; the metadata are in each.

    Returns the file, or the index and the files.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # Only folders of models need it.

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=attrgetter("byte_count"),
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    if not split.is_sharded:
        path = folder / f"{stem}.safetensors"
        write_safetensors(path, tensors, metadata, progress)
        return [path]
    index, files = folder / f"{stem}.safetensors.index.json", split.filename_to_tensors
    content = {"metadata": split.metadata, WEIGHT_MAP: split.tensor_to_filename}
    check_room(index, stored.total_bytes(tensors))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=folder, ignore_cleanup_errors=True) as partial:
            for file, names in files.items():
                write_safetensors(Path(partial, file), {name: tensors[name] for name in names}, metadata, progress)
            write_bytes(Path(partial, index.name), (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
            index.unlink(missing_ok=True)  # An older index never stands beside newer files.
            for file in (*files, index.name):
                Path(partial, file).replace(folder / file)
            sync(folder)
    except OSError as error:
        raise WeightError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    return [index, *map(folder.joinpath, files)]
