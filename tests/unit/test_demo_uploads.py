"""Uploaded files are looked at before they are used, and what is refused leaves nothing behind."""

import io
import os
import pickle
import zlib

import numpy as np
import pytest
from PIL import Image

from demo import uploads
from demo.photographs import first_frames, look_at, plan_of
from demo.subjects import Pictures
from dreambooth_ms.data.pictures import frame_of
from dreambooth_ms.data.plan import Framing
from dreambooth_ms.errors import DataError
from dreambooth_ms.formats.files.open import write_tensors
from tests.whole_loras import write_run_lora


def png(width=40, height=30, colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def png_that_claims(width, height):
    """A PNG of a few bytes whose header says it is large."""
    content = bytearray(png(1, 1))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def refused(folder, store, name, content):
    with pytest.raises(DataError) as error:
        store(folder, name, content)
    assert not folder.exists() or not list(folder.iterdir())
    assert str(folder) not in str(error.value)
    return str(error.value)


def test_a_picture_is_stored_under_a_name_of_ours(tmp_path):
    path = uploads.store_picture(tmp_path, "../../My Dog; rm -rf ~.PNG", png())
    assert path.parent == tmp_path
    assert path.name.startswith("My-Dog-rm-rf-")
    assert path.suffix == ".png"
    assert uploads.store_picture(tmp_path, "../../My Dog; rm -rf ~.PNG", png()) == path


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.svg", b"<svg onload='alert(1)'/>", "expected a picture"),
        ("a.exe", b"MZ", "expected a picture"),
        ("a.png", b"", "is empty"),
        ("a.png", b"#!/bin/sh", "not a picture of a known format"),
        ("a.png", png()[:60], "cannot be read"),
        ("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture of a known format"),
        ("a.png", png_that_claims(9000, 8000), "too many pixels"),
        ("a.png", png_that_claims(60000, 60000), "too many pixels"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, name, content, reason):
    sentence = refused(tmp_path / "uploads", uploads.store_picture, name, content)
    assert reason in sentence
    assert sentence.startswith(name)


def test_large_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_PICTURE_BYTES", 50)
    assert "are too many" in refused(tmp_path / "uploads", uploads.store_picture, "a.png", png())


def lora_file(folder):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {layer: (np.zeros((1, 64), np.float32), np.zeros((64, 1), np.float32))}
    return write_run_lora(folder, {"unet": factors}, 1)


def test_a_lora_is_stored(tmp_path):
    content = lora_file(tmp_path / "source").read_bytes()
    path = uploads.store_lora(tmp_path / "uploads", "dog.safetensors", content)
    assert path.read_bytes() == content


def test_what_is_no_lora_is_refused(tmp_path):
    # A single tensor without a dot in its name would be the vectors of a word.
    write_tensors(tmp_path / "other.safetensors", {"a.b": np.zeros(3, np.float32)})
    folder = tmp_path / "uploads"
    assert "holds no LoRA" in refused(
        folder, uploads.store_lora, "a.safetensors", (tmp_path / "other.safetensors").read_bytes()
    )
    assert refused(folder, uploads.store_lora, "a.safetensors", b"no")
    assert "expected a LoRA" in refused(folder, uploads.store_lora, "a.py", b"import os")


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.ckpt", "a.pt", "a.bin"):
        refused(tmp_path / "uploads", uploads.store_lora, name, pickle.dumps(Harm()))
    assert not (tmp_path / "harm").exists()


# --- photographs ---


@pytest.fixture
def folder(tmp_path):
    for name, size in {"1.png": (64, 64), "2.png": (200, 64), "10.png": (20, 24)}.items():
        (tmp_path / name).write_bytes(png(*size, colour=(int(name[0]) * 20, size[0], 9)))
    return tmp_path


def looked_at(folder):
    """One subject's folder, trained at 64 pixels in the middle."""
    (look,), _ = look_at([Pictures(folder)], Framing(((64, 64),), True, False), seed=0)
    return look


def test_photographs_come_with_what_is_wrong_with_them(folder):
    (folder / "3.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "4.jpg").write_bytes(b"no")
    (folder / "notes.txt").write_text("")
    look = looked_at(folder)
    problems = {photograph.path.name: " ".join(photograph.problems) for photograph in look.photographs}
    assert problems["1.png"] == ""
    assert "68% of it is cut off" in problems["2.png"]
    assert "the same picture as 1.png" in problems["3.png"]
    assert "not a picture" in problems["4.jpg"]
    assert "enlarged 3.2 times" in problems["10.png"]
    assert not look.usable
    assert any("notes.txt" in remark for remark in look.remarks)


def test_few_photographs_are_remarked(folder):
    (folder / "10.png").unlink()
    assert any("Only 2" in remark for remark in looked_at(folder).remarks)
    with pytest.raises(DataError, match="no such folder"):
        looked_at(folder / "none")


def test_the_crop_shown_is_the_crop_trained_on(folder):
    look = looked_at(folder)
    assert look.usable
    wide = next(photograph for photograph in look.photographs if photograph.path.name == "2.png")
    bright = np.asarray(wide.thumbnail).sum(axis=(0, 2))
    left, right = np.flatnonzero(bright > bright.max() * 0.8)[[0, -1]]
    crop, scale = frame_of((200, 64), (64, 64)), wide.thumbnail.width / 200
    assert abs(left - crop.left * scale) <= 2
    assert abs(right - (crop.left + 64) * scale) <= 2


def test_random_crops_are_those_of_the_seed(folder):
    from demo.photographs import Record

    records = tuple(Record(folder / f"{n}.png", str(n), (300, 64), ("",)) for n in range(5))

    def frames(seed):
        return first_frames(plan_of([records], Framing(((64, 64),), False, False), seed))

    assert frames(1) == frames(1)
    assert frames(1) != frames(2)
    assert len(frames(1)) == 5
