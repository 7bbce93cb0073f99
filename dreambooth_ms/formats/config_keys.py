"""What the keys of a model's configurations may hold: a table for each, in which a key has the type of its values.

config_keys.yaml has them, and says which specs have a field for a key.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from dreambooth_ms.diffusion import NoiseScheduleSpec
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models import specs

_LARGEST, _MOST = 1e38, 1_000_000
"""Numbers that can be calculated with in float32, NaN and infinity left out; and sizes that networks have."""
_WORDS = {int: "a whole number above 0", float: "a number", bool: "true or false", str: "text", type(None): "null"}

_KINDS = {"0": Literal[0], "flags": bool, "null": None, "numbers": float, "objects": dict, "sizes": int, "texts": str}
_KINDS |= {"lists of numbers": tuple[float, ...], "lists of sizes": tuple[int, ...]}
_KINDS |= {"lists of sizes and 0": tuple[Literal[0] | int, ...]}
"""By their names in config_keys.yaml, where "or" stands between several."""
TABLES = specs.read_table(Path(__file__).with_name("config_keys.yaml"))
"""As that file has them."""
_SPECS: Mapping[str, Any] = {**vars(specs), "NoiseScheduleSpec": NoiseScheduleSpec}
"""Where a table's "fields of" are found."""


def _keys(table: str) -> Mapping[str, Any]:
    own = TABLES[table]
    keys: dict[str, Any] = dict.fromkeys(own.get("anything", ()), Any)
    keys |= {field.name: field.type for spec in own.get("fields of", ()) for field in fields(_SPECS[spec])}
    keys |= {key: Literal.__getitem__((value,)) for key, value in own.get("written", {}).items()}
    for kind in own:
        if _KINDS.keys() >= {*kind.split(" or ")}:
            keys |= dict.fromkeys(own[kind], Union.__getitem__(tuple(map(_KINDS.get, kind.split(" or ")))))
    keys |= {key: Literal.__getitem__(tuple(values)) for key, values in own.get("one of", {}).items()}
    lists = {key: Literal.__getitem__(tuple(values)) for key, values in own.get("lists of", {}).items()}
    return keys | {key: GenericAlias(tuple, (kind, ...)) for key, kind in lists.items()}


KEYS = {table: _keys(table) for table in TABLES}
"""Table -> key of a configuration -> type of its values."""


def check_keys(config: Mapping[str, Any], table: str) -> None:
    """Stop, by a WeightError, at a key that is not known in a table, or at a value that is not of its type.

    Nothing follows from a key that nobody knows if it is null, false or empty: so libraries write what is not used.
    """
    keys = KEYS[table]
    for key, value in config.items():
        if key not in keys and not (key.startswith("_") or _is_off(value)):
            raise WeightError(
                f"{key} {reprlib.repr(value)} is not known, and may mean another network; "
                "use SD 1.x, 2.x, SDXL, IF or AltDiffusion, or take the key out if it means nothing"
            )
        if key in keys and not _fits(value, keys[key]):
            raise WeightError(
                f"{key}: expected {_words(keys[key])}, got {reprlib.repr(value)}; "
                "download it again, or use SD 1.x, 2.x, SDXL, IF or AltDiffusion"
            )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == "" or (isinstance(value, (list, dict)) and not any(value))


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(value == part for part in parts)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(one, parts[0]) for one in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int) and 1 <= value <= _MOST
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) < _LARGEST
    return kind is Any or isinstance(value, kind)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join("null" if part is None else str(part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each {_words(get_args(kind)[0])}"
    return " or ".join(map(_words, get_args(kind))) or _WORDS.get(kind, "an object")
