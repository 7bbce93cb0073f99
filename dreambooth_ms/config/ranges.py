"""Ranges of values, in words and as tests. A field names its own: `rank: Annotated[int, at_least(1)] = 4`."""

import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias


class Range(NamedTuple):
    """The values that a field may take: in words, and as a test. None is never out of range."""

    expected: str
    holds: Callable[[Any], bool]


def at_least(lowest: float) -> Range:
    """Finite numbers from the lowest on."""
    return Range(f"at least {lowest}", lambda value: lowest <= value < math.inf)


def above(lowest: float) -> Range:
    """Finite numbers above the lowest."""
    return Range(f"greater than {lowest}", lambda value: lowest < value < math.inf)


DECAY = Range("at least 0 and less than 1", lambda value: 0 <= value < 1)
SHARE = Range("greater than 0 and at most 1", lambda value: 0 < value <= 1)
INNER_SHARE = Range("greater than 0 and less than 1", lambda value: 0 < value < 1)
PART = Range("from 0 to 1", lambda value: 0 <= value <= 1)
SCORE = Range("from 0 to 10", lambda value: 0 <= value <= 10)
ZERO_OR_ONE = Range("0 or 1", lambda value: value in (0, 1))
FINITE = Range("a finite number", math.isfinite)
STEPS = Range("from 1 to 1000", lambda value: 1 <= value <= 1000)
SIDE = Range("a multiple of 8, at least 32", lambda value: value >= 32 and value % 8 == 0)
SEED = Range("from 0 to 2**64 - 1", lambda value: 0 <= value < 2**64)
PATH = "path"
"""Marks a field that holds a path, or several, in which ~ is the home folder."""
SECRET = "secret"
"""Marks a field whose value is written into no file."""
COLOUR = Range(
    "white, black, grey or #rrggbb", lambda name: bool(re.fullmatch(r"white|black|gr[ae]y|#[0-9a-fA-F]{6}", name))
)
NOT_EMPTY = Range("not empty", lambda value: len(value) > 0 and all(value))
"""A text, or a list that has texts and none of them empty."""

_MEMORY_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([GM])i?B?", re.IGNORECASE)


def memory_size(text: str) -> int | None:
    """Bytes of a size as MindSpore spells it, "16GB" for 16 times 2^30; None for any other text."""
    found = _MEMORY_SIZE.fullmatch(text)
    return int(float(found[1]) * 2 ** (30 if found[2] in "gG" else 20)) if found else None


Pattern: TypeAlias = dict[str, float] | list[float]
"""By the ends of layers' names; or by block, as kohya's scripts count."""


def pattern(text: str | None) -> Pattern | None:
    """{"to_q": 8, "attn2.to_k": 16}, or a list as 4,4,8; None for any other text."""
    with suppress(ValueError, RecursionError):
        read: Pattern = json.loads(text if text and text[0] in "{[" else f"[{text or ''}]")
        numbers = list(read.values()) if isinstance(read, dict) else read
        if all(type(own) in (int, float) and 0 <= own < math.inf for own in numbers):
            return read
    return None


PATTERN = Range('{"end of a layer\'s name": number}, or a list of numbers', lambda text: bool(pattern(text)))
MEMORY = Range("a size such as 16GB", lambda text: bool(memory_size(text)))
