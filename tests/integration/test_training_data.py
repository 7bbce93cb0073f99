"""What `train` makes its batches of, by its flags: captions of all kinds, and what a changed one does to a run."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.cli import train as command
from dreambooth_ms.cli.main import main
from tests.tiny_model import write_random_model
from tools.tiny_base.world import write_subject


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("base"), levels=0)


@pytest.fixture
def planned(base, tmp_path, monkeypatch):
    """Flags -> the batches of a run on five photographs, just before it would train; or its exit status."""
    write_subject(tmp_path / "photographs")
    made = []
    monkeypatch.setattr(command, "train", lambda step, batches, *rest: made.append(batches))

    def plan(*flags):
        arguments = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": tmp_path / "photographs",
            "instance_prompt": "a photo of sks star",
            "resolution": 32,
            "train_batch_size": 1,
            "max_train_steps": 20,
            "output_dir": tmp_path / "run",
            "seed": 0,
        }
        own = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
        status = main(["train", *own, "--center_crop", *flags])
        return made[-1] if made and status == 0 else status

    return plan


def captions(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)


def prompts(batches, count=20):
    """The prompt of each row, by its picture's stem."""
    return [(row.view.record.path.stem, row.view.prompt) for step in range(count) for row in batches.plan.rows(step)]


@pytest.fixture
def stems(tmp_path):
    write_subject(tmp_path / "photographs")
    return sorted(path.stem for path in (tmp_path / "photographs").iterdir())


def test_each_row_reads_the_embedding_of_its_own_picture_s_caption(planned, tmp_path, stems):
    captions(tmp_path / "photographs", **{stem: f"star {n}" for n, stem in enumerate(stems)})
    batches = planned("--use_txt_as_label")
    assert set(prompts(batches)) == {(stem, f"star {n}") for n, stem in enumerate(stems)}
    read = {}
    for step in range(20):
        ((_, _, view),) = batches.plan.rows(step)
        read.setdefault(view.prompt, []).append(batches(step).inputs["encoder_hidden_states"][0])
    assert all((one == texts[0]).all() for texts in read.values() for one in texts)
    firsts = [texts[0] for texts in read.values()]
    assert len(firsts) == 5 and all(not np.array_equal(one, firsts[0]) for one in firsts[1:])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--read_prompt_from_txt", "instance"], "a photo of sks star star {n}"),
        (
            ["--read_prompt_from_txt", "both", "--prompt_template", "{CAPTION}, {PROMPT}"],
            "star {n}, a photo of sks star",
        ),
        ([], "a photo of sks star"),
    ],
)
def test_prompt_and_caption_make_what_the_flags_say(planned, tmp_path, stems, flags, expected):
    captions(tmp_path / "photographs", **{stem: f"star {n}" for n, stem in enumerate(stems)})
    assert set(prompts(planned(*flags))) == {(stem, expected.format(n=n)) for n, stem in enumerate(stems)}


def test_names_are_prompts(planned, stems):
    assert set(prompts(planned("--use_filename_as_label"))) == {(stem, stem) for stem in stems}


def test_captions_of_metadata_and_of_class_pictures(planned, tmp_path, stems):
    rows = [{"file_name": f"{stem}.png", "prompt": [f"star {n}", f"a {n}"]} for n, stem in enumerate(stems)]
    (tmp_path / "photographs" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = planned("--caption_column", "prompt")
    assert {prompt for _, prompt in prompts(found)} <= {text for row in rows for text in row["prompt"]}
    write_subject(tmp_path / "class")
    captions(tmp_path / "class", **{stem: f"plain {n}" for n, stem in enumerate(stems)})
    prior = ["--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a star"]
    found = planned(
        "--read_prompt_from_txt", "class", *prior, "--num_class_images", "5", "--output_dir", str(tmp_path / "2")
    )
    assert {prompt for _, prompt in prompts(found)} == {"a photo of sks star", *(f"a star plain {n}" for n in range(5))}


def test_rows_that_vary_their_prompts_are_embedded_in_advance(planned, tmp_path, stems, capfd):
    captions(tmp_path / "photographs", **dict.fromkeys(stems, "sks star, a, b, c"))
    batches = planned("--use_txt_as_label", "--shuffle_caption", "--keep_tokens", "1", "--caption_dropout", "0.3")
    read = {prompt for _, prompt in prompts(batches)}
    assert "" in read and len(read) > 4
    assert all(prompt.startswith("sks star, ") for prompt in read if prompt)
    capfd.readouterr()
    assert all(np.isfinite(batches(step).inputs["encoder_hidden_states"]).all() for step in range(20))
    assert "compiling" not in capfd.readouterr().err


def test_a_missing_caption_ends_the_run_before_anything_is_written(planned, tmp_path, stems, capfd):
    captions(tmp_path / "photographs", **dict.fromkeys(stems[1:], "a star"))
    assert planned("--use_txt_as_label") == 2
    assert (
        f"no caption, expected a text such as dog.txt beside dog.png, 1 found: {stems[0]}.png" in capfd.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_captions_that_are_too_long_are_told_once_with_their_files(planned, tmp_path, stems, capfd):
    captions(tmp_path / "photographs", **{stem: f"star {n} " + "star " * 90 * (n < 2) for n, stem in enumerate(stems)})
    planned("--use_txt_as_label")
    said = [line for line in capfd.readouterr().err.splitlines() if "tokens" in line]
    (line,) = said
    assert line.endswith(
        f"captions of more than 77 tokens, the rest is not read, 2 found: {stems[0]}.png, {stems[1]}.png"
    )


def test_a_changed_caption_is_told_to_a_run_that_goes_on(planned, tmp_path, stems, capfd, monkeypatch):
    captions(tmp_path / "photographs", **{stem: f"star {n}" for n, stem in enumerate(stems)})
    monkeypatch.undo()
    flags = ("--use_txt_as_label", "--max_train_steps", "1", "--checkpointing_steps", "1")
    assert planned(*flags) == 0
    captions(tmp_path / "photographs", **{stems[1]: "another star"})
    capfd.readouterr()
    assert planned("--use_txt_as_label", "--max_train_steps", "2") == 2
    assert f"(instance: {stems[1]}.png changed)" in capfd.readouterr().err


@pytest.fixture
def of_many_shapes(tmp_path):
    """Photographs of three shapes: six tall, two square and one wide."""
    folder = tmp_path / "photographs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, size in enumerate([(40, 72)] * 6 + [(50, 50)] * 2 + [(90, 60)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_with_buckets_every_picture_is_seen_at_its_shape_and_class_pictures_have_the_same_ones(
    planned, tmp_path, of_many_shapes, capfd
):
    prior = ["--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a star"]
    prior += ["--num_class_images", "9", "--infer_steps", "1"]
    batches = planned("--use_aspect_ratio_bucket", "--max_train_steps", "18", *prior)
    said = capfd.readouterr().err
    assert [line for line in said.splitlines() if "cut off" in line and line.endswith("steps")] == [
        "24x40: 6 pictures, 7.4% cut off, 12 steps",
        "32x32: 2 pictures, 0.0% cut off, 4 steps",
        "40x24: 1 picture, 10.0% cut off, 2 steps",
    ]
    sizes = Counter(Image.open(path).size for path in (tmp_path / "class").iterdir())
    assert sizes == {(24, 40): 6, (32, 32): 2, (40, 24): 1}
    seen = Counter()
    for step in range(18):
        batch, rows = batches(step), batches.plan.rows(step)
        ((width, height),) = {row.view.frame.size for row in rows}
        assert batch.target.shape == (2, 4, height // 2, width // 2)
        assert {row.view.record.size for row in rows[1:]} == {(width, height)}
        seen[rows[0].view.record.path.name] += 1
    assert set(seen.values()) == {2} and len(seen) == 9


def test_few_buckets_are_those_that_cut_off_least(planned, tmp_path, of_many_shapes):
    batches = planned("--use_aspect_ratio_bucket", "--max_buckets", "1", "--debug_arb")
    assert Image.open(tmp_path / "run" / "crops.png").width > 8 * 160, "the first eight pictures"
    assert {row.view.frame.size for step in range(20) for row in batches.plan.rows(step)} == {(24, 40)}


def test_rows_count_where_their_masks_are_and_class_rows_everywhere(planned, tmp_path, stems):
    for number, stem in enumerate(stems):
        picture = Image.open(tmp_path / "photographs" / f"{stem}.png")
        mask = np.zeros(picture.size[::-1], np.uint8)
        mask[: 10 + 10 * number] = 255
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{stem}.png")
    write_subject(tmp_path / "class")
    prior = ["--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a star"]
    batches = planned("--mask_dir", str(tmp_path / "masks"), *prior, "--num_class_images", "5")
    for step in range(5):
        mask, target = batches(step).extras["mask"], batches(step).target
        assert mask.shape == target.shape
        assert mask.mean((1, 2, 3)) == pytest.approx(1)
        assert mask[0, :, 0].min() > 1 > mask[0, :, -1].max()
        assert (mask[1] == 1).all()
    assert planned("--output_dir", str(tmp_path / "2"))(0).extras == {}


def test_a_run_with_masks_trains(planned, tmp_path, stems, monkeypatch, capfd):
    monkeypatch.undo()
    for stem in stems:
        path = tmp_path / "photographs" / f"{stem}.png"
        picture = Image.open(path).convert("RGB")
        picture.putalpha(Image.fromarray(np.tile(np.arange(picture.width, dtype=np.uint8), (picture.height, 1))))
        picture.save(path)
    assert planned("--alpha_mask", "--unmasked_weight", "0.1", "--max_train_steps", "2") == 0
    assert "--unmasked_weight" not in capfd.readouterr().err


def test_a_folder_of_masks_that_is_not_there_is_one_line(planned, tmp_path, capfd):
    assert planned("--mask_dir", str(tmp_path / "mask")) == 2
    assert [line for line in capfd.readouterr().err.splitlines() if "error:" in line] == [
        f"dreambooth-ms: error: --mask_dir {tmp_path / 'mask'}: no such folder"
    ]


# --- Several subjects ---


@pytest.fixture
def several(base, tmp_path, monkeypatch):
    """Flags -> the batches of a run without --instance_data_dir, just before it would train; or its exit status."""
    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "train", lambda step, batches, *rest: made.append(batches))

    def plan(*flags):
        own = ["--pretrained_model_name_or_path", str(base), "--resolution", "32", "--train_batch_size", "1"]
        own += ["--max_train_steps", "20", "--output_dir", "run", "--seed", "0", "--center_crop"]
        status = main(["train", *own, *flags])
        return made[-1] if made and status == 0 else status

    return plan


def write_pictures(folder, count, size=(40, 40), seed=0):
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(100 * seed + number).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def seen(batches, steps=20):
    """Of each row the concept, the stem of its picture and its prompt."""
    rows = [row for step in range(steps) for row in batches.plan.rows(step)]
    return [(row.concept.name, row.view.record.path.stem, row.view.prompt) for row in rows]


def test_a_list_of_subjects_has_class_pictures_of_each(several, tmp_path, capfd):
    write_pictures(tmp_path / "lists" / "dog", 3)
    write_pictures(tmp_path / "cat", 1, (40, 72), seed=1)
    entries = [
        {
            "instance_prompt": "a photo of sks star",
            "class_prompt": "a photo of star",
            "instance_data_dir": "dog",
            "class_data_dir": "stars",
        },
        {
            "instance_prompt": "a sks photo",
            "class_prompt": "a photo",
            "class_negative_prompt": "star",
            "instance_data_dir": "cat",
            "class_data_dir": "photos",
            "num_class_images": 2,
            "repeats": 2,
            "weight": 0.5,
            "mask_dir": "masks",
        },
    ]
    (tmp_path / "lists" / "masks").mkdir()
    half = np.repeat(np.array([0, 255], np.uint8), 20)
    Image.fromarray(np.tile(half, (72, 1))).save(tmp_path / "lists" / "masks" / "0.png")
    (tmp_path / "lists" / "list.json").write_text(json.dumps(entries))
    flags = ["--concepts_list", "lists/list.json", "--with_prior_preservation", "--num_class_images", "3"]
    batches = several(*flags, "--infer_steps", "1", "--use_aspect_ratio_bucket", "--prior_loss_weight", "0.3")
    said = capfd.readouterr().err
    assert "instance: 3 pictures of lists/dog, 'a photo of sks star'" in said
    assert "instance_2: 1 picture of cat, 'a sks photo'" in said
    found = seen(batches)
    assert Counter(found[::2]) == {
        **{("instance", str(n), "a photo of sks star"): 4 for n in range(3)},
        ("instance_2", "0", "a sks photo"): 8,
    }
    of_class = {"instance": ("class", "a photo of star"), "instance_2": ("class_2", "a photo")}
    assert all((prior[0], prior[2]) == of_class[own[0]] for own, prior in zip(found[::2], found[1::2], strict=True))
    weights = {
        (name, weight)
        for step in range(20)
        for name, weight in zip(batches(step).concepts, batches(step).weight, strict=True)
    }
    assert {name: round(float(weight), 3) for name, weight in weights} == {
        "instance": 1.0, "instance_2": 0.5, "class": 0.3, "class_2": 0.3,
    }  # fmt: skip
    for step in range(20):
        made = batches(step)
        flat = [bool((mask == 1).all()) for mask in made.extras["mask"]]
        assert flat == [name != "instance_2" for name in made.concepts], "where the error counts"
    sizes = {
        name: [Image.open(path).size for path in sorted((tmp_path / "lists" / name).iterdir())]
        for name in ("stars", "photos")
    }
    assert sizes == {"stars": [(32, 32)] * 3, "photos": [(24, 40)] * 2}
    written = Image.open(tmp_path / "lists" / "photos" / "class-00000.png").info["dreambooth_ms"]
    assert json.loads(written)["prompt"] == "a photo"


def test_a_run_that_goes_on_is_told_what_changed_of_which_subject(several, tmp_path, monkeypatch, capfd):
    write_pictures(tmp_path / "dog", 1)
    write_pictures(tmp_path / "cat", 1, seed=1)
    dog, cat = ({"instance_prompt": f"a photo of {name}", "instance_data_dir": name} for name in ("dog", "cat"))
    (tmp_path / "list.json").write_text(json.dumps([dog, cat]))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    flags = ("--concepts_list", "list.json", "--checkpointing_steps", "1", "--max_train_steps")
    assert several(*flags, "1") == 0
    (tmp_path / "list.json").rename(tmp_path / "other.yaml")
    assert several("--concepts_list", "other.yaml", "--checkpointing_steps", "1", "--max_train_steps", "2") == 0
    (tmp_path / "other.yaml").write_text(json.dumps([dog, cat | {"instance_prompt": "a star", "weight": 2}]))
    capfd.readouterr()
    assert several("--concepts_list", "other.yaml", "--max_train_steps", "3") == 2
    assert "(concepts: prompt of instance_2, weight of instance_2 changed)" in capfd.readouterr().err
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert {name for line in history for name in line if name.startswith("instance")} == {
        "instance_loss",
        "instance_2_loss",
    }
