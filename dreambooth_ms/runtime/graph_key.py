"""What a compiled graph depends on, as one digest.

A cell is described by what MindSpore's parser reads of it: classes, attributes, primitives, constants, parameters by
name, shape and dtype (their values are no part of a graph). Beside the cell stand its inputs' shapes and dtypes, the
sources of this package, the versions and the settings. What can't be described has no key, and is compiled each time.
"""

import dataclasses
import hashlib
import inspect
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore._c_expression import MetaFuncGraph_, MixedPrecisionType
from mindspore._c_expression.typing import Type
from mindspore.communication import GlobalComm, get_group_size, get_rank

from dreambooth_ms.atomic import file_digest

PACKAGE = Path(__file__).parents[1]

# Settings that name places and processes, and decide nothing of a graph.
NOT_DECISIVE = ("MS_COMPILER_CACHE_", "MS_DEV_FORCE_USE_COMPILE_CACHE", "MS_SUBMODULE_LOG_v", "MS_SCHED_", "MS_NODE_ID")
NOT_DECISIVE += ("MS_ROLE", "MS_WORKER_")

READ_OF_CELL = {"_params", "_cells", "_buffers", "_primitives", "training", "mixed_precision_type", "_jit_config_dict"}
OF_A_COMPILATION = {"_compiled_for", "sequence_modified", "current_phase", "__parse_method__", "__compile_cell_hook__"}
FLAGS, FLAG_OF_A_COMPILATION = "_func_graph_flags", "compile_phase"
NOT_READ_OF_CELL = set(vars(nn.Cell())) - READ_OF_CELL | OF_A_COMPILATION | {FLAGS}
VALUES = (tuple, Enum, Type, MixedPrecisionType, np.generic)
"""What is the same where it is equal; of everything else it counts which attributes hold the same object."""


class NotDescribable(Exception):
    """A value whose bearing on a graph is not known."""


def graph_key(cell: nn.Cell, inputs: tuple[Any, ...], settings: object = None) -> str:
    """The digest of everything that decides the graph of a call; `settings` are what `surroundings` does not know.
    NotDescribable if the cell holds something unknown, or the sources are not those that were imported."""
    description = _Description()
    for part in (settings, surroundings(), _shapes(inputs), cell):
        description.add(part)
    return description.hash.hexdigest()[:32]


def sources() -> dict[str, str]:
    """The digests of this package's files, as they are on disk."""
    return {str(path.relative_to(PACKAGE)): file_digest(path) for path in sorted(PACKAGE.rglob("*.py"))}


def surroundings() -> tuple[Any, ...]:
    """Sources, versions, MindSpore's settings in the environment and the context, and which of how many processes."""
    if sources() != _SOURCES_AT_IMPORT:
        raise NotDescribable("sources that were changed meanwhile")
    library = (ms.__version__, np.__version__, sys.version_info[:2], platform.machine())
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("MS_", "MINDSPORE_")) and not name.startswith(NOT_DECISIVE)
    }
    context = [ms.get_context(name) for name in ("mode", "device_target", "deterministic", "jit_config")]
    processes = (get_rank(), get_group_size()) if GlobalComm.INITED else None
    return _SOURCES_AT_IMPORT, library, environment, context, processes


_SOURCES_AT_IMPORT = sources()


class _Description:
    """A text of values that is the same in each process, as its digest."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []

    def add(self, value: Any) -> None:
        """Add a value; an object that was added before, by its number."""
        if value is None or isinstance(value, bool | int | float | str | bytes):
            self._say(type(value).__name__, repr(value))
            return
        if not isinstance(value, VALUES):
            if id(value) in self._numbers:
                self._say("again", self._numbers[id(value)])
                return
            self._numbers[id(value)] = len(self._numbers)
            self._alive.append(value)  # Or its number could go to another object.
        self._say("one of", _name(type(value)))
        for part in next(parts_of for kind, parts_of in _KINDS if isinstance(value, kind))(value):
            self.add(part)
        self._say("end")

    def _say(self, *words: object) -> None:
        self.hash.update(" ".join(map(str, words)).encode() + b"\0")


def _shapes(given: Any) -> Any:
    """The shapes and dtypes of tensors, and other inputs, which are constants of a graph, as they are."""
    if isinstance(given, Tensor):
        return given.shape, given.dtype
    return tuple(map(_shapes, given)) if isinstance(given, tuple | list) else given


def _name(of: Any) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def _source(of: Any) -> Iterator[str]:
    """The digest of the file that something was written in, unless its package is described as a whole."""
    if of.__module__.partition(".")[0] not in (__name__.partition(".")[0], "mindspore"):
        file = inspect.getsourcefile(of)
        if file is None:
            raise NotDescribable(f"the source of {of.__module__}")
        yield file_digest(Path(file))


def _cell(cell: nn.Cell) -> Iterator[Any]:
    """Class and attributes of a cell, without what MindSpore keeps there for itself."""
    yield from _source(type(cell))
    yield {name: value for name, value in vars(cell).items() if name not in NOT_READ_OF_CELL}
    yield {name: value for name, value in vars(cell).get(FLAGS, {}).items() if name != FLAG_OF_A_COMPILATION}


def _function(function: Callable[..., Any]) -> Iterator[Any]:
    """Name, defaults and closure of a function; the decorators of MindSpore are taken off."""
    inner = inspect.unwrap(function)
    yield _name(inner)
    yield from _source(inner)
    yield inner.__defaults__
    yield from (cell.cell_contents for cell in inner.__closure__ or ())


def _array(value: Any) -> tuple[Any, ...]:
    array = value.asnumpy() if isinstance(value, Tensor) else np.asarray(value)
    # A dtype that numpy does not know comes as one it does; MindSpore's name tells them apart.
    return str(value.dtype), array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _fields(value: Any) -> Iterator[Any]:
    if not dataclasses.is_dataclass(value):
        raise NotDescribable(_name(type(value)))
    yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


# The first that fits; a parameter is a tensor too.
_KINDS: tuple[tuple[type | tuple[type, ...], Callable[[Any], Iterable[Any]]], ...] = (
    (Parameter, lambda p: (p.name, str(p.dtype), p.shape, p.requires_grad)),
    ((Tensor, np.ndarray, np.generic), _array),
    ((Type, MixedPrecisionType), lambda member: (str(member),)),
    (Enum, lambda member: (member.name,)),
    (nn.Cell, _cell),
    ((ops.Primitive, MetaFuncGraph_), lambda primitive: (vars(primitive),)),
    ((tuple, list), lambda values: (len(values), *values)),
    (dict, lambda mapping: sorted(mapping.items(), key=lambda item: str(item[0]))),
    (set, lambda values: sorted(values, key=repr)),
    (type, lambda kind: (_name(kind),)),
    (type(lambda: None), _function),
    (type(_Description().add), lambda method: (method.__func__, method.__self__)),
    (partial, lambda call: (call.func, call.args, call.keywords)),
    (object, _fields),
)
