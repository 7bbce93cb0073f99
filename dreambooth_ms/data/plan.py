"""Which picture, prompt, crop and flip each row of each batch sees: a function of the seed, known in advance.

Rows are numbered over the whole run, each concept's by themselves. All that is random about a row depends on its
number, so it makes no difference how the rows are cut into batches: two batches of 1 are the rows of one batch of 2.
The size is the step's, and depends on the number of the step.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dreambooth_ms.data.pictures import Frame, Size, frame_of
from dreambooth_ms.data.records import Concept, Record
from dreambooth_ms.randomness import generator


@dataclass(frozen=True, slots=True)
class View:
    """A picture as a row sees it."""

    record: Record
    prompt: str
    frame: Frame
    flip: bool


class Row(NamedTuple):
    """A row of the run."""

    concept: Concept
    number: int
    """Among the rows of its concept: what all its draws are named by."""
    view: View


@dataclass(frozen=True)
class Framing:
    """How pictures become crops."""

    sizes: tuple[Size, ...]
    """Each step draws one, for all its rows."""
    center_crop: bool
    random_flip: bool


@dataclass(frozen=True)
class Plan:
    """The rows of every batch: `batch_size` of each concept, in the order of the concepts.

    Each concept is gone through in an order drawn anew for every epoch of its own, so that no picture is dropped and
    all come up equally often, whatever the batch size.
    """

    concepts: tuple[Concept, ...]
    batch_size: int
    framing: Framing
    seed: int
    batches_per_step: int = 1

    @property
    def rows_per_step(self) -> int:
        """The rows of each concept in a step."""
        return self.batch_size * self.batches_per_step

    def size_of_step(self, step: int) -> Size:
        """The size of a step's rows, counted from 0. (Buckets by aspect ratio would be chosen here.)"""
        sizes = self.framing.sizes
        return sizes[generator(self.seed, "size", step).integers(len(sizes))] if len(sizes) > 1 else sizes[0]

    def rows(self, batch: int) -> list[Row]:
        """The rows of a batch, counted from 0 over the run."""
        size = self.size_of_step(batch // self.batches_per_step)
        numbers = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        return [Row(one, number, self._view(one, number, size)) for one in self.concepts for number in numbers]

    def views(self, first_batch: int, stop_batch: int) -> tuple[View, ...]:
        """All distinct views of these batches, in the order of their first use."""
        batches = range(first_batch, stop_batch)
        return tuple(dict.fromkeys(row.view for batch in batches for row in self.rows(batch)))

    def _view(self, concept: Concept, number: int, size: Size) -> View:
        name, framing = concept.name, self.framing
        epoch, position = divmod(number, len(concept.records))
        record = concept.records[_order(self.seed, name, len(concept.records), epoch)[position]]
        prompt = record.captions[0]
        if len(record.captions) > 1:
            prompt = record.captions[generator(self.seed, f"{name} caption", number).integers(len(record.captions))]
        drawn = None if framing.center_crop else generator(self.seed, f"{name} crop", number)
        flip = framing.random_flip and generator(self.seed, f"{name} flip", number).random() < 0.5
        return View(record, prompt, frame_of(record.size, size, drawn), bool(flip))


@lru_cache(maxsize=64)
def _order(seed: int, name: str, count: int, epoch: int) -> np.ndarray:
    """The positions (count,) in which an epoch goes through a concept. Rows come in order, so few are asked again."""
    return generator(seed, f"{name} order", epoch).permutation(count).astype(np.int32)
