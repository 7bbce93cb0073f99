"""What a user can get wrong. Each message says what was given, what was expected, and what to do."""

import errno
import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import TypeAlias

FAILED_STATUS, USER_ERROR_STATUS, INTERRUPTED_STATUS = 1, 2, 130
"""Exit statuses: a defect of the toolkit; a user's mistake; 128 + SIGINT, as shells report it."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""A disk that is full, or may not be written to."""
Tell: TypeAlias = Callable[[str], object]
"""Shows a line to the user, or notes it."""


class UserError(Exception):
    """A mistake that the user can mend. Never raised for a defect of the toolkit itself."""


class ConfigError(UserError):
    """A flag or a configuration file is wrong: an unknown key, a wrong type, an impossible combination."""


class DataError(UserError):
    """A picture, a caption or an image folder cannot be used."""


class WeightError(UserError):
    """A weight file or a model folder cannot be read, or does not fit the network it is meant for."""


class DeviceError(UserError):
    """The device cannot do what was asked of it."""


def count_of(number: int, thing: str) -> str:
    """How many of a thing, in words: "1 picture", "1,200 pictures"."""
    return f"{number:,} {thing if number == 1 else thing + 's'}"


def show_names(names: Sequence[str], at_most: int = 3) -> str:
    """The first of some names, and how many more there are, in one line whatever they hold."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(name if name.isprintable() else ascii(name)[1:-1] for name in names[:at_most]) + more


def near(path: str | os.PathLike[str]) -> str:
    """What to add to a message of a path that is not there: the nearest that is, if there is one."""
    text = os.path.expanduser(os.fspath(path))
    slashed = text.replace("\\", "/")
    if slashed != text and os.path.exists(slashed):
        return f"; did you mean {slashed}?"
    folder, name = os.path.split(slashed.rstrip("/"))
    while folder.strip("/") and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    if os.path.lexists(os.path.join(folder, name)):
        return ""  # What is wrong is below a file.
    try:
        there = {one.casefold(): one for one in os.listdir(folder or ".")}
    except (OSError, ValueError):
        return ""
    stem = os.path.splitext(name.casefold())[0]
    close = get_close_matches(name.casefold(), there, n=1) or [one for one in there if os.path.splitext(one)[0] == stem]
    return f"; did you mean {os.path.join(folder, there[close[0]])}?" if close else ""


def explain(error: BaseException) -> str | None:
    """What to tell the user of an error that the user can mend; None for a defect."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        for code, reason in zip(DISK_ERRORS, map(os.strerror, DISK_ERRORS), strict=True):
            if error.errno == code or reason in str(error):  # Of several errors shutil keeps only the texts.
                where = error.filename or "a file"
                return f"{where}: cannot be written ({reason}); free some space and run the same command again"
    return None
