"""Which picture, crop and flip each row of each step sees: a function of the seed, known before the run starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth_ms.data.pictures import CropBox, centre_crop, random_crop
from dreambooth_ms.data.records import Record
from dreambooth_ms.randomness import generator


@dataclass(frozen=True)
class View:
    """A picture as a row sees it."""

    record: Record
    crop: CropBox
    flip: bool


@dataclass(frozen=True)
class Framing:
    """How pictures become squares."""

    resolution: int
    center_crop: bool
    random_flip: bool


@dataclass(frozen=True)
class Plan:
    """The rows of every step: `batch_size` of each group, the groups in the order given.

    Each group is gone through in an order drawn anew for every epoch of its own, so that no picture is dropped and all
    come up equally often, whatever the batch size.
    """

    groups: tuple[tuple[Record, ...], ...]
    batch_size: int
    framing: Framing
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the largest group is gone through once."""
        return -(-max(len(records) for records in self.groups) // self.batch_size)

    def rows(self, step: int) -> tuple[View, ...]:
        """What the rows of a step see."""
        return tuple(self._view(records, step, row) for records in self.groups for row in range(self.batch_size))

    def views(self, first_step: int, stop_step: int) -> tuple[View, ...]:
        """All distinct views of these steps, in the order of their first use."""
        return tuple(dict.fromkeys(view for step in range(first_step, stop_step) for view in self.rows(step)))

    def _view(self, records: Sequence[Record], step: int, row: int) -> View:
        group = records[0].group
        epoch, position = divmod(step * self.batch_size + row, len(records))
        record = records[generator(self.seed, f"{group} order", epoch).permutation(len(records))[position]]
        framing = self.framing
        if framing.center_crop:
            crop = centre_crop(record.size, framing.resolution)
        else:
            crop = random_crop(record.size, framing.resolution, generator(self.seed, f"{group} crop", step, row))
        flip = framing.random_flip and generator(self.seed, f"{group} flip", step, row).random() < 0.5
        return View(record, crop, bool(flip))
