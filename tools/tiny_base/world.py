"""A world of captioned drawings, small enough to train a Stable Diffusion from scratch on a processor.

Every picture shows one flat shape on a soft background. What a caption leaves out still varies (shade, pattern,
outline, eyes, pose), so that the model knows classes rather than icons, and one individual of a class can be new to it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreambooth_ms.randomness import generator

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = {
    "red": (208, 34, 40),
    "orange": (244, 130, 28),
    "yellow": (250, 216, 48),
    "green": (38, 152, 64),
    "cyan": (52, 196, 212),
    "blue": (38, 78, 200),
    "purple": (128, 52, 164),
    "pink": (246, 138, 184),
    "white": (242, 242, 242),
    "black": (26, 26, 28),
}
SIZES = {"small": 15.0, "medium": 18.5, "large": 22.0}
POSITIONS = {"center": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
PATTERNS = ("plain", "striped", "dotted", "split")

CANVAS = 64.0
"""Side of the canvas in canvas units, the pixels of a 64 x 64 picture. Sizes, offsets and widths are in these units."""

FREE_RADIUS = 27.5
"""Offset and radius of a shape with its outline add up to about this at most, so that the border shows background."""

EYE_HEIGHT = {"triangle": -0.2, "heart": 0.22}

SUBJECT_SHAPE = "star"
SUBJECT_COLOURS = ("cyan", "orange")
SUBJECT_BACKGROUNDS = ("blue", "purple", "green", "pink", "red")
SUBJECT_POSITIONS = ("center", "left", "top", "right", "bottom")
SUBJECT_SEED = 7

SET_SEED = 24

# (weight, what the caption mentions besides the shape)
CAPTION_FORMS = (
    (0.12, ()),
    (0.09, ("colour",)),
    (0.60, ("colour", "background")),
    (0.03, ("background",)),
    (0.03, ("colour", "size")),
    (0.04, ("colour", "size", "background")),
    (0.04, ("colour", "position", "background")),
    (0.05, ("colour", "size", "position", "background")),
)
DETAIL_MENTION = 0.97
"""How often a caption with a colour says all that is out of the ordinary: a notable size, pattern, outline, eyes."""
NOTABLE_SIZES = ("small",)
NONSENSE_SHARE = 0.12
PLACES = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
WORDS = sorted(
    {"a", "an", "photo", "of", "on", "in", "at", "the", "and", "with", "background", "outline", "eyes"}
    | set(SHAPES) | set(COLOURS) | set(SIZES) | set(POSITIONS) | set(PATTERNS) - {"plain"}
)  # fmt: skip
"""All words of the captions, without the comma and without the meaningless words."""

Field = np.ndarray
Shift = tuple[int, int, int]


@dataclass(frozen=True)
class Shares:
    """How many of the scenes have what tells individuals from each other."""

    patterned: float
    outlined: float
    eyed: float
    """Of those that are not small."""


CALM = Shares(patterned=0.3, outlined=0.18, eyed=0.2)
"""Mostly plain shapes: what is named is learnt first."""
RICH = Shares(patterned=0.54, outlined=0.45, eyed=0.45)
"""One in ten has a pattern, an outline and eyes; of the calm scenes, one in a hundred."""
MIXED = Shares(patterned=0.45, outlined=0.35, eyed=0.4)
"""Between the two: a third has none of them but, perhaps, eyes."""


@dataclass(frozen=True)
class Scene:
    """One picture: what it shows by name, and the jitters no caption mentions."""

    shape: str
    colour: str
    background: str
    size: str
    position: str
    pattern: str = "plain"
    accent: str | None = None
    """Second colour of the pattern; None if plain."""
    outline: str | None = None
    """Colour of the outline, if there is one."""
    eyes: str | None = None
    """Colour of the two eyes, if there are any."""
    angle: float = 0.0
    """Rotation, in degrees, clockwise."""
    aspect: float = 1.0
    """Width over height."""
    scale: float = 1.0
    """Factor on the radius of the size class."""
    offset: tuple[float, float] = (0.0, 0.0)
    """Added to the centre of the position class, canvas units, x to the right and y down."""
    shift: Shift = (0, 0, 0)
    """Added to the RGB colour of the shape, 8-bit levels; likewise for accent and background."""
    accent_shift: Shift = (0, 0, 0)
    background_shift: Shift = (0, 0, 0)
    gradient: tuple[float, float] = (0.0, 0.0)
    """Change of the background across the canvas along x and y, 8-bit levels."""
    pattern_angle: float = 0.0
    """Direction of the pattern relative to the shape, in degrees."""
    pattern_phase: float = 0.0
    """Where the pattern starts, 0 .. 1 of its period."""
    pattern_period: float = 10.0
    """Width of one repeat of the pattern, canvas units."""
    outline_width: float = 3.5
    """Canvas units."""


INDIVIDUALS = {
    "melon": Scene("circle", "green", "-", "large", "center", "split", "yellow", "white", "black", pattern_angle=90.0),
    "flag": Scene("square", "blue", "-", "large", "center", "striped", "yellow", "pink", "white", pattern_angle=45.0),
    "tent": Scene("triangle", "red", "-", "large", "center", "striped", "purple", None, "black", pattern_angle=90.0),
    "bonfire": Scene("star", "orange", "-", "large", "center", "striped", "cyan", "black", None, pattern_angle=0.0),
    "sweet": Scene("heart", "cyan", "-", "large", "center", "dotted", "pink", "white", None, pattern_angle=45.0),
    "plaster": Scene("cross", "white", "-", "large", "center", "dotted", "black", "green", None, pattern_angle=0.0),
}
"""Subjects to compare methods on, by names for people, but for their backgrounds.

No scene of the world has the shape, the pattern and both colours of one of them (`resembles_subject`)."""


def sample_scene(rng: np.random.Generator, shares: Shares = CALM) -> Scene:
    """Draw a scene; the colours of shape, accent, outline and background all differ.

    Never a scene that `resembles_subject`: those are drawn again.
    """
    while True:
        scene = _sample_any_scene(rng, shares)
        if not resembles_subject(scene):
            return scene


def resembles_subject(scene: Scene) -> bool:
    """Whether the scene has what is reserved: a star of both cyan and orange, or shape, pattern and both colours of one
    of `INDIVIDUALS`, either colour as the accent."""
    return (scene.shape == SUBJECT_SHAPE and {scene.colour, scene.accent} == set(SUBJECT_COLOURS)) or any(
        (scene.shape, scene.pattern) == (one.shape, one.pattern)
        and {scene.colour, scene.accent} == {one.colour, one.accent}
        for one in INDIVIDUALS.values()
    )


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Draw the scene, antialiased by signed distances.

    Returns:
        uint8 (size, size, 3), RGB.
    """
    step = CANVAS / size
    steps = (np.arange(size) + 0.5) * step
    x, y = np.meshgrid(steps, steps)
    radius = scene_radius(scene)
    local_x, local_y = _to_local(scene, x, y, radius)
    distance = shape_distance(scene.shape, local_x, local_y) * radius

    picture = _background(scene, x, y)
    colour = _shade(scene.colour, scene.shift)
    if scene.accent is not None:
        accent = _shade(scene.accent, scene.accent_shift)
        share = _coverage(_pattern_distance(scene, local_x * radius, local_y * radius), step)
        colour = _mix(colour, accent, share)
    # Half of the outline lies outside the body, so that thin arms keep their colour.
    if scene.outline is not None:
        picture = _mix(picture, _shade(scene.outline), _coverage(distance - scene.outline_width / 2, step))
        distance = distance + scene.outline_width / 2
    picture = _mix(picture, colour, _coverage(distance, step))
    if scene.eyes is not None:
        picture = _mix(picture, _shade(scene.eyes), _coverage(_eye_distance(scene, local_x, local_y) * radius, step))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe the scene in one of several levels of detail, sometimes with a meaningless word before the shape."""
    mentions = CAPTION_FORMS[rng.choice(len(CAPTION_FORMS), p=[weight for weight, _ in CAPTION_FORMS])][1]
    detailed = "colour" in mentions and rng.random() < DETAIL_MENTION
    words = [scene.size] if "size" in mentions or (detailed and scene.size in NOTABLE_SIZES) else []
    if "colour" in mentions:
        words += _colour_words(scene, detailed)
    if rng.random() < NONSENSE_SHARE:
        words.append(_meaningless_word(rng))
    text = "a photo of " + _with_article(" ".join([*words, scene.shape]))
    if detailed:
        text += _extras(scene)
    if "position" in mentions:
        text += f" {PLACES[scene.position]},"
    if "background" in mentions:
        text += f" on {_with_article(scene.background)} background"
    return text


def scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the world of this seed."""
    return sample_scene(generator(seed, "scene", index))


def draw(seed: int, index: int, shares: Shares = CALM) -> tuple[np.ndarray, str]:
    """Picture and caption number `index` of the world of this seed and these shares.

    Returns:
        Picture, uint8 (64, 64, 3), RGB; its caption.
    """
    rng = generator(seed, "scene", index)
    drawn = sample_scene(rng, shares)
    return render(drawn), caption(drawn, rng)


def subject_scenes(count: int = 5, seed: int = SUBJECT_SEED) -> list[Scene]:
    """Scenes of the subject: a star split into cyan and orange, with a thick white outline and two black eyes.

    `sample_scene` never draws a star of these two colours, so a model of this world has not seen it. Background,
    position, size and pose differ from picture to picture; everything else is the subject.
    """
    return [_subject_scene(index, generator(seed, "subject", index)) for index in range(count)]


def subject_pictures(count: int = 5, seed: int = SUBJECT_SEED) -> list[np.ndarray]:
    """Pictures of the subject (see `subject_scenes`), each uint8 (64, 64, 3), RGB."""
    return [render(scene) for scene in subject_scenes(count, seed)]


def individual_scenes(name: str, count: int, first: int = 0) -> list[Scene]:
    """Scenes of one of `INDIVIDUALS`, from a number on, which differ as those of the subject."""
    one, numbers = INDIVIDUALS[name], range(first, first + count)
    return [replace(one, **_surroundings(one, number, generator(SET_SEED, name, number))) for number in numbers]


def free_backgrounds(scene: Scene) -> list[str]:
    """Colours that a scene's shape has not, in an order of its own."""
    used = (scene.colour, scene.accent, scene.outline, scene.eyes)
    free = [colour for colour in COLOURS if colour not in used]
    return [*free[len(scene.shape) % len(free) :], *free[: len(scene.shape) % len(free)]]


def write_subject(folder: Path) -> list[Path]:
    """Write the five pictures of the subject as 1.png … 5.png into the folder; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, picture in enumerate(subject_pictures(), start=1):
        paths.append(folder / f"{number}.png")
        Image.fromarray(picture).save(paths[-1])
    return paths


def scene_radius(scene: Scene) -> float:
    """Radius of the scene's shape, canvas units."""
    return SIZES[scene.size] * scene.scale


def shape_distance(shape: str, x: Field, y: Field) -> Field:
    """Signed distance to the outline of an upright shape of radius about 1; negative inside.

    Args:
        shape: one of `SHAPES`.
        x: in units of the radius, to the right, from the centre.
        y: likewise, upwards.

    Returns:
        The distances, in units of the radius; exact inside near an edge, sharp-cornered outside.
    """
    return _DISTANCES[shape](x, y)


def _circle(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 0.92


def _square(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - 0.82


def _triangle(x: Field, y: Field) -> Field:
    slope = np.array([1.6, 0.92]) / np.hypot(1.6, 0.92)
    return np.maximum(-0.72 - y, slope[0] * np.abs(x) + slope[1] * (y - 0.88))


def _star(x: Field, y: Field) -> Field:
    tip, notch, sector = 1.02, 0.55, np.pi / 5
    folded = np.abs(np.mod(np.arctan2(x, y) + sector, 2 * sector) - sector)
    length = np.hypot(x, y)
    edge = np.array([notch * np.cos(sector) - tip, notch * np.sin(sector)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    beyond_edge = normal[0] * (length * np.cos(folded) - tip) + normal[1] * length * np.sin(folded)
    return np.maximum(beyond_edge, length - tip)


def _heart(x: Field, y: Field) -> Field:
    size = 1.6
    across, up = np.abs(x) / size, (y + 0.9) / size
    lobe = np.hypot(across - 0.25, up - 0.75) - np.sqrt(2) / 4
    foot = np.maximum(across + up, 0) / 2
    nearest = np.minimum(np.hypot(across, up - 1), np.hypot(across - foot, up - foot))
    return size * np.where(across + up > 1, lobe, nearest * np.sign(across - up))


def _cross(x: Field, y: Field) -> Field:
    across, up = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(across - 0.92, up - 0.33), np.maximum(across - 0.33, up - 0.92))


_DISTANCES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
}


def _to_local(scene: Scene, x: Field, y: Field, radius: float) -> tuple[Field, Field]:
    """Canvas coordinates, y down, to upright coordinates of the shape, y up, in units of its radius."""
    margin = 0.0 if scene.outline is None else scene.outline_width / 2
    reach = max(FREE_RADIUS - radius - margin, 0.0)
    direction = POSITIONS[scene.position]
    across = x - CANVAS / 2 - direction[0] * reach - scene.offset[0]
    down = y - CANVAS / 2 - direction[1] * reach - scene.offset[1]
    cosine, sine = np.cos(np.radians(scene.angle)), np.sin(np.radians(scene.angle))
    stretch = np.sqrt(scene.aspect)
    return (cosine * across + sine * down) / (radius * stretch), (sine * across - cosine * down) / radius * stretch


def _pattern_distance(scene: Scene, x: Field, y: Field) -> Field:
    """Signed distance to the accent parts of the pattern, canvas units; negative where the accent shows."""
    cosine, sine = np.cos(np.radians(scene.pattern_angle)), np.sin(np.radians(scene.pattern_angle))
    along, across = cosine * x + sine * y, cosine * y - sine * x
    period = scene.pattern_period
    if scene.pattern == "split":
        return -along
    wave = _to_nearest(along, period, scene.pattern_phase)
    if scene.pattern == "striped":
        return np.abs(wave) - 0.22 * period
    other_wave = _to_nearest(across, period, scene.pattern_phase)
    return np.hypot(wave, other_wave) - 0.3 * period


def _to_nearest(position: Field, period: float, phase: float) -> Field:
    """Signed distance to the nearest repeat of a pattern, -period / 2 .. period / 2."""
    return np.mod(position + (phase + 0.5) * period, period) - period / 2


def _eye_distance(scene: Scene, x: Field, y: Field) -> Field:
    height = EYE_HEIGHT.get(scene.shape, 0.06)
    return np.hypot(np.abs(x) - 0.24, y - height) - 0.15


def _coverage(distance: Field, step: float) -> Field:
    """Share of each pixel inside, 0 .. 1, from the signed distance of its centre and the side of a pixel."""
    return np.clip(0.5 - distance / step, 0, 1)[..., None]


def _mix(below: Field, above: Field, share: Field) -> Field:
    return below + (above - below) * share


def _shade(colour: str, shift: Shift = (0, 0, 0)) -> Field:
    return np.clip(np.add(COLOURS[colour], shift, dtype=np.float64), 0, 255)


def _background(scene: Scene, x: Field, y: Field) -> Field:
    slope = (x / CANVAS - 0.5) * scene.gradient[0] + (y / CANVAS - 0.5) * scene.gradient[1]
    return np.clip(_shade(scene.background, scene.background_shift) + slope[..., None], 0, 255)


def _sample_any_scene(rng: np.random.Generator, shares: Shares) -> Scene:
    colour, background, accent, outline = (str(name) for name in rng.permutation(list(COLOURS))[:4])
    shape, size = str(rng.choice(SHAPES)), str(rng.choice(list(SIZES), p=[0.15, 0.25, 0.6]))
    pattern = str(rng.choice(PATTERNS, p=[1 - shares.patterned, *[shares.patterned / 3] * 3]))
    eyed = size != "small" and rng.random() < shares.eyed
    accent_shown = None if pattern == "plain" else accent
    return Scene(
        shape=shape,
        colour=colour,
        background=background,
        size=size,
        position=str(rng.choice(list(POSITIONS), p=[0.7, 0.075, 0.075, 0.075, 0.075])),
        pattern=pattern,
        accent=accent_shown,
        outline=outline if rng.random() < shares.outlined else None,
        eyes=_eye_colour(colour, accent_shown) if eyed else None,
        angle=rng.uniform(-8, 8),
        aspect=rng.uniform(0.92, 1.08),
        scale=rng.uniform(0.93, 1.07),
        offset=(rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)),
        shift=_sample_shift(rng),
        accent_shift=_sample_shift(rng),
        background_shift=_sample_shift(rng),
        gradient=(rng.uniform(-20, 20), rng.uniform(-20, 20)),
        pattern_angle=float(rng.choice([0, 45, 90, 135])) + rng.uniform(-12, 12),
        pattern_phase=rng.uniform(0, 1),
        pattern_period=rng.uniform(11, 15),
        outline_width=rng.uniform(3.0, 4.5),
    )


def _sample_shift(rng: np.random.Generator) -> Shift:
    red, green, blue = rng.integers(-18, 19) + rng.integers(-8, 9, 3)
    return int(red), int(green), int(blue)


def _eye_colour(colour: str, accent: str | None) -> str | None:
    """Black if it shows on both colours of the shape, else white, else None."""
    return next((eye for eye in ("black", "white") if eye not in (colour, accent)), None)


def _subject_scene(index: int, rng: np.random.Generator) -> Scene:
    return Scene(
        shape=SUBJECT_SHAPE,
        colour=SUBJECT_COLOURS[0],
        background=SUBJECT_BACKGROUNDS[index % len(SUBJECT_BACKGROUNDS)],
        size="large",
        position=SUBJECT_POSITIONS[index % len(SUBJECT_POSITIONS)],
        pattern="split",
        accent=SUBJECT_COLOURS[1],
        outline="white",
        eyes="black",
        angle=rng.uniform(-14, 14),
        scale=rng.uniform(0.86, 1.1),
        offset=(rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)),
        gradient=(rng.uniform(-20, 20), rng.uniform(-20, 20)),
        outline_width=4.2,
    )


def _surroundings(one: Scene, number: int, rng: np.random.Generator) -> dict[str, Any]:
    """Where and how an individual stands in a picture."""
    backgrounds = free_backgrounds(one)
    return {
        "background": backgrounds[number % len(backgrounds)],
        "position": SUBJECT_POSITIONS[number % len(SUBJECT_POSITIONS)],
        "angle": rng.uniform(-14, 14),
        "scale": rng.uniform(0.86, 1.1),
        "offset": (rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)),
        "gradient": (rng.uniform(-20, 20), rng.uniform(-20, 20)),
    }


def _colour_words(scene: Scene, detailed: bool) -> list[str]:
    if detailed and scene.accent is not None:
        return [scene.pattern, scene.colour, "and", scene.accent]
    return [scene.colour]


def _extras(scene: Scene) -> str:
    extras = [] if scene.outline is None else [f"{_with_article(scene.outline)} outline"]
    if scene.eyes is not None:
        extras.append(f"{scene.eyes} eyes")
    return " with " + " and ".join(extras) if extras else ""


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _meaningless_word(rng: np.random.Generator) -> str:
    """A word of 3 or 4 letters that names nothing; never "sks", which a user may want to give a meaning."""
    while True:
        word = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 5)))
        if word != "sks" and word not in WORDS:
            return word


if __name__ == "__main__":
    for path in write_subject(Path(sys.argv[1])):
        print(path)
