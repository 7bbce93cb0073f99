"""Everything a user can set: one dataclass per section, one docstring per field, defaults in one place.

Field names are the flag names, in diffusers' spelling, and are unique over the sections of a command. The text under
a field is what `--help` prints. Values are plain: numbers, text, booleans and lists of text or numbers.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

from dreambooth_ms.config.aspect_ratios import SD_XL_BASE_RATIOS

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Method: TypeAlias = Literal["lora", "full"]
Optimizer: TypeAlias = Literal["AdamW", "adafactor", "prodigy"]
MixedPrecision: TypeAlias = Literal["no", "fp16", "bf16"]
LossScalerType: TypeAlias = Literal["dynamic", "static"]
PredictionType: TypeAlias = Literal["epsilon", "v_prediction"]
LearningRateSchedule: TypeAlias = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
DeviceTarget: TypeAlias = Literal["auto", "CPU", "Ascend"]
ValidationScheduler: TypeAlias = Literal["DPMSolverMultistepScheduler", "DDIMScheduler"]
SamplingScheduler: TypeAlias = Literal[
    "ddim",
    "ddpm",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm++_2m",
    "dpm++_2m_karras",
    "dpm++_2s",
    "dpm++_sde",
    "unipc",
    "deis",
    "lcm",
    "edm_euler",
    "edm_dpm++_2m",
]
SamplingTask: TypeAlias = Literal["txt2img", "img2img"]
WeightType: TypeAlias = Literal["fp32", "fp16", "bf16"]
ModelFormat: TypeAlias = Literal["diffusers", "stability", "mindone"]
WeightFormat: TypeAlias = Literal[
    "diffusers", "stability", "mindone", "kohya", "kohya_diffusers", "peft", "diffusers_peft", "diffusers_processors"
]

POLYNOMIAL_END_LEARNING_RATE = 1e-7
"""Where the polynomial schedule ends, as in diffusers."""


LEAST_PRODIGY_RATE = 0.1
"""Below it the learning rate is likely to be meant for another optimiser; diffusers warns there too."""


OFFSET_NOISE_STRENGTH = 0.1
"""What --offset_noise stands for, as in diffusers."""


class Findings(NamedTuple):
    """What a check of one configuration found, one line per entry."""

    problems: list[str]
    warnings: list[str]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    pretrained_model_name_or_path: str
    """Base model: a local folder or file, or a name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub. None: its main branch."""
    variant: str | None = None
    """Variant of the weight files, such as fp16. None: the plain files."""
    pretrained_vae_model_name_or_path: str | None = None
    """Autoencoder to use in place of the base's own: a folder or file, or a name on the hub. It computes in float32."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The subject's pictures."""

    instance_data_dir: str
    """Folder with the pictures of the subject."""
    instance_prompt: str
    """Prompt that names the subject, with its rare token: "a photo of sks dog"."""
    resolution: int = 512
    """Side of the square training pictures, in pixels."""
    center_crop: bool = False
    """Crop the centre of each picture, in place of a random part."""
    random_flip: bool = False
    """Mirror pictures left to right at random."""
    image_interpolation_mode: Interpolation = "lanczos"
    """Filter used to resize pictures."""


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Prior preservation: pictures of the class keep the model from forgetting what the class looks like."""

    with_prior_preservation: bool = False
    """Train on pictures of the class beside those of the subject."""
    prior_loss_weight: float = 1.0
    """Weight of the class pictures' loss."""
    class_data_dir: str | None = None
    """Folder with the class pictures; those that are missing are generated into it."""
    class_prompt: str | None = None
    """Prompt that names the class, without the rare token: "a photo of dog"."""
    num_class_images: int = 100
    """Number of class pictures to have."""
    sample_batch_size: int = 4
    """Class pictures generated at a time."""
    infer_steps: int = 50
    """Denoising steps for each generated class picture."""
    guidance_scale: float = 7.5
    """Classifier-free guidance for generated class pictures; 1 turns it off."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What is trained."""

    method: Method = "lora"
    """How the subject is taught. lora: a small update beside frozen weights. full: all weights of the UNet."""
    train_text_encoder: bool = False
    """Train the text encoder too, of SDXL both, in the same way as the UNet."""
    rank: int = 4
    """Rank of the LoRA update; the size of the file grows with it."""
    lora_alpha: int | None = None
    """The update is scaled by lora_alpha / rank. None: equal to the rank, a scale of 1."""
    lora_target_modules: list[str] = field(default_factory=lambda: ["to_k", "to_q", "to_v", "to_out.0"])
    """Layers of the UNet that get an update, by the end of their names."""
    lora_dropout: float = 0.0
    """Share of the inputs of each LoRA update that is dropped at random in training."""
    use_ema: bool = False
    """Keep a running average of the trained weights, and use it for validation and as the result."""
    ema_decay: float = 0.9999
    """Decay of the running average; in the first steps it is (1 + step) / (10 + step)."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the network learns to predict."""

    prediction_type: PredictionType | None = None
    """Prediction target. None: the one that the base model was trained with."""
    snr_gamma: float | None = None
    """Min-SNR weighting: rows with little noise weigh less; 5.0 is usual. None: all rows weigh the same."""
    offset_noise: bool = False
    """Add a random constant of strength 0.1 to each channel of the noise; it helps very dark and bright pictures."""
    noise_offset: float = 0.0
    """The same with a strength of your choice."""


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """The optimiser and its learning rate."""

    optimizer: Optimizer = "AdamW"
    """How gradients become updates. prodigy finds the size of its steps by itself; adafactor keeps next to no state."""
    use_8bit_adam: bool = False
    """Keep AdamW's moments in 8 bits, a quarter of the memory; matters with full."""
    learning_rate: float | None = None
    """Learning rate after the warm-up. None: 5e-4 for lora, 5e-6 for full; 1 with prodigy, which multiplies its own
    by it."""
    text_encoder_lr: float | None = None
    """Learning rate of the text encoder, of SDXL both. None: the same as --learning_rate."""
    scale_lr: bool = False
    """Multiply the learning rates by pictures per step: batch size times accumulation steps times processes."""
    lr_scheduler: LearningRateSchedule = "constant"
    """How the learning rate changes over the run."""
    lr_warmup_steps: int = 500
    """Steps of linear warm-up; not used by the constant schedule."""
    lr_num_cycles: int = 1
    """Number of restarts of the cosine_with_restarts schedule."""
    lr_power: float = 1.0
    """Power of the polynomial schedule."""
    adam_beta1: float = 0.9
    """Decay of the mean of the gradients."""
    adam_beta2: float = 0.999
    """Decay of the mean of the squared gradients."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay."""
    adam_weight_decay_text_encoder: float | None = None
    """Weight decay of the text encoder, of SDXL both. None: the same as --adam_weight_decay."""
    adam_epsilon: float = 1e-8
    """Added to the denominator of the update."""
    adafactor_scale_parameter: bool = False
    """Multiply the learning rate of each weight by its root mean square, as in Adafactor's paper."""
    prodigy_beta3: float | None = None
    """Decay of the sums from which Prodigy estimates its steps. None: the square root of --adam_beta2."""
    prodigy_decouple: bool = True
    """Weight decay beside the gradients, as AdamW's, not in them."""
    prodigy_use_bias_correction: bool = True
    """Correct Prodigy's moments for their start from zero, as Adam does."""
    prodigy_safeguard_warmup: bool = True
    """Keep the learning rate out of Prodigy's estimate, so that a warm-up does not raise it."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass(frozen=True, kw_only=True)
class LossScalingConfig:
    """With --mixed_precision fp16 the loss is scaled, so that small gradients are not lost."""

    loss_scaler_type: LossScalerType = "dynamic"
    """dynamic: the scale falls with each overflow, and grows again. static: it stays. Either skips such a step."""
    init_loss_scale: float = 65536.0
    """Scale of the first step; powers of two round nothing."""
    loss_scale_factor: float = 2.0
    """By how much the scale falls and grows."""
    scale_window: int = 2000
    """Steps in a row without an overflow after which the scale grows."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: how long, from where, and what it leaves behind."""

    train_batch_size: int = 4
    """Pictures of the subject per step and process; prior preservation adds as many of the class."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are added up to one optimiser step; a larger batch in the memory of a small one."""
    gradient_checkpointing: bool = False
    """Save memory: compute activations again in the backward pass, in place of keeping them. A step takes longer."""
    max_device_memory: str | None = None
    """Memory that each process may take, such as 16GB; the run is refused if it is expected to need more. None: the
    machine's, which the processes on it share."""
    max_train_steps: int | None = None
    """Number of optimiser steps. None: decided by num_train_epochs."""
    num_train_epochs: int = 1
    """Passes over the pictures; not used when max_train_steps is given."""
    seed: int | None = None
    """Makes the run repeatable. None: drawn at random and recorded."""
    output_dir: str | None = None
    """Folder for the trained weights and the checkpoints. None: lora-dreambooth-model, or for full dreambooth-model."""
    checkpointing_steps: int = 500
    """Steps between checkpoints."""
    checkpoints_total_limit: int | None = None
    """Number of checkpoints to keep; the oldest go first. None: all."""
    resume_from_checkpoint: str | None = None
    """Checkpoint folder to resume from, or latest."""
    logging_dir: str = "logs"
    """Folder for the TensorBoard log, inside output_dir."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Pictures drawn during training, to see how far it is."""

    validation_prompt: str | None = None
    """What to draw. None: nothing is drawn."""
    num_validation_images: int = 4
    """Pictures drawn at a time, always from the same noise."""
    validation_steps: int = 100
    """Optimiser steps between drawings."""
    validation_scheduler: ValidationScheduler = "DPMSolverMultistepScheduler"
    """Sampling method, by the name of diffusers' class."""


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where it runs."""

    device_target: DeviceTarget = "auto"
    """Device. auto: an Ascend if there is one, otherwise the CPU."""
    mixed_precision: MixedPrecision | None = None
    """What networks compute in: fp16, bf16 (on Ascend), or no for float32. What is trained, norms, softmax, loss and
    optimiser are float32 in any case, and so is the autoencoder. None: no."""
    ms_mode: int = 0
    """MindSpore mode: 0 compiles graphs, 1 is PyNative, slower and easier to debug."""


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """Training on several devices: one process each, started by mpirun or msrun."""

    is_parallel: bool = False
    """Train in all the processes that mpirun or msrun started; each takes its own pictures of every step."""
    num_processes: int | None = None
    """Processes that train together. None: as many as were started; another number than that is refused."""
    zero_stage: int = 0
    """1: each process keeps its own share of AdamW's moments, to save memory with --method full. 0: each keeps all."""


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """The base model and the adapters on it."""

    pretrained_model_name_or_path: str
    """Base model: a local folder or file, or a name on the Hugging Face hub."""
    pretrained_vae_model_name_or_path: str | None = None
    """Autoencoder to use in place of the base's own: a folder, or a name on the hub."""
    lora: list[str] = field(default_factory=list)
    """Adapter files or folders; several are added up."""
    lora_scale: list[float] = field(default_factory=lambda: [1.0])
    """Strength of the adapters, one for all or one for each: 0 is the base model, 1 is as trained."""


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """The pictures to make."""

    prompt: str
    """What to draw: a prompt, or the path of a text file with one prompt per line."""
    negative_prompt: str = ""
    """What to keep away from. Empty: nothing; SDXL models are then guided by zeros where their folder asks for it."""
    num_images_per_prompt: int = 1
    """Pictures per prompt."""
    batch_size: int = 4
    """Pictures drawn at a time."""
    height: int | None = None
    """Height in pixels. None: the model's own."""
    width: int | None = None
    """Width in pixels. None: the model's own."""
    sd_xl_base_ratios: str | None = None
    """Size by the name of one that SDXL was trained at, in place of height and width: width over height."""
    num_inference_steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance: how closely to follow the prompt; 1 turns it off."""
    guidance_rescale: float = 0.0
    """Share of the guided prediction that is brought back to the contrast of the unguided one; 0.7 is usual for models
    that predict velocity, whose pictures guidance makes too bright."""
    scheduler: SamplingScheduler = "ddim"
    """Sampling method. Those that begin with edm_ are for models trained in EDM's formulation."""
    seed: int = 0
    """The same seed draws the same pictures, whatever the batch size."""
    clip_skip: int = 0
    """Layers left out at the end of the text encoders."""
    support_long_prompts: bool = False
    """Read prompts beyond 77 tokens in pieces of 75. Otherwise they are cut, and a warning says what was lost."""
    vae_whole_up_to: int | None = None
    """Side in pixels of the largest square that the autoencoder decodes at once; what has more pixels is decoded in
    bands of rows, which takes less memory and gives the same picture. None: 256 on CPU, 2048 on Ascend."""
    num_rows: int | None = None
    """Rows of the sheet that is written beside the pictures of each prompt; with num_cols in place of
    num_images_per_prompt. None: 1, or no sheet."""
    num_cols: int | None = None
    """Columns of that sheet. None: 1, or no sheet."""
    output_dir: str = "outputs"
    """Folder for the pictures."""


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Image to image: what pictures start from."""

    task: SamplingTask | None = None
    """From text alone, or from a picture. None: from a picture if --image names one."""
    image: str | None = None
    """Picture to start from. Without --height and --width its shape is kept, at the area that the model draws."""
    strength: float = 0.75
    """How far to go from the picture: with 1 nothing of it is left."""


@dataclass(frozen=True, kw_only=True)
class SizesConfig:
    """What SDXL is told of the pictures, by which it draws as if from sharp or blurred, whole or cropped ones."""

    orig_height: int | None = None
    """Height of the picture before it was resized. None: that of the picture drawn."""
    orig_width: int | None = None
    """Width of the picture before it was resized. None: that of the picture drawn."""
    target_height: int | None = None
    """Height of the picture. None: that of the picture drawn. The refiner is not told."""
    target_width: int | None = None
    """Width of the picture. None: that of the picture drawn. The refiner is not told."""
    crop_coords_top: int = 0
    """Rows cut off above."""
    crop_coords_left: int = 0
    """Columns cut off at the left."""
    aesthetic_score: float = 6.0
    """How beautiful the picture is, of 10; only the refiner is told."""
    negative_aesthetic_score: float = 2.5
    """How beautiful what to keep away from is."""


@dataclass(frozen=True, kw_only=True)
class RefinerConfig:
    """A second model, SDXL's refiner, that goes on from the base's pictures."""

    refiner: str | None = None
    """The model: a local folder or file, or a name on the Hugging Face hub. None: pictures are the base's."""
    denoising_end: float | None = None
    """Share of the way from noise that is the base's; the rest is the refiner's. None: 0.8, or with --refiner_strength
    the base finishes its pictures."""
    refiner_strength: float | None = None
    """Let the base finish, and the refiner start from its pictures, this far from them."""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """What base and adapted model are compared on."""

    instance_data_dir: str
    """Folder with photographs of the subject."""
    prompt: str
    """What to draw of the subject: a prompt, or the path of a text file with one prompt per line."""
    class_prompt: str
    """Prompt of the class, to see what the training did to it."""
    clip: str | None = None
    """Folder of the CLIP model that measures, in transformers' layout. None: the base model's own clip folder."""
    num_images_per_prompt: int = 1
    """Pictures per prompt; as many are drawn of the class prompt."""
    batch_size: int = 4
    """Pictures drawn at a time."""
    num_inference_steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance: how closely to follow the prompt; 1 turns it off."""
    scheduler: SamplingScheduler = "ddim"
    """Sampling method."""
    seed: int = 0
    """The same seed draws the same pictures."""
    output_dir: str = "evaluation"
    """Folder for before_after.png and metrics.json."""


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """From any format to any other; which they are is told from the files and the target's name."""

    source: str
    """Model or LoRA: a file or a folder, in any format that is read."""
    target: str
    """What to write. A name that ends in .safetensors is a single file, in .ckpt a MindSpore checkpoint, without an
    extension a folder."""
    format: WeightFormat | None = None
    """Format to write, where the target's name leaves it open. None: told by the name."""
    dtype: WeightType | None = None
    """Type of the numbers to write. None: as they are."""
    base: str | None = None
    """For a LoRA: the model it is for, where that has other sizes than the published ones."""
    alpha: float | None = None
    """For a LoRA whose file does not hold its alpha, as those of mindone. None: its rank, a scale of 1."""
    variant: str | None = None
    """Variant of the weight files in a model folder, such as fp16. None: the plain files, or the only variant."""
    prediction_type: PredictionType | None = None
    """What the model predicts, for a source that does not tell. None: SD 2.x velocity, others noise."""
    use_ema: bool = False
    """Take the moving averages that a single file may hold, in place of the weights."""


@dataclass(frozen=True, kw_only=True)
class InspectionConfig:
    """What is in a file or folder."""

    source: str
    """Model or LoRA: a file or a folder, in any format that is read."""
    base: str | None = None
    """For a LoRA: the model it is for, where that has other sizes than the published ones."""
    variant: str | None = None
    """Variant of the weight files in a model folder, such as fp16. None: the plain files, or the only variant."""


@dataclass(frozen=True, kw_only=True)
class MergingConfig:
    """One or several LoRAs become part of a model's weights."""

    base: str
    """The model: a file or a folder, in any format that is read."""
    lora: list[str]
    """LoRA files or folders of any format and rank; several are added up."""
    target: str
    """What to write. A name that ends in .safetensors is a single file, in .ckpt a MindSpore checkpoint, without an
    extension a folder."""
    scale: float = 1.0
    """Strength of the LoRAs: 1 is as trained; -1 takes out again what was merged at 1."""
    alpha: float | None = None
    """For LoRAs whose file does not hold their alpha, as those of mindone. None: their rank, a scale of 1."""
    format: ModelFormat | None = None
    """Format to write. None: told by the target's name."""
    dtype: WeightType | None = None
    """Type of the numbers to write. None: as they are in the model."""
    variant: str | None = None
    """Variant of the weight files in a model folder, such as fp16. None: the plain files, or the only variant."""
    prediction_type: PredictionType | None = None
    """What the model predicts, for one that does not tell. None: SD 2.x velocity, others noise."""


class Range(NamedTuple):
    """The values that a field may take: in words, and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _at_least(lowest: float) -> Range:
    return Range(f"at least {lowest}", lambda value: lowest <= value < math.inf)


_POSITIVE = Range("greater than 0", lambda value: 0 < value < math.inf)
_DECAY = Range("at least 0 and less than 1", lambda value: 0 <= value < 1)
_NOT_EMPTY = Range("not empty", lambda value: len(value) > 0)
_STEPS = Range("from 1 to 1000", lambda value: 1 <= value <= 1000)
_SHARE = Range("greater than 0 and at most 1", lambda value: 0 < value <= 1)
_SCORE = Range("from 0 to 10", lambda value: 0 <= value <= 10)
_SIDE = Range("a multiple of 8, at least 32", lambda value: value >= 32 and value % 8 == 0)

_MEMORY_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([GM])i?B?", re.IGNORECASE)


def memory_size(text: str) -> int | None:
    """Bytes of a size as MindSpore spells it, "16GB" for 16 times 2^30; None if it is none."""
    found = _MEMORY_SIZE.fullmatch(text)
    return int(float(found[1]) * 2 ** (30 if found[2] in "gG" else 20)) if found else None


RANGES: dict[str, Range] = {
    "pretrained_model_name_or_path": _NOT_EMPTY,
    "pretrained_vae_model_name_or_path": _NOT_EMPTY,
    "instance_data_dir": _NOT_EMPTY,
    "instance_prompt": _NOT_EMPTY,
    "resolution": _SIDE,
    "prior_loss_weight": _at_least(0),
    "class_data_dir": _NOT_EMPTY,
    "class_prompt": _NOT_EMPTY,
    "num_class_images": _at_least(1),
    "sample_batch_size": _at_least(1),
    "infer_steps": _STEPS,
    "guidance_scale": _at_least(0),
    "rank": _at_least(1),
    "lora_alpha": _at_least(1),
    "lora_target_modules": _NOT_EMPTY,
    "lora_dropout": _DECAY,
    "ema_decay": _DECAY,
    "snr_gamma": _POSITIVE,
    "noise_offset": _at_least(0),
    "learning_rate": _POSITIVE,
    "text_encoder_lr": _POSITIVE,
    "gradient_accumulation_steps": _at_least(1),
    "validation_prompt": _NOT_EMPTY,
    "num_validation_images": _at_least(1),
    "validation_steps": _at_least(1),
    "lr_warmup_steps": _at_least(0),
    "lr_num_cycles": _at_least(1),
    "lr_power": _POSITIVE,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_weight_decay": _at_least(0),
    "adam_weight_decay_text_encoder": _at_least(0),
    "adam_epsilon": _POSITIVE,
    "prodigy_beta3": _DECAY,
    "max_grad_norm": _POSITIVE,
    "init_loss_scale": _at_least(1),
    "loss_scale_factor": Range("greater than 1", lambda value: 1 < value < math.inf),
    "scale_window": _at_least(1),
    "train_batch_size": _at_least(1),
    "max_device_memory": Range("a size such as 16GB", lambda value: bool(memory_size(value))),
    "max_train_steps": _at_least(1),
    "num_train_epochs": _at_least(1),
    "seed": Range("from 0 to 2**64 - 1", lambda value: 0 <= value < 2**64),
    "output_dir": _NOT_EMPTY,
    "checkpointing_steps": _at_least(1),
    "checkpoints_total_limit": _at_least(1),
    "resume_from_checkpoint": _NOT_EMPTY,
    "logging_dir": _NOT_EMPTY,
    "num_processes": _at_least(1),
    "zero_stage": Range("0 or 1", lambda value: value in (0, 1)),
    "ms_mode": Range("0 or 1", lambda value: value in (0, 1)),
    "lora_scale": Range("finite numbers", lambda value: len(value) > 0 and all(map(math.isfinite, value))),
    "prompt": _NOT_EMPTY,
    "num_images_per_prompt": _at_least(1),
    "batch_size": _at_least(1),
    "height": _SIDE,
    "width": _SIDE,
    "num_inference_steps": _STEPS,
    "sd_xl_base_ratios": Range(f"one of {', '.join(SD_XL_BASE_RATIOS)}", lambda value: value in SD_XL_BASE_RATIOS),
    "guidance_rescale": Range("from 0 to 1", lambda value: 0 <= value <= 1),
    "clip_skip": _at_least(0),
    "vae_whole_up_to": _SIDE,
    "num_rows": _at_least(1),
    "num_cols": _at_least(1),
    "image": _NOT_EMPTY,
    "strength": _SHARE,
    "orig_height": _at_least(1),
    "orig_width": _at_least(1),
    "target_height": _at_least(1),
    "target_width": _at_least(1),
    "crop_coords_top": _at_least(0),
    "crop_coords_left": _at_least(0),
    "aesthetic_score": _SCORE,
    "negative_aesthetic_score": _SCORE,
    "refiner": _NOT_EMPTY,
    "denoising_end": Range("greater than 0 and less than 1", lambda value: 0 < value < 1),
    "refiner_strength": _SHARE,
    "clip": _NOT_EMPTY,
    "source": _NOT_EMPTY,
    "target": _NOT_EMPTY,
    "base": _NOT_EMPTY,
    "scale": Range("a finite number", math.isfinite),
    "alpha": Range("a finite number", math.isfinite),
}
"""Ranges by field name, the same in every command. None is never out of range."""


def out_of_range(config: Any) -> list[str]:
    """One line per field of a sectioned config whose value is outside its entry in RANGES."""
    lines = []
    for section in fields(config):
        for name, value in vars(getattr(config, section.name)).items():
            if value is not None and name in RANGES and not RANGES[name].holds(value):
                lines.append(f"--{name}: expected {RANGES[name].expected}, got {value!r}")
    return lines


def _changed(section: Any) -> list[str]:
    """Names of the fields that differ from their defaults."""
    defaults = type(section)()
    return [name for name, value in vars(section).items() if value != getattr(defaults, name)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Teach the base model a subject from a few pictures."""

    model: ModelConfig
    data: DataConfig
    prior: PriorConfig = field(default_factory=PriorConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    loss_scaling: LossScalingConfig = field(default_factory=LossScalingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def check(self) -> Findings:
        """Ranges, and every rule that looks at more than one field. Reads no file."""
        return Findings(out_of_range(self) + self._impossible(), self._doubtful())

    @property
    def learning_rate(self) -> float:
        """The rate of the UNet before --scale_lr; the default is that of diffusers' script for the method."""
        of_method = 5e-4 if self.method.method == "lora" else 5e-6
        return self.optimiser.learning_rate or (1.0 if self.optimiser.optimizer == "prodigy" else of_method)

    @property
    def rows_per_step(self) -> int:
        """Pictures of the subject in one step of all processes."""
        run = self.run
        return run.train_batch_size * run.gradient_accumulation_steps * (self.processes.num_processes or 1)

    @property
    def text_encoder_weight_decay(self) -> float:
        """The text encoder's own weight decay, or the UNet's."""
        own = self.optimiser.adam_weight_decay_text_encoder
        return self.optimiser.adam_weight_decay if own is None else own

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.run.output_dir or ("lora-" if self.method.method == "lora" else "") + "dreambooth-model")

    @property
    def noise_offset(self) -> float:
        """Strength of the constant added to the noise."""
        return OFFSET_NOISE_STRENGTH if self.loss.offset_noise else self.loss.noise_offset

    def _impossible(self) -> list[str]:
        prior, optimiser = self.prior, self.optimiser
        uses_prior = prior.with_prior_preservation
        same_folder = prior.class_data_dir is not None and (
            os.path.realpath(prior.class_data_dir) == os.path.realpath(self.data.instance_data_dir)
        )
        rules = [
            (
                uses_prior and prior.class_data_dir is None,
                "--with_prior_preservation: needs --class_data_dir, the folder of the class pictures",
            ),
            (
                uses_prior and prior.class_prompt is None,
                "--with_prior_preservation: needs --class_prompt, the prompt of the class pictures",
            ),
            (
                uses_prior and same_folder,
                "--class_data_dir: expected another folder than --instance_data_dir, "
                "or class pictures would mix with those of the subject",
            ),
            (
                optimiser.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END_LEARNING_RATE,
                f"--learning_rate: the polynomial schedule ends at {POLYNOMIAL_END_LEARNING_RATE:g} "
                f"and must start above it, got {self.learning_rate:g}",
            ),
            (
                optimiser.optimizer == "prodigy" and optimiser.text_encoder_lr is not None,
                "--text_encoder_lr: prodigy has one rate for all weights; leave it out, or choose another --optimizer",
            ),
            (
                self.processes.zero_stage > 0 and (optimiser.optimizer.lower() != "adamw" or optimiser.use_8bit_adam),
                "--zero_stage 1: shares out the moments of plain AdamW; leave out --optimizer and --use_8bit_adam",
            ),
            (
                self.loss.offset_noise and self.loss.noise_offset > 0,
                f"--offset_noise: is --noise_offset {OFFSET_NOISE_STRENGTH}; give one of them",
            ),
        ]
        return [message for broken, message in rules if broken]

    def _doubtful(self) -> list[str]:
        prior, optimiser, run = self.prior, self.optimiser, self.run
        method, validation, scaling = self.method, self.validation, self.loss_scaling
        reasons = {}
        if self.device.mixed_precision != "fp16":
            reasons.update(dict.fromkeys(vars(scaling), "without --mixed_precision fp16"))
        elif scaling.loss_scaler_type == "static":
            reasons.update(dict.fromkeys(("loss_scale_factor", "scale_window"), "with --loss_scaler_type static"))
        if not prior.with_prior_preservation:
            reasons.update(dict.fromkeys(vars(prior), "without --with_prior_preservation"))
        if method.method != "lora":
            lora_only = ("rank", "lora_alpha", "lora_target_modules", "lora_dropout")
            reasons.update(dict.fromkeys(lora_only, f"with --method {method.method}"))
        if optimiser.optimizer != "AdamW":
            reasons["use_8bit_adam"] = f"with --optimizer {optimiser.optimizer}"
        if optimiser.optimizer != "adafactor":
            reasons["adafactor_scale_parameter"] = "without --optimizer adafactor"
        else:
            of_adam = ("adam_beta1", "adam_beta2", "adam_epsilon")
            reasons.update(dict.fromkeys(of_adam, "with --optimizer adafactor"))
        if optimiser.optimizer != "prodigy":
            of_prodigy = [name for name in vars(optimiser) if name.startswith("prodigy_")]
            reasons.update(dict.fromkeys(of_prodigy, "without --optimizer prodigy"))
        if not method.use_ema:
            reasons["ema_decay"] = "without --use_ema"
        if not method.train_text_encoder:
            text_only = ("text_encoder_lr", "adam_weight_decay_text_encoder")
            reasons.update(dict.fromkeys(text_only, "without --train_text_encoder"))
        if validation.validation_prompt is None:
            reasons.update(dict.fromkeys(vars(validation), "without --validation_prompt"))
        if optimiser.lr_scheduler == "constant":
            reasons["lr_warmup_steps"] = "with --lr_scheduler constant"
        if optimiser.lr_scheduler != "cosine_with_restarts":
            reasons["lr_num_cycles"] = "without --lr_scheduler cosine_with_restarts"
        if optimiser.lr_scheduler != "polynomial":
            reasons["lr_power"] = "without --lr_scheduler polynomial"
        if run.max_train_steps is not None:
            reasons["num_train_epochs"] = "beside --max_train_steps"
        changed = [
            name for section in (prior, method, optimiser, scaling, run, validation) for name in _changed(section)
        ]
        warnings = [f"--{name} has no effect {reasons[name]}" for name in changed if name in reasons]
        if optimiser.optimizer == "prodigy" and self.learning_rate < LEAST_PRODIGY_RATE:
            warnings.append(
                f"--learning_rate {self.learning_rate:g} multiplies what prodigy finds by itself; it is usually 1"
            )
        warms_up = optimiser.lr_scheduler != "constant"
        if warms_up and run.max_train_steps is not None and optimiser.lr_warmup_steps >= run.max_train_steps:
            warnings.append(
                f"--lr_warmup_steps {optimiser.lr_warmup_steps} is not less than --max_train_steps "
                f"{run.max_train_steps}: the learning rate never arrives at --learning_rate"
            )
        return warnings


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw pictures with a base model and its adapters."""

    weights: WeightsConfig
    pictures: PicturesConfig
    start: StartConfig = field(default_factory=StartConfig)
    sizes: SizesConfig = field(default_factory=SizesConfig)
    refinement: RefinerConfig = field(default_factory=RefinerConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def check(self) -> Findings:
        """Ranges, and every rule that looks at more than one field. Reads no file."""
        return Findings(out_of_range(self) + self._impossible(), self._doubtful())

    @property
    def num_images_per_prompt(self) -> int:
        """Pictures of each prompt: as many as were asked for, or as the sheet has room for."""
        wanted = self.pictures
        return (wanted.num_rows or 1) * (wanted.num_cols or 1) if self.draws_sheet else wanted.num_images_per_prompt

    @property
    def draws_sheet(self) -> bool:
        """Whether the pictures of each prompt are written as a sheet too."""
        return self.pictures.num_rows is not None or self.pictures.num_cols is not None

    def _impossible(self) -> list[str]:
        wanted, start, refinement = self.pictures, self.start, self.refinement
        both_sizes = wanted.sd_xl_base_ratios is not None and (wanted.height, wanted.width) != (None, None)
        sizes = self.sizes
        rules = [
            _scales_that_fit(self.weights),
            (both_sizes, "--sd_xl_base_ratios: is a height and a width; give it without --height and --width"),
            (
                self.draws_sheet and wanted.num_images_per_prompt != 1,
                "--num_images_per_prompt: is --num_rows times --num_cols; give it without them",
            ),
            (
                start.task == "img2img" and start.image is None,
                "--task img2img: needs --image, the picture to start from",
            ),
            (
                start.task == "txt2img" and start.image is not None,
                "--image: a picture is started from with --task img2img only",
            ),
            (
                (sizes.orig_height is None) != (sizes.orig_width is None),
                "--orig_height: give it together with --orig_width",
            ),
            (
                (sizes.target_height is None) != (sizes.target_width is None),
                "--target_height: give it together with --target_width",
            ),
            (
                refinement.denoising_end is not None and refinement.refiner_strength is not None,
                "--denoising_end: the base stops there, with --refiner_strength it finishes; give one of them",
            ),
            (
                refinement.refiner is None and refinement.denoising_end is not None,
                "--denoising_end: needs --refiner, which goes on from there",
            ),
        ]
        return [message for broken, message in rules if broken]

    def _doubtful(self) -> list[str]:
        warnings = []
        if self.weights.lora_scale != [1.0] and not self.weights.lora:
            warnings.append("--lora_scale has no effect without --lora")
        if self.pictures.negative_prompt and self.pictures.guidance_scale <= 1:
            warnings.append("--negative_prompt has no effect with a --guidance_scale of 1 or less")
        if self.pictures.guidance_rescale and self.pictures.guidance_scale <= 1:
            warnings.append("--guidance_rescale has no effect with a --guidance_scale of 1 or less")
        if self.start.image is None and _changed(self.start) == ["strength"]:
            warnings.append("--strength has no effect without --image")
        if self.refinement.refiner is None and self.refinement.refiner_strength is not None:
            warnings.append("--refiner_strength has no effect without --refiner")
        return warnings


def _scales_that_fit(weights: WeightsConfig) -> tuple[bool, str]:
    """Whether there are neither one scale nor as many as adapters, and what to say of it."""
    given, adapters = len(weights.lora_scale), len(weights.lora)
    return (
        bool(adapters) and given not in (1, adapters),
        f"--lora_scale: expected one number, or one for each of {adapters} in --lora, got {given}",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare a base model with its adapted self: same prompts, same noise."""

    weights: WeightsConfig
    comparison: ComparisonConfig
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def check(self) -> Findings:
        """Ranges. Reads no file."""
        problems = out_of_range(self)
        if not self.weights.lora:
            problems.append("--lora: missing; name the adapter to compare the base with")
        broken, message = _scales_that_fit(self.weights)
        if broken:
            problems.append(message)
        return Findings(problems, [])


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write a model or a LoRA in another format."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source", "target")
    """Fields that may be given without their flags, in this order."""

    conversion: ConversionConfig

    def check(self) -> Findings:
        """Ranges. Reads no file."""
        return Findings(out_of_range(self), [])


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Tell what a file or folder is."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source",)
    """Fields that may be given without their flags, in this order."""

    inspection: InspectionConfig

    def check(self) -> Findings:
        """Ranges. Reads no file."""
        return Findings(out_of_range(self), [])


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check that the installation works on this machine."""

    device: DeviceConfig = field(default_factory=DeviceConfig)

    def check(self) -> Findings:
        """Ranges and exclusions. Reads no file."""
        problems = out_of_range(self)
        if self.device.mixed_precision not in (None, "no"):
            problems.append("--mixed_precision: the doctor compares figures in float32; leave it out")
        return Findings(problems, [])


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merge LoRAs into a model."""

    merging: MergingConfig

    def check(self) -> Findings:
        """Ranges. Reads no file."""
        problems = out_of_range(self)
        if not self.merging.lora:
            problems.append("--lora: missing; name the LoRA to merge")
        return Findings(problems, [])
