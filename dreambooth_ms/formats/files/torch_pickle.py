"""What a pickle of PyTorch describes, without running anything that it names.

A pickle is a program for a small stack machine. Python's own, the one that is written in Python, builds numbers,
strings, lists and tuples here, by the operations that protocols 2 to 5 write. A class or function is only a pair of
names (`Global`), which is never looked up; what is called or constructed becomes an empty dictionary, which keeps items
that are set and swallows all other state, unless it makes a tensor: a view into a storage, which stands elsewhere in
the file. Time and memory are bounded by the number of operations: nothing is copied, compared or walked through, and
nothing but texts and small numbers is hashed. (The machine that is written in C makes its memo as long as it is told.)

The names are those of torch._utils and torch.serialization in PyTorch 0.4 to 2.x.
"""

import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, BinaryIO

from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.format_error import FormatError, quoted, unread_type
from dreambooth_ms.formats.files.stored import checked_byte_count, is_valid_text

MAX_OPERATIONS = 2_000_000
"""Per pickle. A checkpoint of SDXL with the state of its optimiser has about 400,000."""

# Class of a storage -> bytes per element, and the type if arrays can have it.
_STORAGES: Mapping[str, tuple[int, DType | None]] = {
    **{dtype.storage: (dtype.itemsize, dtype) for dtype in DType if dtype.storage},
    "UntypedStorage": (1, DType.U8),
    **{"ComplexFloatStorage": (8, None), "ComplexDoubleStorage": (16, None)},
    **{"QInt8Storage": (1, None), "QUInt8Storage": (1, None), "QInt32Storage": (4, None)},
}
_Machine: Any = pickle._Unpickler
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")

_UNSIGNED = {"uint16": DType.U16, "uint32": DType.U32, "uint64": DType.U64}

_DEEPEST = 4
"""Dictionaries within dictionaries that are looked into."""

_LONGEST_NAME, _LONGEST_NOTE = 100, 1000

_IN_PARTS = re.compile(r"(?:^|\.)(?:modifier_token|string_to_param|attn2\.to_[kv]\.weight)(?:\.|$)")
"""Dictionaries of files that keep what belongs together in several: weights and words, or the factors of a weight."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names."""

    module: str
    name: str


_OF_SUBCLASSES = tuple(Global("torch._tensor", name) for name in ("_rebuild_from_type", "_rebuild_from_type_v2"))
"""Their arguments are another function, a class, and arguments."""


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


class Entries(dict[str, Any]):
    """What becomes of dictionaries, sets and objects: items whose keys are strings are kept, others are swallowed."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is str:
            super().__setitem__(key, value)

    def append(self, items: Any) -> None:
        """Swallow an item, or several."""

    extend = add = append


class TorchUnpickler(_Machine):
    """Reads a pickle, and notes every storage by its key."""

    find_class = Global

    def __init__(self, file: BinaryIO, storages: dict[str, Storage]) -> None:
        super().__init__(file, encoding="latin-1")
        self.storages, self.dispatch = storages, _Bounded(_OPERATIONS)

    def load(self) -> Any:
        """What the pickle builds, behind which the file then stands; FormatError if it is none, damaged or too long."""
        try:
            return super().load()
        except _DAMAGES as error:
            raise FormatError("its pickle is cut short or damaged") from error

    def get_extension(self, code: int) -> None:
        """Push what stands for something that is named by a number."""
        self.append(Entries())

    def persistent_load(self, identifier: Any) -> Any:
        """For ("storage", kind, key, device, number of elements, view of another storage, …)."""
        if not isinstance(identifier, tuple) or len(identifier) < 5 or identifier[0] != "storage":
            return Entries()
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

    def construct(self) -> None:
        """Call what is below the topmost value with that for its arguments."""
        arguments = self.stack.pop()
        self._instantiate(self.stack.pop(), arguments)

    def _instantiate(self, function: Any, arguments: Any) -> None:
        """Push what PyTorch's own functions make of their arguments."""
        if function in _OF_SUBCLASSES and isinstance(arguments, tuple):
            function, arguments = arguments[0], arguments[2]
        made: Any = Entries()
        if isinstance(function, Global) and isinstance(arguments, tuple | list):
            match function.module, function.name:
                case "torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2":
                    made = _view(arguments[:4], None, arguments[6:7])
                case "torch._utils", "_rebuild_tensor_v3":
                    made = _view(arguments[:4], arguments[6], arguments[7:8])
                case ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") | ("torch", "Size"):
                    made = arguments[0]
        self.append(made)


class _Bounded(dict[int, Any]):
    """What each operation does; it is told so many times."""

    left = MAX_OPERATIONS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise FormatError(f"a pickle of more than {MAX_OPERATIONS} operations")
        return super().__getitem__(code)


_DAMAGES = (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error)

_AS_PYTHON = """
    PROTO FRAME STOP MARK DUP BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST
    BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    APPEND APPENDS SETITEM SETITEMS ADDITEMS GLOBAL STACK_GLOBAL INST OBJ BINPERSID EXT1 EXT2 EXT4
"""
"""Operations that Python's own reader may do: by themselves, or by the methods above."""

_OWN: Mapping[str, Callable[[Any], object]] = {
    **dict.fromkeys(("EMPTY_DICT", "EMPTY_SET"), lambda reader: reader.append(Entries())),
    "FROZENSET": lambda reader: reader._instantiate(None, reader.pop_mark()),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), TorchUnpickler.construct),
    "NEWOBJ_EX": lambda reader: (reader.stack.pop(), reader.construct()),
    "BUILD": lambda reader: reader.stack.pop(),
    "BYTEARRAY8": TorchUnpickler.load_binbytes8,  # Python's takes the memory first.
}
_OPERATIONS = {code: _Machine.dispatch[code] for (code,) in map(vars(pickle).__getitem__, _AS_PYTHON.split())}
_OPERATIONS |= {vars(pickle)[name][0]: own for name, own in _OWN.items()}


def _view(described: Sequence[Any], dtype_name: Any, flags: Sequence[Any]) -> View:
    """The tensor that a call describes by storage, offset, shape and strides, and by a type if the storage has none.
    The flags mark what else must happen to the values, as for the negative or conjugate of another tensor."""
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
    and how many tensors others hold, by their places. Of a file of several that belong together all of them, by paths.
    FormatError if there is none."""
    views = [(path, {n: one for n, one in own.items() if isinstance(one, View)}) for path, own in _dictionaries(root)]
    held = [(path, own) for path, own in views if own]
    if not held:
        raise FormatError("it holds no tensors by name")
    if any(_IN_PARTS.search(path) for path, _ in held):
        return {f"{path}.{name}".removeprefix("."): view for path, own in held for name, view in own.items()}, {}
    _, largest = max(held, key=lambda item: len(item[1]))
    left_out = {path or "top": len(own) for path, own in held if own is not largest}
    return largest, left_out


def _dictionaries(root: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object and the dictionaries within it, each once, nearest first."""
    queue, seen = [("", root, 0)], set()
    for path, mapping, depth in queue:  # Which grows meanwhile.
        if not isinstance(mapping, dict) or id(mapping) in seen:
            continue
        seen.add(id(mapping))
        yield path, mapping
        for name, value in mapping.items():
            if depth < _DEEPEST and isinstance(value, dict | list):
                inner = f"{path}.{name[:_LONGEST_NAME]}".removeprefix(".")
                # Of SDXL words have a list of a vector for each text encoder.
                is_word = isinstance(value, list) and len(value) <= 2 and _IN_PARTS.search(inner)
                queue.append((inner, {str(n): one for n, one in enumerate(value)} if is_word else value, depth + 1))


def find_notes(root: Mapping[str, Any]) -> dict[str, str]:
    """What stands beside the tensors and is short, such as the number of steps."""
    notes = {
        name: str(value)
        for name, value in root.items()
        if isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 2**63)
    }
    return {name: text for name, text in notes.items() if len(text) <= _LONGEST_NOTE and is_valid_text(name + text)}
