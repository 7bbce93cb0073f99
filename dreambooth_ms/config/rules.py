"""What a field goes with. It stands at the field: `ema_decay: Annotated[float, DECAY, only_with("use_ema")] = 0.9999`.
A rule looks at the values of all fields, by name, and but for few only where its own field differs from its default."""

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

Values: TypeAlias = Mapping[str, Any]


class Resume(Enum):
    """Whether a field may differ when a run goes on. A field that says nothing may not."""

    MAY_CHANGE = "always"
    CUTS_ROWS = "while a step has as many rows"
    BY_CONTENT = "while what it names has the same content"


class Rule(NamedTuple):
    """What a value may break beside others, and the message then: `{field}` is its own name, `{rank}` a value."""

    broken: Callable[[Values], Any]
    message: str
    is_note: bool = False
    """Whether the value is accepted, with the message as a note."""
    of_default: bool = False
    """Whether it is also looked at where the field has its default."""


def no_effect(reason: str, when: Callable[[Values], Any]) -> Rule:
    """The field is not read then; the reason completes "--name has no effect"."""
    return Rule(when, f"--{{field}} has no effect {reason}", is_note=True)


def only_with(other: str, *those: str) -> Rule:
    """The field is only read while the other one has one of those values, or without any: while it is set."""
    if not those:
        return no_effect(f"without --{other}", lambda values: not values[other])
    return no_effect(f"without --{other} {' or '.join(those)}", lambda values: values[other] not in those)


def not_with(other: str, *those: str) -> Rule:
    """The field is not read where the other one has one of those values."""
    return no_effect(f"with --{other} {{{other}}}", lambda values: values[other] in those)


def needs(other: str, what: str, *instead: str) -> Rule:
    """The other field must be given, too, or one of those instead; `what` says what it is."""
    return Rule(
        lambda values: not any(values[name] for name in (other, *instead)), f"--{{field}}: needs --{other}, {what}"
    )


def needed_without(other: str, own: str, message: str) -> Rule:
    """The field, `own`, must be given, or the other one."""
    return Rule(lambda values: not (values[own] or values[other]), f"--{own}: missing; {message}", of_default=True)


def refused_with(other: str, value: object, message: str) -> Rule:
    """The other field must not have this value."""
    return Rule(lambda values: values[other] == value, f"--{{field}}: {message}")


def excludes(*others: str, message: str) -> Rule:
    """None of the other fields, whose default is None, may be given."""
    return Rule(lambda values: any(values[other] is not None for other in others), f"--{{field}}: {message}")
