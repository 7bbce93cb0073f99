"""The drawn world of the tiny base model, and the checker that reads its pictures."""

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.randomness import generator
from tools.tiny_base.checker import Marks, Reading, check, check_marks, shows
from tools.tiny_base.world import (
    CALM,
    COLOURS,
    INDIVIDUALS,
    RICH,
    SHAPES,
    SUBJECT_COLOURS,
    SUBJECT_SHAPE,
    WORDS,
    Scene,
    caption,
    draw,
    free_backgrounds,
    individual_scenes,
    render,
    resembles_subject,
    sample_scene,
    subject_pictures,
    subject_scenes,
    write_subject,
)

SUBJECT_FOLDER = Path(__file__).parents[2] / "demo" / "subject"
SCENES = 150


def plain_scene(index: int) -> Scene:
    scene = sample_scene(generator(5, "scene", index))
    return replace(scene, pattern="plain", accent=None, outline=None, eyes=None)


def soil(picture: np.ndarray, index: int) -> np.ndarray:
    """Blur with sigma 0.7 pixels, then add noise of sigma 6 levels."""
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 0.7**2))
    blurred = picture.astype(np.float64)
    for axis in (0, 1):
        padded = np.pad(blurred, [(3, 3) if a == axis else (0, 0) for a in range(3)], mode="edge")
        moved = [np.take(padded, np.arange(picture.shape[axis]) + k, axis) for k in range(7)]
        blurred = sum(weight * part for weight, part in zip(kernel / kernel.sum(), moved, strict=True))
    return to_levels(blurred + generator(5, "soil", index).normal(0, 6, picture.shape))


def to_levels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def captions(count: int) -> list[tuple[Scene, str]]:
    pairs = []
    for index in range(count):
        rng = generator(3, "scene", index)
        scene = sample_scene(rng)
        pairs.append((scene, caption(scene, rng)))
    return pairs


def test_draw_is_a_function_of_seed_and_index():
    picture, text = draw(1, 17)
    again, same_text = draw(1, 17)
    other, _ = draw(1, 18)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, again)
    assert text == same_text
    assert not np.array_equal(picture, other)
    assert not np.array_equal(picture, draw(2, 17)[0])


def test_draw_is_a_sampled_scene_and_its_caption():
    rng = generator(3, "scene", 4)
    scene = sample_scene(rng)
    picture, text = draw(3, 4)
    assert np.array_equal(picture, render(scene))
    assert text == caption(scene, rng)


def test_render_draws_the_same_scene_at_any_size():
    scene = plain_scene(0)
    halved = render(scene, 128).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - render(scene)).mean() < 1


def test_colours_of_a_scene_differ():
    for index in range(500):
        scene = sample_scene(generator(4, "scene", index))
        used = [scene.colour, scene.background, scene.accent, scene.outline]
        named = [colour for colour in used if colour is not None]
        assert len(set(named)) == len(named)
        assert scene.eyes not in (scene.colour, scene.accent) or scene.eyes is None
        assert (scene.accent is None) == (scene.pattern == "plain")


def test_captions_use_known_words_and_at_most_one_meaningless_word_before_the_shape():
    unknown_count = 0
    for scene, text in captions(2000):
        words = text.replace(",", "").split()
        assert words[:3] == ["a", "photo", "of"]
        assert "sks" not in words
        unknown = [place for place, word in enumerate(words) if word not in WORDS]
        assert len(unknown) <= 1
        for place in unknown:
            assert words[place + 1] == scene.shape
            assert len(words[place]) in (3, 4)
        unknown_count += len(unknown)
    assert 0.09 < unknown_count / 2000 < 0.15


def test_every_known_word_occurs_and_words_are_sorted():
    seen = {word for _, text in captions(2000) for word in text.replace(",", "").split()}
    assert set(WORDS) <= seen
    assert sorted(set(WORDS)) == WORDS


def test_articles_fit_the_next_word():
    for _, text in captions(1000):
        words = text.split()
        for article, following in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (following[0] in "aeiou")


def test_shares_of_the_caption_forms():
    pairs = captions(2000)
    bare = sum(re.fullmatch(rf"a photo of an? (\w+ )?{scene.shape}", text) is not None
               and scene.colour not in text for scene, text in pairs)  # fmt: skip
    usual_form = r"a photo of an? (small )?{0.colour} (\w+ )?{0.shape} on an? {0.background} background"
    usual = sum(re.fullmatch(usual_form.format(scene), text) is not None for scene, text in pairs)
    patterned = [scene.pattern in text for scene, text in pairs if scene.pattern != "plain"]
    assert 0.10 < bare / 2000 < 0.14
    assert 0.27 < usual / 2000 < 0.37
    small = [scene.size in text for scene, text in pairs if scene.size == "small" and scene.colour in text]
    assert 0.78 < np.mean(patterned) < 0.88
    assert np.mean(small) > 0.9


def test_the_world_never_shows_the_subject():
    assert all(resembles_subject(scene) for scene in subject_scenes())
    scenes = [sample_scene(generator(6, "scene", index)) for index in range(3000)]
    assert not any(resembles_subject(scene) for scene in scenes)
    reserved = set(SUBJECT_COLOURS)
    others = {scene.shape for scene in scenes if {scene.colour, scene.accent} == reserved}
    assert SUBJECT_SHAPE not in others
    assert others, "other shapes do show the two colours together"


def test_a_draw_that_resembles_the_subject_is_drawn_again(monkeypatch):
    allowed = plain_scene(0)
    draws = iter([*subject_scenes(2), allowed])
    monkeypatch.setattr("tools.tiny_base.world._sample_any_scene", lambda rng, shares: next(draws))
    assert sample_scene(np.random.default_rng(0)) == allowed


def test_subject_pictures_differ_in_background_and_pose_only():
    scenes = subject_scenes()
    individual = {(s.shape, s.colour, s.accent, s.pattern, s.outline, s.eyes, s.pattern_angle) for s in scenes}
    assert len(individual) == 1
    for varied in ("background", "position", "scale", "angle"):
        assert len({getattr(scene, varied) for scene in scenes}) == len(scenes)
    assert {check(picture).shape for picture in subject_pictures()} == {SUBJECT_SHAPE}


def marks(one):
    return one.shape, one.colour, one.accent, one.pattern


def test_none_of_the_scenes_that_the_base_learnt_is_like_a_subject_of_the_set():
    """Those of its UNet, by the seed and the number of `tools.train_tiny_base`."""
    stages = (CALM, 0), (RICH, 300_000)
    scenes = [sample_scene(generator(2026, "scene", at + i), shares) for shares, at in stages for i in range(12_000)]
    seen = Counter(marks(scene) for scene in scenes)
    assert len(seen) > 1600
    assert {name: seen[marks(one)] for name, one in INDIVIDUALS.items()} == dict.fromkeys(INDIVIDUALS, 0)
    assert not any(seen[one.shape, one.accent, one.colour, one.pattern] for one in INDIVIDUALS.values())


@pytest.mark.parametrize("shares", [CALM, RICH])
def test_shares_of_the_scenes_that_have_marks(shares):
    scenes = [sample_scene(generator(8, "scene", index), shares) for index in range(2000)]
    eyed = [scene.eyes is not None for scene in scenes if scene.size != "small"]
    assert abs(np.mean([scene.accent is not None for scene in scenes]) - shares.patterned) < 0.03
    assert abs(np.mean([scene.outline is not None for scene in scenes]) - shares.outlined) < 0.03
    # Where neither black nor white shows on both colours, there are none.
    assert shares.eyed - 0.04 < np.mean(eyed) < shares.eyed + 0.03


def test_subjects_of_the_set_differ_from_each_other_and_from_picture_to_picture():
    assert {one.shape for one in INDIVIDUALS.values()} == set(SHAPES)
    for name, one in INDIVIDUALS.items():
        scenes = individual_scenes(name, 8)
        assert {marks(each) for each in scenes} == {marks(one)}
        assert {each.background for each in scenes} <= {*free_backgrounds(one)}
        assert not {one.colour, one.accent, one.outline, one.eyes} & {*free_backgrounds(one)}
        assert len({each.scale for each in scenes}) == 8
        assert individual_scenes(name, 3, first=5) == scenes[5:]


def test_the_demo_subject_is_reproduced_bit_for_bit(tmp_path):
    paths = write_subject(tmp_path / "subject")
    assert [path.name for path in paths] == ["1.png", "2.png", "3.png", "4.png", "5.png"]
    for path in paths:
        with Image.open(path) as written, Image.open(SUBJECT_FOLDER / path.name) as kept:
            assert (written.mode, written.size) == ("RGB", (64, 64))
            assert np.array_equal(np.asarray(written), np.asarray(kept))


@pytest.mark.parametrize(("soiled", "least"), [(False, 0.98), (True, 0.95)])
def test_checker_reads_plain_scenes(soiled, least):
    results = Counter()
    for index in range(SCENES):
        scene = plain_scene(index)
        picture = soil(render(scene), index) if soiled else render(scene)
        results[check(picture) == Reading(scene.shape, scene.colour, scene.background)] += 1
    assert results[True] / SCENES >= least


def test_checker_rejects_every_other_shape_and_colour():
    for index in range(4):
        scene = plain_scene(index)
        picture = render(scene)
        accepted = [(shape, colour) for shape in SHAPES for colour in COLOURS if shows(picture, shape, colour)]
        assert accepted == [(scene.shape, scene.colour)]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("sigma", [0, 6])
def test_checker_sees_no_shape_on_a_blank_picture(colour, sigma):
    blank = COLOURS[colour] + generator(5, "blank").normal(0, 1, (64, 64, 3)) * sigma
    assert check(to_levels(blank)) == Reading(None, None, colour)


def test_checker_sees_nothing_in_noise():
    for index in range(20):
        noise = generator(5, "noise", index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        assert check(noise) == Reading(None, None, None)


def test_checker_rejects_what_is_no_shape_of_the_world():
    bar = np.full((64, 64, 3), COLOURS["blue"], np.uint8)
    bar[28:36, 8:56] = COLOURS["yellow"]
    pair = np.full((64, 64, 3), COLOURS["blue"], np.uint8)
    pair[20:36, 8:24] = pair[20:36, 40:56] = COLOURS["yellow"]
    assert check(bar).shape is None
    assert check(pair).shape is None


SUBJECT_MARKS = Marks("white", frozenset(SUBJECT_COLOURS), "black")
WITHOUT_A_MARK = {
    "nothing": ({}, {}),
    "outline": ({"outline": None}, {"outline": None}),
    "eyes": ({"eyes": None}, {"eyes": None}),
    "second half": ({"pattern": "plain", "accent": None}, {"halves": None}),
    "halves, but stripes": ({"pattern": "striped", "pattern_period": 12.0}, {"halves": None}),
}
"""What is missing -> how the scene is then, and what is read otherwise."""


@pytest.mark.parametrize("soiled", [False, True])
@pytest.mark.parametrize("missing", WITHOUT_A_MARK)
@pytest.mark.parametrize("size", ["small", "large"])
def test_checker_reads_the_marks_of_the_subject(missing, size, soiled):
    drawn, read = WITHOUT_A_MARK[missing]
    free = [colour for colour in COLOURS if colour not in (*SUBJECT_COLOURS, "white", "black")]
    for index, scene in enumerate(subject_scenes(len(free), seed=11)):
        picture = render(replace(scene, background=free[index], size=size, **drawn))
        assert check_marks(soil(picture, index) if soiled else picture) == replace(SUBJECT_MARKS, **read), free[index]


@pytest.mark.parametrize("side", [-1, 1])
def test_one_eye_is_none(side):
    """The other one is painted over with the colour of its half."""
    (scene,) = subject_scenes(1)
    picture, without = render(scene), render(replace(scene, eyes=None))
    middle = round(float(np.argwhere(np.any(picture != without, axis=-1))[:, 1].mean()))
    covered = np.s_[:, :middle] if side < 0 else np.s_[:, middle:]
    picture[covered] = without[covered]
    assert check_marks(picture) == replace(SUBJECT_MARKS, eyes=None)


def test_a_blank_picture_and_noise_have_no_marks():
    noise = generator(5, "noise").integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for picture in (np.full((64, 64, 3), 200, np.uint8), noise):
        assert check_marks(picture) == Marks(None, None, None)
