"""Prompts of pictures during training, by flags, files and the names of guides; the sheet of them over a run."""

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.cli.validation import with_prompts_read
from dreambooth_ms.config.load import load, to_yaml
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError, DataError
from dreambooth_ms.sampling.picture_file import (
    GAP,
    LABEL_WIDTH,
    MARGIN,
    MOST_COLUMNS,
    STRIP,
    validation_name,
    validation_pictures,
    write_picture,
    write_strip,
)

REQUIRED = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "dog", "--instance_prompt", "a sks dog"]


def read(*flags):
    return with_prompts_read(load(TrainConfig, [*REQUIRED, *flags], lambda note: None))


def prompts(*flags):
    return read(*flags).validation.validation_prompt


def test_prompts_are_given_one_by_one_with_their_commas_in_a_list_or_in_a_file(tmp_path):
    assert prompts() is None
    assert prompts("--validation_prompt", "a dog, running") == ("a dog, running",)
    assert prompts("--validation_prompt", "a, b", "--validation_prompt=c") == ("a, b", "c")
    (tmp_path / "run.yaml").write_text("validation_prompt: [a dog, 'a, b', 3]\n")
    assert prompts("--config", str(tmp_path / "run.yaml")) == ("a dog", "a, b", "3")
    file = tmp_path / "prompts"
    file.write_text("\ufeffa dog\r\n\n  un été \na dog\n", encoding="utf-8")
    assert prompts("--validation_prompt", "first", "--validation_prompt", str(file)) == ("first", "a dog", "un été")
    assert prompts("--test_prompts_file", str(file)) == ("a dog", "un été")


def test_a_resolved_file_has_the_prompts_themselves(tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog, ${x}\na cat\n", encoding="utf-8")
    config = read("--validation_prompt", str(tmp_path / "prompts.txt"))
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(TrainConfig, ["--config", str(tmp_path / "config.yaml")]) == config
    assert config.validation.validation_prompt == ("a dog, ${x}", "a cat")


def test_flags_of_guides_are_spellings():
    of_guide = (
        "--auto_test_model --save_sample_prompt x --save_sample_negative_prompt blurry --n_save_sample 2 "
        "--save_guidance_scale 5 --save_infer_steps 30 --test_seed 42"
    )
    wanted = read(*of_guide.split()).validation
    assert (wanted.validation_prompt, wanted.validation_negative_prompt) == (("x",), "blurry")
    assert (wanted.num_validation_images, wanted.validation_seed) == (2, 42)
    assert (wanted.validation_guidance_scale, wanted.validation_inference_steps) == (5.0, 30)
    others = read("--test_prompt", "x", "--test_num_per_prompt", "3", "--test_negative_prompt", "y").validation
    assert (others.num_validation_images, others.validation_negative_prompt) == (3, "y")


WRONG = {
    "--validation_prompt=": "--validation_prompt: expected not empty, got ''",
    "--validation_prompt": "--validation_prompt: expected text or a list of texts, or None, got nothing",
    "--validation_prompt a dog": "--validation_prompt: unexpected 'dog' after its value; put text with spaces",
    "--validation_prompt x --validation_prompt=": "--validation_prompt: expected not empty, got 'x, '",
    "--test_prompt x --test_prompts_file y.txt": "--test_prompts_file: means the same as --test_prompt; give one",
    "--validation_prompt x --test_seed -1": "--validation_seed: expected from 0 to 2**64 - 1, got -1",
    "--validation_prompt x --save_infer_steps 0": "--validation_inference_steps: expected from 1 to 1000, got 0",
    "--validation_prompt x --save_guidance_scale -1": "--validation_guidance_scale: expected at least 0, got -1.0",
    "--sample_prompts prompts.txt": "--sample_prompts: give prompts, or a text file with one per line, by",
}


@pytest.mark.parametrize("flags", WRONG)
def test_what_is_wrong_is_one_line(flags):
    with pytest.raises(ConfigError) as error:
        read(*flags.split())
    (line,) = str(error.value).splitlines()
    assert line.startswith(WRONG[flags])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "no such file"),
        (b"", "the file holds no prompt; write one per line"),
        (b" \n\n", "the file holds no prompt; write one per line"),
        (b"caf\xe9", "not readable as UTF-8 text"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_one_line(tmp_path, content, line):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError) as error:
        prompts("--validation_prompt", str(file))
    assert str(error.value).startswith(f"--validation_prompt {file}: {line}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (["--test_seed", "3"], "--validation_seed has no effect without --validation_prompt"),
        (
            ["--validation_prompt", "x", "--test_negative_prompt", "y", "--save_guidance_scale", "1"],
            "--validation_negative_prompt has no effect without guidance",
        ),
    ],
)
def test_what_has_no_effect_is_noted(flags, note):
    notes: list[str] = []
    load(TrainConfig, [*REQUIRED, *flags], notes.append)
    assert notes == [note]


def grey(level):
    return np.full((8, 8, 3), level, np.uint8)


def columns_of(folder, rows):
    """The levels of a strip's pictures, row by row; 255 where there is none."""
    with Image.open(folder / STRIP) as strip:
        pixels = np.asarray(strip.convert("L"))
    middles = [
        MARGIN + LABEL_WIDTH + 80 + n * (160 + GAP) for n in range((pixels.shape[1] - 2 * MARGIN) // (160 + GAP))
    ]
    height = (pixels.shape[0] - 2 * MARGIN - 36) // rows
    return [
        [int(pixels[MARGIN + 36 + row * height + 80, x]) for x in middles if x < pixels.shape[1]] for row in range(rows)
    ]


def test_the_strip_has_a_row_for_each_prompt_and_few_columns_whatever_lies_in_the_folder(tmp_path):
    for step in range(1, 31):
        prompts_then = ("dog",) if step < 20 else ("cat", "dog")
        for at, prompt in enumerate(prompts_then):
            for number in (0, 1):
                path = tmp_path / validation_name(step, at * 2 + number)
                level = step + (100 if prompt == "cat" else 0)
                write_picture(path, grey(level if number == 0 else 250), {"prompt": prompt, "number": number})
    (tmp_path / "step-000001-9.png").write_bytes(b"no picture")
    Image.fromarray(grey(200)).save(tmp_path / "step-000001-8.png")
    (tmp_path / "step-x-1.png").write_bytes(b"")
    write_strip(tmp_path, ("dog", "cat"), 30)
    dogs, cats = columns_of(tmp_path, 2)
    assert len(dogs) == MOST_COLUMNS
    assert (dogs[0], dogs[-1], cats[0], cats[-1]) == (1, 30, 255, 130)
    assert dogs == sorted(dogs)
    # A run that goes on from an earlier step shows nothing of what came later.
    write_strip(tmp_path, ("dog",), 3)
    assert columns_of(tmp_path, 1) == [[1, 2, 3]]


def test_files_are_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 0):
        (tmp_path / validation_name(7, number)).touch()
    assert [path.name for path in validation_pictures(tmp_path)[7]] == [
        "step-000007-0.png", "step-000007-9.png", "step-000007-10.png",
    ]  # fmt: skip
    assert validation_pictures(tmp_path / "none") == {}
