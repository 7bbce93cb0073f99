"""`check` says what is wrong before a training, and writes nothing; `prepare` makes what training reads whole."""

import json

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFilter

from dreambooth_ms.atomic import TEMPORARY_PREFIX
from dreambooth_ms.cli import prepare as preparation
from dreambooth_ms.cli import train, training_needs
from dreambooth_ms.cli.main import main
from dreambooth_ms.cli.training_needs import StepTimes
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.pictures import frame_of, open_picture, resize_and_crop
from dreambooth_ms.errors import WeightError
from dreambooth_ms.weights.bundle import open_bundle
from tests.tiny_model import write_random_model
from tests.unit.test_looks import scene


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("base"), levels=0)


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """The current folder, with four photographs in `dog`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    for number in range(4):
        scene(number).save(tmp_path / "dog" / f"{number}.png")
    return tmp_path


def flags(base, *more, **values):
    named = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": "dog",
        "instance_prompt": "a photo of sks star",
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_steps": 6,
        "output_dir": "run",
        "seed": 0,
    }
    return [word for name, value in (named | values).items() for word in (f"--{name}", str(value))] + list(more)


@pytest.fixture
def checked(base, place, capsys):
    """Flags -> exit status and report of `check --json`, which leaves all files as they were."""

    def check(*more, **values):
        before = sorted((str(path), path.stat().st_mtime_ns) for path in place.rglob("*"))
        status = main(["check", *flags(base, "--json", *more, **values)])
        assert sorted((str(path), path.stat().st_mtime_ns) for path in place.rglob("*")) == before
        return status, json.loads(capsys.readouterr().out)

    return check


def test_sound_pictures_are_described(checked):
    status, report = checked()
    assert status == 0 and report["to_mend"] == []
    (concept,) = report["concepts"]
    assert concept == {
        "name": "instance",
        "pictures": 4,
        "sizes": ["320x240"],
        "trained_at": {"32x32": 4},
        "cut_off": pytest.approx(0.25),
        "seen": 3.0,
        "odd": {},
    }
    assert report["steps"] == 6 and report["time"] is None
    assert sum(report["memory"].values()) > 0
    assert "sks" in report["rare_words"]["a photo of sks star"]


def test_odd_pictures_are_named_and_nothing_has_to_be_mended(checked, place):
    scene(0).resize((160, 120)).save(place / "dog" / "again.jpg")
    scene(7).filter(ImageFilter.GaussianBlur(6)).save(place / "dog" / "soft.png")
    scene(8, (24, 20)).save(place / "dog" / "tiny.png")
    scene(9, (400, 100)).save(place / "dog" / "wide.png")
    status, report = checked()
    odd = report["concepts"][0]["odd"]
    assert status == 0
    assert odd["near-duplicate"] == {"again.jpg": "like 0.png"}
    assert list(odd["very blurred"]) == ["soft.png"]
    assert odd["small"] == {"tiny.png": "enlarged 1.6 times"}
    assert odd["much cropped"] == {"wide.png": "75% cut off"}


def test_a_new_word_is_one_token_and_one_that_no_prompt_holds_is_to_be_mended(checked):
    words = {"method": "custom_diffusion", "modifier_token": "<new1>+<new2>"}
    status, report = checked(**words, instance_prompt="a photo of <new1> star")
    assert report["rare_words"]["a photo of <new1> star"] == {"<new1>": 1}
    assert status == 1
    assert report["to_mend"] == [
        "--modifier_token: <new2>: in no prompt and no caption of dog; name the subject by it, as in "
        "--instance_prompt 'a photo of <new2> dog'"
    ]
    status, report = checked(**words | {"num_vectors": 3}, instance_prompt="a <new1> star of <new2>")
    assert (status, report["rare_words"]) == (0, {"a <new1> star of <new2>": {"<new1>": 3, "<new2>": 3}})


def test_in_words_it_says_the_same(base, place, capsys):
    scene(0).resize((160, 120)).save(place / "dog" / "again.jpg")
    (place / "dog" / "notes.md").touch()
    assert main(["check", *flags(base)]) == 0
    said = capsys.readouterr().out
    assert "instance: 5 pictures of 160x120 to 320x240, trained at 32x32, 25% cut off, each seen 2.4 times" in said
    assert "instance, near-duplicate: again.jpg (like 0.png)" in said
    assert "skipped what is not a picture, 1 found: notes.md" in said
    assert "expected memory: " in said and "not known before a first run" in said


def test_sizes_of_buckets_and_class_pictures_are_counted(checked, place):
    (place / "class").mkdir()
    for number in range(3):
        scene(20 + number, (240, 320)).save(place / "class" / f"{number}.png")
    scene(10, (240, 320)).save(place / "dog" / "tall.png")
    prior = {"class_data_dir": "class", "class_prompt": "a photo of star", "num_class_images": 5}
    status, report = checked("--with_prior_preservation", "--use_aspect_ratio_bucket", **prior)
    subject, of_class = report["concepts"]
    assert status == 0
    assert subject["trained_at"] == {"24x40": 1, "40x24": 4} and subject["seen"] == pytest.approx(12 / 5)
    assert of_class["pictures"] == 3 and of_class["trained_at"] == {"24x40": 3}
    assert "2 class pictures to be generated first" in report["notes"]
    assert list(report["rare_words"]["a photo of sks star"]) == ["sks"]


def damaged(place):
    (place / "dog" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (place / "dog" / "worse.jpg").write_text("no picture")
    Image.new("RGB", (4, 4)).save(place / "dog" / "dot.png")


def captions(place, *names, text="a dog"):
    for name in names:
        (place / "dog" / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())


TO_MEND = {
    "every damaged picture": (damaged, [], ["bad.png: not a picture", "worse.jpg: not a picture", "dot.png: 4x4"]),
    "missing captions": (
        lambda place: captions(place, 0, 2),
        ["--use_txt_as_label"],
        ["no caption, expected a text such as dog.txt beside dog.png, 2 found: 1.png, 3.png"],
    ),
    "captions and pictures": (
        lambda place: (damaged(place), captions(place, 0, 1, 2, 3, "bad", "worse", "dot", text=b"\xff\xfe")),
        ["--use_txt_as_label"],
        ["0.txt: not UTF-8 at byte 0", "bad.png: not a picture", "worse.jpg: not a picture", "dot.png: 4x4"],
    ),
    "empty captions": (
        lambda place: captions(place, 0, 1, 2, 3, text=" \n"),
        ["--use_txt_as_label"],
        ["empty captions, 4 found: 0.txt, 1.txt, 2.txt, 3.txt"],
    ),
    "no folder": (lambda place: None, ["--instance_data_dir", "dgo"], ["dgo: no such folder; did you mean dog?"]),
    "no pictures": (
        lambda place: (place / "empty").mkdir(),
        ["--instance_data_dir", "empty"],
        ["empty: no picture in it, it is empty"],
    ),
    "missing masks": (
        lambda place: (place / "masks").mkdir(),
        ["--mask_dir", "masks"],
        [f"{n}.png: no mask in masks" for n in range(4)],
    ),
    "too little memory": (
        lambda place: None,
        ["--max_device_memory", "100MB"],
        ["expected memory: ", "and there are 0.1 GiB; what needs less: "],
    ),
}


@pytest.mark.parametrize("case", TO_MEND)
def test_all_that_is_to_be_mended_is_listed(checked, place, case):
    prepare, more, expected = TO_MEND[case]
    prepare(place)
    status, report = checked(*more)
    assert status == 1
    assert all(any(text in line for line in report["to_mend"]) for text in expected), report["to_mend"]


def test_a_long_caption_is_named(checked, place):
    captions(place, 0, 1, 3)
    captions(place, 2, text="dog " * 100)
    status, report = checked("--use_txt_as_label")
    assert status == 0
    assert any("captions of more than 77 tokens" in line and line.endswith(": 2.png") for line in report["notes"])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--rank", "0"], "--rank: expected at least 1, got 0"),
        (["--resolution", "34"], "--resolution: expected a multiple of 8, at least 32, got 34"),
        (["--pretrained_model_name_or_path", "dog"], "dog is not a model folder"),
        (["--jsn"], "--jsn: unknown flag; did you mean --json?"),
    ],
)
def test_a_command_that_train_does_not_take_is_refused_as_there(base, place, capsys, more, expected):
    replaced = dict(zip(flags(base)[::2], flags(base)[1::2], strict=True))
    words = [word for pair in replaced.items() if pair[0] not in more for word in pair]
    assert main(["check", *words, *more]) == 2
    assert f"dreambooth-ms: error: {expected}" in capsys.readouterr().err


# --- How long it will take ---


@pytest.fixture
def times(base, place, monkeypatch, tmp_path):
    """Flags -> the times of such steps, kept in a folder of this test's own, by a clock that a list turns."""
    monkeypatch.setattr(training_needs, "default_folder", lambda: tmp_path / "graphs")
    return lambda *more, **values: StepTimes(load(TrainConfig, flags(base, *more, **values)), open_bundle(base))


def run(own, monkeypatch, ends):
    own._ends = [0.0]
    for end in ends:
        monkeypatch.setattr(training_needs.time, "monotonic", lambda end=end: end)
        own.measure(None)
    own.close()


def test_the_time_is_known_after_a_first_run_with_its_spread(times, monkeypatch):
    assert times().expected(100) == (
        "expected time: not known before a first run with such steps on this machine",
        None,
    )
    run(times(), monkeypatch, [90.0, *(90.0 + 2 * n for n in range(1, 51))])
    said, seconds = times().expected(100)
    assert seconds == {"seconds": 200.0, "from": 200.0, "to": 200.0, "compilation": 88.0, "measured": 50}
    assert said.startswith("expected time: 03:20 (03:20 to 03:20, ") and "up to 01:28 to compile" in said
    run(times(), monkeypatch, [2.0, *(2.0 + 4 * n for n in range(1, 51))])
    _, seconds = times().expected(100)
    assert (seconds["from"], seconds["to"], seconds["compilation"], seconds["measured"]) == (200.0, 400.0, 88.0, 100)


def test_other_steps_have_times_of_their_own(times, monkeypatch):
    run(times(), monkeypatch, [9.0, 10.0, 11.0])
    assert times(learning_rate=1e-5, max_train_steps=9, instance_prompt="other").steps == [1.0, 1.0]
    for other in ({"rank": 3}, {"train_batch_size": 1}, {"resolution": 64}, {"ms_mode": 1}):
        assert times(**other).steps == []


@pytest.mark.parametrize("ends", [[], [9.0], [9.0, 10.0]])
def test_a_run_too_short_to_tell_compilation_from_steps_leaves_nothing(times, monkeypatch, ends):
    run(times(), monkeypatch, ends)
    assert times().steps == []


def test_without_a_home_folder_nothing_is_kept(times, monkeypatch):
    monkeypatch.setattr(training_needs, "default_folder", lambda: None)
    run(times(), monkeypatch, [9.0, 10.0, 11.0])
    assert times().steps == []


def test_damaged_times_are_none_and_a_full_disk_does_not_matter(times, monkeypatch, tmp_path):
    run(times(), monkeypatch, [9.0, 10.0, 11.0])
    (file,) = (tmp_path / "times").iterdir()
    file.write_text("[[1.0")
    assert times().steps == []

    def full(*_):
        raise WeightError("no space")

    monkeypatch.setattr(training_needs, "write_bytes", full)
    run(times(), monkeypatch, [9.0, 10.0, 11.0])


# --- prepare ---


def prepared(*more):
    return main(["prepare", "dog", "ready", *more])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_pictures_are_what_training_reads_of_them(place):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(5).save(place / "dog" / "turned.jpg", exif=exif, quality=95)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    scene(6).convert("RGBA").save(place / "dog" / "clear.png", icc_profile=profile)
    assert prepared("--resolution", "64") == 0
    for path in (place / "dog").iterdir():
        source = open_picture(path)
        crop = resize_and_crop(source, frame_of(source.size, (64, 64)), "lanczos")
        ready = Image.open(place / "ready" / f"{path.stem}.png")
        assert ready.mode == "RGB" and ready.info == {}
        assert (np.asarray(ready) == np.asarray(crop)).all()
        assert (np.asarray(open_picture(place / "ready" / f"{path.stem}.png")) == np.asarray(crop)).all()


def test_buckets_cut_off_little_and_training_nothing_more(place, checked):
    scene(11, (240, 400)).save(place / "dog" / "tall.png")
    assert prepared("--resolution", "64", "--use_aspect_ratio_bucket", "--max_buckets", "2") == 0
    sizes = {path.name: Image.open(path).size for path in (place / "ready").iterdir()}
    assert len({*sizes.values()}) == 2 and sizes["tall.png"][0] < sizes["tall.png"][1]
    _, report = checked("--use_aspect_ratio_bucket", instance_data_dir="ready", resolution=64)
    assert report["concepts"][0]["cut_off"] == pytest.approx(0, abs=1e-9)


def test_of_near_duplicates_the_largest_stays(place, capsys):
    scene(0, (320, 240)).resize((160, 120)).save(place / "dog" / "00.png")
    assert prepared() == 0
    assert names(place / "ready") == ["0.png", "1.png", "2.png", "3.png"]
    said = capsys.readouterr().err
    assert "00.png: left out, a near-duplicate of 0.png" in said and "4 pictures, 1 left out" in said


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv"])
def test_captions_are_kept_by_the_new_names(place, checked, file):
    scene(12).save(place / "dog" / "4.jpg", quality=95)
    (place / "dog" / "0.txt").write_text("zero")
    (place / "dog" / "4.jpg.txt").write_text("four\nvier")
    rows = [("4.jpg", 'a "dog", wet'), ("gone.jpg", "x"), *((f"{n}.png", str(n)) for n in range(4))]
    text = "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in rows)
    if file.endswith("csv"):
        text = "file_name,text\n" + "\n".join(f'{name},"{text}"'.replace('"dog"', '""dog""') for name, text in rows)
    (place / "dog" / file).write_text(text)
    assert prepared() == 0
    assert names(place / "ready") == [
        "0.png", "0.txt", "1.png", "2.png", "3.png", "4.png", "4.png.txt", "metadata.jsonl",
    ]  # fmt: skip
    assert (place / "ready" / "4.png.txt").read_text() == "four\nvier"
    written = [json.loads(line) for line in (place / "ready" / "metadata.jsonl").read_text().splitlines()]
    assert written[0] == {"file_name": "4.png", "text": 'a "dog", wet'} and len(written) == 5
    status, _ = checked("--caption_column", "text", instance_data_dir="ready")
    assert status == 0


class Killed(BaseException):
    pass


def prepare_killed(monkeypatch, *more):
    """Prepare, up to the third picture."""

    def killed(path, *rest):
        if path.name == "2.png":
            raise Killed
        return open_picture(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "open_picture", killed)
        with pytest.raises(Killed):
            prepared(*more)


def test_a_killed_command_leaves_no_target_and_the_next_goes_on(place, monkeypatch):
    prepare_killed(monkeypatch)
    assert not (place / "ready").exists()
    (partial,) = place.glob(f"{TEMPORARY_PREFIX}*")
    before = {path.name: path.stat().st_mtime_ns for path in partial.iterdir()}
    assert sorted(before) == ["0.png", "1.png"]
    assert prepared() == 0
    after = {path.name: path.stat().st_mtime_ns for path in (place / "ready").iterdir()}
    assert before.items() <= after.items() and len(after) == 4
    assert not list(place.glob(f"{TEMPORARY_PREFIX}*"))


def test_with_other_settings_a_killed_command_s_work_is_not_used(place, monkeypatch):
    prepare_killed(monkeypatch)
    assert prepared("--resolution", "64") == 0
    assert {Image.open(path).size for path in (place / "ready").iterdir()} == {(64, 64)}
    assert not list(place.glob(f"{TEMPORARY_PREFIX}*"))


REFUSED = {
    "no source": (lambda place: None, ["nothing", "ready"], ["nothing: no such folder"]),
    "a target with files": (
        lambda place: (place / "ready").mkdir() or (place / "ready" / "0.png").touch(),
        ["dog", "ready"],
        ["ready: is there already"],
    ),
    "the source as target": (lambda place: None, ["dog", "dog"], ["dog: is there already"]),
    "damaged pictures": (damaged, ["dog", "ready"], ["bad.png: not a picture", "worse.jpg: not a", "dot.png: 4x4"]),
    "names that differ in the suffix": (
        lambda place: scene(13).save(place / "dog" / "0.jpg"),
        ["dog", "ready"],
        ["dog/0.jpg, dog/0.png: would become the same file; rename them"],
    ),
    "a target below a file": (
        lambda place: (place / "file").touch(),
        ["dog", "file/ready"],
        ["cannot be written (Not a directory)"],
    ),
    "an odd side": (lambda place: None, ["dog", "ready", "--resolution", "50"], ["--resolution: expected a multiple"]),
    "no target": (lambda place: None, ["dog"], ["--target: required"]),
    "metadata that are no table": (
        lambda place: (place / "dog" / "metadata.jsonl").write_text("[1]\n"),
        ["dog", "ready"],
        ["metadata.jsonl: line 1 is not an object of columns"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_prepared_is_refused_by_name(place, capsys, case):
    make, words, expected = REFUSED[case]
    make(place)
    before = sorted(place.rglob("*"))
    assert main(["prepare", *words]) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in expected), said
    assert sorted(place.rglob("*")) == before


# --- What train says first ---


def test_train_tells_its_pictures_before_any_work(base, place, capsys, monkeypatch):
    scene(0).resize((160, 120)).save(place / "dog" / "again.jpg")
    monkeypatch.setattr(train, "train_and_save", lambda *rest: 0)
    monkeypatch.setattr(train, "prepare_training", lambda *rest: ())
    assert main(["train", *flags(base)]) == 0
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if line.startswith("instance: ")]
    assert line == (
        "instance: 5 pictures of 160x120 to 320x240, trained at 32x32, 25% cut off, each seen 2.4 times; "
        "1 near-duplicate (`dreambooth-ms check` names them)"
    )


def test_every_subject_of_a_list_is_described_and_what_is_wrong_with_another_is_listed(base, place, capsys):
    (place / "cat").mkdir()
    for number in range(2):
        scene(30 + number).save(place / "cat" / f"{number}.png")
    (place / "fox").mkdir()
    (place / "fox" / "bad.png").write_text("no picture")
    subjects = [{"instance_data_dir": name, "instance_prompt": f"a photo of sks {name}"} for name in ("dog", "cat")]
    words = [word for word in flags(base, "--json") if word not in ("dog", "a photo of sks star")]
    words = [word for word in words if word not in ("--instance_data_dir", "--instance_prompt")]
    (place / "list.json").write_text(json.dumps(subjects))
    assert main(["check", *words, "--concepts_list", "list.json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(one["pictures"], one["seen"]) for one in report["concepts"]] == [(4, 2.0), (2, 2.0)]
    assert list(report["rare_words"]) == ["a photo of sks dog", "a photo of sks cat"]
    subjects.append({"instance_data_dir": "fox", "instance_prompt": "a photo of sks fox"})
    (place / "list.json").write_text(json.dumps(subjects))
    assert main(["check", *words, "--concepts_list", "list.json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert len(report["concepts"]) == 2
    assert report["to_mend"] == ["fox/bad.png: not a picture of a known format; save it as PNG or JPEG, or remove it"]
