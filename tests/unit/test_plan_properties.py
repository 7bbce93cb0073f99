"""However a run is cut into batches, steps and parts, its rows are the same."""

import zlib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth_ms.config.train import LossConfig
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.captions import Wording
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.pictures import covering_size, frame_of
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Record
from dreambooth_ms.diffusion import NoiseScheduleSpec, draw_columns
from dreambooth_ms.models.specs import VaeSpec

SEEDS = st.integers(0, 2**64 - 1)
SIZES = st.tuples(st.integers(8, 200), st.integers(8, 200))


PRIOR_WEIGHT = 0.7
NAMES = (INSTANCE, CLASS, "cat")


@st.composite
def folders(draw, weight=PRIOR_WEIGHT):
    """Pictures of the subject, and of the class and of another subject if there are any, with one or two captions."""
    captions = draw(st.sampled_from([("",), ("", " at night")]))
    return tuple(
        Concept(
            name,
            tuple(
                Record(Path(f"{name}-{i}"), f"{name} {i}", size, tuple(f"a photo of {name}{end}" for end in captions))
                for i, size in enumerate(draw(st.lists(SIZES, min_size=1, max_size=6)))
            ),
            1.0 if name == INSTANCE else weight,
        )
        for name in NAMES[: draw(st.integers(1, 3))]
    )


FRAMINGS = st.builds(
    Framing,
    sizes=st.sampled_from([((32, 32),), ((48, 32),), ((32, 32), (24, 40), (64, 16))]),
    center_crop=st.booleans(),
    random_flip=st.booleans(),
)


def rows_of(plan, batches, name):
    return [row for batch in range(batches) for row in plan.rows(batch) if row.concept.name == name]


@given(folders(), FRAMINGS, SEEDS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_batches_of_any_size_cut_the_same_rows(concepts, framing, seed, size, parts, steps):
    """So that batches whose gradients are accumulated are one large batch."""
    large = Plan(concepts, size * parts, framing, seed)
    small = Plan(concepts, size, framing, seed, batches_per_step=parts)
    assert large.rows_per_step == small.rows_per_step
    for concept in concepts:
        assert rows_of(large, steps, concept.name) == rows_of(small, steps * parts, concept.name)


@given(folders(), FRAMINGS, SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 50))
def test_all_rows_of_a_step_have_one_size_of_the_framings(concepts, framing, seed, size, parts, step):
    plan = Plan(concepts, size, framing, seed, batches_per_step=parts)
    batches = [plan.rows(step * parts + part) for part in range(parts)]
    (of_step,) = {row.view.frame.size for batch in batches for row in batch}
    assert of_step in framing.sizes


def records(**sizes):
    return tuple(Record(Path(name), name, size, (name,)) for name, size in sizes.items())


BUCKETS = ((24, 40), (32, 32), (40, 24))


def test_every_picture_is_seen_at_the_size_that_loses_least_of_it():
    shown = records(tall=(50, 90), square=(64, 60), other=(70, 64), wide=(90, 50))
    plan = Plan((Concept(INSTANCE, shown),), 1, Framing(BUCKETS, True, False), seed=0)
    seen = [(row.view.record.path.name, row.view.frame.size) for step in range(4) for row in plan.rows(step)]
    assert sorted(seen) == [("other", (32, 32)), ("square", (32, 32)), ("tall", (24, 40)), ("wide", (40, 24))]


@given(st.lists(SIZES, min_size=1, max_size=12), SEEDS, st.integers(1, 3), st.integers(1, 3))
def test_with_buckets_too_all_pictures_come_up_equally_often(sizes, seed, size, parts):
    """Up to one among those of a size; a size has as many steps as befits its pictures, up to one."""
    shown = tuple(Record(Path(str(i)), str(i), own, ("",)) for i, own in enumerate(sizes))
    plan = Plan((Concept(INSTANCE, shown),), size, Framing(BUCKETS, False, False), seed, parts)
    steps = 3 * len(sizes) + 1
    seen = Counter(row.view.record.path for batch in range(steps * parts) for row in plan.rows(batch))
    chosen = Counter(plan.rows(step * parts)[0].view.frame.size for step in range(steps))
    for bucket in plan.buckets:
        own = [seen[record.path] for record in bucket.groups[0][0].records]
        assert sum(own) == chosen[bucket.size] * size * parts
        assert max(own) - min(own) <= 1
        assert abs(chosen[bucket.size] - steps * len(own) / len(sizes)) < 1 + 1e-9


def test_concepts_of_a_group_take_turns_by_their_pictures_and_repeats_and_a_class_with_its_subject():
    subjects = [
        Concept("dog", records(a=(64, 64), b=(64, 64), c=(30, 50)), group=INSTANCE),
        Concept("cat", records(d=(64, 64)), group=INSTANCE, repeats=Fraction(2)),
    ]
    classes = [Concept(f"any {one.name}", records(e=(64, 64), f=(64, 64)), group=CLASS) for one in subjects]
    plan = Plan((*subjects, *classes), 1, Framing(BUCKETS, True, False), seed=3)
    rows = [plan.rows(step) for step in range(50)]
    assert all(prior.concept.name == f"any {row.concept.name}" for row, prior in rows)
    assert Counter(row.concept.name for row, _ in rows) == {"dog": 30, "cat": 20}
    seen = Counter(row.view.record.path.name for row, _ in rows)
    assert seen == {"a": 10, "b": 10, "c": 10, "d": 20}
    draws = [(row.concept.name, row.number) for both in rows for row in both]
    assert len(set(draws)) == len(draws), "no two rows may share what is drawn for them"


def test_rows_vary_their_prompts_by_their_numbers():
    concept = Concept(INSTANCE, (Record(Path("a"), "a", (64, 64), ("sks dog, x, y",)),), wording=Wording(0.5, True, 1))
    plan = Plan((concept,), 1, Framing(((32, 32),), True, False), seed=0)
    prompts = [plan.rows(batch)[0].view.prompt for batch in range(50)]
    assert set(prompts) == {"", "sks dog, x, y", "sks dog, y, x"}
    assert prompts == [plan.rows(batch)[0].view.prompt for batch in range(50)]


@given(folders(), FRAMINGS, SEEDS, st.integers(1, 5), st.integers(1, 3))
@settings(deadline=None)
def test_every_epoch_of_a_concept_has_each_of_its_pictures_once(concepts, framing, seed, size, epochs):
    plan = Plan(concepts, size, framing, seed)
    for bucket in plan.buckets:
        for (concept,) in bucket.groups:
            records, steps = concept.records, epochs * len(concept.records) * len(framing.sizes)
            rows = [row for row in rows_of(plan, steps, concept.name) if row.view.frame.size == bucket.size]
            for epoch in range(min(epochs, len(rows) // len(records))):
                seen = Counter(row.view.record for row in rows[epoch * len(records) : (epoch + 1) * len(records)])
                assert seen == Counter(records)


@given(folders(), FRAMINGS, SEEDS, st.integers(1, 4), st.integers(0, 6), st.integers(0, 6))
def test_a_run_in_two_parts_sees_what_the_whole_run_sees(concepts, framing, seed, size, stop, rest):
    whole, first, second = (Plan(concepts, size, framing, seed) for _ in range(3))
    parts = [first.rows(batch) for batch in range(stop)] + [second.rows(batch) for batch in range(stop, stop + rest)]
    assert parts == [whole.rows(batch) for batch in range(stop + rest)]


@given(folders(), FRAMINGS, SEEDS, st.integers(0, 50))
def test_every_view_is_inside_its_picture_and_as_the_flags_ask(concepts, framing, seed, batch):
    plan = Plan(concepts, 3, framing, seed)
    size = plan.rows(batch)[0].view.frame.size
    assert size in framing.sizes
    for _, _, view in plan.rows(batch):
        (width, height), frame = covering_size(view.record.size, size), view.frame
        assert (frame.size, frame.resized) == (size, (width, height))
        assert 0 <= frame.top <= height - size[1]
        assert 0 <= frame.left <= width - size[0]
        assert framing.random_flip or not view.flip
        assert not framing.center_crop or frame == frame_of(view.record.size, size)
        assert view.prompt in view.record.captions


def posterior(view):
    rng = np.random.default_rng(zlib.crc32(repr(view).encode()))
    return rng.standard_normal((2, 4, 2, 2), np.float32) * 0.1


def maker(concepts, seed, size, batches_per_step, noise_offset=0.1):
    prompts = sorted({caption for concept in concepts for record in concept.records for caption in record.captions})
    return BatchMaker(
        plan=Plan(concepts, size, Framing(((32, 32),), False, True), seed, batches_per_step),
        posteriors=posterior,
        texts=lambda prompt: PromptText(np.full((3, 2), prompts.index(prompt))),
        objective=draw_columns(NoiseScheduleSpec()),
        scaled=VaeSpec(scaling_factor=0.18215).scaled,
        loss=LossConfig(noise_offset=noise_offset),
    )


def fields(batch):
    """What the step takes of each row, by name."""
    return batch.inputs | {"target": batch.target, "weight": batch.weight}


def by_concept(batches, name):
    """Each field's rows of one concept, over several batches."""
    mine = [np.array([each == name for each in batch.concepts]) for batch in batches]
    return [
        np.concatenate([fields(batch)[field][rows] for batch, rows in zip(batches, mine, strict=True)])
        for field in fields(batches[0])
    ]


@given(folders(), SEEDS, st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_accumulated_batches_are_the_rows_of_one_large_batch(concepts, seed, size, parts):
    large, small = maker(concepts, seed, size * parts, 1), maker(concepts, seed, size, parts)
    for step in range(2):
        whole, pieces = [large(step)], [small(step * parts + part) for part in range(parts)]
        for name in set(whole[0].concepts):
            for ours, theirs in zip(by_concept(pieces, name), by_concept(whole, name), strict=True):
                assert np.array_equal(ours, theirs)


@given(st.floats(0, 3).flatmap(folders), SEEDS, st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_the_weights_of_a_step_add_up_to_those_of_its_concepts(concepts, seed, size, parts):
    made = maker(concepts, seed, size, parts)
    total = sum(made(part).weight.sum() for part in range(parts))
    assert total == pytest.approx(sum(concept.weight for concept in concepts), rel=1e-5)


@given(folders(), SEEDS, st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_a_batch_depends_on_its_number_alone(concepts, seed, number):
    one, other = maker(concepts, seed, 1, 1), maker(concepts, seed, 1, 1)
    other(0)
    first, again = one(number), other(number)
    assert all(np.array_equal(rows, fields(again)[field]) for field, rows in fields(first).items())
