"""What does not fit between a file and the networks it is for."""

from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth_ms.errors import WeightError


@dataclass(frozen=True)
class Report:
    """All misfits together; empty where everything fits."""

    missing: tuple[str, ...] = ()
    """Public names that no tensor of the file holds."""
    unexpected: tuple[str, ...] = ()
    """Names in the file that hold nothing known."""
    misshaped: tuple[str, ...] = ()
    """Public names, each with the shape that was expected and the one that was found."""
    duplicate: tuple[str, ...] = ()
    """Public names that several tensors hold, each with the names of these in the file."""

    @property
    def fits(self) -> bool:
        """Whether there is no misfit."""
        return self.count == 0

    @property
    def count(self) -> int:
        """The number of misfits."""
        return sum(map(len, vars(self).values()))

    def summary(self) -> str:
        """One line: kinds of misfits with their counts, by part, with the first names of each; "fits" if none."""
        kinds = (
            ("missing", self.missing, _by_part),
            ("unexpected", self.unexpected, show_names),
            ("of another shape", self.misshaped, _by_part),
            ("there more than once", self.duplicate, _by_part),
        )
        return "; ".join(f"{len(names)} {kind} ({show(names)})" for kind, names, show in kinds if names) or "fits"

    def check(self, source: str, target: str, otherwise: str = "") -> None:
        """Stop if anything does not fit.

        Raises:
            WeightError: the summary, with the file or folder, the networks that it is for, and what to do.
        """
        if not self.fits:
            raise WeightError("; ".join(filter(None, (f"{source} does not fit {target}: {self.summary()}", otherwise))))


def _by_part(names: Sequence[str]) -> str:
    parts: dict[str, list[str]] = {}
    for name in names:
        part, _, rest = name.partition(".")
        parts.setdefault(part, []).append(rest)
    return "; ".join(f"{part} {len(rest)}: {show_names(rest)}" for part, rest in parts.items())


def show_names(names: Sequence[str], at_most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{', '.join(names[:at_most])}{more}"
