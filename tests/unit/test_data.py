"""Which picture, crop and side each row has, what is drawn for it, what is kept on disk, and what is missing."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.cache import ContentCache, cached_embeddings, cached_posteriors
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.pictures import CropBox
from dreambooth_ms.data.plan import Framing, Plan, View
from dreambooth_ms.data.records import CLASS, INSTANCE, Record, read_records
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule, NoiseScheduleSpec
from dreambooth_ms.diffusion.objectives import epsilon
from dreambooth_ms.errors import DataError
from dreambooth_ms.models.specs import VaeSpec
from dreambooth_ms.sampling.class_images import missing_numbers, picture_name
from dreambooth_ms.training.loop import group_means
from tests.parity.reference import as_drawn, normal

LOOSE = Framing(resolution=32, center_crop=False, random_flip=True)
"""Pictures of 80 x 64 have 9 crops at 32 pixels, and two sides each."""


def records(count, group=INSTANCE, size=(80, 64)):
    return tuple(
        Record(Path(f"{group}-{i}.png"), f"{group} digest {i}", size, f"a photo of {group}", group)
        for i in range(count)
    )


def plan(count=5, batch_size=1, framing=LOOSE, seed=0, class_count=0):
    groups = (records(count), records(class_count, CLASS)) if class_count else (records(count),)
    return Plan(groups, batch_size, framing, seed)


def seen(wanted, steps, group=INSTANCE):
    """The pictures of a group's rows, in the order in which the run comes to them."""
    return [view.record for step in range(steps) for view in wanted.rows(step) if view.record.group == group]


class TestWhichPicture:
    @given(
        count=st.integers(1, 12), batch_size=st.integers(1, 5), epochs=st.integers(1, 3), seed=st.integers(0, 2**64 - 1)
    )
    def test_every_picture_comes_up_equally_often_in_any_number_of_epochs(self, count, batch_size, epochs, seed):
        rows = count * epochs
        order = seen(plan(count, batch_size, seed=seed), -(-rows // batch_size))
        assert Counter(order[:rows]) == dict.fromkeys(records(count), epochs)

    def test_five_pictures_at_batch_three_drop_none(self):
        """Three epochs are five full batches; an epoch ends in the middle of the second and of the fourth."""
        order = seen(plan(5, batch_size=3), 5)
        assert len(order) == 15
        for epoch in range(3):
            assert set(order[5 * epoch : 5 * epoch + 5]) == set(records(5))

    def test_a_batch_larger_than_the_folder_is_filled(self):
        assert Counter(seen(plan(2, batch_size=5), 2)) == dict.fromkeys(records(2), 5)

    @pytest.mark.parametrize("batch_size", [2, 3, 4, 12])
    def test_the_order_is_the_same_whatever_the_batch_size(self, batch_size):
        steps = 12
        expected = seen(plan(5), steps)
        assert seen(plan(5, batch_size), steps // batch_size) == expected

    def test_the_order_changes_from_epoch_to_epoch_and_with_the_seed(self):
        order = seen(plan(7), 21)
        assert len({tuple(order[start : start + 7]) for start in (0, 7, 14)}) == 3
        assert seen(plan(7, seed=1), 21) != order

    def test_each_group_has_its_rows_in_every_step_and_epochs_of_its_own(self):
        both = plan(2, batch_size=3, class_count=7)
        for step in range(14):
            assert [view.record.group for view in both.rows(step)] == [INSTANCE] * 3 + [CLASS] * 3
        assert Counter(seen(both, 14)) == dict.fromkeys(records(2), 21)
        assert Counter(seen(both, 14, CLASS)) == dict.fromkeys(records(7, CLASS), 6)

    def test_the_class_pictures_change_nothing_about_the_subjects_rows(self):
        assert seen(plan(5, 2, class_count=3), 10) == seen(plan(5, 2), 10)

    @pytest.mark.parametrize(
        ("count", "class_count", "batch_size", "steps"), [(5, 0, 1, 5), (5, 0, 3, 2), (6, 0, 3, 2), (4, 9, 2, 5)]
    )
    def test_an_epoch_goes_once_through_the_largest_group(self, count, class_count, batch_size, steps):
        assert plan(count, batch_size, class_count=class_count).batches_per_epoch == steps


class TestHowItIsSeen:
    def test_crops_and_sides_vary_from_step_to_step_and_are_the_same_when_asked_again(self):
        views = [plan(1).rows(step)[0] for step in range(60)]
        assert {view.flip for view in views} == {False, True}
        assert {view.crop.left for view in views} == set(range(9))
        assert {view.crop.top for view in views} == {0}
        assert views == [plan(1).rows(step)[0] for step in range(60)]

    def test_the_rows_of_one_step_have_crops_of_their_own(self):
        """One picture, eight rows: were the draws shared, there would be one view."""
        assert len(set(plan(1, batch_size=8).rows(0))) > 1

    def test_another_seed_has_other_crops(self):
        assert [plan(1, seed=1).rows(step) for step in range(20)] != [plan(1).rows(step) for step in range(20)]

    def test_a_centre_crop_without_flip_is_one_view_per_picture(self):
        still = replace(LOOSE, center_crop=True, random_flip=False)
        assert set(plan(3, 2, still).views(0, 30)) == {View(record, CropBox(0, 4), False) for record in records(3)}

    def test_a_tall_picture_is_cropped_up_and_down(self):
        tall = Plan((records(1, size=(64, 80)),), 1, LOOSE, 0)
        crops = [tall.rows(step)[0].crop for step in range(60)]
        assert {crop.left for crop in crops} == {0}
        assert {crop.top for crop in crops} == set(range(9))

    def test_the_views_of_some_steps_are_those_of_their_rows_each_once_in_order_of_use(self):
        wanted = plan(3, batch_size=2, class_count=2)
        views = wanted.views(4, 30)
        used = [view for step in range(4, 30) for view in wanted.rows(step)]
        assert len(views) == len(set(views)) < len(used)
        assert set(views) == set(used)
        assert sorted(views, key=used.index) == list(views)
        assert wanted.views(4, 4) == ()


LATENTS = (4, 6, 10)
PRIOR_LOSS_WEIGHT = 0.7


SCHEDULE = NoiseSchedule.from_spec(NoiseScheduleSpec())


def weighted_by_time(generators):
    """Noise as the target, and rows that weigh 1 to 2 by their timestep."""
    columns = epsilon(SCHEDULE, generators)
    return replace(columns, weight=1 + columns.time / 1000)


def maker(wanted, batches_per_step=1, noise_offset=0.0, objective=weighted_by_time):
    """Batches of a plan: latents of their own for each picture."""
    known = [record for group in wanted.groups for record in group]
    return BatchMaker(
        plan=wanted,
        posteriors={view: normal(2, *LATENTS, seed=known.index(view.record)) for view in wanted.views(0, 60)},
        texts={record.prompt: PromptText(normal(7, 3, seed=i)) for i, record in enumerate(known)},
        objective=objective,
        scaled=VaeSpec(scaling_factor=0.5).scaled,
        group_weights={INSTANCE: 1.0, CLASS: PRIOR_LOSS_WEIGHT},
        batches_per_step=batches_per_step,
        noise_offset=noise_offset,
    )


def fields(batch):
    """Everything that a batch has for each row, by name."""
    named = {name: value for name, value in vars(batch).items() if name != "inputs" and value is not None}
    return named | batch.inputs


class TestRows:
    def test_two_batches_of_one_are_the_rows_of_one_batch_of_two(self):
        """With class pictures a batch is (subject, class), and one of two is (subject, subject, class, class)."""
        small = maker(plan(5, 1, class_count=3), batches_per_step=2, noise_offset=0.1)
        large = maker(plan(5, 2, class_count=3), noise_offset=0.1)
        for step in range(6):
            first, second, both = (fields(made) for made in (small(2 * step), small(2 * step + 1), large(step)))
            for field, rows in both.items():
                cut = [part[field][row] for row in (0, 1) for part in (first, second)]
                assert np.array_equal(rows, np.array(cut)), field
            assert len({row.tobytes() for row in both["target"]}) == 4
            assert len(set(both["timestep"])) > 1

    @pytest.mark.parametrize(("batch_size", "batches_per_step"), [(1, 1), (3, 1), (1, 4), (2, 3)])
    def test_the_coefficients_of_a_step_are_the_rows_weights_over_the_rows_of_their_group(
        self, batch_size, batches_per_step
    ):
        make = maker(plan(5, batch_size, class_count=2), batches_per_step)
        for number in range(batches_per_step):
            batch = make(number)
            lambdas = np.array([1.0 if concept == INSTANCE else PRIOR_LOSS_WEIGHT for concept in batch.concepts])
            expected = lambdas * (1 + batch.inputs["timestep"] / 1000) / (batch_size * batches_per_step)
            assert batch.weight == pytest.approx(expected, rel=1e-6)  # float32 rounding

    def test_the_noise_offset_is_one_constant_per_channel_and_row(self):
        """Beside the noise that there is without it, of the given strength, and of its own for every row."""
        wanted, strength = plan(5, 2, class_count=3), 0.3
        objective = as_drawn(weighted_by_time)
        make, make_plain = (maker(wanted, noise_offset=offset, objective=objective) for offset in (strength, 0.0))
        offsets = []
        for number in range(60):
            with_offset, without = fields(make(number)), fields(make_plain(number))
            offset = with_offset["target"] - without["target"]
            # Rounding of float32 sums of size 4.
            assert np.ptp(offset, axis=(2, 3)).max() < 2e-6
            offsets.append(offset[:, :, 0, 0])
            for field in ("sample", "timestep", "weight"):
                assert np.array_equal(with_offset[field], without[field])
        draws = np.array(offsets) / strength
        assert len(np.unique(np.round(draws, 4))) > 0.9 * draws.size
        # Five standard deviations of the estimates from 960 draws of N(0, 1).
        assert abs(draws.mean()) < 5 / np.sqrt(draws.size)
        assert abs(draws.std() - 1) < 5 / np.sqrt(2 * draws.size)
        between_channels = np.corrcoef(draws.reshape(-1, LATENTS[0]).T) - np.eye(LATENTS[0])
        assert np.abs(between_channels).max() < 5 / np.sqrt(draws.size / LATENTS[0])


@pytest.fixture
def pictures(tmp_path):
    """Three pictures in one colour each."""
    folder = tmp_path / "dog"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 32), (40 * i, 80, 200 - 40 * i)).save(folder / f"{i}.png")
    return folder


class Encoder:
    """Stands for the autoencoder, and counts: the mean of each colour, repeated."""

    def __init__(self):
        self.loaded = 0
        self.encoded = []

    def load(self):
        self.loaded += 1
        return self

    def __call__(self, picture_13HW):
        self.encoded.append(picture_13HW.shape)
        return np.tile(picture_13HW.mean((0, 2, 3))[None, :, None, None], (2, 1, 4, 4)).astype(np.float32)


class TestPosteriorCache:
    def fill(self, tmp_path, pictures, digest="weights", resolution=32, interpolation="lanczos", prompt="a dog"):
        """Look up every picture, in an encoder that is asked for the first time."""
        found = read_records(pictures, prompt, INSTANCE, tell=lambda line: None)
        views = [View(record, CropBox(0, 0), False) for record in found]
        encoder = Encoder()
        values = cached_posteriors(
            ContentCache(tmp_path / "cache"),
            views,
            digest,
            resolution,
            interpolation,
            encoder.load,
            lambda views: views,
        )
        assert sorted(values, key=lambda view: view.record.path) == views
        return [values[view] for view in views], encoder

    def test_the_second_call_encodes_nothing_and_gives_the_same_bits(self, tmp_path, pictures):
        first, encoder = self.fill(tmp_path, pictures)
        assert (encoder.loaded, encoder.encoded) == (1, [(1, 3, 32, 32)] * 3)
        second, encoder = self.fill(tmp_path, pictures)
        assert (encoder.loaded, encoder.encoded) == (0, [])
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))

    def test_each_picture_keeps_its_own_value(self, tmp_path, pictures):
        self.fill(tmp_path, pictures)
        values, _ = self.fill(tmp_path, pictures)
        for i, value in enumerate(values):
            # Eight bits a colour: a 255th of the range of 2.
            assert value[0, :, 0, 0] == pytest.approx(np.array([40 * i, 80, 200 - 40 * i]) / 127.5 - 1, abs=1e-2)

    @pytest.mark.parametrize(
        ("change", "encoded_again"),
        [
            ({"digest": "other weights"}, 3),
            ({"resolution": 16}, 3),
            ({"interpolation": "nearest"}, 3),
            ({"prompt": "a cat"}, 0),
        ],
        ids=["another encoder", "another size", "another filter", "another prompt"],
    )
    def test_what_decides_the_value_is_noticed_and_what_does_not_is_not(
        self, tmp_path, pictures, change, encoded_again
    ):
        self.fill(tmp_path, pictures)
        _, encoder = self.fill(tmp_path, pictures, **change)
        assert len(encoder.encoded) == encoded_again

    def test_a_changed_picture_is_encoded_again_and_no_other(self, tmp_path, pictures):
        before, _ = self.fill(tmp_path, pictures)
        Image.new("RGB", (40, 32), "white").save(pictures / "1.png")
        after, encoder = self.fill(tmp_path, pictures)
        assert len(encoder.encoded) == 1
        assert (after[1] == 1).all()
        assert np.array_equal(after[0], before[0])
        assert np.array_equal(after[2], before[2])

    def test_a_renamed_picture_is_known_by_its_content(self, tmp_path, pictures):
        self.fill(tmp_path, pictures)
        (pictures / "2.png").rename(pictures / "3.png")
        assert self.fill(tmp_path, pictures)[1].encoded == []

    def test_every_crop_and_side_has_a_value_of_its_own(self, tmp_path, pictures):
        record = read_records(pictures, "a dog", INSTANCE, tell=lambda line: None)[0]
        views = [View(record, CropBox(0, left), flip) for left in (0, 8) for flip in (False, True)]
        encoder = Encoder()
        cached_posteriors(
            ContentCache(tmp_path / "cache"), views, "weights", 32, "lanczos", encoder.load, lambda views: views
        )
        assert len(encoder.encoded) == len(list((tmp_path / "cache").iterdir())) == 4

    @pytest.mark.parametrize("content", [b"", b"not a tensor", None], ids=["empty", "something else", "cut short"])
    def test_a_damaged_file_is_made_again(self, tmp_path, pictures, content):
        before, _ = self.fill(tmp_path, pictures)
        damaged = sorted((tmp_path / "cache").iterdir())[0]
        damaged.write_bytes(damaged.read_bytes()[:-1] if content is None else content)
        after, encoder = self.fill(tmp_path, pictures)
        assert len(encoder.encoded) == 1
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        assert self.fill(tmp_path, pictures)[1].encoded == []

    def test_black_latents_are_refused_with_the_picture_and_the_way_out(self, tmp_path, pictures):
        views = [View(record, CropBox(0, 0), False) for record in read_records(pictures, "", INSTANCE, tell=print)]
        said = r"0\.png: the autoencoder gave nothing but zeros.*--pretrained_vae_model_name_or_path"
        with pytest.raises(DataError, match=said):
            cached_posteriors(
                ContentCache(tmp_path), views, "", 32, "lanczos", lambda: lambda picture: np.zeros((2, 4)), list
            )

    def test_values_that_are_no_numbers_are_refused_and_not_kept(self, tmp_path, pictures):
        views = [View(record, CropBox(0, 0), False) for record in read_records(pictures, "", INSTANCE, tell=print)]
        cache = ContentCache(tmp_path / "cache")
        with pytest.raises(DataError, match=r"0\.png: the autoencoder gave values that are no numbers"):
            cached_posteriors(
                cache, views, "", 32, "lanczos", lambda: lambda picture: np.full((2, 4), np.nan), lambda views: views
            )
        assert not list((tmp_path / "cache").glob("*"))


class TestEmbeddingCache:
    def test_only_what_is_missing_is_encoded(self, tmp_path):
        asked = []

        def encode(prompts):
            asked.append(list(prompts))
            return {prompt: PromptText(np.full((7, 3), len(prompt), np.float32)) for prompt in [*prompts, ""]}

        cache = ContentCache(tmp_path)
        for prompts, digest in ((["a dog"], "w"), (["a dog", "a sks dog"], "w"), (["a dog"], "w"), (["a dog"], "v")):
            found = cached_embeddings(cache, prompts, digest, encode)
            assert {prompt: value.text[0, 0] for prompt, value in found.items()} == {p: len(p) for p in prompts}
        assert asked == [["a dog"], ["a sks dog"], ["a dog"]]

    def test_pooled_text_is_kept_beside_the_embedding_and_nothing_where_there_is_none(self, tmp_path):
        """The second look finds them on disk: nothing may be encoded any more."""
        texts = {"SDXL": PromptText(normal(7, 3), normal(5)), "SD": PromptText(normal(7, 3, seed=1))}
        cached_embeddings(ContentCache(tmp_path), list(texts), "weights", lambda missing: texts)
        found = cached_embeddings(ContentCache(tmp_path), list(texts), "weights", lambda missing: {})
        assert found["SD"].pooled.size == 0
        for prompt, expected in texts.items():
            assert all(np.array_equal(ours, one) for ours, one in zip(found[prompt], expected, strict=True))


class TestClassPictures:
    def make(self, folder, *names):
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).touch()

    def test_a_folder_that_is_not_there_yet_lacks_all(self, tmp_path):
        assert missing_numbers(tmp_path / "class", 3) == [0, 1, 2]

    def test_only_picture_files_count(self, tmp_path):
        self.make(tmp_path, "a.JPG", "b.webp", "notes.txt", "captions.json", ".hidden.png", ".partial-x.png")
        assert missing_numbers(tmp_path, 4) == [0, 1]

    def test_a_folder_that_is_named_like_a_picture_does_not_count(self, tmp_path):
        (tmp_path / "folder.png").mkdir()
        assert missing_numbers(tmp_path, 2) == [0, 1]

    def test_a_run_that_was_killed_goes_on_where_it_stopped(self, tmp_path):
        self.make(tmp_path, *map(picture_name, range(3)), ".partial-abc.png")
        assert missing_numbers(tmp_path, 5) == [3, 4]

    def test_a_picture_that_was_removed_is_drawn_again_under_its_number(self, tmp_path):
        self.make(tmp_path, *map(picture_name, (0, 2, 3)))
        assert missing_numbers(tmp_path, 5) == [1, 4]

    def test_the_users_own_pictures_take_no_number(self, tmp_path):
        self.make(tmp_path, "mine.png", picture_name(0))
        assert missing_numbers(tmp_path, 4) == [1, 2]

    @pytest.mark.parametrize("wanted", [1, 2])
    def test_enough_is_enough(self, tmp_path, wanted):
        self.make(tmp_path, "a.png", picture_name(7))
        assert missing_numbers(tmp_path, wanted) == []

    def test_a_file_in_the_way_is_a_clear_error(self, tmp_path):
        (tmp_path / "class").touch()
        with pytest.raises(DataError, match=r"--class_data_dir .*class: expected a folder, got a file"):
            missing_numbers(tmp_path / "class", 3)


def test_the_errors_of_a_step_are_reported_by_group():
    rows = [(INSTANCE, 1.0), (CLASS, 10.0), (INSTANCE, 3.0), (CLASS, 20.0), (CLASS, 60.0)]
    assert group_means(rows) == {INSTANCE: 2.0, CLASS: 30.0}
