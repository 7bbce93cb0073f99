"""People's picture folders, and pictures as a viewer shows them."""

import hashlib
import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from dreambooth_ms import randomness
from dreambooth_ms.config.schema import schema_fields
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data import pictures
from dreambooth_ms.data.pictures import Frame, find_pictures, frame_of, open_picture, read_picture, resize_and_crop
from dreambooth_ms.errors import DataError

INTERPOLATIONS = schema_fields(TrainConfig)["image_interpolation_mode"].kind
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
SQUARE = (64, 64)
HEIF = (".heic", ".heif", ".hif")
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def save(path, colour=RED, size=(8, 8), mode="RGB", **options):
    Image.new(mode, size, colour).save(path, **options)
    return path


def corner(path) -> tuple[int, ...]:
    image = open_picture(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def gradient(width: int, height: int) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))


# --- Folders ---


def test_pictures_come_in_the_order_people_number_them(tmp_path):
    for name in ("dog10.png", "dog2.png", "Dog1.png", "dog.png", "cat.png", "2.png", "10.png"):
        save(tmp_path / name)
    names = [path.name for path in find_pictures(tmp_path)[0]]
    assert names == ["2.png", "10.png", "cat.png", "dog.png", "Dog1.png", "dog2.png", "dog10.png"]


@pytest.mark.parametrize(
    "suffix", [*(suffix for suffix in pictures.SUFFIXES if suffix not in HEIF + (".avif",)), ".JPG", ".Png", ".JFIF"]
)
def test_every_usual_suffix_is_a_picture_and_opens(tmp_path, suffix):
    save(tmp_path / f"dog{suffix}", size=(16, 16))
    (path,) = find_pictures(tmp_path)[0]
    assert open_picture(path).size == (16, 16)


def test_everything_else_is_listed_as_skipped(tmp_path):
    save(tmp_path / "dog.png")
    save(tmp_path / ".hidden.png")
    (tmp_path / "._dog.jpg").write_bytes(b"finder")
    (tmp_path / "notes.txt").write_text("rex")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    found, notes = find_pictures(str(tmp_path))
    assert [path.name for path in found] == ["dog.png"]
    assert {path.name for path in notes[pictures.SKIPPED]} == {
        ".hidden.png",
        "._dog.jpg",
        "notes.txt",
        "folder.png",
        "broken.png",
    }


def test_what_was_skipped_is_one_line(tmp_path):
    save(tmp_path / "dog.png")
    for name in [*(f"{number}.txt" for number in range(7)), "two\nlines.txt"]:
        (tmp_path / name).touch()
    (line,) = pictures.told(find_pictures(tmp_path)[1])
    assert line == f"{tmp_path}: skipped what is not a picture, 8 found: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 3 more"
    assert "\n" not in pictures.told({"skipped": [tmp_path / "two\nlines.txt"]})[0]
    assert pictures.told({"skipped": []}) == []


def test_captions_that_nothing_reads_are_told_as_such(tmp_path):
    for name in ("a.png", "b.jpg"):
        save(tmp_path / name)
    for name in ("a.txt", "b.caption", "metadata.jsonl", "c.txt"):
        (tmp_path / name).write_text("a dog on grass")
    assert pictures.told(find_pictures(tmp_path)[1]) == [
        f"{tmp_path}: skipped what is not a picture, 1 found: c.txt",
        f"{tmp_path}: captions are not read, all pictures have one prompt, 3 found: a.txt, b.caption, metadata.jsonl",
    ]


def test_a_folder_without_pictures_is_refused_with_what_it_holds(tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path}: no picture in it, it is empty; expected a folder with pictures"):
        find_pictures(tmp_path)
    (tmp_path / "dog.psd").touch()
    with pytest.raises(DataError, match=r"no picture in it, 1 found: dog.psd; expected a folder with pictures"):
        find_pictures(tmp_path)


def test_what_is_not_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path}/dogs: no such folder; expected a folder with pictures"):
        find_pictures(tmp_path / "dogs")
    path = save(tmp_path / "dog.png")
    with pytest.raises(DataError, match=f"^{path}: not a folder; expected a folder with pictures"):
        find_pictures(path)
    (tmp_path / "Dog").mkdir()
    with pytest.raises(DataError, match=f"^{tmp_path}/dgo: no such folder; did you mean {tmp_path}/Dog\\?; expected"):
        find_pictures(tmp_path / "dgo")


# --- Opening ---


@pytest.mark.parametrize(
    ("orientation", "store"),
    [
        (1, lambda upright: upright),
        (2, lambda upright: upright[:, ::-1]),
        (3, lambda upright: np.rot90(upright, 2)),
        (4, lambda upright: upright[::-1]),
        (5, lambda upright: upright.transpose(1, 0, 2)),
        (6, lambda upright: np.rot90(upright, 1)),
        (7, lambda upright: np.rot90(upright, 2).transpose(1, 0, 2)),
        (8, lambda upright: np.rot90(upright, -1)),
    ],
)
def test_a_photo_is_turned_upright_by_its_exif_tag(tmp_path, orientation, store):
    """The file stores the pixels as EXIF 2.3, tag 274, describes each value."""
    upright = np.zeros((2, 3, 3), dtype=np.uint8)
    upright[0, 0] = 255
    stored = store(upright)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "dog.png", exif=exif)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "dog.png")), upright)


@pytest.mark.parametrize(
    ("mode", "colour", "shown"),
    [
        ("RGB", RED, RED),
        ("RGBA", (*RED, 255), RED),
        ("RGBA", (*RED, 0), WHITE),
        ("RGBA", (*BLACK, 128), (127, 127, 127)),
        ("L", 100, (100, 100, 100)),
        ("LA", (0, 0), WHITE),
        ("1", 1, WHITE),
        ("I;16", 65535, WHITE),
        ("I;16", 32896, (128, 128, 128)),
        ("I;16", 128, BLACK),
        ("I;16", 129, (1, 1, 1)),
    ],
)
def test_every_mode_looks_as_in_a_viewer(tmp_path, mode, colour, shown):
    assert corner(save(tmp_path / "dog.png", colour, mode=mode)) == shown


def test_a_transparent_palette_entry_is_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([*BLACK, *RED])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "dog.png", transparency=0)
    assert corner(tmp_path / "dog.png") == WHITE
    assert open_picture(tmp_path / "dog.png").getpixel((1, 0)) == RED


def test_a_cmyk_photo_has_its_colours(tmp_path):
    path = save(tmp_path / "dog.jpg", (0, 255, 255, 0), mode="CMYK", quality=100)
    assert np.abs(np.subtract(corner(path), RED)).max() <= 3


def test_a_transparent_picture_is_put_on_the_colour_that_was_asked_for(tmp_path):
    path = save(tmp_path / "dog.png", (*RED, 0), mode="RGBA")
    for name, colour in (("white", WHITE), ("black", BLACK), ("grey", (128,) * 3), ("#102030", (16, 32, 48))):
        opened = read_picture(path, name)
        assert opened.picture.getpixel((0, 0)) == colour
        assert opened.notes == (f"transparent, put on {name} (--transparent_background names another colour)",)
        assert opened.reading == (() if name == "white" else (str(colour),))
    opaque = read_picture(save(tmp_path / "cat.png", (*RED, 255), mode="RGBA"), "black")
    assert opaque[1:] == ((), ())


# --- Colour profiles ---


def profile(space, *tags, pcs=b"XYZ "):
    """A colour profile of version 2, as ICC.1:2001-04 lays it out."""
    table, data = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in (*tags,):
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI4s4s4s", start + len(data), b"", 0x02400000, kind, space, pcs) + bytes(12) + b"acsp"
    header += bytes(28) + struct.pack(">iii", *fixed(*D50)) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + data


def fixed(*values):
    return [round(value * 65536) for value in values]


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *fixed(*values))


def power(exponent):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def ink_table():
    """Cyan, magenta, yellow and black to CIELAB: black is dark, cyan is a dark red, and the others do nothing."""
    steps = bytes(range(256))
    corners = [
        (0, 128, 128) if k else (255 - 100 * c, 128 + 60 * c, 128) for c, _, _, k in itertools.product((0, 1), repeat=4)
    ]
    matrix = struct.pack(">9i", *fixed(1, 0, 0, 0, 1, 0, 0, 0, 1))
    return b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + 4 * steps + bytes(sum(corners, ())) + 3 * steps


D50 = (0.9642, 1.0, 0.8249)
TO_D50_BY_PRIMARY = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
"""Display P3's primaries adapted to D50, by which its matrix profiles are made."""
WHITE_POINT = (b"wtpt", xyz(*D50))
DISPLAY_P3 = profile(
    b"RGB ",
    WHITE_POINT,
    *((name + b"XYZ", xyz(*primary)) for name, primary in zip((b"r", b"g", b"b"), TO_D50_BY_PRIMARY, strict=True)),
    *((name + b"TRC", power(2.0)) for name in (b"r", b"g", b"b")),
)
LINEAR_GREY = profile(b"GRAY", WHITE_POINT, (b"kTRC", power(1.0)))
INKS = profile(b"CMYK", WHITE_POINT, (b"A2B0", ink_table()), pcs=b"Lab ")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SRGB_TO_D50 = ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410))
"""Of IEC 61966-2-1's primaries, adapted to D50 by Bradford's method."""


def in_srgb(display_p3):
    """The same colour's numbers in sRGB, by its matrix and curve."""
    linear = np.linalg.solve(SRGB_TO_D50, np.transpose(TO_D50_BY_PRIMARY) @ (np.array(display_p3) / 255) ** 2)
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("colour", [(200, 30, 60), (90, 160, 40), (128, 128, 128), (255, 255, 255)])
@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("jpg", {"quality": 100}), ("webp", {"lossless": True}), ("tif", {})]
)
def test_a_photo_of_a_phone_has_the_colours_that_its_profile_says(tmp_path, colour, suffix, options):
    path = save(tmp_path / f"dog.{suffix}", colour, icc_profile=DISPLAY_P3, **options)
    opened = read_picture(path)
    assert np.abs(opened.picture.getpixel((0, 0)) - in_srgb(colour)).max() <= (4 if suffix == "jpg" else 1)
    assert opened.notes == ()
    assert opened.reading == ("profile",) if colour[0] != colour[1] else True


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (200, 30, 60, 128)), ("RGBA", (200, 30, 60, 0))])
def test_a_profile_is_of_colours_and_not_of_transparency_or_what_is_behind(tmp_path, mode, colour):
    shown = corner(save(tmp_path / "dog.png", colour, mode=mode, icc_profile=DISPLAY_P3))
    share = colour[3] / 255
    assert np.abs(shown - (share * in_srgb(colour[:3]) + (1 - share) * 255)).max() <= 1


def test_a_profile_of_srgb_changes_no_pixel(tmp_path):
    gradient(64, 48).save(tmp_path / "dog.png", icc_profile=SRGB)
    opened = read_picture(tmp_path / "dog.png")
    assert np.array_equal(np.asarray(opened.picture), np.asarray(gradient(64, 48)))
    assert opened[1:] == ((), ())


@pytest.mark.parametrize(("mode", "level"), [("L", 55), ("LA", (55, 255)), ("I;16", 55 * 257)])
def test_a_grey_photo_has_the_greys_of_its_profile(tmp_path, mode, level):
    """A fifth of the light is level 128 in sRGB."""
    assert corner(save(tmp_path / "dog.png", level, mode=mode, icc_profile=LINEAR_GREY)) == (128, 128, 128)


def test_a_grey_photo_may_have_a_profile_of_colours(tmp_path):
    assert (
        np.abs(corner(save(tmp_path / "dog.png", 55, mode="L", icc_profile=DISPLAY_P3)) - in_srgb((55,) * 3)).max() <= 1
    )


@pytest.mark.parametrize(("inks", "shown"), [((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), BLACK), ((0, 255, 0, 0), WHITE)])
def test_a_printed_photo_has_the_colours_of_its_inks(tmp_path, inks, shown):
    assert (
        np.abs(np.subtract(corner(save(tmp_path / "dog.tif", inks, mode="CMYK", icc_profile=INKS)), shown)).max() <= 1
    )


def test_cyan_is_what_the_profile_says_of_it(tmp_path):
    red, green, blue = corner(save(tmp_path / "dog.tif", (255, 0, 0, 0), mode="CMYK", icc_profile=INKS))
    assert red > 200
    assert green < 120 < blue


@pytest.mark.parametrize(
    ("mode", "colour", "content"),
    [
        ("RGB", RED, b"no profile"),
        ("RGB", RED, DISPLAY_P3[:200]),
        ("RGB", RED, LINEAR_GREY),
        ("RGB", RED, INKS),
        ("CMYK", (0, 255, 255, 0), DISPLAY_P3),
    ],
    ids=["nonsense", "cut", "of greys", "of inks", "of light, for inks"],
)
def test_a_profile_that_is_none_or_of_other_pixels_is_told_and_left_out(tmp_path, mode, colour, content):
    opened = read_picture(save(tmp_path / "dog.tif", colour, mode=mode, icc_profile=content))
    assert opened.picture.getpixel((0, 0)) == RED
    assert opened[1:] == ((), ("colour profile damaged or of other pixels, taken as sRGB",))


# --- Photographs of phones ---


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF here")
@pytest.mark.parametrize("name", ["dog.avif", "dog.jpg"])
def test_an_avif_photo_is_opened_whatever_its_name(tmp_path, name):
    exif = Image.Exif()
    exif[274] = 6
    save(tmp_path / "x.avif", (200, 30, 60), (64, 32), exif=exif, icc_profile=DISPLAY_P3, quality=100).rename(
        tmp_path / name
    )
    (path,) = find_pictures(tmp_path)[0]
    assert open_picture(path).size == (32, 64)
    assert np.abs(corner(path) - in_srgb((200, 30, 60))).max() <= 4


@pytest.mark.skipif(not pictures.HAS_HEIF, reason="pillow-heif is not installed here")
@pytest.mark.parametrize("name", [*(f"dog{suffix}" for suffix in HEIF), "IMG_1.HEIC", "dog.jpg"])
def test_a_heic_photo_is_opened_whatever_its_name(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as file:
        Image.new("RGB", (64, 32), (200, 30, 60)).save(file, "HEIF", icc_profile=DISPLAY_P3, quality=100)
    assert find_pictures(tmp_path)[0] == [path]
    assert open_picture(path).size == (64, 32)
    assert np.abs(corner(path) - in_srgb((200, 30, 60))).max() <= 4


@pytest.mark.skipif(not pictures.HAS_HEIF, reason="pillow-heif is not installed here")
def test_a_damaged_heic_photo_is_refused(tmp_path):
    with (tmp_path / "whole.heic").open("wb") as file:
        gradient(64, 64).save(file, "HEIF")
    (tmp_path / "dog.heic").write_bytes((tmp_path / "whole.heic").read_bytes()[:-300])
    with pytest.raises(DataError, match=r"dog.heic: .*; save it (again )?as PNG or JPEG"):
        open_picture(tmp_path / "dog.heic")


def test_a_heic_photo_says_what_it_needs_where_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "HAS_HEIF", False)
    monkeypatch.setattr(pictures, "_FORMATS", tuple(name for name in pictures._FORMATS if name != "HEIF"))
    (tmp_path / "dog.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    with pytest.raises(DataError, match=r"dog.jpg: a HEIC photograph, for which pip install pillow-heif is needed; or"):
        open_picture(tmp_path / "dog.jpg")


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_a_16_bit_tiff_of_either_byte_order_is_scaled(tmp_path, byte_order):
    mode = {"<": "I;16", ">": "I;16B"}[byte_order]
    Image.frombytes(mode, (8, 8), np.full(64, 32896, dtype=f"{byte_order}u2").tobytes()).save(tmp_path / "dog.tif")
    assert corner(tmp_path / "dog.tif") == (128, 128, 128)


@pytest.mark.parametrize(("kind", "value"), [(np.int32, 70000), (np.int32, -1), (np.float32, 0.5)])
def test_pixels_that_are_not_a_photo_are_refused_rather_than_clipped(tmp_path, kind, value):
    Image.fromarray(np.full((8, 8), value, dtype=kind)).save(tmp_path / "dog.tif")
    with pytest.raises(DataError, match=r"dog.tif: cannot be read \(its pixels"):
        open_picture(tmp_path / "dog.tif")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE, BLACK)]
    frames[0].save(tmp_path / f"dog.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert corner(tmp_path / f"dog.{suffix}") == RED


def test_of_a_phone_photo_with_several_pictures_the_first_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (WHITE, BLACK)]
    frames[0].save(tmp_path / "dog.mpo", save_all=True, append_images=frames[1:])
    assert corner((tmp_path / "dog.mpo").rename(tmp_path / "dog.jpg")) == WHITE


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path}/dog.png: no such file$"):
        open_picture(tmp_path / "dog.png")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"])
def test_a_file_that_is_no_picture_is_refused_whatever_its_name(tmp_path, content):
    (tmp_path / "dog.png").write_bytes(content)
    with pytest.raises(DataError, match=r"dog.png: not a picture of a known format; save it as PNG or JPEG"):
        open_picture(tmp_path / "dog.png")


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_truncated_picture_is_refused(tmp_path, name):
    stream = io.BytesIO()
    gradient(64, 64).save(stream, name)
    path = tmp_path / "dog.png"
    path.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    with pytest.raises(DataError, match=f"^{path}: "):
        open_picture(path)


@given(
    name=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]),
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_picture_is_opened_or_refused_but_never_crashes(tmp_path_factory, name, damage):
    stream = io.BytesIO()
    gradient(24, 16).save(stream, name)
    content = bytearray(stream.getvalue())
    for position, value in damage:
        content[position % len(content)] = value
    path = tmp_path_factory.mktemp("damaged") / "dog.png"
    path.write_bytes(content)
    try:
        assert open_picture(path).mode == "RGB"
    except DataError as error:
        assert str(path) in str(error)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour_type, rows):
    """A PNG as no library here would write it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("colour_type", "pixel", "shown"),
    [(2, [65535, 0, 0], RED), (6, [65535, 0, 0, 0], WHITE), (4, [0, 65535], BLACK), (4, [0, 0], WHITE)],
    ids=["RGB", "transparent RGB", "grey", "transparent grey"],
)
def test_16_bits_per_channel_look_as_in_a_viewer(tmp_path, colour_type, pixel, shown):
    rows = (b"\0" + struct.pack(f">{len(pixel)}H", *pixel) * 8) * 8
    (tmp_path / "dog.png").write_bytes(png(8, 8, 16, colour_type, rows))
    assert corner(tmp_path / "dog.png") == shown


def test_a_picture_of_few_colours_has_them(tmp_path):
    gradient(64, 64).quantize(16).save(tmp_path / "dog.png")
    assert np.asarray(open_picture(tmp_path / "dog.png")).std() > 10


def test_a_jpeg_of_a_phone_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    gradient(64, 32).save(tmp_path / "dog.jpg", exif=exif)
    assert open_picture(tmp_path / "dog.jpg").size == (32, 64)


def test_a_header_that_claims_too_many_pixels_is_refused_before_they_are_made(tmp_path):
    (tmp_path / "dog.png").write_bytes(png(60000, 60000, 8, 2, bytes(100)))
    with pytest.raises(DataError, match=r"dog.png: too large to be a photograph .* scale it down"):
        open_picture(tmp_path / "dog.png")


def test_a_large_photograph_is_opened_without_a_word(tmp_path, monkeypatch, recwarn):
    path = save(tmp_path / "dog.png", size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert open_picture(path).size == (40, 40)
    assert not recwarn


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "dog.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"dog.png: too large to be a photograph .* scale it down"):
        open_picture(path)


def test_a_strip_is_refused_before_it_is_enlarged(tmp_path):
    open_picture(save(tmp_path / "wide.png", size=(200, 10)))
    with pytest.raises(DataError, match=r"strip.png: 10x201 is too narrow for a square picture; crop it"):
        open_picture(save(tmp_path / "strip.png", size=(10, 201)))


# --- Resizing and cropping ---


CROPS = st.sampled_from([(32, 32), (64, 64), (40, 64), (96, 32), (512, 512)])


@given(size=SIZES, crop=CROPS)
def test_a_picture_just_covers_the_crop_and_the_shape_stays(size, crop):
    """One side is the crop's; the other is what keeps the shape, rounded down, and not smaller than the crop's."""
    resized = pictures.covering_size(size, crop)
    assert resized[0] >= crop[0]
    assert resized[1] >= crop[1]
    fixed = [side for side in (0, 1) if resized[side] == crop[side]]
    other = [crop[side] * size[1 - side] / size[side] for side in fixed]
    assert any(exact - 1 < resized[1 - side] <= exact for side, exact in zip(fixed, other, strict=True))


@given(size=SIZES, resolution=st.sampled_from([32, 64, 512]))
def test_the_shortest_side_becomes_the_resolution_and_the_shape_stays(size, resolution):
    resized = pictures.covering_size(size, (resolution, resolution))
    assert min(resized) == resolution
    longest = resolution * max(size) / min(size)
    assert longest - 1 < max(resized) <= longest
    assert (resized[0] <= resized[1]) if size[0] <= size[1] else (resized[0] >= resized[1])


@given(size=SIZES, crop=CROPS, seed=st.integers(0, 2**32))
def test_every_crop_is_inside_the_resized_picture(size, crop, seed):
    width, height = pictures.covering_size(size, crop)
    for frame in (frame_of(size, crop), frame_of(size, crop, randomness.generator(seed, "crop"))):
        assert (frame.size, frame.resized) == (crop, (width, height))
        assert frame.highest == (height - crop[1], width - crop[0])
        assert 0 <= frame.top <= height - crop[1]
        assert 0 <= frame.left <= width - crop[0]


@pytest.mark.parametrize(("size", "tops", "lefts"), [((67, 64), {0}, {0, 1, 2, 3}), ((64, 66), {0, 1, 2}, {0})])
def test_a_random_crop_reaches_both_ends_and_repeats_with_its_seed(size, tops, lefts):
    frames, again = (
        [frame_of(size, SQUARE, randomness.generator(0, "crop", row=row)) for row in range(200)] for _ in range(2)
    )
    assert ({frame.top for frame in frames}, {frame.left for frame in frames}) == (tops, lefts)
    assert frames == again


def test_the_centre_crop_leaves_the_same_margin_on_both_sides():
    assert frame_of((164, 64), SQUARE) == Frame(SQUARE, (164, 64), top=0, left=50)
    assert frame_of((64, 164), SQUARE) == Frame(SQUARE, (64, 164), top=50, left=0)
    assert frame_of((164, 64), (100, 64)) == Frame((100, 64), (164, 64), top=0, left=32)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(90, 64), (64, 90), (50, 40), (64, 64)])
@pytest.mark.parametrize("crop", [SQUARE, (48, 72)])
def test_a_crop_is_a_window_of_the_resized_picture(interpolation, size, crop):
    image = gradient(*size)
    resized_size = pictures.covering_size(size, crop)
    top, left = resized_size[1] - crop[1], resized_size[0] - crop[0]
    frame = Frame(crop, resized_size, top, left)
    window = resize_and_crop(image, frame, interpolation)
    resized = np.asarray(image.resize(resized_size, getattr(Image.Resampling, interpolation.upper())))
    assert np.array_equal(np.asarray(window), resized[top : top + crop[1], left : left + crop[0]])
    flipped = resize_and_crop(image, frame, interpolation, flip=True)
    assert np.array_equal(np.asarray(flipped), np.asarray(window)[:, ::-1])


@given(
    width=st.integers(8, 160),
    height=st.integers(8, 160),
    crop=st.sampled_from([(32, 32), (40, 40), (64, 64), (48, 32)]),
    interpolation=st.sampled_from(INTERPOLATIONS),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_any_picture_gives_a_crop_whose_mirror_mirrored_is_itself(width, height, crop, interpolation, seed):
    image = gradient(width, height)
    frame = frame_of(image.size, crop, randomness.generator(seed, "crop"))
    window, mirrored = (np.asarray(resize_and_crop(image, frame, interpolation, flip)) for flip in (False, True))
    assert window.shape == (crop[1], crop[0], 3)
    assert np.array_equal(mirrored[:, ::-1], window)


@pytest.mark.parametrize(("top", "left"), [(1, 0), (0, 27), (0, -1)])
def test_a_crop_outside_the_picture_is_a_defect(top, left):
    with pytest.raises(ValueError, match="is outside"):
        resize_and_crop(gradient(90, 64), Frame(SQUARE, (90, 64), top, left), "lanczos")


def test_a_frame_of_another_picture_is_a_defect():
    with pytest.raises(ValueError, match="is outside"):
        resize_and_crop(gradient(90, 64), frame_of((80, 64), SQUARE), "lanczos")


# --- Arrays and digests ---


def test_pixels_become_numbers_from_minus_one_to_one():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    array = pictures.to_array(Image.fromarray(levels))
    assert (array.dtype, array.shape) == (np.float32, (16, 16, 3))
    assert (array.min(), array.max()) == (-1.0, 1.0)
    assert np.array_equal(np.round((array + 1) * 127.5), levels)


def test_the_digest_is_that_of_the_bytes(tmp_path):
    path = save(tmp_path / "dog.png")
    assert pictures.digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"nothing.png: cannot be read"):
        pictures.digest(tmp_path / "nothing.png")
