"""Where a file keeps each public tensor, and what must be done to it on the way, to be read and to be written.

Every change moves elements and computes nothing, so it holds for any dtype, bfloat16's bit patterns in uint16 included.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

import numpy as np

from dreambooth_ms.errors import WeightError, show_names
from dreambooth_ms.formats.naming import TABLES

Shape = tuple[int, ...]
_WRAPPERS, _IGNORABLE = (re.compile("|".join(TABLES[table])) for table in ("wrappers", "ignorable"))


class Layout(Enum):
    """How a tensor lies in a file: what becomes of a public one and of its shape."""

    AS_IS = (lambda value: value, lambda shape: shape)
    TRANSPOSED = (lambda value: value.T, lambda shape: shape[::-1])
    """(I, O) for a linear layer's (O, I): OpenCLIP's text projection is a bare matrix, multiplied from the right."""
    CONVOLUTION = (lambda value: value[..., None, None], lambda shape: (*shape, 1, 1))
    """(O, I, 1, 1) for (O, I)."""
    LINEAR = (lambda value: value[..., 0, 0], lambda shape: shape[:-2])
    """(O, I) for (O, I, 1, 1)."""

    @property
    def keeps_order(self) -> bool:
        """Whether the elements follow each other alike in both forms."""
        return self is not Layout.TRANSPOSED

    @property
    def inverse(self) -> "Layout":
        """The layout that undoes this one."""
        return {Layout.CONVOLUTION: Layout.LINEAR, Layout.LINEAR: Layout.CONVOLUTION}.get(self, self)

    def store(self, value: np.ndarray) -> np.ndarray:
        """Public form -> stored form, as a view."""
        return self.value[0](value)

    def stored_shape(self, shape: Shape) -> Shape:
        """The stored form's shape for a public shape."""
        return self.value[1](shape)


@dataclass(frozen=True)
class Slot:
    """The tensor of a file that holds a public one: all of it, or one of equal blocks of its rows."""

    name: str
    layout: Layout = Layout.AS_IS
    block: int = 0
    blocks: int = 1

    def restore(self, stored: np.ndarray) -> np.ndarray:
        """The file's tensor -> the public one, as a view."""
        own = np.split(stored, self.blocks)[self.block] if self.blocks > 1 else stored
        return self.layout.inverse.store(own)

    def stored_shape(self, shape: Shape) -> Shape:
        """The shape of the file's tensor for a public shape."""
        own = self.layout.stored_shape(shape)
        return (self.blocks * own[0], *own[1:]) if self.blocks > 1 else own

    def public_shape(self, stored: Shape) -> Shape:
        """The public shape for the shape of the file's tensor."""
        own = (stored[0] // self.blocks, *stored[1:]) if self.blocks > 1 else stored
        return self.layout.inverse.stored_shape(own)


@dataclass(frozen=True)
class Assembly:
    """A tensor of a file, and the public ones it is made of, in the order of their rows."""

    pieces: tuple[str, ...]
    layout: Layout = Layout.AS_IS
    shared: bool = False
    """Whether the pieces are all this one tensor, instead of its blocks of rows."""

    def build(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The public tensors, in the order of the pieces -> the file's tensor."""
        stored = [self.layout.store(value) for value in values]
        if self.shared:
            assert all(np.array_equal(stored[0], other) for other in stored[1:]), self.pieces
        return stored[0] if self.shared or len(stored) == 1 else np.concatenate(stored)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the file's tensor for the public shapes, in the order of the pieces."""
        own = self.layout.stored_shape(shapes[0])
        return own if self.shared or len(shapes) == 1 else (len(shapes) * own[0], *own[1:])


def found_slot(slot: Slot, shape: Shape, stored: Shape) -> Slot | None:
    """The slot with the layout that leads from the stored shape to the public one, or None if there is none. Tools
    disagree on whether a 1x1 convolution is kept as a linear layer."""
    layouts = [slot.layout]
    if slot.layout is not Layout.TRANSPOSED and len(shape) == 2:
        layouts += [Layout.AS_IS, Layout.CONVOLUTION]
    elif shape[2:] == (1, 1):
        layouts += [Layout.AS_IS, Layout.LINEAR]
    candidates = (replace(slot, layout=layout) for layout in layouts)
    return next((candidate for candidate in candidates if candidate.stored_shape(shape) == stored), None)


def unwrapped(name: str) -> str:
    """A name without the levels of what a network was wrapped in when it was saved."""
    return _WRAPPERS.sub("", name)


Places = dict[str, list[Slot]]
"""By public name: where a file has it."""


def locate(
    names: Iterable[str], held_by: Callable[[str], Mapping[str, Slot]], publics: Iterable[str]
) -> tuple[Places, tuple[str, ...]]:
    """The places of public names in a file, in the order of `publics`, and its names that hold none of them; by what a
    name holds."""
    places: Places = {}
    held = {name: held_by(name) for name in names}
    for name, own in held.items():
        for public, slot in own.items():
            places.setdefault(public, []).append(replace(slot, name=name))
    unknown = tuple(name for name, own in held.items() if not own)
    return {public: places[public] for public in publics if public in places}, unknown


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

    @classmethod
    def of(
        cls, places: Places, missing: Iterable[str], unexpected: Iterable[str], misshaped: Iterable[str]
    ) -> "Report":
        """With the places of each public name, of which those that have several are duplicates."""
        twice = {name: " and ".join(slot.name for slot in own) for name, own in places.items() if len(own) > 1}
        shown = (f"{name}: {names}" for name, names in twice.items())
        return cls(tuple(missing), tuple(unexpected), tuple(misshaped), tuple(shown))

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
        """If anything does not fit, a WeightError: the summary, with the file or folder, the networks that it is for,
        and what to do."""
        if not self.fits:
            raise WeightError("; ".join(filter(None, (f"{source} does not fit {target}: {self.summary()}", otherwise))))


def _by_part(names: Sequence[str]) -> str:
    parts: dict[str, list[str]] = {}
    for name in names:
        part, _, rest = name.partition(".")
        parts.setdefault(part, []).append(rest)
    return "; ".join(f"{part} {len(rest)}: {show_names(rest)}" for part, rest in parts.items())


@dataclass(frozen=True)
class Naming:
    """The rules of a format, applied to every public name of one model."""

    shapes: Mapping[str, Shape]
    """The public names that the model has, in the order of writing, and those that the format keeps besides."""
    places: Mapping[str, Sequence[Slot]]
    """Where the format keeps each of them: first the place it is written to, then others that readers meet."""
    averages: Mapping[str, Slot] = field(default_factory=dict)
    """Where moving averages (EMA) of the weights are kept, if the file has them."""
    optional: frozenset[str] = frozenset()
    """Public names that no network here needs, such as CLIP's temperature: kept where both formats have a place."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """Values of optional names that readers of the format look for, written when there are no better ones."""
    prefix: str = ""
    """What names in a file that holds one network alone lack before them."""

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Where each of them is written to."""
        return {name: slots[0] for name, slots in self.places.items()}

    def plain(self, name: str) -> str:
        """A name of the file as the rules have it."""
        return self.prefix + unwrapped(name).removeprefix(self.prefix)

    def read_plan(
        self, stored: Mapping[str, Shape], parts: Collection[str] | None = None, averages: bool = False
    ) -> "ReadPlan":
        """What is read from where, with a report of what does not fit, of a file's names and shapes. Of some parts, or
        of all that the model has; with `averages` where the parameters have them."""
        wanted = parts_of(self.shapes) if parts is None else set(parts)
        places, unknown = self.locate(stored, averages)
        places = {name: found for name, found in places.items() if name.partition(".")[0] in wanted}
        slots = {name: found_slot(own[0], self.shapes[name], stored[own[0].name]) for name, own in places.items()}
        misshaped = [
            f"{name}: expected {own[0].stored_shape(self.shapes[name])}, got {stored[own[0].name]}"
            for name, own in places.items()
            if not slots[name]
        ]
        averaged = {slot.name for slot in self.averages.values()}
        of_format = averaged | {slot.name for slot in self.slots.values()}
        plain = {name: self.plain(name) for name in unknown}
        known = dict.fromkeys(name for name, own in plain.items() if own in of_format or _IGNORABLE.fullmatch(own))
        return ReadPlan(
            slots={name: slot for name, slot in slots.items() if slot},
            ignored=tuple(known),
            averages=tuple(sorted(name for name in stored if self.plain(name) in averaged)),
            report=Report.of(
                places,
                missing=(name for name in self.required(wanted) if name not in places),
                unexpected=(name for name in unknown if name not in known),
                misshaped=misshaped,
            ),
        )

    def locate(self, names: Collection[str], averages: bool = False) -> tuple[Places, tuple[str, ...]]:
        """Find the public names that are held by the names of a file, whatever their shapes: as `locate`."""
        there = {name: [slot] for name, slot in self.averages.items() if averages and slot.name in names}
        holders = (replace(self, places={**self.places, **there}) if there else self).holders
        return locate(names, lambda name: holders.get(self.plain(name), {}), self.shapes)

    def required(self, parts: Collection[str] | None = None) -> list[str]:
        """The public names without which a part is not whole, of some parts or of all."""
        needed = (name for name in self.shapes if name not in self.optional)
        return [name for name in needed if parts is None or name.partition(".")[0] in parts]

    def present_parts(self, stored: Collection[str]) -> list[str]:
        """The parts of which a file holds anything, in the model's order."""
        held = parts_of(name for name in self.locate(stored)[0] if name not in self.optional)
        return [part for part in parts_of(self.shapes) if part in held]

    def write_plan(self, names: Collection[str], parts: Collection[str] | None = None) -> "WritePlan":
        """What is written where, in the order of the model, of the public names that there are values for. Some parts
        are to be whole, or those that any of the names belongs to."""
        held = set(names)
        groups: dict[str, list[str]] = {}
        for name in (name for name in self.slots if name in held):
            groups.setdefault(self.slots[name].name, []).append(name)
        # Blocks of rows are written together or not at all.
        groups = {stored: group for stored, group in groups.items() if len(group) >= self.slots[group[0]].blocks}
        written = {name for group in groups.values() for name in group}
        whole = parts_of(name for name in self.slots if name in held) if parts is None else parts
        return WritePlan(
            tensors={stored: self._assembly(group) for stored, group in groups.items()},
            constants={
                self.slots[name].name: value
                for name, value in self.constants.items()
                if name not in held and name.partition(".")[0] in whole
            },
            left_out=tuple(name for name in names if name not in written),
            report=Report(missing=tuple(name for name in self.required(whole) if name not in held)),
        )

    def _assembly(self, group: list[str]) -> Assembly:
        slot, ordered = self.slots[group[0]], sorted(group, key=lambda name: self.slots[name].block)
        return Assembly(tuple(ordered), slot.layout, shared=len(group) > slot.blocks)

    @cached_property
    def holders(self) -> dict[str, dict[str, Slot]]:
        """The rules read backwards: name in a file -> the public names it holds."""
        holders: dict[str, dict[str, Slot]] = {}
        for public, slots in self.places.items():
            for slot in slots:
                holders.setdefault(self.plain(slot.name), {}).setdefault(public, slot)
        return holders


@dataclass(frozen=True)
class ReadPlan:
    """Where each public tensor is in a file."""

    slots: Mapping[str, Slot]
    """Public name -> the file's tensor and its layout there."""
    ignored: tuple[str, ...]
    """Names of the file that are known and not needed: schedules of the noise, position ids, averages."""
    averages: tuple[str, ...]
    """Names of the file that hold moving averages."""
    report: Report


@dataclass(frozen=True)
class WritePlan:
    """What each tensor of a file is made of."""

    tensors: Mapping[str, Assembly]
    """Name in the file -> what it is made of, in the order of writing."""
    constants: Mapping[str, float]
    """Scalars to be written besides: name in the file -> value."""
    left_out: tuple[str, ...]
    """Public names that the format has no place for."""
    report: Report
    """What is missing for the parts to be whole."""


def parts_of(names: Iterable[str]) -> dict[str, None]:
    """The parts that public names belong to, in order."""
    return dict.fromkeys(name.partition(".")[0] for name in names)
