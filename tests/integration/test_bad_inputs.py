"""Whatever is wrong, the program says so in one line each, with what to do, and leaves everything as it was."""

import io
import json
import os
import platform
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.cli.main import main
from dreambooth_ms.config.spellings import REFUSED, VALUES
from dreambooth_ms.training.checkpoint import MANIFEST, STATE, find_latest
from dreambooth_ms.training.history import HISTORY
from dreambooth_ms.training.run_folder import CONFIG
from dreambooth_ms.training.run_lock import sign, take_lock
from tests.tiny_model import write_random_dino, write_random_model

PROGRAM = "dreambooth-ms: error: "
UNET_WEIGHTS, UNET_CONFIG = "unet/diffusion_pytorch_model.safetensors", "unet/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


# --- What the cases start from ---


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A model and three photographs."""
    shared = tmp_path_factory.mktemp("shared")
    write_random_model(shared / "model")
    (shared / "dog").mkdir()
    for number in range(3):
        (shared / "dog" / f"{number}.png").write_bytes(encoded("PNG", seed=number))
    return shared


@pytest.fixture(scope="module")
def run(shared):
    """The folder of a run that has ended: two steps, a checkpoint after each."""
    assert main(train_command(shared, output_dir=shared / "run", checkpointing_steps=1)) == 0
    return shared / "run"


@pytest.fixture
def place(shared, tmp_path, monkeypatch):
    """The current folder, with a copy of all that."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "dog"):
        shutil.copytree(shared / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def copied_run(run, place):
    """A copy of the ended run as `out`."""
    return shutil.copytree(run, place / "out")


@pytest.fixture
def encoded_pictures(run, place):
    """What the run keeps of pictures and prompts, in a new folder `out`: nothing has to be computed before training."""
    shutil.copytree(run / "cache", place / "out" / "cache")


@pytest.fixture
def refused(place, capsys):
    """Runs a command line that must fail, and returns what it says.

    It may change nothing but the files, and what is in the folders, that are named in `may_leave`.
    """

    def check(*arguments, may_leave=()):
        before = contents(place)
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        said = capsys.readouterr().err.splitlines()
        assert status == 2, said
        errors = [line.removeprefix(PROGRAM) for line in said if line.startswith(PROGRAM)]
        assert errors
        assert errors == [line.removeprefix(PROGRAM) for line in said[-len(errors) :]], "errors come last"
        assert not any("Traceback" in line for line in said)
        after = contents(place)
        changed = [name for name in after if after[name] != before.get(name)]
        assert all(name in may_leave or name.startswith(tuple(f"{left}/" for left in may_leave)) for name in changed)
        assert before.keys() <= after.keys(), "something was removed"
        return errors

    return check


@pytest.fixture
def train_refused(place, refused):
    """The same for a training with some flags that differ; None leaves a flag out."""

    def check(*more, may_leave=(), **flags):
        return refused(*train_command(place, **flags), *more, may_leave=may_leave)

    return check


def train_command(place, **flags):
    defaults = {
        "pretrained_model_name_or_path": "model",
        "instance_data_dir": "dog",
        "instance_prompt": "a photo of star",
        "resolution": 32,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "seed": 1,
        "output_dir": "out",
    }
    for name in ("pretrained_model_name_or_path", "instance_data_dir"):
        defaults[name] = place / defaults[name]
    values = {name: value for name, value in (defaults | flags).items() if value is not None}
    return ["train", *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


def contents(folder):
    """Every path below a folder, with the bytes of files."""
    return {
        os.path.relpath(os.path.join(parent, name), folder): read(os.path.join(parent, name))
        for parent, folders, files in os.walk(folder)
        for name in folders + files
    }


def read(path):
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return file.read()


def encoded(kind, size=(40, 48), seed=0, **options):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def cut(content, share=0.5):
    return content[: int(len(content) * share)]


def png_that_claims(width, height):
    """A PNG whose header speaks of so many pixels, with almost no data behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


# --- Picture folders ---

NO_PICTURE = "pictures: no picture in it, "
SAVE_AGAIN = "; save it again as PNG or JPEG, or remove it"
NOT_A_PICTURE = ": not a picture of a known format; save it as PNG or JPEG, or remove it"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, f"{NO_PICTURE}it is empty; expected a folder with pictures (png, jpg, "),
        ({".DS_Store": b"", "notes.txt": b"rex"}, f"{NO_PICTURE}2 found: .DS_Store, notes.txt; expected a folder"),
        ({"dog.psd": b"", "dog.svg": b"<svg/>"}, f"{NO_PICTURE}2 found: dog.psd, dog.svg; expected a folder"),
        ({"dog.jpg": cut(encoded("JPEG"))}, "pictures/dog.jpg: cannot be read (image file is truncated"),
        ({"dog.png": cut(encoded("PNG"))}, "pictures/dog.png: cannot be read ("),
        ({"dog.webp": cut(encoded("WEBP"))}, "pictures/dog.webp: "),
        ({"dog.gif": cut(encoded("GIF"))}, "pictures/dog.gif: cannot be read (image file is truncated"),
        ({"dog.png": b"<!DOCTYPE html><title>404 Not Found</title>"}, f"pictures/dog.png{NOT_A_PICTURE}"),
        ({"dog.png": b""}, f"pictures/dog.png{NOT_A_PICTURE}"),
        ({"dog.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"}, f"pictures/dog.jpg{NOT_A_PICTURE}"),
        ({"dog.png": encoded("PNG", (1, 1))}, "pictures/dog.png: 1x1 pixels are too few to learn from; use a larger"),
        ({"dog.png": encoded("PNG", (10, 300))}, "pictures/dog.png: 300x10 is too narrow for a square picture; crop"),
        ({"dog.png": png_that_claims(60000, 60000)}, "pictures/dog.png: too large to be a photograph ("),
        ({"dog.png": png_that_claims(12000, 10000)}, "pictures/dog.png: cannot be read (image file is truncated"),
        ({"dog.png": encoded("PNG"), b"\xff\xfe.png": b""}, f"\\udcff\\udcfe.png{NOT_A_PICTURE}"),
    ],
    ids=[
        "empty", "stray files", "other kinds", "truncated JPEG", "truncated PNG", "truncated WebP", "truncated GIF",
        "a web page", "zero bytes", "PostScript", "one pixel", "a strip", "a decompression bomb", "a large header",
        "a name that is not UTF-8",
    ],
)  # fmt: skip
def test_a_picture_folder_that_cannot_be_used(place, train_refused, files, said):
    os.mkdir("pictures")
    for name, content in files.items():
        with open(os.path.join(b"pictures", os.fsencode(name)), "wb") as file:
            file.write(content)
    (line,) = train_refused(instance_data_dir="pictures")
    assert said in line
    if "cannot be read" in line:
        assert line.endswith(SAVE_AGAIN)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere", "nowhere: no such folder; expected a folder with pictures"),
        ("dog/0.png", "dog/0.png: not a folder; expected a folder with pictures"),
        ("dog/0.png/below", "dog/0.png/below: no such folder; expected a folder with pictures"),
        ("d" * 300, f"{'d' * 300}: no such folder; expected a folder with pictures"),
        (
            "~nobody-of-that-name/dog",
            "--instance_data_dir: ~nobody-of-that-name/dog: no home folder is known for ~nobody",
        ),
        (os.fsdecode(b"d\xff"), "--instance_data_dir: expected text in UTF-8, got "),
    ],
    ids=["missing", "a file", "below a file", "too long", "an unknown user", "not UTF-8"],
)
def test_a_path_that_is_no_picture_folder(train_refused, path, said):
    (line,) = train_refused(instance_data_dir=path)
    assert line.startswith(said)


def test_a_link_to_nowhere_and_a_folder_are_no_pictures(place, train_refused):
    (place / "links").mkdir()
    (place / "links" / "dog.png").symlink_to(place / "nowhere.png")
    (place / "links" / "more.png").mkdir()
    (line,) = train_refused(instance_data_dir="links")
    assert line.startswith("links: no picture in it, 2 found: dog.png, more.png; expected a folder with pictures")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_picture_without_permission(place, train_refused):
    (place / "dog" / "1.png").chmod(0)
    (line,) = train_refused()
    assert "dog/1.png: cannot be read (Permission denied)" in line


def test_every_damaged_picture_is_named_at_once(place, train_refused):
    (place / "dog" / "0.png").write_bytes(b"")
    (place / "dog" / "2.png").write_bytes(cut(encoded("PNG")))
    first, second = train_refused()
    assert "dog/0.png: not a picture of a known format" in first
    assert "dog/2.png: cannot be read" in second


PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo", "num_class_images": 1}


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("dog/0.png", "--class_data_dir dog/0.png: expected a folder, got a file"),
        ("/proc/x", "/proc/x: cannot be written (No such file or directory); choose another folder"),
    ],
    ids=["a file", "not allowed"],
)
def test_a_folder_of_class_pictures_that_cannot_be(train_refused, folder, said):
    if folder.startswith("/proc") and not sys.platform.startswith("linux"):
        pytest.skip("no /proc here")
    assert train_refused(class_data_dir=folder, **PRIOR) == [said]


def test_a_damaged_class_picture(place, train_refused):
    (place / "pictures").mkdir()
    (place / "pictures" / "dog.png").write_bytes(b"")
    assert train_refused(class_data_dir="pictures", **PRIOR) == [f"pictures/dog.png{NOT_A_PICTURE}"]


# --- New words, and photographs of the class ---


WORD = {"method": "custom_diffusion", "modifier_token": "<new1>", "instance_prompt": "a photo of <new1> star"}
REAL = {"method": "custom_diffusion", "class_data_dir": "real", "num_class_images": 2}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"instance_prompt": "a photo of star"},
            "--modifier_token: <new1>: in no prompt and no caption of dog; name the subject by it, as in "
            "--instance_prompt 'a photo of <new1> dog'",
        ),
        ({"modifier_token": "<new1>+<new2>"}, "--modifier_token: <new2>: in no prompt and no caption of dog; "),
        ({"modifier_token": "<NEW1>"}, "--modifier_token: <NEW1>: in no prompt and no caption of dog; "),
        ({"modifier_token": "a/b"}, "--modifier_token: expected different words put together by +, such as "),
        ({"modifier_token": "<new1>+<new1>"}, "--modifier_token: expected different words put together by +"),
        ({"modifier_token": "<new1>+"}, "--modifier_token: expected different words put together by +"),
        ({"method": "lora"}, "--modifier_token: new words are trained by --method custom_diffusion or textual_inv"),
        (
            {"method": "textual_inversion", "modifier_token": None},
            "--method textual_inversion: trains new words alone; name them with --modifier_token",
        ),
        (
            {"modifier_token": "<new1>+<new2>", "initializer_token": "star"},
            "--initializer_token 'star': expected a word for each of --modifier_token '<new1>+<new2>'",
        ),
        (
            {"initializer_token": "a star"},
            "--initializer_token 'a star': expected a word that is one token, it is 2 tokens",
        ),
        ({"train_text_encoder": True}, "--train_text_encoder: --method custom_diffusion trains new words"),
        (
            {"use_aspect_ratio_bucket": True},
            "--use_aspect_ratio_bucket: custom_diffusion varies the size of pictures in a square; give --noaug with it",
        ),
        ({"train_new_words": True, "method": "lora", "modifier_token": None}, "--train_new_words: needs --modifier_to"),
    ],
)
def test_new_words_that_cannot_be_trained(place, train_refused, flags, said):
    (line,) = train_refused(**WORD | flags)
    assert line.replace(f"{place}/", "").startswith(said)


def test_a_caption_that_holds_the_word_is_enough(place, train_refused):
    for number in range(3):
        (place / "dog" / f"{number}.txt").write_text("a <new1> star" if number == 2 else "a star")
    flags = {"instance_prompt": None, "use_txt_as_label": True, "checkpointing_steps": 1}
    # What is wrong then comes later.
    (line,) = train_refused(**WORD | flags, resume_from_checkpoint="gone")
    assert line.startswith("out/gone: not a checkpoint")


def real_prior(place, images=2, names=2, captions=2):
    """A folder as the published script's retrieval leaves one."""
    (place / "real" / "images").mkdir(parents=True)
    for number in range(images):
        (place / "real" / "images" / f"{number}.jpg").write_bytes(encoded("JPEG", seed=number))
    for file, count, line in (("images.txt", names, "real/images/{}.jpg"), ("caption.txt", captions, "star {}")):
        if count:
            (place / "real" / file).write_text("".join(f"{line.format(n)}\n" for n in range(count)))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"images": 0}, "real/images: no picture in it, it is empty"),
        (
            {"images": 1},
            "real/images: 1 picture, expected --num_class_images 2 for --real_prior; put more there with their "
            "captions, or lower it",
        ),
        ({"captions": 3}, "real/caption.txt: 3 lines, 2 in images.txt; each goes with one there"),
        ({"names": 1}, "real/caption.txt: 2 lines, 1 in images.txt; each goes with one there"),
        ({"names": 1, "captions": 1}, "real/images: no caption, expected a line in images.txt, 1 found: 1.jpg"),
        ({"names": 0}, "real/images.txt: cannot be read (No such file or directory)"),
        ({"captions": 0}, "real/caption.txt: cannot be read (No such file or directory)"),
    ],
)
def test_photographs_of_the_class_that_are_not_whole(place, train_refused, layout, said):
    real_prior(place, **layout)
    (line,) = train_refused("--with_prior_preservation", "--real_prior", **REAL)
    assert line.startswith(said)


def test_photographs_of_the_class_that_are_not_there(place, train_refused):
    (line,) = train_refused("--with_prior_preservation", "--real_prior", **REAL)
    assert line.startswith("real: no such folder")
    (place / "real").mkdir()
    for number in range(2):
        (place / "real" / f"{number}.png").write_bytes(encoded("PNG", seed=number))
    (line,) = train_refused("--with_prior_preservation", "--real_prior", **REAL)
    assert line == "real: no caption, expected a text such as dog.txt beside dog.png, 2 found: 0.png, 1.png"
    (line,) = train_refused("--with_prior_preservation", "--real_prior", **REAL | {"class_data_dir": None})
    assert line == "--with_prior_preservation: needs --class_data_dir, the folder of the class pictures"


# --- Flags ---


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rnak", "8"], "--rnak: unknown flag; did you mean --rank?"),
        (["--instance_promt", "x"], "--instance_promt: unknown flag; did you mean --instance_prompt?"),
        (["--zzz"], "--zzz: unknown flag"),
        (["dog"], "--output_dir: unexpected 'dog' after its value; put text with spaces in quotes"),
        (["--rank", "four"], "--rank: expected a whole number, got 'four'"),
        (["--rank"], "--rank: expected a whole number, got nothing"),
        (["--learning_rate", "fast"], "--learning_rate: expected a number, or None, got 'fast'"),
        (["--center_crop", "maybe"], "--center_crop: expected True or False, got 'maybe'"),
        (["--method", "ful"], "--method: expected one of lora, full, custom_diffusion, textual_inversion, got 'ful'"),
        (["--method", "pivotal_tuning"], f"--method: pivotal_tuning: {VALUES['method']['pivotal_tuning']}"),
        (["--lr_scheduler", "step"], "--lr_scheduler: expected one of linear, cosine, "),
        (["--rank", "0"], "--rank: expected at least 1, got 0"),
        (["--lora_target_modules", "to_x"], "--lora_target_modules: no layer is named to_x; there are "),
        (["--rank", "100000"], "--rank: expected 1 to 16, the size of the smallest adapted layer, got 100000"),
        (["--resolution", "100"], "--resolution: expected a multiple of 8, at least 32, got 100"),
        (["--learning_rate", "nan"], "--learning_rate: expected greater than 0, got nan"),
        (["--lora_dropout", "1"], "--lora_dropout: expected at least 0 and less than 1, got 1.0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps: expected at least 1, got 0"),
        (["--seed", "-1"], "--seed: expected from 0 to 2**64 - 1, got -1"),
        (["--with_prior_preservation", "--class_prompt", "x"], "--with_prior_preservation: needs --class_data_dir"),
        (["--with_prior_preservation", "--class_data_dir", "x"], "--with_prior_preservation: needs --class_prompt"),
        (["--offset_noise", "--noise_offset", "0.2"], "--offset_noise: is --noise_offset 0.1; give one of them"),
        (["--rank", "4", "--lora_rank", "8"], "--lora_rank: means the same as --rank; give one of them"),
        (["--lr_scheduler", "polynomial", "--learning_rate", "1e-8"], "--learning_rate: the polynomial schedule ends"),
        (["--optimizer", "lion"], "--optimizer: expected one of AdamW, adafactor, prodigy, got 'lion'"),
        (["--optimizer", "prodigy", "--text_encoder_lr", "1e-4"], "--text_encoder_lr: prodigy has one rate for all"),
        (["--mixed_precision", "fp8"], "--mixed_precision: expected one of no, fp16, bf16, auto, or None, got 'fp8'"),
        (["--mixed_precision", "bf16"], "--mixed_precision bf16: the CPU cannot compute in bfloat16; use fp16"),
        (["--loss_scale_factor", "1"], "--loss_scale_factor: expected greater than 1, got 1.0"),
        (["--sample_at_first"], f"--sample_at_first: {REFUSED['sample_at_first'].reason}"),
        (
            ["--report_to", "comet_ml"],
            "--report_to: expected one or several of tensorboard, wandb, swanlab and",
        ),
        (["--wandb_api_key", "secret"], f"--wandb_api_key: {REFUSED['wandb_api_key'].reason}"),
        (["--device_target", "GPU"], "--device_target: expected one of auto, CPU, Ascend, got 'GPU'"),
        (
            ["--device_target", "Ascend"],
            "--device_target Ascend: no Ascend device was found here; `dreambooth-ms doctor --device_target",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag(train_refused, flags, said):
    (line,) = train_refused(*flags)
    assert line.startswith(said)


def test_all_wrong_flags_are_reported_at_once(train_refused):
    lines = train_refused("--rnak", "8", "--resolution", "wide", "--sample_at_first", "--lora_dropout", "2", seed=-1)
    assert [line.split(":")[0] for line in lines] == [
        *("--rnak", "--resolution", "--sample_at_first", "--lora_dropout", "--seed"),
    ]


def test_what_is_required_is_asked_for_by_every_command(refused):
    assert len(refused("train")) == 3
    assert len(refused("sample")) == 2
    assert len(refused("evaluate")) == 5
    assert refused("trian") == ["trian: unknown command; did you mean train?"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"rank: 4: 5", "--config run.yaml: line 1: mapping values are not allowed in this context"),
        (b"data:\n\trank: 4\n", "--config run.yaml: line 2: found character that cannot start any token"),
        (b"\x89PNG\r\n\x1a\n", "--config run.yaml: "),
        (b"- rank", "--config run.yaml: expected lines such as `rank: 4`"),
        (b"rank: 4\n---\nrank: 5", "--config run.yaml: line 2: but found another document"),
        (b"rank: !!python/object:os.system x", "--config run.yaml: line 1: could not determine a constructor"),
        (b"a: &a [*a]", "--config run.yaml: line 1: YAML recursive aliases are not supported"),
        (b"ranks: 4", "run.yaml: ranks: unknown key; did you mean rank?"),
        (b"models: {rank: 4}", "run.yaml: models: unknown section; did you mean model?"),
        (b"data: {rank: 4}", "run.yaml: data.rank: belongs to section method"),
        (b"rank: four", "run.yaml: rank: expected a whole number, got 'four'"),
        (b"rank: [4]", "run.yaml: rank: expected a whole number, got [4]"),
        (
            b"method: {method: {method: lora}}",
            "run.yaml: method.method: expected one of lora, full, custom_diffusion, textual_inversion, got {",
        ),
        (b"lora_target_modules: [{a: 1}]", "run.yaml: lora_target_modules: expected a list of texts, got [{'a': 1}]"),
        (b'class_prompt: "a\\0b"', "run.yaml: class_prompt: expected text in UTF-8, got 'a\\x00b'"),
        (b"sample_at_first: true", "run.yaml: sample_at_first: dreambooth-ms sample shows what the base model makes"),
    ],
)
def test_a_wrong_configuration_file(place, train_refused, text, said):
    (place / "run.yaml").write_bytes(text)
    (line,) = train_refused(config="run.yaml")
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nothing.yaml", "No such file or directory"),
        ("dog", "Is a directory"),
        ("y" * 300, "File name too long"),
        ("dog/0.png", "'utf-8' codec can't decode byte 0x89 in position 0: invalid start byte"),
    ],
)
def test_a_configuration_file_that_is_none(train_refused, path, said):
    assert train_refused(config=path) == [f"--config {path}: {said}"]


# --- Base models ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nowhere", "./nowhere: no such file or folder; check the path"),
        ("nowhere", "nowhere: no such file or folder; a name on the hub has the form owner/model"),
        ("m" * 300, f"{'m' * 300}: no such file or folder; a name on the hub has the form owner/model"),
        (
            "~nobody-of-that-name/model",
            "--pretrained_model_name_or_path: ~nobody-of-that-name/model: no home folder is known for ~nobody",
        ),
        ("mdoel", "mdoel: no such file or folder; did you mean model?"),
        ("model/uent", "model/uent: no such file or folder; did you mean model/unet?"),
        ("model.safetensors", "model.safetensors: no such file or folder; did you mean model?"),
        ("dog/0.png", "dog/0.png: expected a model folder, got a file"),
        (
            "dog",
            "dog is not a model folder in diffusers' layout: model_index.json is missing; is the download complete?",
        ),
        ("model/unet", "model/unet is not a model folder in diffusers' layout: model_index.json is missing"),
    ],
)
def test_a_path_that_is_no_base_model(train_refused, name, said):
    (line,) = train_refused(pretrained_model_name_or_path=name)
    assert line.startswith(said)


PARTS = (
    "model_index.json", UNET_CONFIG, UNET_WEIGHTS, "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json", SCHEDULER_CONFIG,
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_half_a_download_that_lacks_a_file(place, train_refused, part):
    (place / "model" / part).unlink()
    (line,) = train_refused()
    assert part.split("/")[-1] in line
    assert line.endswith("is the download complete?")


@pytest.mark.parametrize("part", PARTS)
def test_half_a_download_that_cut_a_file(place, train_refused, part):
    file = place / "model" / part
    file.write_bytes(cut(file.read_bytes()))
    (line,) = train_refused()
    assert str(file) in line
    assert line.endswith(("download it again", "copy or download it again"))


def change(**changes):
    """Give keys of a JSON file other values; ... removes one."""

    def apply(path):
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return apply


def write(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("part", "damage", "said"),
    [
        (UNET_CONFIG, write(b"hello"), "unet/config.json: not readable as JSON ("),
        (UNET_CONFIG, write(b"\xff\xfe"), "unet/config.json: not readable as JSON ("),
        (UNET_CONFIG, write(b"[]"), "unet/config.json: expected a JSON object; download it again"),
        (UNET_CONFIG, change(block_out_channels=...), "unet/config.json: 'block_out_channels' is missing; download"),
        (
            UNET_CONFIG,
            change(block_out_channels=None),
            "unet/config.json: block_out_channels: expected a list, each a whole",
        ),
        (UNET_CONFIG, change(cross_attention_dim=...), "unet/config.json: 'cross_attention_dim' is missing; download"),
        (UNET_CONFIG, change(cross_attention_dim=32), "its unet reads text of width 32, its text_encoder gives 24; "),
        (UNET_CONFIG, change(in_channels=5), "its unet takes 5 channels and gives 4, a picture has 4; use a text-to"),
        (
            UNET_CONFIG,
            change(class_embed_type="projection"),
            "unet/config.json: class_embed_type: expected timestep or null, got 'projection'; download it again",
        ),
        (
            UNET_CONFIG,
            change(down_block_types=["KDownBlock2D"]),
            "unet/config.json: down_block_types: expected a list, each CrossAttnDownBlock2D or DownBlock2D or Simple",
        ),
        ("vae/config.json", change(latent_channels=...), "vae/config.json: 'latent_channels' is missing; download"),
        ("text_encoder/config.json", change(vocab_size=...), "text_encoder/config.json: 'vocab_size' is missing"),
        (
            SCHEDULER_CONFIG,
            change(prediction_type="sample"),
            "scheduler/scheduler_config.json: prediction_type: expected epsilon or v_prediction, got 'sample'; downlo",
        ),
        (
            SCHEDULER_CONFIG,
            change(beta_schedule="cosine"),
            "scheduler_config.json: beta_schedule: expected scaled_linear or linear or squaredcos_cap_v2, got 'cosine'",
        ),
        (
            SCHEDULER_CONFIG,
            change(_class_name="FlowMatchEulerDiscreteScheduler"),
            "scheduler_config.json: FlowMatchEulerDiscreteScheduler: for models that are trained in another way (flow",
        ),
        (
            SCHEDULER_CONFIG,
            change(rescale_betas_zero_snr=True),
            "scheduler_config.json: prediction_type epsilon with zero terminal SNR (rescale_betas_zero_snr): no",
        ),
        (UNET_CONFIG, change(sample_size=None), "unet/config.json: sample_size: expected a whole number above 0, got"),
        (
            UNET_CONFIG,
            change(norm_num_groups=5),
            "config.json: block_out_channels 16 is not a multiple of norm_num_gro",
        ),
        (
            "model_index.json",
            change(text_encoder_2=[]),
            "text_encoder_2/model.safetensors is missing (found: ",
        ),
        ("model_index.json", change(unet=..., _class_name="FluxPipeline"), "FluxPipeline is another kind of model; "),
        (UNET_WEIGHTS, write(b""), f"{UNET_WEIGHTS}: not a readable safetensors file ("),
        (UNET_WEIGHTS, write(b"<!DOCTYPE html>"), f"{UNET_WEIGHTS}: not a readable safetensors file ("),
        ("tokenizer/merges.txt", write(b""), "tokenizer/merges.txt: cut short; download it again"),
    ],
)
def test_a_model_folder_that_does_not_fit(place, train_refused, part, damage, said):
    damage(place / "model" / part)
    (line,) = train_refused()
    assert said in line


def test_another_autoencoder_that_is_none(train_refused):
    (line,) = train_refused(pretrained_vae_model_name_or_path="dog")
    assert "dog/diffusion_pytorch_model.safetensors is missing (found: " in line


def test_a_variant_that_is_not_there(train_refused):
    (line,) = train_refused(variant="fp16")
    assert "unet/diffusion_pytorch_model.fp16.safetensors is missing (found: config.json, diffusion_py" in line


def test_weights_of_another_shape(place, encoded_pictures, train_refused):
    change(block_out_channels=[16, 64])(place / "model" / UNET_CONFIG)
    (line,) = train_refused(may_leave=[f"out/{CONFIG}"])
    assert f"{UNET_WEIGHTS} does not fit UNet2DConditionModel: " in line
    assert "conv1.weight: expected (64, 16, 3, 3), got (32, 16, 3, 3)" in line


# --- Where the results go ---


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("dog/0.png", "dog/0.png: cannot be written (Not a directory); choose another folder"),
        ("dog/0.png/run", "dog/0.png/run: cannot be written (Not a directory); choose another folder"),
        ("o" * 300, f"{'o' * 300}: cannot be written (File name too long); choose another folder"),
        ("/proc/x", "/proc/x: cannot be written (No such file or directory); choose another folder"),
        ("/proc/x/y", "/proc/x/y: cannot be written (No such file or directory); choose another folder"),
    ],
    ids=["a file", "below a file", "too long", "not allowed", "below what is not allowed"],
)
def test_an_output_folder_that_cannot_be(train_refused, folder, said):
    if folder.startswith("/proc") and not sys.platform.startswith("linux"):
        pytest.skip("no /proc here")
    assert train_refused(output_dir=folder) == [said]


def test_the_run_of_another_configuration_is_left_alone_and_every_difference_named(shared, refused, copied_run):
    flags = {"rank": 8, "learning_rate": 1e-5, "instance_prompt": "a star", "max_train_steps": 9}
    (line,) = refused(*train_command(shared, **flags))
    assert line == (
        "out holds a run with another configuration (--instance_prompt: 'a photo of star' there, 'a star' here; "
        "--rank: 4 there, 8 here; --learning_rate: 0.0005 there, 1e-05 here); choose another --output_dir"
    )


@pytest.mark.parametrize(
    "text", [b"hello", b"a: 1\nb: 2", b"\xff\x00", b""], ids=["text", "other keys", "bytes", "empty"]
)
def test_a_folder_with_the_configuration_of_another_program_is_left_alone(place, train_refused, text):
    (place / "out").mkdir()
    (place / "out" / CONFIG).write_bytes(text)
    (line,) = train_refused()
    assert line.startswith(f"out/{CONFIG}: not the configuration of a run (")
    assert line.endswith("; choose another --output_dir")


@pytest.mark.parametrize("name", [FILE_NAME, UNET_WEIGHTS])
def test_a_folder_with_weights_of_another_program_is_left_alone(place, train_refused, name):
    (place / "out" / name).parent.mkdir(parents=True)
    (place / "out" / name).write_bytes(b"weights")
    assert train_refused() == [f"out/{name}: would be replaced, and is of no run there; choose another --output_dir"]


def test_the_base_model_is_not_trained_in_its_own_folder(train_refused):
    (line,) = train_refused(method="full", output_dir="model")
    assert line.startswith(f"model/{UNET_WEIGHTS}: would be replaced")


def test_a_log_that_cannot_be_written(train_refused, encoded_pictures):
    (line,) = train_refused(logging_dir="/proc/x", may_leave=[f"out/{CONFIG}", f"out/{HISTORY}"])
    assert line == "out: the log cannot be written (No such file or directory); free some space and resume"


def test_a_folder_that_another_run_is_at_work_in(place, train_refused):
    with take_lock(place / "out") as lock:
        sign(lock, 7)
        (line,) = train_refused()
    assert line == (
        f"out: process 7 on {platform.node()} is training in it; wait for its end, stop it, or choose another "
        "--output_dir"
    )


# --- Mending ---


def test_a_command_that_failed_before_its_first_step_can_be_mended(place, encoded_pictures, train_refused):
    """The configuration it left in its folder is in nobody's way."""
    change(block_out_channels=[16, 64])(place / "model" / UNET_CONFIG)
    for rank in (2, 4):
        (line,) = train_refused(rank=rank, may_leave=["out"])
        assert f"{UNET_WEIGHTS} does not fit UNet2DConditionModel: " in line
        assert f"rank: {rank}" in (place / "out" / CONFIG).read_text()


def test_a_run_that_was_moved_is_still_that_run(shared, place, copied_run, capsys):
    """And so is one whose command names what was a default."""
    copied_run.rename(place / "elsewhere")
    assert main(train_command(shared, output_dir="elsewhere", learning_rate=5e-4)) == 0
    assert "nothing left to do" in capsys.readouterr().err


# --- Resuming ---


def cut_state(path):
    (path / STATE).write_bytes(cut((path / STATE).read_bytes()))


def cut_manifest(path):
    (path / MANIFEST).write_text(cut((path / MANIFEST).read_text()))


def other_format(path):
    change(format=99)(path / MANIFEST)


def no_adapter(path):
    (path / FILE_NAME).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_state, f"{STATE} is missing, cut short or changed; resume from another checkpoint"),
        (no_adapter, f"{FILE_NAME} is missing, cut short or changed; resume from another checkpoint"),
        (
            cut_manifest,
            f"not a checkpoint of this program ({MANIFEST} is missing or damaged); name a folder checkpoint-",
        ),
        (other_format, "written in format 99, this version reads format 1; go on with the version that wrote it"),
    ],
)
def test_a_damaged_checkpoint_is_not_resumed_from(shared, copied_run, refused, damage, said):
    damage(copied_run / "checkpoint-2")
    command = train_command(shared, max_train_steps=3, resume_from_checkpoint="out/checkpoint-2")
    (line,) = refused(*command)
    assert line.startswith(f"out/checkpoint-2: {said}")
    assert find_latest(copied_run).step == 1


@pytest.mark.parametrize("path", ["nowhere", "dog", "dog/0.png", "c" * 300])
def test_a_path_without_a_checkpoint(train_refused, path):
    (line,) = train_refused(resume_from_checkpoint=path)
    place = path if os.path.exists(path) else f"out/{path}"
    assert line.startswith(
        f"{place}: not a checkpoint of this program ({MANIFEST} is missing or damaged); name a folder"
    )


def test_a_checkpoint_that_is_further_than_the_run(train_refused, run):
    (line,) = train_refused(max_train_steps=1, resume_from_checkpoint=run / "checkpoint-2")
    assert line == (
        f"{run}/checkpoint-2: 2 steps done, the run would end after 1; "
        "raise --max_train_steps, or choose another --output_dir"
    )


def test_the_checkpoint_of_another_rank(run, train_refused):
    (line,) = train_refused(rank=8, resume_from_checkpoint=run / "checkpoint-1")
    assert line.startswith(f"{run}/checkpoint-1: belongs to another training (--rank: 4 there, 8 here")
    assert line.endswith("); repeat that training's flags, or start anew in another --output_dir")


# --- Sampling and comparing ---


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora", "nowhere"], "nowhere: no such file or folder; a name on the hub has the form owner/model"),
        (["--lora", "./dog/lora.safetensors"], "./dog/lora.safetensors: no such file or folder; check the path"),
        (["--lora", "dgo"], "dgo: no such file or folder; did you mean dog?"),
        (["--lora", "dog"], f"dog: holds no LoRA, such as {FILE_NAME} (found: 0.png, 1.png, 2.png)"),
        (["--lora", "dog/0.png"], "dog/0.png: not a readable weight file (it is a PNG picture)"),
        (
            ["--lora", f"model/{UNET_WEIGHTS}"],
            f"model/{UNET_WEIGHTS}: this is a UNet alone, in diffusers' naming without its folder; expected a LoRA",
        ),
        (["--height", "100"], "--height: expected a multiple of 8, at least 32, got 100"),
        (["--scheduler", "plmss"], "--scheduler: expected one of ddim, ddpm, pndm, lms, euler, "),
        (["--sampler", "DPMPP2SAncestralSampler"], "--sampler: DPMPP2SAncestralSampler is not in this version; "),
        (
            ["--scheduler", "edm_euler"],
            "--scheduler edm_euler: is for models trained in EDM's formulation, and",
        ),
        (["--guidance_rescale", "2"], "--guidance_rescale: expected from 0 to 1, got 2.0"),
        (["--eta", "1.5"], "--eta: expected from 0 to 1, got 1.5"),
        (["--sd_xl_base_ratios", "1.1"], "--sd_xl_base_ratios: expected one of 0.5, 0.52, "),
        (
            ["--sd_xl_base_ratios", "1.0", "--width", "512"],
            "--sd_xl_base_ratios: is a height and a width; give it without --height and --width",
        ),
        (["--clip_skip", "-1"], "--clip_skip: expected at least 0, got -1"),
        (["--clip_skip", "1"], "--clip_skip: expected 0 to 0, as its text encoders have layers, got 1"),
        (["--vae_whole_up_to", "100"], "--vae_whole_up_to: expected a multiple of 8, at least 32, got 100"),
        (
            ["--num_rows", "2", "--num_images_per_prompt", "3"],
            "--num_images_per_prompt: is --num_rows times --num_cols; give it without them",
        ),
        (["--num_cols", "0"], "--num_cols: expected at least 1, got 0"),
        (["--task", "img2img"], "--task img2img: needs --image, the picture to start from"),
        (["--task", "outpaint"], "--task: expected one of txt2img, img2img, inpaint, or None, got 'outpaint'"),
        (
            ["--task", "txt2img", "--img", "dog/0.png"],
            "--image: a picture is started from with --task img2img only",
        ),
        (["--image", "nowhere.png"], "nowhere.png: no such file"),
        (["--image", "empty.txt"], "empty.txt: not a picture of a known format; "),
        (["--image", "dog/0.png", "--strength", "0"], "--strength: expected greater than 0 and at most 1, got 0.0"),
        (
            ["--image", "dog/0.png", "--strength", "0.01"],
            "--strength 0.01: of 25 steps none is left; raise --strength or --num_inference_steps",
        ),
        (["--orig_width", "100"], "--orig_height: give it together with --orig_width"),
        (["--target_height", "100"], "--target_height: give it together with --target_width"),
        (["--crop_coords_top", "-1"], "--crop_coords_top: expected at least 0, got -1"),
        (["--aesthetic_score", "11"], "--aesthetic_score: expected from 0 to 10, got 11.0"),
        (["--refiner", "nowhere"], "nowhere: no such file or folder; a name on the hub has the form owner/model"),
        (["--denoising_end", "0.8"], "--denoising_end: needs --refiner, which goes on from there"),
        (
            ["--refiner", "model", "--denoising_end", "1"],
            "--denoising_end: expected greater than 0 and less than 1, got 1.0",
        ),
        (
            ["--refiner", "model", "--denoising_end", "0.8", "--refiner_strength", "0.3"],
            "--denoising_end: the base stops there, with --refiner_strength it finishes; give one of them",
        ),
        (
            ["--lora", "a,b,c", "--lora_scale", "1,0.5"],
            "--lora_scale: expected one number, or one for each of --lora a, b, c",
        ),
        (["--lora_scale", "strong"], "--lora_scale: expected a list of numbers, got "),
        (["--add_pipeline", "True"], "--add_pipeline: name the second model with --refiner"),
        (["--output_dir", "dog/0.png"], "dog/0.png: cannot be written (Not a directory); choose another folder"),
        (["--prompt", "dog/0.png"], "--prompt dog/0.png: not readable as UTF-8 text ("),
        (["--prompt", "empty.txt"], "--prompt empty.txt: the file holds no prompt; write one per line"),
        (["--prompt", "emtpy.txt"], "--prompt emtpy.txt: no such file; did you mean empty.txt?"),
        (
            ["--variant", "fp16"],
            "model: unet/diffusion_pytorch_model.fp16.safetensors is missing (found: config.json, ",
        ),
        (
            ["--image", "dog/0.png", "--transparent_background", "blue"],
            "--transparent_background: expected white, black, grey or #rrggbb, got 'blue'",
        ),
        (["--pretrained_model_name_or_path", "dog"], "dog is not a model folder in diffusers' layout: "),
    ],
)
def test_pictures_that_cannot_be_sampled(place, refused, flags, said):
    (place / "empty.txt").write_text("\n")
    (line,) = refused(
        *("sample", "--pretrained_model_name_or_path", "model", "--prompt", "a star", "--output_dir", "out"), *flags
    )
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora", ""], "--lora: missing; name the adapter to compare the base with"),
        (["--clip", "dog"], "dog holds no CLIP model: config.json is missing; is the download complete?"),
        (["--instance_data_dir", "nowhere"], "nowhere: no such folder; expected a folder with pictures"),
        (["--instance_data_dir", "dgo"], "dgo: no such folder; did you mean dog?; expected a folder with pictures"),
        (["--clip", "./clip"], "./clip: no such file or folder; check the path"),
        (["--dino", "./dino"], "./dino: no such file or folder; check the path"),
        (["--dino", "dog"], "dog holds no DINO model: config.json is missing; is the download complete?"),
        (
            ["--dino", "model/clip"],
            "model/clip holds no DINO model but one of the type clip; name another, such as face",
        ),
        (
            ["--clip", "encoder"],
            "encoder holds no CLIP model but one of the type vit; name another, such as openai/clip",
        ),
        (
            ["--dino", "wider"],
            "wider/model.safetensors does not fit ViTModel: 21 of another shape (embeddings.cls_token: ",
        ),
        (["--dino", "odd"], "odd/config.json: image_size 28 is not a multiple of patch_size 8: no network has these"),
        (["--dino", "unnormalised"], "unnormalised: preprocessor_config.json is missing; is the download complete?"),
        (
            ["--held_out_data_dir", "one"],
            "--held_out_data_dir: 0.png is in --instance_data_dir, too; take it out of one",
        ),
        (["--other_data_dir", "nowhere"], "nowhere: no such folder; expected a folder with pictures"),
        (["--num_class_images", "1"], "--num_class_images: expected at least 2, got 1"),
    ],
)
def test_a_comparison_that_cannot_be_made(place, refused, flags, said):
    write_random_dino(place)
    config = json.loads((place / "encoder" / "config.json").read_text())
    for name, other in {"wider": {"hidden_size": 48}, "odd": {"patch_size": 8}, "unnormalised": {}}.items():
        shutil.copytree(place / "encoder", place / name)
        (place / name / "config.json").write_text(json.dumps(config | other))
    (place / "unnormalised" / "preprocessor_config.json").unlink()
    (place / "one").mkdir()
    shutil.copy(place / "dog" / "0.png", place / "one")
    (line,) = refused(
        *("evaluate", "--pretrained_model_name_or_path", "model", "--prompt", "a star", "--class_prompt", "a photo"),
        *("--instance_data_dir", "dog", "--output_dir", "out"),
        *(flags if "--lora" in flags else ["--lora", "nowhere", *flags]),
    )
    assert line.startswith(said)


def test_a_comparison_without_a_clip_model_says_which_to_name(place, refused):
    shutil.rmtree(place / "model" / "clip")
    command = [
        "evaluate",
        "--pretrained_model_name_or_path",
        "model",
        "--prompt",
        "a star",
        "--class_prompt",
        "a photo",
    ]
    (line,) = refused(*command, "--instance_data_dir", "dog", "--output_dir", "out", "--lora", "nowhere")
    assert line == "--clip: model has no CLIP model; name one, such as openai/clip-vit-base-patch32"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--base", "mdoel"], "mdoel: no such file or folder; did you mean model?"),
        (["--lora", "./nowhere"], "./nowhere: no such file or folder; check the path"),
    ],
)
def test_what_cannot_be_merged(refused, flags, said):
    given = {"--base": "model", "--lora": "model/unet", **dict([flags])}
    assert refused("merge", *(text for flag in given.items() for text in flag), "--target", "out") == [said]
