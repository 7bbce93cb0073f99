"""A picture's prompt: its own caption, its name, or its concept's prompt; and what rows make of it."""

import json

import numpy as np
import pytest

from dreambooth_ms.data.captions import Captioning, Wording
from dreambooth_ms.errors import DataError

PROMPT = "a photo of sks dog"
FILES, COLUMN = Captioning(from_files=True), Captioning(column="text")
NAMES = ("1.png", "2.jpg", "3.jpeg")


@pytest.fixture
def pictures(tmp_path):
    """Three names; what they hold does not matter here."""
    for name in NAMES:
        (tmp_path / name).touch()
    return [tmp_path / name for name in NAMES]


def write(folder, **texts):
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_bytes(text if isinstance(text, bytes) else text.encode())


def test_without_a_flag_all_have_the_prompt_of_the_concept(pictures, tmp_path):
    write(tmp_path, **{"1.txt": "a dog in snow"})
    assert Captioning().prompts(pictures, PROMPT) == [(PROMPT,)] * 3


def test_captions_are_found_by_every_name_that_trainers_use(pictures, tmp_path):
    """Suffix replaced, appended (ShivamShrirao's), or kohya's .caption; with byte order mark, lines and blanks."""
    write(tmp_path, **{"1.txt": b"\xef\xbb\xbf one \r\n", "2.jpg.txt": "two\nzwei\n\n", "3.caption": "three"})
    assert Captioning(from_files=True).prompts(pictures, PROMPT) == [("one",), ("two", "zwei"), ("three",)]


def test_a_template_joins_prompt_and_caption(pictures, tmp_path):
    write(tmp_path, **{f"{n}.txt": f"{{n}} {n}" for n in (1, 2, 3)})
    found = Captioning(from_files=True, template="{PROMPT}, {CAPTION}").prompts(pictures, PROMPT)
    assert found == [(f"{PROMPT}, {{n}} {n}",) for n in (1, 2, 3)]


def test_a_picture_s_own_caption_goes_before_its_name_and_that_before_the_prompt(pictures, tmp_path):
    write(tmp_path, **{"2.txt": "two"})
    assert Captioning(from_names=True).prompts(pictures, PROMPT) == [("1",), ("2",), ("3",)]
    assert Captioning(from_files=True, from_names=True).prompts(pictures, PROMPT) == [("1",), ("two",), ("3",)]


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv"])
def test_captions_of_metadata(pictures, tmp_path, file):
    rows = [{"file_name": name, "prompt": f"dog {i}"} for i, name in enumerate(NAMES)]
    lines = (
        [json.dumps(row) for row in rows]
        if file.endswith("l")
        else ["file_name,prompt", *(f"{r['file_name']},{r['prompt']}" for r in rows)]
    )
    write(tmp_path, **{file: "\n".join(lines) + "\n", "1.txt": "not read"})
    assert Captioning(column="prompt").prompts(pictures, PROMPT) == [("dog 0",), ("dog 1",), ("dog 2",)]


def test_a_list_in_metadata_is_several_captions(pictures, tmp_path):
    write(tmp_path, **{"metadata.jsonl": json.dumps({"file_name": "1.png", "text": ["a", "b", "a"]})})
    assert Captioning(column="text").prompts(pictures[:1], PROMPT) == [("a", "b")]


@pytest.mark.parametrize(
    ("files", "captioning", "message"),
    [
        ({"1.txt": "one"}, FILES, "no caption, expected a text such as dog.txt beside dog.png, 2 found: 2.jpg, 3.jp"),
        ({}, FILES, "no caption, .* 3 found: 1.png, 2.jpg, 3.jpeg"),
        ({"1.txt": " \n", "2.txt": "", "3.txt": "three"}, FILES, "empty captions, 2 found: 1.txt, 2.txt"),
        ({"1.txt": "é".encode("latin-1")}, FILES, "1.txt: not UTF-8 at byte 0; save it again as UTF-8"),
        ({}, COLUMN, "--caption_column text: .* has none of metadata.jsonl, metadata.csv"),
        ({"metadata.csv": "file_name,prompt\n1.png,x\n"}, COLUMN, "no column text; it has file_name, prompt"),
        ({"metadata.csv": ""}, COLUMN, "no column file_name, text; it has no rows"),
        (
            {"metadata.csv": "file_name,text\n1.png,x\n"},
            COLUMN,
            "expected a 'text' in the metadata, 2 found: 2.jpg, 3.jp",
        ),
        (
            {"metadata.jsonl": '{"file_name": "1.png", "text": 3}'},
            COLUMN,
            "empty or not text in column text of .*, 1 found: 1.png",
        ),
        ({"metadata.jsonl": '{"file_name"'}, COLUMN, "metadata.jsonl: line 1 is not JSON"),
        ({"metadata.jsonl": "[1]"}, COLUMN, "metadata.jsonl: line 1 is not an object of columns"),
    ],
)
def test_what_is_wrong_is_told_with_the_files(pictures, tmp_path, files, captioning, message):
    write(tmp_path, **files)
    with pytest.raises(DataError, match=message):
        captioning.prompts(pictures, PROMPT)


def test_rows_drop_and_shuffle_what_they_read():
    tags = "sks dog, running, snow, blue sky"
    wording = Wording(dropout=0.25, shuffles=True, kept=1)
    rows = [wording.of_row(tags, np.random.default_rng(n)) for n in range(2000)]
    assert rows == [wording.of_row(tags, np.random.default_rng(n)) for n in range(2000)]
    read = [row for row in rows if row]
    assert 0.2 < 1 - len(read) / len(rows) < 0.3
    assert len(set(read)) == 6
    assert all(row.startswith("sks dog, ") and sorted(row.split(", ")) == sorted(tags.split(", ")) for row in read)


def test_a_wording_that_changes_nothing_leaves_the_prompt_as_it_is():
    assert Wording().of_row("a ,b", np.random.default_rng(0)) == "a ,b"


LISTED = Captioning(from_files=True, from_lists=True)


def test_lists_give_each_picture_the_caption_of_its_line(tmp_path):
    """As the published script's retrieval leaves them: paths from where it ran; Windows' line ends, any order."""
    (tmp_path / "images").mkdir()
    pictures = [tmp_path / "images" / f"{n}.jpg" for n in (0, 1, 10)]
    write(tmp_path, **{"images.txt": "real/images/10.jpg\r\nreal/images/0.jpg\r\n/elsewhere/1.jpg\r\n"})
    write(tmp_path, **{"caption.txt": "ten\r\nzero, a cat\r\none\r\n"})
    assert LISTED.prompts(pictures, "") == [("zero, a cat",), ("one",), ("ten",)]


def test_a_picture_with_an_empty_line_has_no_caption(tmp_path):
    (tmp_path / "images").mkdir()
    write(tmp_path, **{"images.txt": "0.jpg\n1.jpg\n2.jpg", "caption.txt": "zero\n\ntwo"})
    with pytest.raises(DataError, match=r"images: no caption, expected a line in images.txt, 1 found: 1.jpg"):
        LISTED.prompts([tmp_path / "images" / f"{n}.jpg" for n in range(3)], "")
