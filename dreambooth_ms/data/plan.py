"""Which picture, prompt, crop and flip each row of each batch sees: a function of the seed, known in advance.

Rows are numbered over the whole run, each concept's by themselves, and all that is random about one depends on its
number: two batches of 1 are the rows of one batch of 2. The size is the step's. Each picture takes the size that loses
least of it: it is resized until it covers that, and the rest is cut.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from dreambooth_ms.config.choices import BUCKETS
from dreambooth_ms.data.augmentation import augmented
from dreambooth_ms.data.holes import Hole, draw_hole
from dreambooth_ms.data.pictures import Frame, Size, frame_of
from dreambooth_ms.data.records import CLASS, Concept, Record
from dreambooth_ms.randomness import generator

MOST_TURNS = 100_000


@dataclass(frozen=True, slots=True)
class View:
    """A picture as a row sees it."""

    record: Record
    prompt: str
    frame: Frame
    flip: bool
    hole: Hole | None = None
    """What an inpainting model draws anew of the crop, as it is mirrored; None: another model."""

    @property
    def encoded(self) -> tuple["View", ...]:
        """What latents are needed of: the picture and, with a hole, what is left of it, which stands for the hole."""
        return (replace(self, hole=None), self) if self.hole else (self,)

    @property
    def corner(self) -> tuple[int, int]:
        """(top, left) of its crop in the resized picture; mirrored from the right; (0, 0) if pasted on grey."""
        if self.frame.place:
            return 0, 0
        return self.frame.top, self.frame.highest[1] - self.frame.left if self.flip else self.frame.left


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
    center_crop: bool
    random_flip: bool
    augments: bool = False
    """Whether the subject's pictures are shown smaller and larger (`data.augmentation`)."""
    inpaints: bool = False
    """Whether each row has a hole (`data.holes`)."""


class Bucket(NamedTuple):
    """The steps of one size, and what is seen in them."""

    size: Size
    groups: tuple[tuple[Concept, ...], ...]
    """The concepts of each group, with their pictures of this size."""
    shares: tuple[tuple[int, ...], ...]
    """How often the concepts of each group come up beside each other."""


@dataclass(frozen=True)
class Plan:
    """The rows of every batch: `batch_size` of each group of concepts, in the order of the groups. Sizes take turns by
    the pictures that the first group has of them, its concepts by their pictures and repeats; each concept is gone
    through in an order of each epoch of its own. Another group of as many concepts goes along with it."""

    concepts: tuple[Concept, ...]
    batch_size: int
    framing: Framing
    seed: int
    batches_per_step: int = 1

    @property
    def rows_per_step(self) -> int:
        """The rows of each group in a step."""
        return self.batch_size * self.batches_per_step

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The sizes that steps have, with their concepts."""
        named: dict[str, list[Concept]] = {}
        for concept in self.concepts:
            named.setdefault(concept.group or concept.name, []).append(concept)
        leading = next(iter(named.values()))
        sizes = of_records(self.framing.sizes, [record for concept in leading for record in concept.records])
        split = [[_split(one, sizes, fills=group is not leading) for one in group] for group in named.values()]
        found = []
        for at, size in enumerate(sizes):
            # Of the leading concepts only those with pictures of this size, and what goes along with them.
            held = [k for k, by_size in enumerate(split[0]) if by_size[at].records]
            along = [held if len(group) == len(leading) else range(len(group)) for group in split]
            groups = [tuple(group[k][at] for k in own) for group, own in zip(split, along, strict=True)]
            shares = [_whole([one.repeats * len(one.records) for one in group]) for group in groups]
            shares = [shares[0] if len(own) == len(shares[0]) else own for own in shares]
            found.append(Bucket(size, tuple(groups), tuple(shares)))
        return tuple(found)

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """How often steps of each bucket come up beside each other."""
        parts = [[one.repeats * len(one.records) for one in bucket.groups[0]] for bucket in self.buckets]
        return _whole([sum(part, Fraction(0)) for part in parts])

    def rows(self, batch: int) -> list[Row]:
        """The rows of a batch, counted from 0 over the run."""
        step, part = divmod(batch, self.batches_per_step)
        at, earlier = taking_turns(self.shares, step)
        bucket, first = self.buckets[at], earlier * self.rows_per_step + part * self.batch_size
        return [
            self._row(group[which], own, at, bucket.size)
            for group, shares in zip(bucket.groups, bucket.shares, strict=True)
            for which, own in (taking_turns(shares, first + n) for n in range(self.batch_size))
        ]

    def _row(self, concept: Concept, own: int, bucket: int, size: Size) -> Row:
        """The row that sees a concept's pictures of a bucket for the `own`-th time, counted from 0."""
        framing, number = self.framing, own * len(self.buckets) + bucket
        epoch, position = divmod(own, len(concept.records))
        name, turn = concept.drawn_as or concept.name, epoch * len(self.buckets) + bucket
        record = concept.records[_order(self.seed, name, len(concept.records), turn)[position]]
        draws = self.draws(concept, number)
        prompt = record.captions[0]
        if len(record.captions) > 1:
            prompt = record.captions[draws("caption").integers(len(record.captions))]
        if concept.wording:
            prompt = concept.wording.of_row(prompt, draws("wording"))
        frame = frame_of(record.size, size, None if framing.center_crop else draws("crop"))
        if framing.augments and concept.group != CLASS:
            frame, said = augmented(record.size, size, draws("augmentation"), framing.center_crop)
            prompt = prompt and said + prompt
        flip = framing.random_flip and draws("flip").random() < 0.5
        hole = draw_hole(size, draws("hole")) if framing.inpaints else None
        return Row(concept, number, View(record, prompt, frame, bool(flip), hole))

    def draws(self, concept: Concept, number: int) -> Callable[[str], np.random.Generator]:
        """By the purpose, what the row of a concept with this number draws from."""
        return lambda purpose: generator(self.seed, f"{concept.drawn_as or concept.name} {purpose}", number)


def taking_turns(shares: tuple[int, ...], position: int) -> tuple[int, int]:
    """Which of some things comes up at a position, and how often before: each by its share, spread evenly."""
    cycle, at = divmod(position, sum(shares))
    order, before = _cycle(shares)
    return int(order[at]), cycle * shares[order[at]] + int(before[at])


def sizes_of(resolution: int, multiple: int = 8) -> list[Size]:
    """The sizes of a resolution, from the narrowest on: at 512 and 1024 the published ones, else the largest that have
    no more than its area, whose sides are multiples of 64, or of less at low resolutions, and of `multiple`."""
    if resolution in BUCKETS:
        return BUCKETS[resolution]
    step = min(64, max(8, resolution // 64 * 8))
    step = -(-step // multiple) * multiple
    lowest, highest = resolution // 2 // step * step, 2 * resolution
    widths = range(max(lowest, step), highest + 1, step)
    fitting = {(width, min(highest, resolution**2 // width // step * step)) for width in widths}
    kept = {size for size in fitting if size[1] >= max(lowest, step)}
    sizes = kept | {(height, width) for width, height in kept} | {(resolution, resolution)}
    return sorted(sizes, key=lambda size: (size[0] / size[1], size[0]))


def nearest(sizes: Sequence[Size], pictures: Sequence[Size]) -> np.ndarray:
    """The position (P,) of the size that loses least of each picture; of equals the first."""
    return lost_area(sizes, pictures).argmin(1)


def lost_area(sizes: Sequence[Size], pictures: Sequence[Size]) -> np.ndarray:
    """The share (P, S) of each picture that is cut off at each size: of aspect ratios a and b 1 - min(a/b, b/a)."""
    own, of_sizes = (np.log([width / height for width, height in of]) for of in (pictures, sizes))
    return 1 - np.exp(-np.abs(own[:, None] - of_sizes[None]))


def least_losing(sizes: Sequence[Size], pictures: Sequence[Size], at_most: int) -> list[Size]:
    """So many of the sizes, or fewer, that lose least of all pictures together."""
    # A picture is nearest to one of its two neighbours among the chosen: the best choice up to a size extends another.
    ordered = sorted(sizes, key=lambda size: size[0] / size[1])
    # Before the first and behind the last stands a size that is never nearest.
    ratios = np.array([0, *(width / height for width, height in ordered), np.inf])
    lost = np.pad(lost_area(ordered, pictures), ((0, 0), (1, 1)), constant_values=np.inf)
    of_pictures = np.array([width / height for width, height in pictures])
    between = [
        [lost[(of_pictures > low) & (of_pictures <= high)][:, [i, j]].min(1).sum() for j, high in enumerate(ratios)]
        for i, low in enumerate(ratios)
    ]
    none: tuple[float, list[int]] = (np.inf, [])
    best, found = [(0.0, none[1]), *[none] * (len(ratios) - 1)], none
    for _ in range(min(at_most, len(ordered)) + 1):
        best = [
            min(((best[i][0] + between[i][j], [*best[i][1], j]) for i in range(j)), default=none)
            for j in range(len(ratios))
        ]
        # More sizes are only worth their compilation where they lose less.
        found = best[-1] if best[-1][0] < found[0] - 1e-9 else found
    return [ordered[j - 1] for j in found[1][:-1]]


def table_of_sizes(plan: Plan, steps: int) -> list[tuple[Size, int, float, int]]:
    """Each size of a run of so many steps, its pictures of the subjects, the mean share cut off them, and its steps."""
    turns = Counter(taking_turns(plan.shares, step)[0] for step in range(steps))
    pictures = [[record.size for one in bucket.groups[0] for record in one.records] for bucket in plan.buckets]
    return [
        (bucket.size, len(own), float(lost_area([bucket.size], own).mean()), turns[at])
        for at, (bucket, own) in enumerate(zip(plan.buckets, pictures, strict=True))
    ]


def of_records(sizes: Sequence[Size], records: Sequence[Record]) -> list[Size]:
    """Those of the sizes that some record loses least at."""
    return [sizes[at] for at in sorted(set(nearest(sizes, [record.size for record in records]).tolist()))]


def _split(concept: Concept, sizes: Sequence[Size], fills: bool) -> list[Concept]:
    """A concept with its records of each size; `fills`: where it has none, with all."""
    at = nearest(sizes, [record.size for record in concept.records])
    of_sizes = [tuple(concept.records[i] for i in np.flatnonzero(at == n)) for n in range(len(sizes))]
    return [replace(concept, records=own or (concept.records if fills else ())) for own in of_sizes]


def _whole(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Whole numbers in these proportions, to 1 in 100,000 where they would become larger."""
    scale = math.lcm(*(share.denominator for share in map(Fraction, shares)))
    whole = [int(share * scale) for share in shares]
    if sum(whole) > MOST_TURNS:
        whole = [max(1, round(MOST_TURNS * one / sum(whole))) for one in whole]
    return tuple(one // math.gcd(*whole) for one in whole)


@lru_cache(maxsize=256)
def _cycle(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What comes up at each position of a cycle, and how often it has come up before in it."""
    which, before = np.repeat(np.arange(len(shares)), shares), np.concatenate([np.arange(own) for own in shares])
    order = np.argsort((before + 0.5) / np.array(shares)[which], kind="stable")
    return which[order], before[order]


@lru_cache(maxsize=64)
def _order(seed: int, name: str, count: int, epoch: int) -> np.ndarray:
    """The positions (count,) in which an epoch goes through a concept. Rows come in order, so few are asked again."""
    return generator(seed, f"{name} order", epoch).permutation(count).astype(np.int32)
