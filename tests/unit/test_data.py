"""Which picture, crop and side each row has, what is drawn for it, what is kept on disk, and what is missing."""

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor
from PIL import Image

from dreambooth_ms.adapters.lora import initialise_lora, inject_lora, lora_trainables
from dreambooth_ms.cli.toy_networks import SD_UNET
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.config.shared import BaseModelConfig
from dreambooth_ms.config.train import DataConfig, LossConfig, RunConfig, TrainConfig, ValidationConfig
from dreambooth_ms.data import conditioning as text_module
from dreambooth_ms.data import pictures as picture_files
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.cache import ContentCache, embedding_lookup, posterior_lookup
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.pictures import Frame
from dreambooth_ms.data.plan import Framing, Plan, View
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Record, Source
from dreambooth_ms.diffusion import NoiseSchedule, NoiseScheduleSpec, draw_columns
from dreambooth_ms.errors import DataError
from dreambooth_ms.models.parameters import initialise
from dreambooth_ms.models.specs import VaeSpec
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.processes.group import ALONE
from dreambooth_ms.sampling.picture_file import class_picture_name, missing_numbers
from dreambooth_ms.training.loop import concept_means, train
from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
from dreambooth_ms.training.step import DiffusionLoss, TrainStep
from tests.parity.reference import as_drawn, normal
from tools import bench_data

LOOSE = Framing(sizes=((32, 32),), center_crop=False, random_flip=True)
"""Pictures of 80 x 64 have 9 crops at 32 pixels, and two sides each."""
PRIOR_LOSS_WEIGHT = 0.7


def records(count, name=INSTANCE, size=(80, 64), captions=("a photo",)):
    return tuple(Record(Path(f"{name}-{i}.png"), f"{name} digest {i}", size, captions) for i in range(count))


def plan(count=5, batch_size=1, framing=LOOSE, seed=0, class_count=0, batches_per_step=1, **record):
    concepts = [Concept(INSTANCE, records(count, **record))]
    if class_count:
        concepts.append(Concept(CLASS, records(class_count, CLASS), PRIOR_LOSS_WEIGHT))
    return Plan(tuple(concepts), batch_size, framing, seed, batches_per_step)


def job_of(config, *counts):
    """Of a run whose concepts, each a group, have so many pictures."""
    concepts = [Concept(str(at), records(count), group=str(at)) for at, count in enumerate(counts)]
    sources = tuple(Source(Path(), "", replace(one, records=())) for one in concepts)
    return TrainingJob(ALONE, config, None, sources, concepts)


def seen(wanted, steps, name=INSTANCE):
    """The pictures of a concept's rows, in the order in which the run comes to them."""
    return [row.view.record for step in range(steps) for row in wanted.rows(step) if row.concept.name == name]


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
            assert [row.concept.name for row in both.rows(step)] == [INSTANCE] * 3 + [CLASS] * 3
        assert Counter(seen(both, 14)) == dict.fromkeys(records(2), 21)
        assert Counter(seen(both, 14, CLASS)) == dict.fromkeys(records(7, CLASS), 6)

    def test_the_class_pictures_change_nothing_about_the_subjects_rows(self):
        assert seen(plan(5, 2, class_count=3), 10) == seen(plan(5, 2), 10)

    @pytest.mark.parametrize(("epochs", "interval"), [(None, 100), (1, 4), (50, 200)])
    def test_validation_is_after_steps_or_epochs(self, epochs, interval):
        config = TrainConfig(
            model=BaseModelConfig(pretrained_model_name_or_path=""),
            data=DataConfig(instance_data_dir="", instance_prompt=""),
            run=RunConfig(train_batch_size=2),
            validation=ValidationConfig(validation_prompt="x", validation_epochs=epochs),
        )
        assert job_of(config, 7).validation_interval == interval

    @pytest.mark.parametrize(
        ("count", "class_count", "batch_size", "steps"), [(5, 0, 1, 5), (5, 0, 3, 2), (6, 0, 3, 2), (4, 9, 2, 5)]
    )
    def test_an_epoch_goes_once_through_the_largest_concept(self, count, class_count, batch_size, steps):
        config = TrainConfig(
            model=BaseModelConfig(pretrained_model_name_or_path=""),
            data=DataConfig(instance_data_dir="", instance_prompt=""),
            run=RunConfig(train_batch_size=batch_size, num_train_epochs=1),
        )
        assert job_of(config, count, class_count).total == steps
        wanted = plan(count, batch_size, class_count=class_count)
        largest = max(wanted.concepts, key=lambda concept: len(concept.records))
        assert set(seen(wanted, steps, largest.name)) == set(largest.records)
        if steps > 1:
            assert set(seen(wanted, steps - 1, largest.name)) < set(largest.records)


def test_a_long_run_is_planned_and_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_data", "--pictures", "50", "--steps", "30"])
    bench_data.main()
    said = capsys.readouterr().out
    assert re.match(r"50 pictures, 30 steps: (\d+) views, \d+ without latents\nplanned in ", said)
    assert "memory beside the network" in said


class TestHowItIsSeen:
    def test_crops_and_sides_vary_from_step_to_step_and_are_the_same_when_asked_again(self):
        views = [plan(1).rows(step)[0].view for step in range(60)]
        assert {view.flip for view in views} == {False, True}
        assert {view.frame.left for view in views} == set(range(9))
        assert {view.frame.top for view in views} == {0}
        assert views == [plan(1).rows(step)[0].view for step in range(60)]

    def test_the_rows_of_one_step_have_crops_of_their_own(self):
        """One picture, eight rows: were the draws shared, there would be one view."""
        assert len({row.view for row in plan(1, batch_size=8).rows(0)}) > 1

    def test_another_seed_has_other_crops(self):
        other, ours = ([plan(1, seed=seed).rows(step)[0].view for step in range(20)] for seed in (1, 0))
        assert other != ours

    def test_a_centre_crop_without_flip_is_one_view_per_picture(self):
        still = replace(LOOSE, center_crop=True, random_flip=False)
        middle = Frame((32, 32), resized=(40, 32), top=0, left=4)
        expected = {View(record, "a photo", middle, False) for record in records(3)}
        assert {row.view for step in range(30) for row in plan(3, 2, still).rows(step)} == expected

    def test_each_row_draws_one_of_its_pictures_captions(self):
        captions = ("a dog", "a dog in snow", "a dog at night")
        rows = [plan(1, captions=captions).rows(step)[0] for step in range(60)]
        assert {row.view.prompt for row in rows} == set(captions)
        assert [row.view.prompt for row in rows] == [
            row.view.prompt for step in range(30) for row in plan(1, 2, captions=captions).rows(step)
        ]
        # What else is drawn is as with one caption.
        assert [row.view.frame for row in rows] == [plan(1).rows(step)[0].view.frame for step in range(60)]

    def test_a_tall_picture_is_cropped_up_and_down(self):
        tall = plan(1, size=(64, 80))
        frames = [tall.rows(step)[0].view.frame for step in range(60)]
        assert {frame.left for frame in frames} == {0}
        assert {frame.top for frame in frames} == set(range(9))


LATENTS = (4, 6, 10)
SCHEDULE = NoiseSchedule.from_spec(NoiseScheduleSpec())


def weighted_by_time(generators):
    """Noise as the target, and rows that weigh 1 to 2 by their timestep."""
    columns = draw_columns(NoiseScheduleSpec())(generators)
    return replace(columns, weight=1 + columns.time / 1000)


def maker(wanted, noise_offset=0.0, objective=weighted_by_time):
    """Batches of a plan: latents of their own for each picture."""
    known = [record for concept in wanted.concepts for record in concept.records]
    return BatchMaker(
        plan=wanted,
        posteriors=lambda view: normal(2, *LATENTS, seed=known.index(view.record)),
        texts=lambda prompt: PromptText(normal(7, 3, seed=len(prompt))),
        objective=objective,
        scaled=VaeSpec(scaling_factor=0.5).scaled,
        loss=LossConfig(noise_offset=noise_offset),
    )


def fields(batch):
    """Everything that a batch has for each row, by name."""
    named = {name: value for name, value in vars(batch).items() if name not in ("inputs", "extras")}
    return named | batch.extras | batch.inputs


class TestRows:
    def test_two_batches_of_one_are_the_rows_of_one_batch_of_two(self):
        """With class pictures a batch is (subject, class), and one of two is (subject, subject, class, class)."""
        small = maker(plan(5, 1, class_count=3, batches_per_step=2), noise_offset=0.1)
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
        make = maker(plan(5, batch_size, class_count=2, batches_per_step=batches_per_step))
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


def test_a_step_of_three_concepts_with_prompts_of_their_own_and_no_squares(pynative):
    """The batch maker and one step, by hand: each row has its own caption's text, and each concept its weight."""
    weights = {INSTANCE: 1.0, "cat": 0.5, CLASS: PRIOR_LOSS_WEIGHT}
    concepts = tuple(
        Concept(name, tuple(replace(one, captions=(f"{name} {i}",)) for i, one in enumerate(records(3, name))), weight)
        for name, weight in weights.items()
    )
    wanted = Plan(concepts, 2, Framing(((48, 32),), center_crop=False, random_flip=True), seed=3)
    prompts = [record.captions[0] for concept in concepts for record in concept.records]
    make = BatchMaker(
        plan=wanted,
        posteriors=lambda view: normal(2, 4, view.frame.size[1] // 4, view.frame.size[0] // 4),
        texts=lambda prompt: PromptText(normal(5, SD_UNET.cross_attention_dim, seed=prompts.index(prompt))),
        objective=weighted_by_time,
        scaled=VaeSpec(scaling_factor=0.5).scaled,
    )
    batch, rows = make(0), wanted.rows(0)
    assert batch.inputs["sample"].shape == (6, 4, 8, 12)
    for text, row in zip(batch.inputs["encoder_hidden_states"], rows, strict=True):
        assert row.view.prompt == row.view.record.captions[0]
        assert np.array_equal(text, make.texts(row.view.prompt).text)

    unet, reports = UNet2DConditionModel(SD_UNET), []
    initialise(unet, 0)
    layers = inject_lora(unet, 2, 2.0, ["to_q"])
    initialise_lora(layers, 0)
    trainables = lora_trainables(layers)
    prediction = unet(*map(Tensor, batch.inputs.values())).asnumpy()
    errors = np.square(prediction - batch.target).mean((1, 2, 3))
    step = TrainStep(DiffusionLoss(unet), trainables, AdamW(trainables, Hyperparameters()), 1.0)
    train(step, make, 1, lambda update: 1e-3, range(1), [reports.append])
    (report,) = reports
    # Float32 sums in another order.
    assert report.concept_losses == pytest.approx(
        dict(zip(weights, errors.reshape(3, 2).mean(1), strict=True)), rel=1e-5
    )
    expected = sum(
        weights[name] * (1 + time / 1000) * error / 2
        for name, time, error in zip(batch.concepts, batch.inputs["timestep"], errors, strict=True)
    )
    assert report.loss == pytest.approx(expected, rel=1e-5)


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


def view_of(record, resolution=32, left=0, flip=False):
    frame = Frame((resolution, resolution), (resolution * 5 // 4, resolution), 0, left)
    return View(record, record.captions[0], frame, flip)


def read(pictures, prompt="a dog"):
    return Source(pictures, prompt).records(lambda line: None)


class TestPosteriorCache:
    def fill(self, tmp_path, pictures, digest="weights", resolution=32, interpolation="lanczos", prompt="a dog"):
        """Encode what is missing, then look up every picture, with an encoder that is asked for the first time."""
        views, encoder = [view_of(record, resolution) for record in read(pictures, prompt)], Encoder()
        posteriors = posterior_lookup(
            ContentCache(tmp_path / "cache"), digest, interpolation, encoder.load, lambda views: views
        )
        posteriors.prepare(views)
        assert posteriors.missing(views) == []
        return [posteriors(view) for view in views], encoder

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

    def test_what_a_transparent_picture_is_put_on_decides_its_value_and_no_others(self, tmp_path, pictures):
        """White has the key of versions that knew no other colour."""
        Image.new("RGBA", (40, 32), (200, 30, 60, 100)).save(pictures / "0.png")
        said = []
        by_colour = {
            colour: Source(pictures, "a dog", background=colour).records(said.append)
            for colour in ("white", "black", "#000000")
        }
        assert said[0] == (
            f"{pictures}: transparent, put on white (--transparent_background names another colour), 1 found: 0.png"
        )
        white, black, same = by_colour.values()
        assert white[0].digest == picture_files.digest(pictures / "0.png") != black[0].digest == same[0].digest
        assert [one.digest for one in white[1:]] == [one.digest for one in black[1:]]
        encoder = Encoder()
        posteriors = posterior_lookup(ContentCache(tmp_path / "c"), "w", "lanczos", encoder.load, lambda views: views)
        on_white, on_black, again = (posteriors(view_of(records[0])) for records in (white, black, same))
        assert (on_white > on_black).all()
        assert np.array_equal(on_black, again)
        assert len(encoder.encoded) == 2

    def test_every_crop_and_side_has_a_value_of_its_own(self, tmp_path, pictures):
        record, encoder = read(pictures)[0], Encoder()
        views = [view_of(record, left=left, flip=flip) for left in (0, 8) for flip in (False, True)]
        views.append(View(record, "a dog", Frame((24, 32), (40, 32), 0, 0), False))
        cache = ContentCache(tmp_path / "cache")
        posterior_lookup(cache, "", "lanczos", encoder.load, lambda views: views).prepare(views)
        assert len(encoder.encoded) == len(list((tmp_path / "cache").iterdir())) == 5
        assert encoder.encoded == [(1, 3, 32, 32)] * 4 + [(1, 3, 32, 24)]

    def test_the_same_picture_under_another_prompt_is_encoded_once(self, tmp_path, pictures):
        record, encoder = read(pictures)[0], Encoder()
        views = [replace(view_of(record), prompt=prompt) for prompt in ("a dog", "a dog in snow")]
        posterior_lookup(ContentCache(tmp_path), "", "lanczos", encoder.load, lambda views: views).prepare(views)
        assert len(encoder.encoded) == 1

    @pytest.mark.parametrize("content", [b"", b"not a tensor", None], ids=["empty", "something else", "cut short"])
    def test_a_damaged_file_is_made_again(self, tmp_path, pictures, content):
        before, _ = self.fill(tmp_path, pictures)
        damaged = sorted((tmp_path / "cache").iterdir())[0]
        damaged.write_bytes(damaged.read_bytes()[:-1] if content is None else content)
        after, encoder = self.fill(tmp_path, pictures)
        assert len(encoder.encoded) == 1
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        assert self.fill(tmp_path, pictures)[1].encoded == []

    def test_what_is_found_damaged_or_gone_during_training_is_made_again(self, tmp_path, pictures):
        """By an encoder that is loaded for it; the files are looked at before that, not read."""
        views, encoder = [view_of(record) for record in read(pictures)], Encoder()
        cache = ContentCache(tmp_path / "cache", bytes_in_memory=0)
        posteriors = posterior_lookup(cache, "", "lanczos", encoder.load, lambda views: views)
        posteriors.prepare(views)
        before = [posteriors(view) for view in views]
        first, second, _ = (cache.folder / f"{posteriors.keys(view)[0]}.safetensors" for view in views)
        first.write_bytes(b"damaged")
        second.unlink()
        assert posteriors.missing(views) == views[1:2]
        for _ in range(2):
            assert all(np.array_equal(posteriors(view), value) for view, value in zip(views, before, strict=True))
        assert (encoder.loaded, len(encoder.encoded)) == (3, 5)

    def refused(self, tmp_path, pictures, value, said):
        views, cache = [view_of(record) for record in read(pictures)], ContentCache(tmp_path / "cache")
        posteriors = posterior_lookup(cache, "", "lanczos", lambda: lambda picture: value, lambda views: views)
        with pytest.raises(DataError, match=said):
            posteriors.prepare(views)
        assert not list((tmp_path / "cache").glob("*"))

    def test_black_latents_are_refused_with_the_picture_and_the_way_out(self, tmp_path, pictures):
        said = r"0\.png: the autoencoder gave nothing but zeros.*--pretrained_vae_model_name_or_path"
        self.refused(tmp_path, pictures, np.zeros((2, 4)), said)

    def test_nan_is_refused_and_not_kept(self, tmp_path, pictures):
        self.refused(tmp_path, pictures, np.full((2, 4), np.nan), r"0\.png: the autoencoder gave NaN or infinity")


class TestMemory:
    def test_what_was_asked_for_last_is_kept_within_the_bound(self, tmp_path):
        """Ten arrays of 400 bytes in 1000: the last two are not read again."""
        cache, values = ContentCache(tmp_path, bytes_in_memory=1000), [np.full(100, i, np.float32) for i in range(10)]
        for i, value in enumerate(values):
            cache.put(str(i), value)
            assert np.array_equal(cache.get(str(i)), value)
        cache.get("8")
        cache.get("0")
        for path in tmp_path.iterdir():
            path.unlink()
        held = [i for i in range(10) if cache.get(str(i)) is not None]
        assert held == [0, 8]

    def test_a_value_larger_than_the_bound_is_read_each_time(self, tmp_path):
        cache = ContentCache(tmp_path, bytes_in_memory=10)
        cache.put("a", np.ones(100))
        assert cache.get("a").sum() == cache.get("a").sum() == 100


class TestEmbeddingCache:
    def test_only_what_is_missing_is_encoded(self, tmp_path):
        asked = []

        def encode(prompts):
            asked.append(list(prompts))
            return [(prompt, PromptText(np.full((7, 3), len(prompt), np.float32))) for prompt in [*prompts, ""]]

        cache = ContentCache(tmp_path)
        for prompts, digest in ((["a dog"], "w"), (["a dog", "a sks dog"], "w"), (["a dog"], "w"), (["a dog"], "v")):
            embeddings = embedding_lookup(cache, digest, encode)
            embeddings.prepare(prompts)
            assert {prompt: embeddings(prompt).text[0, 0] for prompt in prompts} == {p: len(p) for p in prompts}
        assert asked == [["a dog"], ["a sks dog"], ["a dog"]]

    def test_pooled_text_is_kept_beside_the_embedding_and_nothing_where_there_is_none(self, tmp_path):
        """The second look finds them on disk: nothing may be encoded any more."""
        texts = {"SDXL": PromptText(normal(7, 3), normal(5)), "SD": PromptText(normal(7, 3, seed=1))}
        embedding_lookup(ContentCache(tmp_path), "weights", lambda missing: texts.items()).prepare(texts)
        found = embedding_lookup(ContentCache(tmp_path), "weights", lambda missing: ())
        found.prepare(texts)
        assert found("SD").pooled.size == 0
        for prompt, expected in texts.items():
            assert all(np.array_equal(ours, one) for ours, one in zip(found(prompt), expected, strict=True))

    def test_many_captions_are_encoded_a_part_at_a_time_by_encoders_loaded_once(self, monkeypatch):
        loaded, asked = [], []

        def texts(prompts, pieces):
            asked.append(len(prompts))
            return {prompt: [PromptText(np.array([len(prompt)], np.int32))] for prompt in prompts}

        def load():
            loaded.append(1)
            return lambda ids: (ids * 2,)

        monkeypatch.setattr(text_module, "PromptTokenizer", lambda readers, warns: SimpleNamespace(texts=texts))
        bundle = SimpleNamespace(text=(), zeros_for_empty_prompt=False, load_text_encoders=load)
        captions = [str(i) for i in range(100)]
        read = text_module.embed_prompts(bundle, captions)
        next(read)
        assert asked == [8], "no more than are encoded at a time"
        assert {prompt: int(text.text[0]) for prompt, text in read} == {one: 2 * len(one) for one in captions}
        assert (asked, loaded) == ([8] * 12 + [5], [1])


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
        self.make(tmp_path, *map(class_picture_name, range(3)), ".partial-abc.png")
        assert missing_numbers(tmp_path, 5) == [3, 4]

    def test_a_picture_that_was_removed_is_sampled_again_under_its_number(self, tmp_path):
        self.make(tmp_path, *map(class_picture_name, (0, 2, 3)))
        assert missing_numbers(tmp_path, 5) == [1, 4]

    def test_the_users_own_pictures_take_no_number(self, tmp_path):
        self.make(tmp_path, "mine.png", class_picture_name(0))
        assert missing_numbers(tmp_path, 4) == [1, 2]

    @pytest.mark.parametrize("wanted", [1, 2])
    def test_enough_is_enough(self, tmp_path, wanted):
        self.make(tmp_path, "a.png", class_picture_name(7))
        assert missing_numbers(tmp_path, wanted) == []

    def test_a_file_in_the_way_is_a_clear_error(self, tmp_path):
        (tmp_path / "class").touch()
        with pytest.raises(DataError, match=r"--class_data_dir .*class: expected a folder, got a file"):
            missing_numbers(tmp_path / "class", 3)


def test_the_errors_of_a_step_are_reported_by_group():
    rows = [(INSTANCE, 1.0), (CLASS, 10.0), (INSTANCE, 3.0), (CLASS, 20.0), (CLASS, 60.0)]
    assert concept_means(rows) == {INSTANCE: 2.0, CLASS: 30.0}
