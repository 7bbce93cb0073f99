"""What a pickle builds, without running anything that it names.

A pickle is a program for a small stack machine. This one builds numbers, strings, lists, tuples and dictionaries, by
the operations that protocols 2 to 5 write. A class or function is only a pair of names (`Global`), which is never
looked up; what is called or constructed becomes an empty dictionary, which keeps items that are set and swallows all
other state, unless the reader of a format knows better. Time and memory are bounded by the number of operations:
nothing is copied, compared or walked through, and nothing but texts and small numbers is hashed.
"""

import pickletools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from dreambooth_ms.formats.files.format_error import FormatError

MAX_OPERATIONS = 2_000_000
"""Per pickle. A checkpoint of SDXL with the state of its optimiser has about 400,000."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names."""

    module: str
    name: str


class PickleMachine:
    """Runs pickles. Of dictionaries it keeps the entries whose keys are strings."""

    def call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        """What a call of a named thing with arguments gives, or an object that is made of a class."""
        return {}

    def load_persistent(self, identifier: Any) -> Any:
        """What stands outside the pickle under an identifier."""
        return {}

    def run(self, file: BinaryIO) -> Any:
        """Run one pickle and return what it builds; the file stands behind it then.

        Raises:
            FormatError: no pickle, cut short, damaged, or too long.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        try:
            with warnings.catch_warnings():
                # Of texts with odd escapes, which only the oldest pickles can have.
                warnings.simplefilter("ignore", DeprecationWarning)
                for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
                    if number == MAX_OPERATIONS:
                        raise FormatError(f"a pickle of more than {MAX_OPERATIONS} operations")
                    _STEPS[operation.name](self, argument)
            return self._stack.pop()
        except (ValueError, IndexError, KeyError) as error:
            raise FormatError("its pickle is cut short or damaged") from error

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self, count: int) -> list[Any]:
        """The topmost values, the lowest of them first."""
        return [self._stack.pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[Any]:
        position = self._marks.pop()
        items = self._stack[position:]
        del self._stack[position:]
        return items

    def _memoize(self, number: int | None) -> None:
        self._memo[len(self._memo) if number is None else number] = self._stack[-1]

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=False):
                if type(key) is str:
                    target[key] = value

    def _name(self, module: Any, name: Any) -> None:
        if not (type(module) is str and type(name) is str):
            raise FormatError("its pickle is damaged")
        self._push(Global(module, name))

    def _construct(self, function: Any, arguments: Any) -> None:
        known = isinstance(function, Global) and isinstance(arguments, tuple)
        self._push(self.call(function, arguments) if known else {})

    def _construct_of(self, items: list[Any]) -> None:
        self._construct(items[0], tuple(items[1:]))


_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)

_STEPS: Mapping[str, Callable[[PickleMachine, Any], Any]] = {
    # How the pickle is stored.
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    # Stack and memo.
    "MARK": lambda m, _: m._marks.append(len(m._stack)),
    "DUP": lambda m, _: m._push(m._stack[-1]),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, number: m._push(m._memo[number])),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), PickleMachine._memoize),
    # Values.
    **dict.fromkeys(_LITERALS, PickleMachine._push),
    "NONE": lambda m, _: m._push(None),
    "NEWTRUE": lambda m, _: m._push(True),
    "NEWFALSE": lambda m, _: m._push(False),
    "EMPTY_TUPLE": lambda m, _: m._push(()),
    "TUPLE1": lambda m, _: m._push(tuple(m._pop(1))),
    "TUPLE2": lambda m, _: m._push(tuple(m._pop(2))),
    "TUPLE3": lambda m, _: m._push(tuple(m._pop(3))),
    "TUPLE": lambda m, _: m._push(tuple(m._pop_to_mark())),
    "EMPTY_LIST": lambda m, _: m._push([]),
    "APPEND": lambda m, _: m._extend(m._pop(1)),
    "APPENDS": lambda m, _: m._extend(m._pop_to_mark()),
    "EMPTY_DICT": lambda m, _: m._push({}),
    "SETITEM": lambda m, _: m._set_items(m._pop(2)),
    "SETITEMS": lambda m, _: m._set_items(m._pop_to_mark()),
    # Names, calls and objects.
    "GLOBAL": lambda m, names: m._name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m._name(*m._pop(2)),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m._construct(*m._pop(2))),
    "NEWOBJ_EX": lambda m, _: m._construct(*m._pop(3)[:2]),
    "INST": lambda m, names: m._construct_of([Global(*names.split(" ", 1)), *m._pop_to_mark()]),
    "OBJ": lambda m, _: m._construct_of(m._pop_to_mark()),
    "BUILD": lambda m, _: m._pop(1),
    "BINPERSID": lambda m, _: m._push(m.load_persistent(*m._pop(1))),
    # What is nobody's tensor. The state of an object and the items of a set are dropped.
    **dict.fromkeys(("EMPTY_SET", "EXT1", "EXT2", "EXT4"), lambda m, _: m._push({})),
    "ADDITEMS": lambda m, _: m._pop_to_mark(),
    "FROZENSET": lambda m, _: m._construct(None, m._pop_to_mark()),
}
"""What each operation does to the machine, with the argument that stands behind it."""
