"""How PyTorch describes tensors in a pickle: views into storages, which stand elsewhere in the file.

The names are those of torch._utils and torch.serialization in PyTorch 0.4 to 2.x.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.format_error import FormatError, quoted, unread_type
from dreambooth_ms.formats.files.pickle_machine import Global, PickleMachine
from dreambooth_ms.formats.files.stored import checked_byte_count, is_valid_text

# Class of a storage -> bytes per element, and the type if arrays can have it.
_STORAGES: Mapping[str, tuple[int, DType | None]] = {
    **{dtype.storage: (dtype.itemsize, dtype) for dtype in DType if dtype.storage},
    "UntypedStorage": (1, DType.U8),
    **{"ComplexFloatStorage": (8, None), "ComplexDoubleStorage": (16, None)},
    **{"QInt8Storage": (1, None), "QUInt8Storage": (1, None), "QInt32Storage": (4, None)},
}
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")

_UNSIGNED = {"uint16": DType.U16, "uint32": DType.U32, "uint64": DType.U64}

_DEEPEST = 4
"""Dictionaries within dictionaries that are looked into."""

_LONGEST_NAME, _LONGEST_NOTE = 40, 1000


@dataclass(frozen=True, slots=True)
class Storage:
    """Elements of one type, in a row."""

    key: str
    itemsize: int
    dtype: DType | None
    count: int

    @property
    def byte_count(self) -> int:
        """Size in bytes."""
        return self.count * self.itemsize


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: some elements of a storage. Offset and strides are in elements of the tensor's own type."""

    storage: Storage
    dtype: DType | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def reach(self) -> int:
        """How many elements of the storage there must be, up to the last that the tensor has."""
        if 0 in self.shape:
            return self.offset
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + last + 1

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements stand in row-major order without a gap."""
        steps = accumulate(reversed(self.shape), mul, initial=1)
        axes = zip(reversed(self.shape), reversed(self.strides), steps, strict=False)
        return 0 in self.shape or all(length == 1 or stride == step for length, stride, step in axes)


class TorchMachine(PickleMachine):
    """Makes a `View` of every tensor, and notes every storage by its key."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}

    def load_persistent(self, identifier: Any) -> Any:
        """For ("storage", kind, key, device, number of elements, view of another storage, …)."""
        if not isinstance(identifier, tuple) or len(identifier) < 5 or identifier[0] != "storage":
            return {}
        kind, key, _, count, *view_of_another = identifier[1:6]
        if not isinstance(kind, Global) or kind.module not in _STORAGE_MODULES or kind.name not in _STORAGES:
            name = kind.name if isinstance(kind, Global) else None
            raise FormatError(f"it has tensors in a storage of an unknown kind {quoted(name)}")
        if type(key) is not str or type(count) is not int or not 0 <= count < 2**59:
            raise FormatError("its pickle is damaged: a storage without key or length")
        if any(one is not None for one in view_of_another):
            raise FormatError("it has storages that are parts of others, as only versions before 0.4 wrote them")
        storage = Storage(key, *_STORAGES[kind.name], count)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise FormatError(f"its pickle is damaged: two storages with the key {quoted(storage.key)}")
        return storage

    def call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        """What PyTorch's own functions make of their arguments."""
        if function.module == "torch._tensor" and function.name in ("_rebuild_from_type", "_rebuild_from_type_v2"):
            function, arguments = arguments[0], arguments[2]
            if not (isinstance(function, Global) and isinstance(arguments, tuple)):
                return {}
        match function.module, function.name:
            case "torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2":
                return _view(arguments[:4], None, arguments[6:7])
            case "torch._utils", "_rebuild_tensor_v3":
                return _view(arguments[:4], arguments[6], arguments[7:8])
            case ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") | ("torch", "Size"):
                return arguments[0]
        return {}


def _view(described: tuple[Any, ...], dtype_name: Any, flags: tuple[Any, ...]) -> View:
    """The tensor that a call describes by storage, offset, shape and strides, and by a type if the storage has none.

    The flags mark what else must happen to the values, as for the negative or conjugate of another tensor.
    """
    storage, offset, shape, strides = described
    if not (isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise FormatError("its pickle is damaged: a tensor without storage, shape or strides")
    name = getattr(dtype_name, "name", "")
    if name.startswith("float8"):
        raise unread_type("a tensor", name)
    dtype = storage.dtype if dtype_name is None else _UNSIGNED.get(name)
    checked_byte_count(shape, dtype or DType.U8)
    if len(strides) != len(shape) or not all(type(n) is int and 0 <= n < 2**62 for n in (offset, *strides)):
        raise FormatError("its pickle is damaged: a tensor with impossible strides")
    return View(storage, None if any(flags) else dtype, offset, shape, strides)


def find_tensors(root: Any) -> tuple[dict[str, View], dict[str, int]]:
    """The dictionary that holds most tensors, be it the object itself or one within it, as in Stable Diffusion's files;
    and how many tensors others hold, by their places.

    Raises:
        FormatError: there is no such dictionary.
    """
    held = []
    for path, mapping in _dictionaries(root):
        if views := {name: value for name, value in mapping.items() if isinstance(value, View)}:
            held.append((path, views))
    if not held:
        raise FormatError("it holds no tensors by name")
    place, largest = max(held, key=lambda item: len(item[1]))
    left_out = {path or "top": len(views) for path, views in held if views is not largest}
    # The words of a textual inversion may be anything: what it is stands in the name of their dictionary.
    prefix = f"{place}." if place.startswith("string_to_") else ""
    return {prefix + name: view for name, view in largest.items()}, left_out


def _dictionaries(root: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object and the dictionaries within it, each once, nearest first."""
    queue, seen = [("", root, 0)], set()
    for path, mapping, depth in queue:  # Which grows meanwhile.
        if not isinstance(mapping, dict) or id(mapping) in seen:
            continue
        seen.add(id(mapping))
        yield path, mapping
        for name, value in mapping.items():
            if depth < _DEEPEST and isinstance(value, dict):
                short = name[:_LONGEST_NAME]
                queue.append((f"{path}.{short}" if path else short, value, depth + 1))


def find_notes(root: Mapping[str, Any]) -> dict[str, str]:
    """What stands beside the tensors and is short, such as the number of steps."""
    notes = {
        name: str(value)
        for name, value in root.items()
        if isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 2**63)
    }
    return {name: text for name, text in notes.items() if len(text) <= _LONGEST_NOTE and is_valid_text(name + text)}
