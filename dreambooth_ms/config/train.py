"""The settings of `train`: one dataclass per section, one docstring per field, which `--help` prints."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from dreambooth_ms.config import choices
from dreambooth_ms.config.ranges import (
    DECAY,
    INNER_SHARE,
    MEMORY,
    NOT_EMPTY,
    PART,
    PATH,
    PATTERN,
    SEED,
    SHARE,
    SIDE,
    STEPS,
    ZERO_OR_ONE,
    Range,
    above,
    at_least,
)
from dreambooth_ms.config.rules import Resume, Rule, excludes, needs, no_effect, not_with, only_with, refused_with
from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import Background, BaseModelConfig, DeviceConfig, HubConfig, ScheduleConfig
from dreambooth_ms.config.stopping import StoppingConfig

POLYNOMIAL_END_RATE = 1e-7
"""Where the polynomial schedule ends, as in diffusers."""

_OF_METHODS = choices.read_table(Path(__file__).with_name("methods.yaml"))
RATES, FOLDERS, PROJECTS = (
    {method: own[what] for method, own in _OF_METHODS.items()} for what in ("rate", "folder", "project")
)
"""The default learning rates, folders and trackers' projects of the methods."""

_TRACKERS = {"tensorboard", "wandb", "swanlab", "trackio"}
_SHOWN_AT = Range(
    "one or several of tensorboard, wandb, swanlab and trackio, or all, or none",
    lambda names: names in (["all"], ["none"]) or (bool(names) and _TRACKERS.issuperset(names)),
)

LEAST_PRODIGY_RATE = 0.1
"""Below it the learning rate is likely to be meant for another optimiser; diffusers warns there too."""

OFFSET_NOISE_STRENGTH = 0.1
"""What --offset_noise stands for, as in diffusers."""

CAPTIONS = ("{CAPTION}", "{TXT_PROMPT}")
"""What stands in --prompt_template for a picture's own caption."""

_NAMELESS = Rule(
    lambda values: (
        values["class_prompt"] and {*words_in(values["instance_prompt"])} <= {*words_in(values["class_prompt"])}
    ),
    "--instance_prompt {instance_prompt!r} has no word that --class_prompt {class_prompt!r} has not: the subject has "
    'no name of its own; add a rare word, as in "a photo of sks dog"',
    is_note=True,
)

_UNMASKED = no_effect(
    "without --mask_dir or --alpha_mask",
    when=lambda values: not (values["mask_dir"] or values["alpha_mask"] or values["concepts_list"]),
)
_OF_ONE = ("instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt", "dataset_name")
_IN_THE_FILE = excludes(*_OF_ONE, message=f"names them itself; leave out {', '.join('--' + name for name in _OF_ONE)}")

_ONE_SOURCE = excludes("instance_data_dir", message="and --instance_data_dir are two sources of pictures; give one")
_DATA_SET = only_with("dataset_name")
_BY_PASSES = no_effect("beside --max_train_steps", when=lambda values: values["max_train_steps"] is not None)
_BY_PASSES_ALONE = no_effect(
    "beside --max_train_steps and for a single subject",
    # A subject of several has a weight.
    when=lambda values: values["max_train_steps"] is not None and "weight" not in values,
)

_CUSTOM = only_with("method", "custom_diffusion")
_AUGMENTED = Rule(
    lambda values: values["method"] == "custom_diffusion" and not values["noaug"],
    "--use_aspect_ratio_bucket: custom_diffusion varies the size of pictures in a square; give --noaug with it",
)


def words_in(prompt: str) -> list[str]:
    """The words of a prompt, in small letters."""
    return re.findall(r"\w+", prompt.lower())


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The subject's pictures."""

    instance_data_dir: Annotated[str | None, NOT_EMPTY, PATH, Resume.BY_CONTENT] = None
    """Folder with the pictures of the subject. Required without concepts_list or dataset_name."""
    instance_prompt: Annotated[str | None, NOT_EMPTY, _NAMELESS] = None
    """Prompt that names the subject by its rare token: "a photo of sks dog". Required where no caption replaces it."""
    concepts_list: Annotated[str | None, NOT_EMPTY, PATH, _IN_THE_FILE, Resume.BY_CONTENT] = None
    """Several subjects: a file with a list of them (JSON or YAML), a dataset_config of kohya's scripts, or a folder of
    folders named "10_sks dog": repeats and prompt. docs/data.md has what they hold."""
    dataset_name: Annotated[str | None, NOT_EMPTY, PATH, _ONE_SOURCE, Resume.BY_CONTENT] = None
    """In place of instance_data_dir, a data set's train split: a folder, or owner/name on the Hugging Face hub, with
    pictures or with parquet files. Captions are read by caption_column, or as beside pictures in a folder."""
    dataset_config_name: Annotated[str | None, NOT_EMPTY, _DATA_SET, Resume.BY_CONTENT] = None
    """Folder in it that is used, where there are several."""
    image_column: Annotated[str, NOT_EMPTY, _DATA_SET, Resume.BY_CONTENT] = "image"
    """Column of its parquet files that has the pictures."""
    cache_dir: Annotated[str | None, NOT_EMPTY, PATH, _DATA_SET, Resume.MAY_CHANGE] = None
    """Folder for downloads, and pictures of parquet files. None: huggingface_hub's cache, and output_dir/cache."""
    repeats: Annotated[float, above(0), _BY_PASSES_ALONE, Resume.MAY_CHANGE] = 1.0
    """How often each picture of the subject comes in a pass of num_train_epochs, and beside those of other subjects."""
    resolution: Annotated[int, SIDE] = 512
    """Side of the square training pictures, in pixels."""
    use_aspect_ratio_bucket: Annotated[bool, _AUGMENTED] = False
    """Train pictures at sizes of several aspect ratios with about the area of resolution x resolution, each at the one
    that cuts off least of it; a step has pictures of one size. Each size is compiled once."""
    max_buckets: Annotated[int | None, at_least(1), only_with("use_aspect_ratio_bucket")] = None
    """At most so many sizes: those at which all pictures together lose least. None: all that some picture needs."""
    debug_arb: Annotated[bool, only_with("use_aspect_ratio_bucket")] = False
    """Write output_dir/crops.png: what is left of the pictures at each size, cropped in the middle."""
    center_crop: bool = False
    """Crop the centre of each picture, in place of a random part."""
    random_flip: bool = False
    """Mirror pictures left to right at random."""
    noaug: Annotated[bool, _CUSTOM] = False
    """Let custom_diffusion see the subject's pictures as they are. Without it they are made smaller, on grey, or
    enlarged, and "a far away ", "very small ", "zoomed in " or "close up " says so before the prompt."""
    mask_dir: Annotated[str | None, NOT_EMPTY, PATH, Resume.BY_CONTENT] = None
    """Folder with a mask per picture, of its name and size: the error counts where it is white, in part where grey."""
    alpha_mask: Annotated[bool, excludes("mask_dir", message="and --mask_dir are two masks; give one of them")] = False
    """The pictures' own opacity is their mask."""
    unmasked_weight: Annotated[float, DECAY, _UNMASKED] = 0.0
    """How much counts what is outside the masks."""
    image_interpolation_mode: choices.Interpolation = "lanczos"
    """Filter used to resize pictures."""
    transparent_background: Background = "white"
    """What pictures are put on where they are transparent: white, black, grey or #rrggbb."""


_COMBINED = only_with("read_prompt_from_txt", "instance", "class", "both")
_TEMPLATE = Range(f"text with {CAPTIONS[0]} in it", lambda text: any(place in text for place in CAPTIONS))


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """What each picture's prompt is, if not the same for all."""

    read_prompt_from_txt: Literal["no", "instance", "class", "both"] = "no"
    """Whose pictures have captions beside them: dog.txt, dog.png.txt or dog.caption for dog.png, each line a caption of
    which a row draws one. What a picture has is combined with its prompt, by prompt_template."""
    use_txt_as_label: bool = False
    """Read the captions beside the subject's pictures, in place of instance_prompt."""
    use_filename_as_label: bool = False
    """Each picture's name without suffix is its prompt; beside the flags above and below only if it has no caption."""
    caption_column: Annotated[str | None, NOT_EMPTY] = None
    """Column of metadata.jsonl or metadata.csv in the folder, whose file_name names the picture: captions are there,
    not in files. Without read_prompt_from_txt they are the subject's and stand in place of instance_prompt."""
    prompt_template: Annotated[str, _TEMPLATE, _COMBINED] = "{PROMPT} {CAPTION}"
    """How read_prompt_from_txt combines them: {PROMPT} is the prompt, {CAPTION} or {TXT_PROMPT} the caption."""
    caption_dropout: Annotated[float, DECAY] = 0.0
    """Share of the subject's rows that read the empty prompt in place of theirs."""
    shuffle_caption: bool = False
    """Rows read the parts of the subject's prompts between commas in an order of their own."""
    keep_tokens: Annotated[int, at_least(0), only_with("shuffle_caption")] = 0
    """Parts at the beginning of a prompt that stay where they are."""

    @property
    def combines(self) -> bool:
        """Whether captions of the subject's pictures are put together with its prompt."""
        return self.read_prompt_from_txt in ("instance", "both") and not self.use_txt_as_label


_HIGH_FOR_TEXT = Rule(
    lambda values: (
        values["learning_rate"] is None
        and values["text_encoder_lr"] is None
        and values["method"] == "lora"
        and values["optimizer"] != "prodigy"
    ),
    f"--train_text_encoder: the default learning rate of {RATES['lora']:g} is the UNet's, and spoils what a text "
    "encoder knows; give a lower --text_encoder_lr, such as 5e-5",
    is_note=True,
)
_LORA = not_with("method", "full", "custom_diffusion", "textual_inversion")
_FROZEN_TEXT = Rule(
    lambda values: values["method"] in ("custom_diffusion", "textual_inversion"),
    "--train_text_encoder: --method {method} trains new words (--modifier_token) in place of the text encoder",
)
_HAS_WORDS = Rule(
    lambda values: values["method"] == "textual_inversion" and not values["modifier_token"],
    "--method textual_inversion: trains new words alone; name them with --modifier_token",
)
_NO_WORD = Rule(
    lambda values: values["method"] == "custom_diffusion" and not values["modifier_token"],
    "--method custom_diffusion trains no new word without --modifier_token: prompts are read by the words of the base",
    is_note=True,
)
_SAVES_TEXT = refused_with("train_text_encoder", True, "--train_text_encoder trains it; leave one of them out")
_NOT_PICKLED = Rule(
    lambda values: values["method"] != "custom_diffusion" and not values["modifier_token"],
    "--no_safe_serialization: LoRAs and models are safetensors; leave it out. `convert` writes other formats",
)
_LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
_IF_TARGETS = ["add_k_proj", "add_v_proj"]
_CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out"]
_RANKED, _LOCON = not_with("adapter", "oft"), only_with("adapter", "locon")
_BLOCKS = Range("from 2 to 64", lambda value: 2 <= value <= 64)
_FACTORS = Range("-1, or at least 1", lambda value: value == -1 or value >= 1)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What is trained."""

    method: Annotated[choices.Method, _HAS_WORDS, _NO_WORD] = "lora"
    """How the subject is taught. lora: a small update beside frozen weights. full: all weights of the UNet.
    custom_diffusion: keys and values of its cross-attention, and new words. textual_inversion: new words alone."""
    freeze_model: Annotated[Literal["crossattn_kv", "crossattn"], _CUSTOM] = "crossattn_kv"
    """What custom_diffusion trains of cross-attention: keys and values, or with crossattn all of it, for faces."""
    train_text_encoder: Annotated[bool, _HIGH_FOR_TEXT, _FROZEN_TEXT] = False
    """Also train the text encoder (both, for SDXL), in the same way as the UNet."""
    tokenizer_max_length: Annotated[int | None, at_least(1)] = None
    """Tokens of a prompt; only as many are taken as the base reads in sampling, too, 77. None: these."""
    text_encoder_use_attention_mask: bool = False
    """Hide from the tokens of a short prompt what fills it up. That follows the base, in training as in sampling: so it
    is with DeepFloyd IF and AltDiffusion, with or without this, and others refuse it."""
    clip_skip: Annotated[int, at_least(0)] = 0
    """Layers left out at the end of the text encoders, in training, class and validation pictures; `sample` needs the
    same. Counted from 0 as in diffusers: 1 is what kohya's and the guides' trainers call --clip_skip 2. Their count
    is --clip_stop_at_last_layers here, as A1111 calls it, since a bare number does not say whose it is."""
    adapter: Annotated[choices.AdapterKind, _LORA] = "lora"
    """The kind of update of lora. locon: of convolutions, too. dora: norm and direction apart. loha, lokr: products of
    two by two, element by element or Kronecker's. oft: rotations. docs/methods.md compares them."""
    rank: Annotated[int, at_least(1), _LORA, _RANKED] = 4
    """Rank of the LoRA update; the size of the file grows with it."""
    lora_alpha: Annotated[int | None, at_least(1), _LORA, _RANKED] = None
    """The update is scaled by lora_alpha / rank. None: equal to the rank, a scale of 1."""
    use_rslora: Annotated[bool, _LORA, _RANKED] = False
    """Scale by lora_alpha / sqrt(rank), so that a large rank learns as fast as a small one."""
    conv_rank: Annotated[int | None, at_least(1), _LORA, _RANKED] = None
    """Rank for 3x3 convolutions, which get an update then, as with locon. None: that of the others."""
    conv_alpha: Annotated[int | None, at_least(1), _LORA, _RANKED] = None
    """lora_alpha for 3x3 convolutions. None: that of the others."""
    rank_pattern: Annotated[str | None, PATTERN, _LORA, _RANKED] = None
    """Other ranks by the ends of layers' names, as {"attn2.to_k": 8}; or for each block of the UNet, as kohya's
    block_dims: 25 numbers for SD 1 and SD 2, 23 for SDXL, of linear layers and 1x1 convolutions. 0: no update."""
    alpha_pattern: Annotated[str | None, PATTERN, _LORA, _RANKED] = None
    """Other values of lora_alpha, in the same form."""
    use_tucker: Annotated[bool, _LOCON] = False
    """Between the factors of 3x3 convolutions a third one has the kernel: fewer numbers."""
    lokr_factor: Annotated[int, _FACTORS, only_with("adapter", "lokr")] = -1
    """Sides of lokr's first factor at most; the smaller, the larger is the file. -1: the two are of about one size."""
    oft_block_size: Annotated[int, _BLOCKS, only_with("adapter", "oft")] = 32
    """Columns that oft rotates together; it has to divide those of every layer."""
    init_lora_weights: Annotated[Literal["gaussian", "pissa"], only_with("adapter", "lora")] = "gaussian"
    """How A and B begin. gaussian: A random, B zero. pissa: with the largest singular values of the weight; the file
    has twice the rank then, and applies to the base as it is."""
    lora_target_modules: Annotated[list[str], NOT_EMPTY, _LORA] = field(default_factory=_LORA_TARGETS.copy)
    """Layers of the UNet that get an update, by the end of their names."""
    lora_dropout: Annotated[float, DECAY, _LORA, not_with("adapter", "dora", "loha", "lokr", "oft")] = 0.0
    """Share of the inputs of each LoRA update that is dropped at random in training."""
    save_precision: Annotated[choices.FloatType | None, Resume.MAY_CHANGE] = None
    """Type of the numbers of the result, and of what lies beside a checkpoint for other programs; what a run goes on
    from is exact in any case. None: fp32 for what was trained, and the base's own for the rest of a model."""
    output_kohya_format: Annotated[bool, _LORA, Resume.MAY_CHANGE] = False
    """Write the LoRA once more, in kohya's names for A1111, Forge and ComfyUI: pytorch_lora_weights_kohya.safetensors.
    The files of loha, lokr, oft and use_tucker have these names without it."""
    no_safe_serialization: Annotated[bool, _NOT_PICKLED, Resume.MAY_CHANGE] = False
    """Write custom_diffusion's weights and new words as PyTorch's .bin, which diffusers' load_attn_procs asks for."""
    skip_save_text_encoder: Annotated[bool, only_with("method", "full"), _SAVES_TEXT, Resume.MAY_CHANGE] = False
    """Write the model of full without its text encoder, which with DeepFloyd IF is most of it."""
    use_ema: bool = False
    """Keep a moving average of the trained weights, and use it for validation and as the result."""
    ema_decay: Annotated[float, DECAY, only_with("use_ema")] = 0.9999
    """Decay of the moving average; in the first steps it is (1 + step) / (10 + step)."""

    @property
    def targets(self) -> list[str]:
        """The ends of names of layers of the UNet that get an update; convolutions, if no others are named."""
        convolves = (self.adapter == "locon" or self.conv_rank) and self.lora_target_modules == _LORA_TARGETS
        return self.lora_target_modules + (_CONVOLUTIONS if convolves else [])

    def targets_in_if(self, reads_pixels: bool) -> list[str]:
        """The same in IF's blocks, whose attention reads text by layers of its own, and pixels or not."""
        if self.lora_target_modules != _LORA_TARGETS:
            return self.targets
        return [one for one in self.targets if reads_pixels or one not in ("to_k", "to_v")] + _IF_TARGETS

    @property
    def suffix(self) -> str:
        """Of files of custom_diffusion and of words."""
        return ".bin" if self.no_safe_serialization else ".safetensors"


OF_CUSTOM_DIFFUSION = "ktn+pll+ucd"
"""What new words start from, as in diffusers' script: rare words that are one token each."""


def split_words(joined: str | None) -> list[str]:
    """The words of a flag."""
    return [word.strip() for word in joined.split("+")] if joined else []


_WORDS = Range(
    "different words put together by +, such as <new1>+<new2>, without a slash",
    lambda joined: all(words := split_words(joined) or [""]) and len(set(words)) == len(words) and "/" not in joined,
)
_TRAINED = Rule(
    lambda values: values["method"] == "full" or (values["method"] == "lora" and not values["train_new_words"]),
    "--modifier_token: new words are trained by --method custom_diffusion or textual_inversion, or beside a LoRA with "
    "--train_new_words",
)
_ENOUGH = Rule(
    lambda values: len(split_words(values["initializer_token"])) < len(split_words(values["modifier_token"])),
    "--initializer_token {initializer_token!r}: expected a word for each of --modifier_token {modifier_token!r}",
)


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """New words, whose vectors are trained."""

    modifier_token: Annotated[str | None, _WORDS, _TRAINED] = None
    """New words for the subjects, put together by +: "<new1>+<new2>". Prompts name the subjects by them."""
    initializer_token: Annotated[str | None, NOT_EMPTY, only_with("modifier_token"), _ENOUGH] = None
    """Words that are one token each, put together by +, whose vectors the new words start from. None: ktn+pll+ucd
    with custom_diffusion, where the vocabulary has them; else random vectors as large as those of the vocabulary."""
    num_vectors: Annotated[int, at_least(1), only_with("modifier_token")] = 1
    """Tokens that each new word stands for; each has a vector of its own."""
    train_new_words: Annotated[bool, needs("modifier_token", "the new words"), only_with("method", "lora")] = False
    """With lora: train the vectors of new words, too (pivotal tuning)."""
    train_text_encoder_ti_frac: Annotated[float | None, INNER_SHARE, only_with("modifier_token")] = None
    """Share of the run after which new words stay as they are. None: they are trained to the end."""

    @property
    def words(self) -> list[str]:
        """The new words."""
        return split_words(self.modifier_token)


_NEVER_WARM = Rule(
    lambda values: values["lr_scheduler"] != "constant" and values["lr_warmup_steps"] >= values["max_train_steps"],
    "--lr_warmup_steps {lr_warmup_steps} is not less than --max_train_steps {max_train_steps}: "
    "the learning rate never arrives at --learning_rate",
    is_note=True,
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: how long, from where, and what it writes."""

    output_dir: Annotated[str | None, NOT_EMPTY, PATH, Resume.MAY_CHANGE] = None
    """Folder for the trained weights and the checkpoints. None: lora-dreambooth-model, dreambooth-model,
    custom-diffusion-model or text-inversion-model, by the method."""
    max_train_steps: Annotated[int | None, at_least(1), _NEVER_WARM, Resume.MAY_CHANGE] = None
    """Number of optimiser steps. None: as many as num_train_epochs takes."""
    num_train_epochs: Annotated[int, at_least(1), _BY_PASSES, Resume.MAY_CHANGE] = 1
    """Passes over the pictures; not used when max_train_steps is given."""
    train_batch_size: Annotated[int, at_least(1), Resume.CUTS_ROWS] = 4
    """Pictures of the subject per step and process; prior preservation adds as many of the class."""
    gradient_accumulation_steps: Annotated[int, at_least(1), Resume.CUTS_ROWS] = 1
    """Batches whose gradients are added up to one optimiser step; a larger batch in the memory of a small one."""
    gradient_checkpointing: bool = False
    """Save memory: compute activations again in the backward pass, in place of keeping them. A step takes longer."""
    max_device_memory: Annotated[str | None, MEMORY] = None
    """Memory of each process, as 16GB; a run that needs more is refused. None: the machine's, shared by all on it."""
    seed: Annotated[int | None, SEED] = None
    """Makes the run repeatable. None: drawn at random and recorded."""
    checkpointing_steps: Annotated[int, at_least(1), Resume.MAY_CHANGE] = 500
    """Steps between checkpoints."""
    checkpoints_total_limit: Annotated[int | None, at_least(1), Resume.MAY_CHANGE] = None
    """Number of checkpoints to keep; the oldest go first. None: all."""
    resume_from_checkpoint: Annotated[str | None, NOT_EMPTY, PATH, Resume.MAY_CHANGE] = None
    """Checkpoint folder to resume from, by its path or its name in output_dir; or latest."""
    accept_changed_data: Annotated[bool, Resume.MAY_CHANGE] = False
    """Go on from a checkpoint although pictures, or the base's weights, are not what they were."""
    logging_dir: Annotated[str, NOT_EMPTY, PATH, Resume.MAY_CHANGE] = "logs"
    """Folder for the TensorBoard log, inside output_dir."""
    report_to: Annotated[list[str], _SHOWN_AT, Resume.MAY_CHANGE] = field(default_factory=lambda: ["tensorboard"])
    """Where the run is shown: tensorboard, wandb, swanlab or trackio, several of them, all that are installed, or none.
    One that fails does not stop the training."""
    tracker_project_name: Annotated[str | None, NOT_EMPTY, Resume.MAY_CHANGE] = None
    """Project of wandb, swanlab and trackio. None: dreambooth-lora, dreambooth, custom-diffusion or textual_inversion,
    by the method."""
    tracker_run_name: Annotated[str | None, NOT_EMPTY, Resume.MAY_CHANGE] = None
    """What the run is called there. None: as output_dir is."""
    profile: Annotated[int | None, at_least(1), Resume.MAY_CHANGE] = None
    """Let MindSpore's profiler record so many steps after the first into output_dir/profile. None: it does not."""


_TEXT_ENCODER = no_effect(
    "without --train_text_encoder or --modifier_token",
    lambda values: not values["train_text_encoder"] and not values["modifier_token"],
)
_OF_ADAM = not_with("optimizer", "adafactor")
_PRODIGY = only_with("optimizer", "prodigy")
_RISES = Rule(
    lambda values: values["lr_scheduler"] == "polynomial" and 0 < values["learning_rate"] <= POLYNOMIAL_END_RATE,
    f"--learning_rate: the polynomial schedule ends at {POLYNOMIAL_END_RATE:g} and must start above it, "
    "got {learning_rate}",
)
_SMALL_FOR_PRODIGY = Rule(
    lambda values: values["optimizer"] == "prodigy" and values["learning_rate"] < LEAST_PRODIGY_RATE,
    "--learning_rate {learning_rate} multiplies what prodigy finds by itself; it is usually 1",
    is_note=True,
)
_NO_WARMUP = no_effect(
    "with --lr_scheduler constant",
    when=lambda values: values["lr_scheduler"] == "constant" and values["lr_warmup_steps"] > 0,
)
_ONE_RATE = refused_with(
    "optimizer", "prodigy", "prodigy has one rate for all weights; leave it out, or choose another --optimizer"
)

_OF_FACTORS = only_with("adapter", "lora", "locon", "dora")


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """The optimiser and its learning rate."""

    learning_rate: Annotated[float | None, above(0), _RISES, _SMALL_FOR_PRODIGY] = None
    """Learning rate after the warm-up. None: 5e-4 for lora and textual_inversion, 5e-6 for full, 1e-5 for
    custom_diffusion; 1 with prodigy, which multiplies its own by it."""
    text_encoder_lr: Annotated[float | None, above(0), _TEXT_ENCODER, _ONE_RATE] = None
    """Learning rate of the text encoder (both, for SDXL), or of new words. None: the same as --learning_rate."""
    loraplus_lr_ratio: Annotated[float | None, above(0), _OF_FACTORS, _ONE_RATE] = None
    """Learning rate of the factor B over that of A (LoRA+); its paper has 16. None: they have the same."""
    scale_lr: bool = False
    """Multiply the learning rates by pictures per step: batch size times accumulation steps times processes."""
    lr_scheduler: choices.LearningRateSchedule = "constant"
    """How the learning rate changes over the run."""
    lr_warmup_steps: Annotated[int, at_least(0), _NO_WARMUP] = 500
    """Steps of linear warm-up; not used by the constant schedule."""
    lr_num_cycles: Annotated[int, at_least(1), only_with("lr_scheduler", "cosine_with_restarts")] = 1
    """Number of cycles of the cosine_with_restarts schedule."""
    lr_power: Annotated[float, above(0), only_with("lr_scheduler", "polynomial")] = 1.0
    """Power of the polynomial schedule."""
    optimizer: Literal["AdamW", "adafactor", "prodigy"] = "AdamW"
    """How gradients become updates. prodigy finds the size of its steps by itself; adafactor keeps next to no state."""
    use_8bit_adam: Annotated[bool, not_with("optimizer", "adafactor", "prodigy")] = False
    """Keep AdamW's moments in 8 bits, a quarter of the memory; matters with full."""
    adam_beta1: Annotated[float, DECAY, _OF_ADAM] = 0.9
    """Decay of the mean of the gradients."""
    adam_beta2: Annotated[float, DECAY, _OF_ADAM] = 0.999
    """Decay of the mean of the squared gradients."""
    adam_weight_decay: Annotated[float, at_least(0)] = 1e-2
    """Decoupled weight decay."""
    adam_weight_decay_text_encoder: Annotated[float | None, at_least(0), _TEXT_ENCODER] = None
    """Weight decay of the text encoder (both, for SDXL). None: the same as --adam_weight_decay."""
    adam_epsilon: Annotated[float, above(0), _OF_ADAM] = 1e-8
    """Added to the denominator of the update."""
    adafactor_scale_parameter: Annotated[bool, only_with("optimizer", "adafactor")] = False
    """Multiply the learning rate of each weight by its root mean square, as in Adafactor's paper."""
    prodigy_beta3: Annotated[float | None, DECAY, _PRODIGY] = None
    """Decay of the sums from which Prodigy estimates its steps. None: the square root of --adam_beta2."""
    prodigy_decouple: Annotated[bool, _PRODIGY] = True
    """Apply weight decay to the weights themselves, as AdamW does, not through the gradients."""
    prodigy_use_bias_correction: Annotated[bool, _PRODIGY] = True
    """Correct Prodigy's moments for their start from zero, as Adam does."""
    prodigy_safeguard_warmup: Annotated[bool, _PRODIGY] = True
    """Keep the learning rate out of Prodigy's estimate, so that a warm-up does not raise it."""
    max_grad_norm: Annotated[float, above(0)] = 1.0
    """Gradients are scaled down to this global norm."""


_PRIOR = only_with("with_prior_preservation")
_OF_CLASS = no_effect(
    "without --with_prior_preservation or --prior_preservation base_output",
    lambda values: not values["with_prior_preservation"] and values["prior_preservation"] != "base_output",
)
_NAMES_CLASS = _OF_CLASS._replace(broken=lambda values: _OF_CLASS.broken(values) and values["keep_best"] != "fidelity")
_ONE_FORM = Rule(
    lambda values: values["with_prior_preservation"],
    "--prior_preservation {prior_preservation}: --with_prior_preservation is class_images; give one of them",
)
_CHANGES_BASE = refused_with(
    "method", "textual_inversion", "--method textual_inversion changes no weight of the base; leave it out"
)
_HAS_UPDATE = Rule(
    lambda values: values["prior_preservation"] == "base_output" and values["method"] in ("full", "custom_diffusion"),
    "--prior_preservation base_output: --method {method} has no update that could be left out; give base_l2",
)
_CLASS_PROMPT = Rule(
    lambda values: (
        values["prior_preservation"] == "base_output" and not (values["class_prompt"] or values["concepts_list"])
    ),
    "--prior_preservation base_output: needs --class_prompt, the prompt that the base answers",
)
_APART = Rule(
    lambda values: (
        values["with_prior_preservation"]
        and (subject := values["instance_data_dir"] or values["dataset_name"])
        and os.path.realpath(subject) == os.path.realpath(values["class_data_dir"])
    ),
    "--class_data_dir: expected another folder than --instance_data_dir, "
    "or class pictures would mix with those of the subject",
)


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Prior preservation: pictures of the class, or the base itself, keep the model from forgetting the class."""

    with_prior_preservation: Annotated[
        bool,
        needs("class_data_dir", "the folder of the class pictures", "concepts_list"),
        needs("class_prompt", "the prompt of the class pictures", "concepts_list", "real_prior"),
    ] = False
    """Train on pictures of the class beside those of the subject."""
    prior_preservation: Annotated[
        Literal["base_l2", "base_output"] | None, _ONE_FORM, _CHANGES_BASE, _HAS_UPDATE, _CLASS_PROMPT
    ] = None
    """The same without class pictures. base_l2: what is added to the base's weights has a price (--base_l2_weight).
    base_output: rows see the subject's pictures under class_prompt, and the target is the base's own answer; for lora.
    class_images is --with_prior_preservation."""
    base_l2_weight: Annotated[float, at_least(0), only_with("prior_preservation", "base_l2")] = 1e-4
    """What base_l2 adds to the loss is so much for each unit of the sum of the squares of all that is added to weights
    of the base: of the whole sum, so that more layers, or a higher rank or rate, ask for less."""
    prior_loss_weight: Annotated[float, at_least(0), _OF_CLASS] = 1.0
    """Weight of the class pictures' loss, or of the difference to the base's answers."""
    class_data_dir: Annotated[str | None, NOT_EMPTY, PATH, _PRIOR, _APART, Resume.BY_CONTENT] = None
    """Folder with the class pictures; those that are missing are generated into it."""
    class_prompt: Annotated[str | None, NOT_EMPTY, _NAMES_CLASS] = None
    """Prompt that names the class, without the rare token: "a photo of dog"."""
    class_negative_prompt: Annotated[str, _PRIOR] = ""
    """What generated class pictures should not show."""
    real_prior: Annotated[bool, _PRIOR] = False
    """Class pictures are photographs, num_class_images of them, each with a caption of its own, and none is generated:
    class_data_dir has pictures with captions beside them, or images/, caption.txt and images.txt, line by line."""
    reg_data_dir: Annotated[str | None, NOT_EMPTY, PATH, only_with("concepts_list"), Resume.BY_CONTENT] = None
    """Folder of folders named "1_dog" with the class pictures, where concepts_list is such a folder."""
    num_class_images: Annotated[int, at_least(1), _PRIOR] = 100
    """Number of class pictures to have, of each class."""
    sample_batch_size: Annotated[int, at_least(1), _PRIOR] = 4
    """Class pictures generated at a time."""
    infer_steps: Annotated[int, STEPS, _PRIOR] = 50
    """Denoising steps for each generated class picture."""
    guidance_scale: Annotated[float, at_least(0), _PRIOR] = 7.5
    """Classifier-free guidance for generated class pictures; 1 turns it off."""

    @property
    def preserves_class(self) -> bool:
        """Whether rows of the class stand beside the subject's."""
        return self.with_prior_preservation or self.prior_preservation == "base_output"

    @property
    def folder(self) -> Path | None:
        """Where the class pictures are; None without prior preservation."""
        return Path(self.class_data_dir) if self.with_prior_preservation and self.class_data_dir else None


_VALIDATES = only_with("validation_prompt")
_SAMPLES = _VALIDATES._replace(broken=lambda values: _VALIDATES.broken(values) and values["keep_best"] != "fidelity")
_GUIDES = no_effect("without guidance", when=lambda values: values["validation_guidance_scale"] <= 1)
_BY_EPOCHS = no_effect("beside --validation_epochs", when=lambda values: values["validation_epochs"] is not None)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Pictures generated during training, to see how far it is."""

    validation_prompt: Annotated[tuple[str, ...] | None, NOT_EMPTY, Resume.MAY_CHANGE] = None
    """Prompt of pictures that are generated during the training, or a text file with one per line; several by the flag
    once more. A base that inpaints draws the middle of the first subject's first picture anew. None: there are none."""
    validation_negative_prompt: Annotated[str, _SAMPLES, _GUIDES, Resume.MAY_CHANGE] = ""
    """What these pictures should not show."""
    validation_images: Annotated[list[str] | None, PATH, _VALIDATES, Resume.MAY_CHANGE] = None
    """For a base that enlarges pictures (IF's second stage): small pictures that are enlarged for each prompt. None:
    there are none."""
    num_validation_images: Annotated[int, at_least(1), _VALIDATES, Resume.MAY_CHANGE] = 4
    """Pictures generated of each prompt each time, always from the same noise."""
    validation_seed: Annotated[int | None, SEED, _SAMPLES, Resume.MAY_CHANGE] = None
    """Names that noise, which is the same for every prompt. None: the run's seed."""
    validation_inference_steps: Annotated[int, STEPS, _SAMPLES, Resume.MAY_CHANGE] = 25
    """Denoising steps of each picture."""
    validation_guidance_scale: Annotated[float, at_least(0), _SAMPLES, Resume.MAY_CHANGE] = 7.5
    """Classifier-free guidance of these pictures; 1 turns it off."""
    validation_steps: Annotated[int, at_least(1), _VALIDATES, _BY_EPOCHS, Resume.MAY_CHANGE] = 100
    """Optimiser steps from one validation to the next."""
    validation_epochs: Annotated[int | None, at_least(1), _VALIDATES, Resume.MAY_CHANGE] = None
    """Passes over the pictures from one validation to the next, in place of validation_steps."""
    validation_scheduler: Annotated[choices.ValidationScheduler, _SAMPLES, Resume.MAY_CHANGE] = (
        "DPMSolverMultistepScheduler"
    )
    """Sampling method, by the name of diffusers' class."""


_ONE_OFFSET = Rule(
    lambda values: values["noise_offset"] > 0,
    f"--offset_noise: is --noise_offset {OFFSET_NOISE_STRENGTH}; give one of them",
)
_NOT_EDM = refused_with(
    "do_edm_style_training", True, "--do_edm_style_training weighs rows by their noise itself; leave one of them out"
)
_LEVELS = refused_with(
    "edm_sampling", "lognormal", "the levels of --edm_sampling lognormal are no timesteps; leave one of them out"
)
_NO_RANGE = Rule(
    lambda values: values["max_timestep"] is not None and values["min_timestep"] >= values["max_timestep"],
    "--max_timestep {max_timestep}: expected more than --min_timestep {min_timestep}",
)
_IN_RANGE = only_with("timestep_bias_strategy", "range")
_OWN_LEVELS = excludes("class_labels_conditioning", message="small pictures have levels of their own; give one of them")
_BIASED = not_with("timestep_bias_strategy", "none")
_HUBER = only_with("loss_type", "huber", "smooth_l1")


@dataclass(frozen=True, kw_only=True)
class LossConfig(ScheduleConfig):
    """What the network learns to predict."""

    snr_gamma: Annotated[float | None, above(0), _NOT_EDM] = None
    """Min-SNR weighting: rows with little noise weigh less; 5.0 is usual. None: all rows weigh the same."""
    debiased_estimation_loss: Annotated[bool, _NOT_EDM] = False
    """Debiased estimation: rows weigh 1 / sqrt(SNR), so that those with little noise weigh less."""
    offset_noise: Annotated[bool, _ONE_OFFSET] = False
    """Add a random constant of strength 0.1 to each channel of the noise; it helps very dark and bright pictures."""
    noise_offset: Annotated[float, at_least(0)] = 0.0
    """Strength of the random constant that is added to each channel of the noise; 0 adds none."""
    multires_noise_iterations: Annotated[int, at_least(0)] = 0
    """Rounds in which noise of ever lower resolutions is added to the noise; 6 is usual, 0 adds none."""
    multires_noise_discount: Annotated[float, PART, only_with("multires_noise_iterations")] = 0.3
    """Strength of each such round, as a share of the one before."""
    ip_noise_gamma: Annotated[float, at_least(0)] = 0.0
    """Input perturbation: strength of more noise, which the network reads and is not to answer; 0.1 is usual."""
    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    """How differences count: squared (l2), or from about huber_c on in proportion. smooth_l1 is huber over huber_c."""
    huber_c: Annotated[float, SHARE, _HUBER] = 0.1
    """Where huber goes from squared to proportional: at the most noise, or everywhere if huber_schedule is constant."""
    huber_schedule: Annotated[Literal["constant", "exponential", "snr"], _HUBER] = "snr"
    """How that grows to 1 with less noise: not at all, exponentially with the timestep, or with the SNR."""
    min_timestep: Annotated[int, at_least(0), _LEVELS] = 0
    """The least timestep that rows have; 0 is almost clean."""
    max_timestep: Annotated[int | None, at_least(1), _NO_RANGE, _LEVELS] = None
    """Rows have timesteps below this one. None: all that the base model has, usually 1000."""
    timestep_bias_strategy: Annotated[Literal["none", "earlier", "later", "range"], _LEVELS] = "none"
    """Timesteps that are drawn more often: those with the least noise (earlier), with the most (later), or a range."""
    timestep_bias_multiplier: Annotated[float, above(0), _BIASED] = 1.0
    """How much more often; below 1 less often."""
    timestep_bias_portion: Annotated[float, SHARE, only_with("timestep_bias_strategy", "earlier", "later")] = 0.25
    """How many of all timesteps these are."""
    timestep_bias_begin: Annotated[int, at_least(0), _IN_RANGE] = 0
    """The first of the range."""
    timestep_bias_end: Annotated[int, at_least(1), _IN_RANGE] = 1000
    """The one after the last of the range."""
    do_edm_style_training: bool = False
    """Count errors of the clean picture, by 1 / sigma^2. For a base that predicts noise it is the same as without;
    bases that were trained in EDM's formulation (Playground v2.5) are always trained in it."""
    edm_sampling: Literal["karras", "lognormal"] = "karras"
    """Which levels of noise rows have with such a base: evenly those of its scheduler, as diffusers' script draws them,
    or by the distribution of the EDM paper, which trains details more."""
    edm_weighting: Literal["none", "edm"] = "none"
    """How errors of the clean picture count with such a base: all the same, as in diffusers' script, or as in the EDM
    paper, more where there is little noise."""

    class_labels_conditioning: Literal["timesteps"] | None = None
    """What a base that enlarges pictures (IF's second stage) reads for the noise of the small one: the timestep of its
    own noise, unless low_res_conditioning. None: the same."""
    low_res_conditioning: Annotated[bool, _OWN_LEVELS] = False
    """Such a base reads the picture made small, with noise of a level of its own, as it was trained and as it is
    sampled with. Without it, as in diffusers' scripts, it reads its own noisy picture twice."""

    @property
    def offset_strength(self) -> float:
        """Strength of the constant that is added to each channel of the noise."""
        return OFFSET_NOISE_STRENGTH if self.offset_noise else self.noise_offset


_SCALED = only_with("mixed_precision", "fp16", "auto")
_ADJUSTED = not_with("loss_scaler_type", "static")


@dataclass(frozen=True, kw_only=True)
class LossScalingConfig:
    """With --mixed_precision fp16 the loss is scaled, so that small gradients are not lost."""

    loss_scaler_type: Annotated[Literal["dynamic", "static"], _SCALED] = "dynamic"
    """dynamic: the scale falls with each overflow, and grows again. static: it stays. Either skips such a step."""
    init_loss_scale: Annotated[float, at_least(1), _SCALED] = 65536.0
    """Scale of the first step; powers of two round nothing."""
    loss_scale_factor: Annotated[float, above(1), _SCALED, _ADJUSTED] = 2.0
    """Factor by which the scale falls and grows."""
    scale_window: Annotated[int, at_least(1), _SCALED, _ADJUSTED] = 2000
    """Steps in a row without an overflow after which the scale grows."""


_PLAIN_ADAMW = Rule(
    lambda values: values["optimizer"] != "AdamW" or values["use_8bit_adam"],
    "--zero_stage 1: shares out the moments of plain AdamW; leave out --optimizer and --use_8bit_adam",
)


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """Training on several devices: one process each, started by mpirun or msrun."""

    is_parallel: Annotated[bool, Resume.MAY_CHANGE] = False
    """Train in all the processes that mpirun or msrun started; each takes its own pictures of every step."""
    num_processes: Annotated[int | None, at_least(1), Resume.CUTS_ROWS] = None
    """Processes that train together. None: as many as were started; another number than that is refused."""
    zero_stage: Annotated[int, ZERO_OR_ONE, _PLAIN_ADAMW, Resume.MAY_CHANGE] = 0
    """1: each process keeps its own share of AdamW's moments, to save memory with --method full. 0: each keeps all."""


@dataclass(frozen=True, kw_only=True)
class PublishingConfig(HubConfig):
    """What is uploaded to the Hugging Face hub in the end."""

    push_to_hub: Annotated[bool, Resume.MAY_CHANGE] = False
    """Upload the result, a model card and the last validation pictures; account and repository are checked before any
    work. Later, or again: dreambooth-ms push."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Schema):
    """Teach a base model a subject from a few pictures."""

    USUAL = (
        *("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "resolution", "output_dir"),
        *("max_train_steps", "train_batch_size", "learning_rate", "method", "rank", "validation_prompt"),
        *("with_prior_preservation", "class_data_dir", "class_prompt"),
    )
    EXAMPLE = """--pretrained_model_name_or_path sd15 --instance_data_dir photographs/dog \\
    --instance_prompt "a photo of sks dog" --max_train_steps 400 --train_batch_size 1 --output_dir runs/dog"""

    model: BaseModelConfig
    data: DataConfig
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    words: WordsConfig = field(default_factory=WordsConfig)
    run: RunConfig = field(default_factory=RunConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    loss_scaling: LossScalingConfig = field(default_factory=LossScalingConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    publishing: PublishingConfig = field(default_factory=PublishingConfig)

    def missing(self) -> list[str]:
        """What there is of a subject that no flag gives."""
        data, captions = self.data, self.captions
        has_prompts = captions.use_txt_as_label or captions.use_filename_as_label or captions.caption_column
        needed = [] if data.dataset_name else ["instance_data_dir"]
        needed += [] if has_prompts and not captions.combines else ["instance_prompt"]
        return [] if data.concepts_list else [name for name in needed if getattr(data, name) is None]

    @property
    def learning_rate(self) -> float:
        """The rate of the UNet before --scale_lr; the default is that of diffusers' script for the method."""
        of_method = 1.0 if self.optimiser.optimizer == "prodigy" else RATES[self.method.method]
        return self.optimiser.learning_rate or of_method

    @property
    def rows_per_step(self) -> int:
        """Pictures of the subject in one step of all processes."""
        run = self.run
        return run.train_batch_size * run.gradient_accumulation_steps * (self.processes.num_processes or 1)

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.run.output_dir or FOLDERS[self.method.method])

    @property
    def encodes_text(self) -> bool:
        """Whether text is encoded in each step, since what reads it changes."""
        return self.method.train_text_encoder or bool(self.words.modifier_token)

    @property
    def augments(self) -> bool:
        """Whether rows vary how large the subject's pictures are."""
        return self.method.method == "custom_diffusion" and not self.data.noaug
