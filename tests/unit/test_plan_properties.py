"""However a run is cut into batches, steps and parts, its rows are the same."""

import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.pictures import centre_crop, crop_range
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, Record
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule, NoiseScheduleSpec
from dreambooth_ms.diffusion.objectives import draw_columns
from dreambooth_ms.models.specs import VaeSpec

SEEDS = st.integers(0, 2**64 - 1)
SIZES = st.tuples(st.integers(8, 200), st.integers(8, 200))


@st.composite
def folders(draw):
    """Pictures of the subject, and of the class if there are any."""
    groups = [INSTANCE, CLASS] if draw(st.booleans()) else [INSTANCE]
    return tuple(
        tuple(
            Record(Path(f"{group}-{number}"), f"{group} {number}", size, f"a photo of {group}", group)
            for number, size in enumerate(draw(st.lists(SIZES, min_size=1, max_size=6)))
        )
        for group in groups
    )


FRAMINGS = st.builds(Framing, resolution=st.just(32), center_crop=st.booleans(), random_flip=st.booleans())


def views_of(plan, batches, group):
    return [view for batch in range(batches) for view in plan.rows(batch) if view.record.group == group]


@given(folders(), FRAMINGS, SEEDS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_batches_of_any_size_cut_the_same_rows(groups, framing, seed, size, parts, steps):
    """So that batches whose gradients are accumulated are one large batch."""
    large, small = (Plan(groups, each, framing, seed) for each in (size * parts, size))
    for group in {records[0].group for records in groups}:
        assert views_of(large, steps, group) == views_of(small, steps * parts, group)


@given(folders(), FRAMINGS, SEEDS, st.integers(1, 5), st.integers(1, 3))
def test_every_epoch_of_a_group_has_each_of_its_pictures_once(groups, framing, seed, size, epochs):
    plan = Plan(groups, size, framing, seed)
    for records in groups:
        rows = views_of(plan, -(-epochs * len(records) // size), records[0].group)
        for epoch in range(epochs):
            seen = Counter(view.record for view in rows[epoch * len(records) : (epoch + 1) * len(records)])
            assert seen == Counter(records)


@given(folders(), FRAMINGS, SEEDS, st.integers(1, 4), st.integers(0, 6), st.integers(0, 6))
def test_a_run_in_two_parts_sees_what_the_whole_run_sees(groups, framing, seed, size, stop, rest):
    plan = Plan(groups, size, framing, seed)
    whole, first, second = plan.views(0, stop + rest), plan.views(0, stop), plan.views(stop, stop + rest)
    assert list(dict.fromkeys([*first, *second])) == list(whole)
    assert len(set(whole)) == len(whole)
    assert set(whole) == {view for batch in range(stop + rest) for view in plan.rows(batch)}


@given(folders(), FRAMINGS, SEEDS, st.integers(0, 50))
def test_every_view_is_inside_its_picture_and_as_the_flags_ask(groups, framing, seed, batch):
    for view in Plan(groups, 3, framing, seed).rows(batch):
        highest = crop_range(view.record.size, framing.resolution)
        assert 0 <= view.crop.top <= highest.top
        assert 0 <= view.crop.left <= highest.left
        assert framing.random_flip or not view.flip
        assert not framing.center_crop or view.crop == centre_crop(view.record.size, framing.resolution)


def posterior(view):
    rng = np.random.default_rng(zlib.crc32(repr(view).encode()))
    return rng.standard_normal((2, 4, 2, 2), np.float32) * 0.1


def maker(groups, seed, size, batches_per_step, prior_weight=0.7, noise_offset=0.1):
    plan = Plan(groups, size, Framing(32, False, True), seed)
    return BatchMaker(
        plan=plan,
        posteriors={view: posterior(view) for view in plan.views(0, 40)},
        texts={
            f"a photo of {group}": PromptText(np.full((3, 2), number)) for number, group in enumerate((INSTANCE, CLASS))
        },
        objective=draw_columns("epsilon", NoiseSchedule.from_spec(NoiseScheduleSpec())),
        scaled=VaeSpec(scaling_factor=0.18215).scaled,
        group_weights={INSTANCE: 1.0, CLASS: prior_weight},
        batches_per_step=batches_per_step,
        noise_offset=noise_offset,
    )


def fields(batch):
    """What the step takes of each row, by name."""
    return batch.inputs | {"target": batch.target, "weight": batch.weight}


def by_group(batches, group):
    """Each field's rows of one group, over several batches."""
    mine = [np.array([each == group for each in batch.concepts]) for batch in batches]
    return [
        np.concatenate([fields(batch)[field][rows] for batch, rows in zip(batches, mine, strict=True)])
        for field in fields(batches[0])
    ]


@given(folders(), SEEDS, st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_accumulated_batches_are_the_rows_of_one_large_batch(groups, seed, size, parts):
    large, small = maker(groups, seed, size * parts, 1), maker(groups, seed, size, parts)
    for step in range(2):
        whole, pieces = [large(step)], [small(step * parts + part) for part in range(parts)]
        for group in set(whole[0].concepts):
            for ours, theirs in zip(by_group(pieces, group), by_group(whole, group), strict=True):
                assert np.array_equal(ours, theirs)


@given(folders(), SEEDS, st.integers(1, 3), st.integers(1, 4), st.floats(0, 3))
@settings(max_examples=30, deadline=None)
def test_the_weights_of_a_step_add_up_to_those_of_its_groups(groups, seed, size, parts, prior_weight):
    made = maker(groups, seed, size, parts, prior_weight)
    total = sum(made(part).weight.sum() for part in range(parts))
    assert total == pytest.approx(1.0 + (prior_weight if len(groups) > 1 else 0.0), rel=1e-5)


@given(folders(), SEEDS, st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_a_batch_hangs_on_its_number_alone(groups, seed, number):
    one, other = maker(groups, seed, 1, 1), maker(groups, seed, 1, 1)
    other(0)
    first, again = one(number), other(number)
    assert all(np.array_equal(rows, fields(again)[field]) for field, rows in fields(first).items())
