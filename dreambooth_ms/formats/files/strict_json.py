"""JSON from files that nobody vouches for."""

import json
from typing import Any

from dreambooth_ms.formats.files.byte_ranges import SourceFile
from dreambooth_ms.formats.files.format_error import FormatError, quoted

MAX_JSON_BYTES = 25_000_000
"""Parsed, `[],[],…` takes 24 times its size; the header of an SDXL model has 0.3 MB."""

_MAX_DIGITS = 20


def read_json_object(source: SourceFile) -> dict[str, Any]:
    """The JSON object that a file is.

    Raises:
        FormatError: it is none.
    """
    if source.size > MAX_JSON_BYTES:
        raise FormatError(f"{source.size} bytes of JSON; at most {MAX_JSON_BYTES} are read")
    return parse_json_object(source.read(0, source.size))


def parse_json_object(content: bytes) -> dict[str, Any]:
    """A JSON object of at most `MAX_JSON_BYTES`, in which no name stands twice at any depth.

    Raises:
        FormatError: it is none.
    """
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repetition, parse_int=_parse_int)
    except ValueError as error:
        raise FormatError(f"no valid JSON: {error}") from error
    except RecursionError as error:
        raise FormatError("no valid JSON: nested too deeply") from error
    if not isinstance(parsed, dict):
        raise FormatError("expected a JSON object")
    return parsed


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise FormatError(f"the name {quoted(name)} stands in it twice")
        unique[name] = value
    return unique


def _parse_int(digits: str) -> int:
    """Older versions of Python take quadratic time for long numbers."""
    if len(digits) > _MAX_DIGITS:
        raise FormatError(f"impossible number {quoted(digits)}")
    return int(digits)
