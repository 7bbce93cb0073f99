"""What is wrong with a file's content, from where it is found to the line that the user reads."""

import re
from pathlib import Path

from dreambooth_ms.models.specs import read_table

_SIGNATURES = read_table(Path(__file__).with_name("signatures.yaml"))


class FormatError(Exception):
    """What is wrong with a file's content; becomes a WeightError where its name is known (`stored.reading`)."""

    def __init__(self, reason: str, remedy: str = "copy or download it again") -> None:
        super().__init__(reason)
        self.remedy = remedy


def unread_type(tensor: str, dtype: object) -> FormatError:
    """The error for a tensor of a type that is not read; fp8 is called so, whatever the file calls it."""
    if isinstance(dtype, str) and re.match(r"(?:hi)?f(?:loat)?8", dtype, re.IGNORECASE):
        return FormatError(f"{tensor} is fp8, {quoted(dtype)}, which is not read", "use the same model in fp16 or bf16")
    return FormatError(f"{tensor} has the type {quoted(dtype)}, which cannot be read")


def seems_to_be(head: bytes) -> str | None:
    """In words, from a file's first bytes; None if nothing is known about them."""
    return next((meaning for meaning, look in _SIGNATURES.items() if re.match(look.encode(), head, re.DOTALL)), None)


def quoted(value: object, within: bool = False) -> str:
    """Something out of a file, for a message: on one line, short, and never walked through as a whole."""
    if isinstance(value, str):
        return repr(value[:100])
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    if isinstance(value, (list, tuple)) and not within:
        shown = [quoted(item, within=True) for item in value[:8]]
        return f"({', '.join(shown)}{', …' if len(value) > 8 else ''})"
    return f"a {type(value).__name__}"
