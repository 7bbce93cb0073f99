"""DeepFloyd IF and AltDiffusion through the commands: those of diffusers' guide, on small models; what they leave; and
what is refused."""

import json
import shlex
import shutil

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.numpy import load_file

from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.folder_layout import read_json, write_json
from dreambooth_ms.sampling.picture_file import validation_pictures
from dreambooth_ms.training.checkpoint import STATE
from tests.fake_hub import OWNER, TOKEN, point_at, running_hub
from tests.picture_settings import read_settings
from tests.tiny_model import write_random_alt, write_random_if
from tools import train_dreambooth, train_dreambooth_lora
from tools.tiny_base.world import write_subject

T5 = "--pre_compute_text_embeddings --tokenizer_max_length=77 --text_encoder_use_attention_mask"
SMALL_ONES = "--validation_images dog_downsized/1.png dog_downsized/2.png --class_labels_conditioning=timesteps"
COMMON = "--instance_data_dir=dog --gradient_accumulation_steps=1"
PRIOR = "--class_data_dir=class --with_prior_preservation --prior_loss_weight=1.0 --class_prompt='a photo of dog'"
COMMANDS = {
    "IF stage I LoRA": (
        train_dreambooth_lora,
        f"--report_to wandb --pretrained_model_name_or_path=if1 {COMMON} --instance_prompt='a sks dog' --resolution=64 "
        "--train_batch_size=4 --learning_rate=5e-6 --scale_lr --max_train_steps=1200 --validation_prompt='a sks dog' "
        f"--validation_epochs=25 --checkpointing_steps=100 {T5}",
    ),
    "IF stage II LoRA": (
        train_dreambooth_lora,
        f"--report_to wandb --pretrained_model_name_or_path=if2 {COMMON} --instance_prompt='a sks dog' "
        "--resolution=256 --train_batch_size=4 --learning_rate=1e-6 --max_train_steps=2000 "
        f"--validation_prompt='a sks dog' --validation_epochs=100 --checkpointing_steps=500 {T5} {SMALL_ONES}",
    ),
    "IF stage I full": (
        train_dreambooth,
        f"--pretrained_model_name_or_path=if1 {COMMON} --instance_prompt='a photo of sks dog' --resolution=64 "
        "--train_batch_size=4 --learning_rate=1e-7 --max_train_steps=150 --validation_prompt 'a photo of sks dog' "
        f"--validation_steps 25 {T5} --use_8bit_adam --set_grads_to_none --skip_save_text_encoder --push_to_hub",
    ),
    "IF stage II full": (
        train_dreambooth,
        "--report_to wandb --pretrained_model_name_or_path=if2 --instance_data_dir=dog --instance_prompt='a sks dog' "
        "--resolution=256 --train_batch_size=2 --gradient_accumulation_steps=6 --learning_rate=5e-6 "
        "--max_train_steps=2000 --validation_prompt='a sks dog' --validation_steps=150 --checkpointing_steps=500 "
        f"{T5} {SMALL_ONES} --push_to_hub",
    ),
    "AltDiffusion": (
        train_dreambooth,
        f"--pretrained_model_name_or_path=alt {COMMON} --instance_prompt='a photo of sks dog' --resolution=512 "
        "--train_batch_size=1 --learning_rate=5e-6 --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=400 "
        "--push_to_hub",
    ),
    "AltDiffusion with prior preservation": (
        train_dreambooth,
        f"--pretrained_model_name_or_path=alt {COMMON} {PRIOR} --instance_prompt='a photo of sks dog' --resolution=512 "
        "--train_batch_size=1 --learning_rate=5e-6 --lr_scheduler=constant --lr_warmup_steps=0 --num_class_images=200 "
        "--max_train_steps=800 --push_to_hub",
    ),
    "AltDiffusion with its text encoder": (
        train_dreambooth,
        f"--pretrained_model_name_or_path=alt --train_text_encoder --instance_data_dir=dog {PRIOR} "
        "--instance_prompt='a photo of sks dog' --resolution=512 --train_batch_size=1 --use_8bit_adam "
        "--gradient_checkpointing --learning_rate=2e-6 --lr_scheduler=constant --lr_warmup_steps=0 "
        "--num_class_images=200 --max_train_steps=800 --push_to_hub",
    ),
    "AltDiffusion LoRA": (
        train_dreambooth_lora,
        f"--pretrained_model_name_or_path=alt {COMMON} --instance_prompt='a photo of sks dog' --resolution=512 "
        "--train_batch_size=1 --checkpointing_steps=100 --learning_rate=1e-4 --report_to=wandb "
        "--lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=500 "
        "--validation_prompt='A photo of sks dog in a bucket' --validation_epochs=50 --seed=0 --push_to_hub",
    ),
}
# So that a run takes seconds.
SHORT = {
    "--resolution": {"64": "32", "256": "32", "512": "32"},
    "--max_train_steps": dict.fromkeys(("150", "400", "800", "1200", "2000"), "2") | {"500": "5"},
    "--validation_epochs": dict.fromkeys(("25", "50", "100"), "1"),
    "--validation_steps": dict.fromkeys(("25", "150"), "2"),
    "--num_class_images": {"200": "2"},
}
UNET = "diffusion_pytorch_model.safetensors"
FEW = "--validation_inference_steps=2 --num_validation_images=1 --infer_steps=2 --seed=1"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_random_if(home / "if1", levels=0)
    write_random_if(home / "if2", second=True, levels=0, only_cross_attention=True, sample_size=32)
    write_random_alt(home / "alt", levels=0)
    for name in ("bare", "damaged"):
        shutil.copytree(home / "if1", home / name)
    index = read_json(home / "bare" / "model_index.json")
    write_json(home / "bare" / "model_index.json", index | {"text_encoder": [None, None]})
    (home / "damaged" / "tokenizer" / "spiece.model").write_bytes(b"?")
    shutil.copytree(home / "if2", home / "silent", ignore=lambda *_: ["image_noising_scheduler"])
    write_subject(home / "dog")
    (home / "dog_downsized").mkdir()
    for number in (1, 2):
        with Image.open(home / "dog" / f"{number}.png") as picture:
            picture.resize((8, 8)).save(home / "dog_downsized" / f"{number}.png")
    return home


@pytest.fixture
def hub(home, monkeypatch):
    with running_hub() as hub:
        point_at(hub, monkeypatch, home / "hub")
        yield hub


@pytest.fixture(autouse=True)
def there(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("WANDB_MODE", "disabled")


def split(line):
    """The words of a command, its values behind their flags."""
    return [part for word in shlex.split(line) for part in word.split("=", 1)]


def shortened(words):
    return [SHORT.get(flag, {}).get(word, word) for flag, word in zip(["", *words], words, strict=False)]


def train(script, words, output):
    return main(["train", *script.with_defaults([*words, "--output_dir", output], script.DEFAULTS)])


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_the_guide_runs(name, home, capfd, runs, hub):
    script, line = COMMANDS[name]
    words = shortened(split(line))
    output = name.replace(" ", "-")
    more = [word for word in split(f"{FEW} --hub_token={TOKEN}") if word]
    assert train(script, [*words, *more], output) == 0, capfd.readouterr().err
    folder = runs[name] = home / output
    assert TOKEN not in "".join(capfd.readouterr())
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert ("--push_to_hub" in words) == (f"{OWNER}/{output}" in hub.files)
    for uploaded, content in hub.files.get(f"{OWNER}/{output}", {}).items():
        assert uploaded.startswith("images/") or (folder / uploaded).read_bytes() == content
    if "--validation_prompt" in words:
        counts = {len(own) for own in validation_pictures(folder / "validation").values()}
        assert counts == {2 if "--validation_images" in words else 1}
    if script is train_dreambooth_lora:
        tensors = load_file(folder / "pytorch_lora_weights.safetensors")
        assert any("add_k_proj" in key for key in tensors) == name.startswith("IF")
        assert all(".lora." in key for key in tensors)
        return
    model = DiffusionPipeline.from_pretrained(folder) if name.startswith("IF") else None
    if model:
        assert model.scheduler.config.variance_type == "fixed_small"
        assert (model.text_encoder is None) == ("--skip_save_text_encoder" in words)
        base = home / words[words.index("--pretrained_model_name_or_path") + 1]
        ours, before = (load_file(own / "unet" / UNET)["conv_out.weight"] for own in (folder, base))
        assert not np.array_equal(ours[:3], before[:3])
    index = read_json(folder / "model_index.json")
    assert index["_class_name"] in ("IFPipeline", "IFSuperResolutionPipeline", "AltDiffusionPipeline")


def sample(output, *more):
    return main(["sample", "--prompt", "a sks dog", "--num_inference_steps", "2", "--output_dir", output, *more])


def test_what_was_trained_samples_one_stage_behind_the_other(home, runs):
    stages = "--weight", "if1", "--super_resolution", "if2", "--super_resolution_steps", "2", "--seed", "4"
    assert sample("plain", *stages) == 0
    adapters = "--lora", str(runs["IF stage I LoRA"]), "--super_resolution_lora", str(runs["IF stage II LoRA"])
    assert sample("adapted", *stages, *adapters, "--super_resolution_prompt", "a dog") == 0
    assert sample("full", "--weight", str(runs["IF stage I full"]), "--height", "32", "--width", "32") == 2
    pictures = [home / name / "00000.png" for name in ("plain", "adapted")]
    assert not np.array_equal(*(np.asarray(Image.open(path)) for path in pictures))
    settings = read_settings(pictures[1])
    assert settings["super_resolution_prompt"] == "a dog"
    assert settings["noise_level"] == 250
    small = "--image", "dog_downsized/1.png", "--noise_level", "100"
    assert sample("enlarged", "--weight", str(runs["IF stage II full"]), *small) == 0
    assert Image.open(home / "enlarged" / "00000.png").size == (32, 32)
    with Image.open(pictures[0]) as picture:
        assert picture.size == (128, 128)


def test_a_stopped_run_goes_on_bit_for_bit(home):
    """Stage II, on small pictures that have captions, masks and a size of their own, with photographs of the class."""
    words = "--pretrained_model_name_or_path if2 --instance_data_dir captioned --use_txt_as_label --mask_dir masks "
    words += "--resolution 32 --use_aspect_ratio_bucket --max_buckets 1 --train_batch_size 1 --low_res_conditioning "
    words += "--with_prior_preservation --real_prior --class_data_dir reals "
    words += "--class_prompt 'a dog' --num_class_images 2 --checkpointing_steps 1 --seed 1"
    for folder, caption in (("captioned", "a sks dog, {}"), ("reals", "a dog, {}")):
        (home / folder).mkdir()
        for number in (3, 4):
            with Image.open(home / "dog" / f"{number}.png") as picture:
                picture.crop((0, 0, 64, 40)).save(home / folder / f"{number}.png")
            (home / folder / f"{number}.txt").write_text(caption.format(number))
    (home / "masks").mkdir()
    for number in (3, 4):
        Image.linear_gradient("L").resize((64, 40)).save(home / "masks" / f"{number}.png")
    for steps, output in (("2", "whole"), ("1", "parts"), ("2", "parts")):
        assert main(["train", *shlex.split(words), "--max_train_steps", steps, "--output_dir", output]) == 0
    whole, parts = (load_file(home / output / "checkpoint-2" / STATE) for output in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


PLAIN = "--instance_data_dir dog --instance_prompt 'a sks dog' --max_train_steps 2 --resolution 32"


@pytest.mark.parametrize(
    ("base", "flags", "line"),
    [
        ("if1", "--class_labels_conditioning timesteps", "--class_labels_conditioning: is for a second stage"),
        ("alt", "--low_res_conditioning", "--low_res_conditioning: is for a second stage"),
        ("if2", "--validation_prompt x", "--validation_images: missing; this base enlarges pictures"),
        (
            "if2",
            "--with_prior_preservation --class_data_dir no --class_prompt dog",
            "--class_data_dir: this base enlarges pictures and generates none",
        ),
        ("if1", "--train_text_encoder --text_encoder_lr 1e-5", "--train_text_encoder: text_encoder of if1 is T5"),
        ("if1", "--resolution 64", "--resolution 64: if1 was trained on pictures of 32 px; give 32"),
        ("if1", "--tokenizer_max_length 512", "--tokenizer_max_length 512: a prompt is 77 tokens with this base"),
        ("if1", "--output_kohya_format", "--output_kohya_format: programs that read kohya's names have no"),
        ("alt", "--train_new_words --modifier_token <new>", "--modifier_token: new words are for CLIP"),
        ("if1", "--method custom_diffusion", "--method custom_diffusion: trains cross-attention of SD"),
        ("if2", "--validation_prompt x --validation_images nosuch.png", "nosuch.png"),
        ("bare", "", "this model holds no text encoder"),
        ("damaged", "", "spiece.model: no model of sentencepiece"),
        (
            "if2 --class_labels_conditioning timesteps",
            "--low_res_conditioning",
            "small pictures have levels of their own",
        ),
        ("silent", "", "image_noising_scheduler: scheduler_config.json is missing"),
        ("if1", "--pretrained_vae_model_name_or_path alt", "if1: denoises pixels, without an autoencoder"),
    ],
)
def test_what_a_base_does_not_do_is_refused(home, base, flags, line, capfd):
    words = shlex.split(f"--pretrained_model_name_or_path {base} {PLAIN} {flags} --output_dir refused")
    assert main(["train", *words]) == 2
    said = capfd.readouterr().err
    assert line in said
    assert not (home / "refused").exists()


def test_models_are_described_checked_and_kept_in_folders(home, capfd):
    assert main(["inspect", "if2"]) == 0
    said = capfd.readouterr().out
    assert "family: DeepFloyd IF" in said
    assert "missing: nothing" in said
    assert main(["inspect", "alt"]) == 0
    assert "family: AltDiffusion" in capfd.readouterr().out
    assert main(["convert", "if1", "one.safetensors"]) == 2
    assert "if1: DeepFloyd IF is kept in folders alone" in capfd.readouterr().err
    assert main(["convert", "alt", "halves", "--dtype", "fp16"]) == 0
    assert sample("of-halves", "--weight", "halves", "--height", "32", "--width", "32") == 0
    words = shlex.split(f"--pretrained_model_name_or_path if1 {PLAIN} --json")
    capfd.readouterr()
    assert main(["check", *words]) == 0
    assert json.loads(capfd.readouterr().out)["memory"]
