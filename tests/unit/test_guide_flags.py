"""Every flag of the scripts and guides that users come from is taken, converted, ignored with a note, or refused by
name with the reason; and their commands are answered as a whole."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth_ms.config import spellings
from dreambooth_ms.config.commands import ConvertConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.config.sample import SampleConfig
from dreambooth_ms.config.schema import schema_fields
from dreambooth_ms.config.spellings import HARMLESS, NOTHING, REFUSED
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError
from tests import published_flags as published
from tools import (
    train_custom_diffusion,
    train_dreambooth,
    train_dreambooth_lora,
    train_dreambooth_lora_sdxl,
    train_textual_inversion,
)

ROOT = Path(__file__).parents[2]
BASE, SUBJECT = "--pretrained_model_name_or_path base", "--instance_data_dir dog --instance_prompt 'a sks dog'"
TRAIN, SAMPLE = f"{BASE} {SUBJECT}", f"{BASE} --prompt x"


def answer(schema, line):
    """The configuration, or the problems; and the notes."""
    notes: list[str] = []
    try:
        return load(schema, shlex.split(line), notes.append), notes
    except ConfigError as error:
        return str(error).splitlines(), notes


EVERY_FLAG = {
    "diffusers full": (TrainConfig, published.FULL_SCRIPT),
    "diffusers lora": (TrainConfig, published.LORA_SCRIPT),
    "diffusers sdxl": (TrainConfig, published.SDXL_SCRIPT),
    "diffusers advanced": (TrainConfig, published.ADVANCED_SCRIPT),
    "diffusers custom diffusion": (TrainConfig, published.CUSTOM_DIFFUSION_SCRIPT),
    "diffusers textual inversion": (TrainConfig, published.TEXTUAL_INVERSION_SCRIPT),
    "notebooks": (TrainConfig, published.NOTEBOOKS),
    "mindone sdxl": (TrainConfig, published.MINDONE_SDXL_TRAINING),
    "mindone diffusers": (TrainConfig, published.MINDONE_DIFFUSERS_TRAINING),
    "mindone sd2": (TrainConfig, published.MINDONE_SD2_TRAINING),
    "mindone sampling": (SampleConfig, published.MINDONE_SAMPLING),
    "conversion": (ConvertConfig, published.CONVERSION),
    "kohya": (TrainConfig, published.KOHYA_TRAINING),
}


@pytest.mark.parametrize("source", EVERY_FLAG)
def test_no_flag_of_a_guide_is_unknown(source):
    schema, names = EVERY_FLAG[source]
    known = schema_fields(schema)
    for name in names:
        spelt = any(field in known for field in (name, *spellings.SPELLINGS.get(name, ())))
        answered = name in HARMLESS or name in REFUSED or name in spellings.CONVERTED
        assert spelt or answered or name in ("config", spellings.BASE_THEN_ADAPTERS), name
        for value in ("", "x"):
            lines, _ = answer(schema, f"--{name} {value}")
            assert not any("unknown flag" in line for line in lines), lines


@pytest.mark.parametrize("name", spellings.REFUSED)
def test_a_refusal_names_only_flags_that_are_there(name):
    reason, _, gives = REFUSED[name]
    every = {*schema_fields(TrainConfig), *schema_fields(SampleConfig), *schema_fields(ConvertConfig), "config"}
    named = {word.strip("-,;:.()") for word in reason.split() if word.startswith("--")}
    assert named <= every
    assert gives == spellings.ALL or every.issuperset(gives)
    assert not {*REFUSED[name].unless} & {*NOTHING}


COMMANDS = {
    # diffusers' README, with Prior preservation and 8-bit Adam
    f"--method full {TRAIN} --class_data_dir dogs --with_prior_preservation --prior_loss_weight=1.0 "
    "--class_prompt 'a dog' --resolution=512 --train_batch_size=1 --gradient_accumulation_steps=2 "
    "--gradient_checkpointing --use_8bit_adam --set_grads_to_none --learning_rate=2e-6 --lr_scheduler=constant "
    "--lr_warmup_steps=0 --num_class_images=200 --max_train_steps=800": (
        [],
        [f"--set_grads_to_none is accepted and ignored: {HARMLESS['set_grads_to_none']}"],
    ),
    # The same for LoRA, as written there
    f"{TRAIN} --checkpointing_steps=100 --report_to=wandb --validation_prompt='A dog' --validation_epochs=50 --seed=0 "
    "--push_to_hub": ([], []),
    # Custom Diffusion, several concepts
    f"--method custom_diffusion {BASE} --concepts_list=list.json --with_prior_preservation --real_prior "
    "--prior_loss_weight=1.0 --resolution=512 --train_batch_size=2 --learning_rate=1e-5 --lr_warmup_steps=0 "
    "--max_train_steps=500 --num_class_images=200 --scale_lr --hflip --modifier_token '<new1>+<new2>'": ([], []),
    # Its command for faces
    f"--method custom_diffusion {TRAIN} --class_data_dir=samples_person --with_prior_preservation --real_prior "
    "--prior_loss_weight=1.0 --class_prompt=person --train_batch_size=2 --learning_rate=5e-6 --lr_warmup_steps=0 "
    "--max_train_steps=1000 --num_class_images=200 --scale_lr --hflip --noaug --freeze_model crossattn "
    "--modifier_token '<new1>' --enable_xformers_memory_efficient_attention": (
        [],
        [
            "--enable_xformers_memory_efficient_attention is accepted and ignored: "
            f"{HARMLESS['enable_xformers_memory_efficient_attention']}"
        ],
    ),
    # The advanced script's words
    f"{TRAIN} --train_text_encoder_ti --train_text_encoder_ti_frac=0.5 --token_abstraction=TOK "
    "--num_new_tokens_per_abstraction=2": ([], []),
    # The practitioner's guide on Windows
    f"--pretrained_model_name_or_path=m --pretrained_vae_name_or_path=m/vae --output_dir=models {SUBJECT} --seed=1337 "
    "--mixed_precision=fp16 --lr_scheduler=constant --use_8bit_adam --train_batch_size=1 --max_train_steps=800 "
    "--save_interval=10000 --learning_rate=1e-6 --lr_warmup_steps=0 --gradient_checkpointing --save_unet_half "
    "--last_epoch=-1 --lr_cycles=1 --n_save_sample=4 --not_cache_latents": (
        [],
        [f"--not_cache_latents is accepted and ignored: {HARMLESS['not_cache_latents']}"],
    ),
    # kohya's train_network.py
    f"{BASE} --train_data_dir=train --output_dir=out --output_name=dog --resolution=512,512 --network_alpha=8 "
    "--network_module=networks.lora --network_dim=16 --optimizer_type=AdamW8bit --learning_rate=1e-4 --unet_lr=1e-4 "
    "--lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=3 --lr_warmup_steps=50 --max_train_steps=800 "
    "--save_model_as=safetensors --save_precision=fp16 --mixed_precision=fp16 --cache_latents --xformers "
    "--max_token_length=75": (
        [],
        [
            f"--{name} is accepted and ignored: {HARMLESS[name]}"
            for name in ("output_name", "save_precision", "cache_latents", "xformers")
            if name in HARMLESS
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_guide_is_answered(command):
    problems, notes = COMMANDS[command]
    found, said = answer(TrainConfig, command)
    if problems:
        assert found == problems
    else:
        assert isinstance(found, TrainConfig), found
        assert said == notes


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ("--optimizer_type AdamW8bit", {"optimizer": "AdamW", "use_8bit_adam": True}),
        ("--optimizer adamw_8bit", {"optimizer": "AdamW", "use_8bit_adam": True}),
        ("--optimizer AdamW8bit --use_8bit_adam", {"optimizer": "AdamW", "use_8bit_adam": True}),
        ("--optim adamw", {"optimizer": "AdamW", "use_8bit_adam": False}),
        ("--resolution 768,768", {"resolution": 768}),
        ("--unet_lr 1e-4 --learning_rate 1e-4", {"learning_rate": 1e-4}),
        ("--use_lora False", {"method": "full"}),
        ("--use_lora True", {"method": "lora"}),
        ("--lora_ft_text_encoder True --text_encoder_lr 5e-5", {"train_text_encoder": True}),
        ("--random_crop False", {"center_crop": True}),
        ("--random_crop", {"center_crop": False}),
        ("--v_parameterization", {"prediction_type": "v_prediction"}),
        ("--v_parameterization --zero_terminal_snr", {"rescale_betas_zero_snr": True}),
        ("--input_perturbation 0.1", {"ip_noise_gamma": 0.1}),
        ("--timestep_range 100 900", {"min_timestep": 100, "max_timestep": 900}),
        ("--timestep_range 100,900", {"min_timestep": 100, "max_timestep": 900}),
        ("--min_timestep 100 --max_timestep 900", {"min_timestep": 100, "max_timestep": 900}),
        ("--lr_scheduler cosine_with_hard_restarts --lr_cycles 2", {"lr_scheduler": "cosine_with_restarts"}),
        ("--validation_prompt x --sample_every_n_epochs 2", {"validation_epochs": 2}),
        ("--save_unet_half", {"save_precision": "fp16"}),
        ("--save_precision float", {"save_precision": "fp32"}),
        ("--clip_stop_at_last_layers 2", {"clip_skip": 1}),
        ("--train_data_repeats 4", {"repeats": 4}),
        ("--report_to wandb", {"report_to": ["wandb"]}),
        ("--log_with tensorboard", {"report_to": ["tensorboard"]}),
        ("--wandb", {"report_to": ["wandb"]}),
        ("--wandb False", {"report_to": ["tensorboard"]}),
        ("--log_tracker_name pets --wandb_run_name Rex", {"tracker_project_name": "pets", "tracker_run_name": "Rex"}),
        ("--wandb_project SD-Dreambooth-HF", {"tracker_project_name": "SD-Dreambooth-HF"}),
    ],
)  # fmt: skip
def test_what_is_written_in_another_way_is_converted(flags, fields):
    config, notes = answer(TrainConfig, f"{TRAIN} {flags}")
    assert isinstance(config, TrainConfig), config
    assert config.values().items() >= fields.items()
    assert not notes


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--resolution 512,768", "--resolution: expected a whole number, got '512,768'"),
        ("--unet_lr 1e-4 --learning_rate 1e-5", "--learning_rate: means the same as --unet_lr; give one of them"),
        ("--network_module lycoris.kohya", f"--network_module: {REFUSED['network_module'].reason}"),
    ],
)
def test_what_is_not_the_same_here_is_refused(flags, line):
    assert answer(TrainConfig, f"{TRAIN} {flags}") == ([line], [])


@pytest.mark.parametrize(
    ("spelling", "scheduler"),
    [
        *[("Euler a", "euler_a"), ("Euler", "euler"), ("LMS", "lms"), ("Heun", "heun"), ("PLMS", "pndm")],
        *[("DPM++ 2M", "dpm++_2m"), ("DPM++ 2M Karras", "dpm++_2m_karras"), ("DPM++ SDE", "dpm++_sde")],
        *[("DDIM", "ddim"), ("UniPC", "unipc")],
        *[("euler_ancestral", "euler_a"), ("dpmpp_2m", "dpm++_2m"), ("dpmpp_2m_karras", "dpm++_2m_karras")],
        *[("dpmpp_sde_gpu", "dpm++_sde"), ("uni_pc", "unipc"), ("deis", "deis"), ("lcm", "lcm"), ("ddpm", "ddpm")],
        *[("dpm_solver++", "dpm++_2m"), ("k_euler_a", "euler_a"), ("DPMPP2MSampler", "dpm++_2m")],
        *[("EDMDPMSolverMultistepScheduler", "edm_dpm++_2m"), ("DPMSolverSinglestepScheduler", "dpm++_2s")],
    ],
)  # fmt: skip
def test_samplers_of_other_programs_are_spellings(spelling, scheduler):
    config, _ = answer(SampleConfig, f"{SAMPLE} --sampler_name '{spelling}'")
    assert config.pictures.scheduler == scheduler


@pytest.mark.parametrize(
    ("spelling", "nearest"),
    [
        *[(f"DPM++ {kind}", "dpm++_sde") for kind in ("2M SDE", "2M SDE Karras", "3M SDE Exponential", "SDE Karras")],
        *[("dpmpp_2m_sde_gpu", "dpm++_sde"), ("DPM++ 2S a", "dpm++_2s"), ("DPM++ 2S a Karras", "dpm++_2s")],
        *[("DPM2 a Karras", "euler_a"), ("LMS Karras", "lms"), ("DPM fast", "dpm++_2m"), ("dpm_adaptive", "dpm++_2m")],
        *[("karras", "dpm++_2m_karras"), ("euler_cfg_pp", "euler"), ("DPMPP2SAncestralSampler", "dpm++_2s")],
        *[("DPM2", "heun"), ("KDPM2DiscreteScheduler", "heun"), ("ipndm_v", "pndm")],
    ],
)  # fmt: skip
def test_samplers_that_are_not_here_are_refused_with_the_nearest(spelling, nearest):
    lines, _ = answer(SampleConfig, f"{SAMPLE} --scheduler '{spelling}'")
    assert lines == [f"--scheduler: {spelling} is not in this version; the nearest is {nearest}"]


def test_no_spelling_of_a_choice_stands_for_two():
    for field, one in {**schema_fields(TrainConfig), **schema_fields(SampleConfig)}.items():
        if isinstance(one.kind, tuple):
            assert [spellings.choice_of(field, one.kind, choice) for choice in one.kind] == [*one.kind]
            assert len({*map(spellings.squeezed, one.kind)}) == len(one.kind)


@pytest.mark.parametrize(
    ("flags", "skipped"),
    [("--clip_skip 1", 1), ("--clip_stop_at_last_layers 2", 1), ("--clip_stop_at_last_layers 1", 0),
     ("--stop_at_clip_layer -2", 1), ("--stop_at_clip_layer=-1", 0)],
)  # fmt: skip
def test_layers_of_the_text_encoder_are_counted_as_each_program_counts(flags, skipped):
    config, _ = answer(SampleConfig, f"{SAMPLE} {flags}")
    assert config.pictures.clip_skip == skipped


def test_a_count_of_layers_that_is_none_is_refused():
    assert answer(SampleConfig, f"{SAMPLE} --clip_stop_at_last_layers two")[0] == [
        "--clip_stop_at_last_layers: expected a whole number, got 'two'"
    ]
    assert answer(SampleConfig, f"{SAMPLE} --clip_stop_at_last_layers 0")[0] == [
        "--clip_skip: expected at least 0, got -1"
    ]


@pytest.mark.parametrize(
    ("schema", "flags", "line"),
    [
        (SampleConfig, "--num_images 2", "--num_images: unknown flag; did you mean --num_images_per_prompt?"),
        (SampleConfig, "--num_image 2", "--num_image: unknown flag; did you mean --num_images_per_prompt?"),
        (
            TrainConfig,
            "--num_images 2",
            "--num_images: unknown flag; did you mean --num_class_images or --num_validation_images?",
        ),
        (TrainConfig, "--lerning_rate 1", "--lerning_rate: unknown flag; did you mean --learning_rate?"),
        (TrainConfig, "-rank 1", "-rank: a flag begins with two dashes; did you mean --rank?"),
        (
            TrainConfig,
            "--seed 1 -use_txt_as_label",
            "-use_txt_as_label: a flag begins with two dashes; did you mean --use_txt_as_label?",
        ),
        (SampleConfig, "--prompt=x -seed=1", "-seed: a flag begins with two dashes; did you mean --seed?"),
    ],
)  # fmt: skip
def test_a_suggestion_is_what_was_meant(schema, flags, line):
    required = TRAIN if schema is TrainConfig else BASE if "--prompt" in flags else SAMPLE
    assert answer(schema, f"{required} {flags}") == ([line], [])


def test_a_required_flag_without_a_dash_is_not_also_missing():
    lines, _ = answer(TrainConfig, f"{BASE} --instance_data_dir dog -instance_prompt 'a sks dog'")
    assert lines == ["-instance_prompt: a flag begins with two dashes; did you mean --instance_prompt?"]


@pytest.mark.parametrize("text", ["-blurry", "-seed of a flower", "-0.5", "-"])
def test_a_text_may_begin_with_a_dash(text):
    config, _ = answer(SampleConfig, f"{SAMPLE} --negative_prompt '{text}'")
    assert config.pictures.negative_prompt == text


MINDONE_FILES = {
    "training": "version: SDXL-base-1.0\nmodel:\n  target: gm.DiffusionEngineDreamBooth\n  params: {}\n"
    "optim:\n  base_learning_rate: 1.0e-4\ndata:\n  per_batch_size: 1\n  total_step: 1000\n",
    "inference": "model:\n  target: gm.models.diffusion.DiffusionEngine\n  params:\n    scale_factor: 0.13025\n",
    "newer": "model:\n  pretrained: x\nenv:\n  mode: 0\n",
}


@pytest.mark.parametrize("schema", [TrainConfig, SampleConfig])
@pytest.mark.parametrize("kind", MINDONE_FILES)
def test_a_file_of_mindone_is_recognised_in_one_line(tmp_path, schema, kind):
    path = tmp_path / "mindone.yaml"
    path.write_text(MINDONE_FILES[kind], encoding="utf-8")
    assert answer(schema, f"--config {path} --weight base")[0] == [
        f"--config {path}: is of mindone's scripts; the file of its name in configs/ here has its values"
    ]


def test_a_file_of_another_command_is_recognised_in_one_line():
    path = ROOT / "configs" / "training" / "sd_v1_5_dreambooth_lora.yaml"
    (line,) = answer(SampleConfig, f"--config {path}")[0]
    assert line.startswith(f"--config {path}: is for another command; sections model, data, ")


def test_a_space_after_a_backslash_is_said():
    assert answer(TrainConfig, f"{TRAIN} --rank 4 ' '")[0] == [
        "--rank: unexpected ' ' after its value; a line that goes on ends in \\ and no space"
    ]


def test_a_file_of_kohya_is_recognised_in_one_line(tmp_path):
    path = tmp_path / "dog.toml"
    path.write_text('[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "dog"\n', encoding="utf-8")
    (line,) = answer(TrainConfig, f"--config {path} --weight base")[0]
    assert line.startswith(f"--config {path}: expected YAML; of a TOML file")
    assert answer(TrainConfig, f"{BASE} --dataset_config {path}")[0].data.concepts_list == str(path)


# --- The scripts under their own names ---

SCRIPTS = {
    train_dreambooth: published.FULL_SCRIPT,
    train_dreambooth_lora: published.LORA_SCRIPT,
    train_dreambooth_lora_sdxl: published.SDXL_SCRIPT,
    train_custom_diffusion: published.CUSTOM_DIFFUSION_SCRIPT,
    train_textual_inversion: published.TEXTUAL_INVERSION_SCRIPT,
}
METHODS = {
    train_dreambooth: "full",
    train_custom_diffusion: "custom_diffusion",
    train_textual_inversion: "textual_inversion",
}
EVERY_SCRIPT = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__.rpartition(".")[2])


@EVERY_SCRIPT
@pytest.mark.parametrize("flags", ["", "--validation_prompt x --train_text_encoder"])
def test_a_script_has_its_published_defaults(script, flags):
    new_words = script in (train_custom_diffusion, train_textual_inversion)
    flags = flags.replace("--train_text_encoder", "") if new_words else flags
    named = "--modifier_token '<new1>'" if new_words else ""
    argv = train_dreambooth.with_defaults(shlex.split(f"{TRAIN} {flags} {named}"), script.DEFAULTS)
    config, notes = answer(TrainConfig, shlex.join(argv))
    # The published rate of the LoRA script's text encoder is the UNet's.
    assert all("the default learning rate" in note for note in notes)
    values = config.values() | {"learning_rate": config.learning_rate, "output_dir": str(config.output_dir)}
    given = ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "modifier_token")
    # Of passes, which --max_train_steps takes the place of; what words start from without a flag; and of the prior.
    given += ("repeats", "num_train_epochs") if values["max_train_steps"] else ()
    given += ("initializer_token", "num_class_images") if new_words else ()
    for name, default in SCRIPTS[script].items():
        only_if_used = "text_encoder" in name or "validation" in name
        if name in values and name not in given and (flags or not only_if_used) and name not in flags:
            assert values[name] == default, name
    assert values["method"] == METHODS.get(script, "lora")


def test_class_pictures_are_as_many_as_in_the_script():
    line = f"{TRAIN} --with_prior_preservation --class_data_dir cats --class_prompt cat --modifier_token '<new1>'"
    argv = train_dreambooth.with_defaults(shlex.split(line), train_custom_diffusion.DEFAULTS)
    assert answer(TrainConfig, shlex.join(argv))[0].prior.num_class_images == 200


@pytest.mark.parametrize(
    ("flags", "prompt"),
    [
        ("--learnable_property object", "a photo of a <toy>"),
        ("--learnable_property=style", "a painting in the style of <toy>"),
        ("", "a photo of a <toy>"),
        ("--instance_prompt 'my <toy>'", "my <toy>"),
    ],
)
def test_a_command_of_textual_inversion_is_one_of_train(flags, prompt):
    line = f"{BASE} --train_data_dir toys --placeholder_token '<toy>' --initializer_token toy --save_steps 100 {flags}"
    argv = train_textual_inversion.translated(shlex.split(line))
    config, _ = answer(TrainConfig, shlex.join(train_dreambooth.with_defaults(argv, train_textual_inversion.DEFAULTS)))
    assert (config.data.instance_data_dir, config.data.instance_prompt) == ("toys", prompt)
    assert (config.words.modifier_token, config.words.initializer_token) == ("<toy>", "toy")
    assert config.run.checkpointing_steps == 100


def test_a_script_leaves_what_is_given_by_any_name_and_by_a_file():
    sdxl = train_dreambooth_lora_sdxl.DEFAULTS
    assert train_dreambooth.with_defaults(["--image_size", "512", "--unet-lr=1"], sdxl) == [
        "--adam_weight_decay=0.0001", "--image_size", "512", "--unet-lr=1",
    ]  # fmt: skip
    assert train_dreambooth.with_defaults(["--config", "x.yaml"], train_dreambooth.DEFAULTS) == ["--config", "x.yaml"]
    steps = ["--validation_prompt", "x", "--validation_steps", "9"]
    assert train_dreambooth.with_defaults(steps, train_dreambooth_lora.DEFAULTS) == steps


@EVERY_SCRIPT
def test_a_script_runs_from_anywhere(script, tmp_path):
    run = subprocess.run([sys.executable, script.__file__, "--rank", "0"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert "--rank: expected at least 1, got 0" in run.stderr
