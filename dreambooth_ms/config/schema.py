"""What all schemas of commands share: their values by name, and the check of these by what stands at the fields."""

from dataclasses import fields
from typing import Any, ClassVar

from dreambooth_ms.config.describe import schema_fields


class Schema:
    """The settings of one command: a frozen dataclass of sections, themselves frozen dataclasses of values.

    A section whose fields only make sense in certain combinations may have `problems`, too.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ()
    """Fields that may be given without their flags, in this order."""
    USUAL: ClassVar[tuple[str, ...]] = ()
    """The fields that everybody sets, with which `--help` is content. Empty: there are so few that it shows all."""
    EXAMPLE: ClassVar[str] = ""
    """The flags of a command that can be typed."""

    def values(self) -> dict[str, Any]:
        """Field name -> value, over all sections."""
        sections = [getattr(self, section.name) for section in fields(self)]  # type: ignore[arg-type]
        return {name: value for section in sections for name, value in vars(section).items()}

    def missing(self) -> list[str]:
        """Fields that are required beside the values of others, and not given."""
        return []

    def problems(self) -> list[str]:
        """Combinations that are refused, beyond those that stand at a field."""
        return []

    def check(self) -> tuple[list[str], list[str]]:
        """Problems and notes, one line each: of ranges, and of rules between fields. Reads no file. A problem names the
        fields that it is about, as `--name`."""
        values = self.values()
        outside, broken, notes = [], [], []
        for name, one in schema_fields(type(self)).items():
            value = values[name]
            if one.range is not None and value is not None and not one.range.holds(value):
                outside.append(f"--{name}: expected {one.range.expected}, got {value!r}")
            if value != one.default:
                found = [rule for rule in one.rules if rule.broken(values)]
                lines = [(rule.message.format_map(values | {"field": name}), rule.is_note) for rule in found]
                broken += [line for line, is_note in lines if not is_note]
                notes += [line for line, is_note in lines if is_note][:1]
        for section in fields(self):  # type: ignore[arg-type]
            broken += getattr(getattr(self, section.name), "problems", list)()
        return outside + broken + self.problems(), notes
