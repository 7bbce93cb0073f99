"""Flags of other programs that are not here: refused with a reason, or harmless and ignored with one.

They stand in refusals.yaml.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Refusal(NamedTuple):
    """Why a flag is refused."""

    reason: str
    unless: tuple[str, ...]
    """Values for which there is nothing to refuse, beside those of NOTHING."""
    gives: tuple[str, ...]
    """Fields that it would have given, or ALL: they are not also reported as missing."""


NOTHING = ("false", "none", "no", "", "0", "0.0", "-1")
"""Values that turn any of these flags off."""
ALL = ("*",)


def _by_name(rows: Iterable[Mapping[str, Any]]) -> dict[str, Refusal]:
    """Each row is an answer to several names; texts are lists of words."""
    answers: dict[str, Refusal] = {}
    for row in rows:
        reason = row.get("reason") or f"not in this version: {row['not_yet']}"
        unless, gives = (tuple(str(row.get(key, "")).split()) for key in ("unless", "gives"))
        answers |= dict.fromkeys(row["names"].split(), Refusal(reason, unless, gives))
    return answers


def _reasons(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {name: answer.reason for name, answer in _by_name(rows).items()}


_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

REFUSED = _by_name(_TABLES["refused"])
"""Flags that are not here -> why, and what to do."""

HARMLESS = _reasons(_TABLES["harmless"])
"""Flags that are accepted and ignored -> why nothing is lost."""

VALUES = {field: _reasons(rows) for field, rows in _TABLES["values"].items()}
"""Field -> values that are refused by name, in lower case -> why."""
METHODS_NOT_YET = VALUES["method"]
