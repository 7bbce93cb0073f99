"""Subjects as a page has them become files in a run's folder, and flags or a list that `train` reads."""

import json

import numpy as np
import pytest
from PIL import Image

from demo.photographs import look_at
from demo.subjects import CONCEPTS, Pictures, Subject, settings, write
from dreambooth_ms.data.plan import Framing, sizes_of, table_of_sizes, taking_turns

SQUARES = Framing(((64, 64),), True, False)


def picture(path, size=(80, 60), mode="RGB", colour=(0, 90, 200)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def subject(folder, **changes):
    return Subject(**{"pictures": Pictures(folder), "prompt": "a sks dog"} | changes)


def test_captions_are_written_beside_copies_and_an_empty_one_is_the_prompt(tmp_path):
    folder, target = tmp_path / "dog", tmp_path / "run"
    picture(folder / "1.png")
    picture(folder / "2.jpg")
    (folder / "1.txt").write_text("as it was")
    one = subject(folder, captions={"1.png": " a sks dog, à la plage\nor so ", "2.jpg": " "})
    write([one], target)
    copies = target / "photographs"
    assert sorted(path.name for path in copies.iterdir()) == ["1.png", "1.txt", "2.jpg", "2.txt"]
    assert (copies / "1.txt").read_text(encoding="utf-8") == "a sks dog, à la plage\nor so"
    assert (copies / "2.txt").read_text(encoding="utf-8") == "a sks dog"
    assert (folder / "1.txt").read_text() == "as it was"
    (own,) = settings([one], target)
    assert (own["instance_data_dir"], own["use_txt_as_label"], own["class_prompt"]) == (copies, True, None)


def test_a_folder_without_captions_stays_where_it_is_and_an_upload_is_copied(tmp_path):
    folder, target = tmp_path / "dog", tmp_path / "run"
    picture(folder / "1.png")
    picture(tmp_path / "masks" / "1.png", mode="L", colour=255)
    write([subject(folder)], target)
    assert not list(target.iterdir())
    uploaded = subject(folder, is_uploaded=True, pictures=Pictures(folder, True, tmp_path / "masks"))
    write([uploaded], target)
    (own,) = settings([uploaded], target)
    assert own["mask_dir"] == target / "masks"
    assert sorted(path.name for path in target.rglob("*.png")) == ["1.png", "1.png"]
    assert own["alpha_mask"] is None
    assert settings([subject(folder, pictures=Pictures(folder, True))], target)[0]["alpha_mask"] is True


def test_several_subjects_are_a_list_and_share_the_pictures_of_one_class(tmp_path):
    folders = [tmp_path / name for name in ("dog", "cat", "hound")]
    for folder in folders:
        picture(folder / "1.png")
    classes = ("a dog", "a cat", "a dog")
    subjects = [
        subject(
            folder, prompt=f"a sks {folder.name}", class_prompt=of, captions={"1.png": "x"} if of == "a cat" else {}
        )
        for folder, of in zip(folders, classes, strict=True)
    ]
    write(subjects, tmp_path / "run")
    listed = json.loads((tmp_path / "run" / CONCEPTS).read_text(encoding="utf-8"))
    assert listed[0] == {
        "instance_data_dir": str(folders[0]),
        "instance_prompt": "a sks dog",
        "class_data_dir": str(tmp_path / "run" / "class_images"),
        "class_prompt": "a dog",
    }
    assert listed[1]["instance_data_dir"] == str(tmp_path / "run" / "photographs-2")
    assert listed[1]["use_txt_as_label"] is True
    assert [one["class_data_dir"].rpartition("/")[2] for one in listed] == [
        "class_images", "class_images-2", "class_images",
    ]  # fmt: skip


# --- what the page shows of them ---


def test_what_a_mask_leaves_out_is_red(tmp_path):
    picture(tmp_path / "dog" / "1.png", (64, 64))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks" / "1.png")
    (look,), _ = look_at([Pictures(tmp_path / "dog", True, tmp_path / "masks")], SQUARES, 0)
    shown = np.asarray(look.photographs[0].thumbnail).astype(int)
    assert shown[180, 90, 0] > 100 > shown[180, 270, 0]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: None, "no mask of its name"),
        (lambda folder: picture(folder / "1.png", (9, 9), "L", 255), "9x9 pixels, its picture 80x60"),
        (lambda folder: picture(folder / "1.png", mode="L", colour=0), "black everywhere"),
        (lambda folder: (folder / "1.png").write_bytes(b"MZ"), "not a picture of a known format"),
    ],
)
def test_a_mask_that_is_wrong_is_told_at_its_photograph(tmp_path, make, problem):
    picture(tmp_path / "dog" / "1.png")
    (tmp_path / "masks").mkdir()
    make(tmp_path / "masks")
    (look,), plan = look_at([Pictures(tmp_path / "dog", True, tmp_path / "masks")], SQUARES, 0)
    assert problem in look.photographs[0].problems[0]
    assert str(tmp_path) not in look.photographs[0].problems[0]
    assert not look.usable
    assert plan is None


def test_captions_beside_photographs_are_shown(tmp_path):
    for name, beside in (("1.png", "1.txt"), ("2.png", "2.png.caption"), ("3.png", None)):
        picture(tmp_path / name)
        if beside:
            (tmp_path / beside).write_bytes(f" caption of {name}\n".encode())
    (look,), _ = look_at([Pictures(tmp_path)], SQUARES, 0)
    assert [one.caption for one in look.photographs] == ["caption of 1.png", "caption of 2.png", ""]
    assert not any("not read" in remark for remark in look.remarks)


def test_the_crops_shown_of_several_subjects_are_those_of_their_run(tmp_path):
    for folder, count in (("dog", 3), ("cat", 2)):
        for number in range(count):
            picture(tmp_path / folder / f"{number}.png", (200, 64 + number))
    framing = Framing(tuple(sizes_of(64, 8)), False, False)
    looks, plan = look_at([Pictures(tmp_path / "dog"), Pictures(tmp_path / "cat")], framing, 4)
    assert [len(look.photographs) for look in looks] == [3, 2]
    assert [concept.name for concept in plan.concepts] == ["instance", "instance_2"]


def test_the_table_of_sizes_is_what_the_steps_have(tmp_path):
    for number, size in enumerate([(64, 64), (65, 64), (200, 64), (64, 100)]):
        picture(tmp_path / f"{number}.png", size)
    framing = Framing(tuple(sizes_of(64, 8)), True, False)
    _, plan = look_at([Pictures(tmp_path)], framing, 0)
    table = table_of_sizes(plan, 10)
    assert sum(pictures for _, pictures, _, _ in table) == 4
    steps = [plan.buckets[taking_turns(plan.shares, step)[0]].size for step in range(10)]
    assert {size: own for size, _, _, own in table} == {size: steps.count(size) for size in set(steps)}
    assert all(0 <= lost < 0.5 for _, _, lost, _ in table)
