"""What all schemas of commands share: their values by name, the check of these by what stands at the fields, and the
schema as data and as help text, read from the schema itself so that they cannot diverge."""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from dreambooth_ms.config.ranges import PATH, SECRET, Range
from dreambooth_ms.config.rules import Resume, Rule

_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("True or False", "[True|False]"), int: ("a whole number", "N"), float: ("a number", "X"),
    str: ("text", "TEXT"), list[str]: ("a list of texts", "TEXT [TEXT ...]"),
    list[float]: ("a list of numbers", "X [X ...]"), tuple[str, ...]: ("text or a list of texts", "TEXT"),
    dict[str, Any]: ("names with what belongs to each, in the file", "…"),
}  # fmt: skip
"""Kind of a field -> what a value has to be, and what stands for it in a usage line."""


@dataclass(frozen=True)
class Field:
    """One field of a schema, as flags, files and the help text see it. `kind` is bool, int, float, str, list[str],
    list[float], tuple[str, ...] for texts that may hold commas, dict[str, Any] for what only a file can say, or the
    tuple of texts to choose from; `default` is dataclasses.MISSING where the user has to give a value."""

    name: str
    section: str
    kind: Any
    optional: bool
    default: Any
    range: Range | None
    rules: tuple[Rule, ...]
    resume: Resume | None
    is_path: bool
    is_secret: bool

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        what = f"one of {', '.join(self.kind)}" if isinstance(self.kind, tuple) else _WORDS[self.kind][0]
        return f"{what}, or None" if self.optional else what

    @property
    def placeholder(self) -> str:
        """What stands for the value in a usage line."""
        return "{" + ",".join(self.kind) + "}" if isinstance(self.kind, tuple) else _WORDS[self.kind][1]


class Schema:
    """The settings of one command: a frozen dataclass of sections, themselves frozen dataclasses of values."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ()
    """Fields that may be given without their flags, in this order."""
    USUAL: ClassVar[tuple[str, ...]] = ()
    """The fields that everybody sets, with which `--help` is content. Empty: there are so few that it shows all."""
    EXAMPLE: ClassVar[str] = ""
    """The flags of a command that can be typed."""

    def values(self) -> dict[str, Any]:
        """Field name -> value, over all sections."""
        sections = [getattr(self, section.name) for section in fields(self)]  # type: ignore[arg-type]
        return {name: value for section in sections for name, value in vars(section).items()}

    def missing(self) -> list[str]:
        """Fields that are required beside the values of others, and not given."""
        return []

    def check(self) -> tuple[list[str], list[str]]:
        """Problems and notes of ranges and rules, one line each; reads no file. Problems name fields, as `--name`."""
        values = self.values()
        shown = {n: ", ".join(map(str, own)) if isinstance(own, list | tuple) else own for n, own in values.items()}
        outside, broken, notes = [], [], []
        for name, one in schema_fields(type(self)).items():
            value = values[name]
            if one.range is not None and value is not None and not one.range.holds(value):
                outside.append(f"--{name}: expected {one.range.expected}, got {shown[name]!r}")
            rules = [rule for rule in one.rules if value != one.default or rule.of_default]
            found = [rule for rule in rules if rule.broken(values)]
            lines = [(rule.message.format_map(shown | {"field": name}), rule.is_note) for rule in found]
            broken += [line for line, is_note in lines if not is_note]
            notes += [line for line, is_note in lines if is_note][:1]
        return outside + broken, notes


def schema_fields(schema: type) -> dict[str, Field]:
    """Every field of every section, by name, in the order of the schema. Names are unique over the sections."""
    known: dict[str, Field] = {}
    for section, owner in sections(schema).items():
        hints = get_type_hints(owner, include_extras=True)
        for one in fields(owner):
            assert one.name not in known, f"{one.name} is a field of two sections"
            default = one.default if one.default_factory is MISSING else one.default_factory()
            known[one.name] = Field(one.name, section, default=default, **_read_hint(hints[one.name]))
    return known


def sections(schema: type) -> dict[str, type]:
    """Section name -> its dataclass."""
    hints = get_type_hints(schema)
    return {one.name: hints[one.name] for one in fields(schema)}


def _read_hint(hint: Any) -> dict[str, Any]:
    """What the annotation of a field says of it: the fields of `Field` from `kind` on, but for the default."""
    hint, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    optional = get_origin(hint) in (Union, UnionType)
    if optional:
        (hint,) = [argument for argument in get_args(hint) if argument is not NoneType]
    return {
        "kind": get_args(hint) if get_origin(hint) is Literal else hint,
        "optional": optional,
        "range": next((mark for mark in marks if isinstance(mark, Range)), None),
        "rules": tuple(mark for mark in marks if isinstance(mark, Rule)),
        "resume": next((mark for mark in marks if isinstance(mark, Resume)), None),
        "is_path": PATH in marks,
        "is_secret": SECRET in marks,
    }


@cache
def field_documentation(owner: type) -> dict[str, str]:
    """Field name -> the docstring under it, for one section; fields without one are left out."""
    texts = {}
    for part in reversed(owner.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = inspect.cleandoc(text)
    return texts


def describe(schema: type) -> str:
    """The flags of a command as help text, by section, required ones first; with choices, ranges and defaults."""
    blocks = []
    for section, owner in sections(schema).items():
        own = [one for one in schema_fields(schema).values() if one.section == section]
        required_first = sorted(own, key=lambda one: one.default is not MISSING)
        blocks.append("\n".join([f"{section}: {inspect.getdoc(owner)}", *_lines(schema, required_first)]))
    return "\n\n".join(blocks)


def describe_usual(schema: type[Schema]) -> str:
    """The same of the flags that everybody sets, in their order."""
    return "\n".join(_lines(schema, map(schema_fields(schema).__getitem__, schema.USUAL)))


def _lines(schema: type, fields_of_it: Iterable[Field]) -> Iterator[str]:
    owners = sections(schema)
    for one in fields_of_it:
        allowed = [one.range.expected] if one.range and one.kind in (int, float) else []
        default = ",".join(map(str, one.default)) if isinstance(one.default, list) else one.default
        value = "required" if default is MISSING else "default: empty" if default == "" else f"default: {default}"
        text = f"{field_documentation(owners[one.section])[one.name]} ({'; '.join([*allowed, value])})"
        yield f"  --{one.name} {one.placeholder}"
        yield textwrap.fill(text, 100, break_on_hyphens=False, initial_indent=" " * 8, subsequent_indent=" " * 8)
