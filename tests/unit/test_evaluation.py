"""Every measure by numbers that were worked out by hand, and the table that shows them."""

import numpy as np
import pytest
from mindspore import Tensor

from dreambooth_ms.cli.evaluate import table
from dreambooth_ms.evaluation import (
    Drawn,
    Figure,
    load_clip_embedder,
    measures,
    similarity,
    similarity_among,
    similarity_in_turn,
)
from dreambooth_ms.formats.clip_tokenizer import ClipTokenizer
from dreambooth_ms.models.clip import CLIPModel, end_positions
from dreambooth_ms.weights.bundle import load_encoder
from tests.tiny_model import write_random_model

EAST, NORTH, UP = np.eye(3)
SLANTED = np.array([0.6, 0.8, 0.0])


def vectors(*rows):
    return np.array(rows)


def test_the_mean_is_over_all_pairs_of_one_of_each():
    # Cosines 1, 0.6, 0, 0, 0.8, 0.
    assert similarity(vectors(EAST, NORTH), vectors(EAST, SLANTED, UP)) == pytest.approx((1 + 0.6 + 0.8) / 6)


def test_a_vector_is_not_compared_with_itself():
    assert similarity_among(vectors(EAST, SLANTED)) == pytest.approx(0.6)
    # The pairs have 0.6, 0 and 0.8.
    assert similarity_among(vectors(EAST, SLANTED, NORTH)) == pytest.approx(1.4 / 3)
    assert similarity_among(vectors(UP, UP, UP)) == pytest.approx(1)


def test_in_turn_each_has_one_partner():
    assert similarity_in_turn(vectors(EAST, NORTH), vectors(SLANTED, SLANTED)) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="shapes"):
        similarity_in_turn(vectors(EAST, NORTH), vectors(EAST, NORTH, UP))


def test_a_figure_has_mean_and_deviation_of_the_seeds():
    # Deviations -2, 0, 2 from 3: the variance is 8 / (3 - 1).
    assert Figure.of([1, 3, 5]) == Figure(3, 2, (1, 3, 5))
    assert Figure.of([4]) == Figure(4, None, (4,))
    assert [str(Figure.of(own)) for own in ([0.25, 0.25], [0.5])] == ["0.250 ± 0.000", "0.500"]


def drawn_from_two_seeds():
    """Of a base that knows nothing of the subject, in the east, and of an adapted model."""
    base = [Drawn(vectors(UP, UP), vectors(NORTH, UP))] * 2
    adapted = [
        Drawn(vectors(EAST, SLANTED), vectors(NORTH, SLANTED)),
        Drawn(vectors(EAST, EAST), vectors(EAST, UP)),
    ]
    return base, adapted


def test_every_measure_of_a_space_with_texts():
    given, held_out, other = vectors(EAST, SLANTED), vectors(EAST), vectors(NORTH, UP)
    texts = vectors(EAST, NORTH)
    found = {one.name: one for one in measures("CLIP", *drawn_from_two_seeds(), texts, given, held_out, other)}
    expected = {
        # To EAST and SLANTED: EAST 0.8, SLANTED 0.8, NORTH 0.4, UP 0.
        "CLIP-I": ("higher", [0, 0], [0.8, 0.8], 0.6, 0.2),
        # Of the photographs given 1 and 0.6 to EAST, of the other subject's 0 and 0.
        "CLIP-I, held out": ("higher", [0, 0], [0.8, 1], 0.8, 0),
        # EAST to EAST 1, SLANTED to NORTH 0.8; EAST to NORTH 0.
        "CLIP-T": ("higher", [0, 0], [0.9, 0.5], None, None),
        "PRES, CLIP": ("lower", [0.2, 0.2], [0.6, 0.4], None, None),
        "DIV, CLIP": ("higher", [1, 1], [0.2, 1], None, None),
        # NORTH stayed, UP became SLANTED; NORTH became EAST, UP stayed.
        "class drift, CLIP": ("lower", [0, 0], [0.5, 0.5], None, None),
    }
    assert list(found) == list(expected)
    for name, (better, base, adapted, *bounds) in expected.items():
        own = found[name]
        assert (own.name, own.better) == (name, better)
        assert (own.base.seeds, own.adapted.seeds) == (pytest.approx(base), pytest.approx(adapted)), name
        assert [own.ceiling, own.floor] == pytest.approx(bounds), name


def test_what_is_not_given_is_not_measured():
    found = measures("DINO", *drawn_from_two_seeds(), None, vectors(EAST, SLANTED))
    assert [one.name for one in found] == ["DINO", "PRES, DINO", "DIV, DINO", "class drift, DINO"]
    assert (found[0].ceiling, found[0].floor) == (pytest.approx(0.6), None)
    of_one_photograph = measures("DINO", *drawn_from_two_seeds(), None, vectors(EAST))
    assert (of_one_photograph[0].ceiling, of_one_photograph[0].adapted.seeds) == (None, pytest.approx((0.8, 1.0)))


def test_the_table_has_a_line_for_each():
    shown = table(measures("DINO", *drawn_from_two_seeds(), None, vectors(EAST, SLANTED)))
    assert shown.splitlines() == [
        "                   better  base           adapted        ceiling  floor",
        "DINO               higher  0.000 ± 0.000  0.800 ± 0.000  0.600    -",
        "PRES, DINO         lower   0.200 ± 0.000  0.500 ± 0.141  -        -",
        "DIV, DINO          higher  1.000 ± 0.000  0.600 ± 0.566  -        -",
        "class drift, DINO  lower   0.000 ± 0.000  0.500 ± 0.000  -        -",
    ]


def test_clip_reads_texts_by_the_tokenizer_beside_it_or_none(tmp_path, pynative):
    home = write_random_model(tmp_path)
    clip, embedder = load_encoder(home / "clip", CLIPModel), load_clip_embedder(home / "clip")
    texts = ["a photo of star", "star"] * 9
    ids = np.concatenate([ClipTokenizer(home / "tokenizer").pieces(text, 1) for text in texts[:2]])
    ends = end_positions(ids, clip.spec.text.eos_token_id)
    expected = clip.encode_text(Tensor(ids), Tensor(ends)).asnumpy()
    found = embedder.texts(texts)
    assert found == pytest.approx(np.tile(expected, (9, 1)), abs=1e-6)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)
    pictures = embedder.pictures([np.full((40, 50, 3), level, np.uint8) for level in range(18)])
    assert pictures.shape == found.shape
    (home / "tokenizer" / "tokenizer_config.json").unlink()
    assert load_clip_embedder(home / "clip").texts is None
