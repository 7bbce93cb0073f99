"""One value: as it is written in a flag or a file -> as its field has it."""

import os
import re
from typing import Any, get_args, get_origin

from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode, ValueNode

from dreambooth_ms.config.schema import Field
from dreambooth_ms.config.spellings import VALUES, choice_of
from dreambooth_ms.errors import ConfigError

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""What no file can hold as text: Python's stand-ins for bytes that are not UTF-8, and the null character."""

_NODES: dict[Any, ValueNode] = {
    bool: BooleanNode(False, is_optional=False),
    int: IntegerNode(0, is_optional=False),
    float: FloatNode(0.0, is_optional=False),
    str: StringNode("", is_optional=False),
}
"""What OmegaConf converts values with."""


def read_value(one: Field, written: Any, is_flag: bool) -> Any:
    """The value of a field; None, lists and choices as users write them, ~ in a path as the home folder.

    Raises:
        ConfigError: it is none.
    """
    texts = [text for text in (written if isinstance(written, list) else [written]) if isinstance(text, str)]
    if reason := VALUES.get(one.name, {}).get(str(written).lower()):
        raise ConfigError(f"{written}: {reason}")
    if "???" in texts:
        raise ConfigError("??? stands for a value that is still to be given")
    if any(map(_NO_TEXT.search, texts)):
        raise ConfigError(f"expected text in UTF-8, got {written!r}; rename a file or folder that is called so")
    if one.optional and (written is None or written in ("None", "null")):
        return None
    if one.kind is str and not isinstance(written, str | None):
        raise ConfigError(f"expected text, got {written!r}; put it in quotes")
    try:
        value = _converted(one, written, is_flag)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"expected {one.expected}, got {written!r}") from error
    return at_home(value) if one.is_path else value


def _converted(one: Field, written: Any, is_flag: bool) -> Any:
    if isinstance(one.kind, tuple):
        return choice_of(one.name, one.kind, written)
    if get_origin(one.kind) is list:
        (kind,) = get_args(one.kind)
        if is_flag or isinstance(written, str):
            written = split(written)
        elif kind is float and isinstance(written, int | float):
            written = [written]
        if not isinstance(written, list):
            raise ValueError
        return [_NODES[kind].validate_and_convert(entry) for entry in written]
    if get_origin(one.kind) is tuple:
        texts = written if isinstance(written, list) else [written]
        return tuple(_NODES[str].validate_and_convert(text) for text in texts)
    if one.kind is bool and not isinstance(written, bool | str):
        raise ValueError
    return _NODES[one.kind].validate_and_convert(written)


def split(value: Any) -> list[str]:
    """The entries of comma-separated text, or of several of them."""
    texts = value if isinstance(value, list) else [value]
    return [entry.strip() for text in texts for entry in str(text).split(",") if entry.strip()]


def at_home(path: Any) -> Any:
    """A path, or a list of them, with ~ as the home folder; None stays as it is.

    Raises:
        ConfigError: there is no such home.
    """
    if isinstance(path, list):
        return [at_home(one) for one in path]
    whole = os.path.expanduser(path) if path else path
    if whole and whole.startswith("~"):
        raise ConfigError(
            f"{path}: no home folder is known for {whole.partition('/')[0]}; write the whole path, "
            f"or ./{path} for a name that begins so"
        )
    return whole
