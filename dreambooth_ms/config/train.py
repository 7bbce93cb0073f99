"""What `train` can be told: one dataclass per section, one docstring per field, which `--help` prints."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from dreambooth_ms.config.choices import (
    Interpolation,
    LearningRateSchedule,
    LossScalerType,
    Method,
    Optimizer,
    PredictionType,
    ValidationScheduler,
)
from dreambooth_ms.config.ranges import Findings, _changed, out_of_range
from dreambooth_ms.config.shared import DeviceConfig

POLYNOMIAL_END_LEARNING_RATE = 1e-7
"""Where the polynomial schedule ends, as in diffusers."""


LEAST_PRODIGY_RATE = 0.1
"""Below it the learning rate is likely to be meant for another optimiser; diffusers warns there too."""


OFFSET_NOISE_STRENGTH = 0.1
"""What --offset_noise stands for, as in diffusers."""


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
class ProcessesConfig:
    """Training on several devices: one process each, started by mpirun or msrun."""

    is_parallel: bool = False
    """Train in all the processes that mpirun or msrun started; each takes its own pictures of every step."""
    num_processes: int | None = None
    """Processes that train together. None: as many as were started; another number than that is refused."""
    zero_stage: int = 0
    """1: each process keeps its own share of AdamW's moments, to save memory with --method full. 0: each keeps all."""


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
