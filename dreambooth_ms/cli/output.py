"""What commands say while they work. Of several processes that train as one, one speaks."""

import sys
from typing import Any

from tqdm import tqdm

PROGRAM = "dreambooth-ms"

_quiet = False


def be_quiet() -> None:
    """Say nothing in this process from now on, but what `complain` says."""
    global _quiet
    _quiet = True


def tell(line: str) -> None:
    """Print a line about what goes on to stderr, which leaves stdout to results."""
    if not _quiet:
        print(line, file=sys.stderr)


def progress(*arguments: Any, **options: Any) -> Any:
    """tqdm's progress bar."""
    return tqdm(*arguments, disable=_quiet, **options)


def complain(line: str) -> None:
    """Print what ends the command, one line per problem; file names that are not UTF-8 are escaped."""
    for problem in line.splitlines():
        print(f"{PROGRAM}: error: {problem}".encode(errors="backslashreplace").decode(), file=sys.stderr)
