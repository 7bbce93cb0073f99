"""Which picture, crop and flip each row of each batch sees: a function of the seed, known before the run starts.

Rows are numbered over the whole run, each group by itself. All that is random about a row depends on its number, so it
makes no difference how the rows are cut into batches: two batches of 1 are the rows of one batch of 2.
"""

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
    """The rows of every batch: `batch_size` of each group, the groups in the order given.

    Each group is gone through in an order drawn anew for every epoch of its own, so that no picture is dropped and all
    come up equally often, whatever the batch size.
    """

    groups: tuple[tuple[Record, ...], ...]
    batch_size: int
    framing: Framing
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which the largest group is gone through once."""
        return -(-max(len(records) for records in self.groups) // self.batch_size)

    def row_numbers(self, batch: int) -> range:
        """The numbers of a batch's rows, the same in each group."""
        return range(batch * self.batch_size, (batch + 1) * self.batch_size)

    def rows(self, batch: int) -> tuple[View, ...]:
        """What the rows of a batch see."""
        return tuple(self._view(records, number) for records in self.groups for number in self.row_numbers(batch))

    def views(self, first_batch: int, stop_batch: int) -> tuple[View, ...]:
        """All distinct views of these batches, in the order of their first use."""
        return tuple(dict.fromkeys(view for batch in range(first_batch, stop_batch) for view in self.rows(batch)))

    def _view(self, records: Sequence[Record], number: int) -> View:
        group = records[0].group
        epoch, position = divmod(number, len(records))
        record = records[generator(self.seed, f"{group} order", epoch).permutation(len(records))[position]]
        framing = self.framing
        if framing.center_crop:
            crop = centre_crop(record.size, framing.resolution)
        else:
            crop = random_crop(record.size, framing.resolution, generator(self.seed, f"{group} crop", number))
        flip = framing.random_flip and generator(self.seed, f"{group} flip", number).random() < 0.5
        return View(record, crop, bool(flip))
