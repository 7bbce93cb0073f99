"""Sections that several commands have, and fields that sections share."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from dreambooth_ms.config.choices import PredictionType, SamplingScheduler
from dreambooth_ms.config.ranges import (
    COLOUR,
    FINITE,
    NOT_EMPTY,
    PART,
    PATH,
    SECRET,
    SEED,
    STEPS,
    ZERO_OR_ONE,
    Range,
    at_least,
)
from dreambooth_ms.config.rules import Resume, Rule, no_effect, only_with, refused_with

Background: TypeAlias = Annotated[str, COLOUR]
"""What a picture is put on where it is transparent."""


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where it runs."""

    device_target: Annotated[Literal["auto", "CPU", "Ascend"], Resume.MAY_CHANGE] = "auto"
    """Device. auto: an Ascend if there is one, otherwise the CPU."""
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = None
    """What networks compute in: fp16, bf16 (on Ascend), no for float32, or auto: fp16 on Ascend, no on CPU, where fp16
    is slower. Trained weights, norms, softmax, loss, optimiser and autoencoder are float32 in any case. None: no."""
    ms_mode: Annotated[int, ZERO_OR_ONE, Resume.MAY_CHANGE] = 0
    """MindSpore mode: 0 compiles graphs, 1 is PyNative, slower and easier to debug."""
    deterministic: Annotated[bool, Resume.MAY_CHANGE] = True
    """On Ascend: sum in the same order each time, in all processes, for the same bits; slower. A CPU always does so."""
    jit_level: Annotated[Literal["O0", "O1"] | None, Resume.MAY_CHANGE] = None
    """How far MindSpore optimises a graph on Ascend. O1: operators are fused, too. None: MindSpore's own choice, O0."""


@dataclass(frozen=True, kw_only=True)
class BaseModelConfig:
    """The base model."""

    pretrained_model_name_or_path: Annotated[str, NOT_EMPTY, PATH, Resume.BY_CONTENT]
    """Base model: a local folder or file, or on the Hugging Face hub owner/model, or owner/model/file.safetensors."""
    revision: Annotated[str | None, Resume.BY_CONTENT] = None
    """Branch, tag or commit on the hub. None: its main branch."""
    variant: Annotated[str | None, Resume.BY_CONTENT] = None
    """Variant of the weight files, such as fp16. None: the plain files, or the only variant."""
    pretrained_vae_model_name_or_path: Annotated[str | None, NOT_EMPTY, PATH, Resume.BY_CONTENT] = None
    """Autoencoder to use in place of the base's own: a folder or file, or a name on the hub. It computes in float32."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """What of the base's scheduler configuration is to be otherwise."""

    prediction_type: PredictionType | None = None
    """Prediction target. None: the one that the base model was trained with."""
    rescale_betas_zero_snr: Annotated[
        bool, refused_with("prediction_type", "epsilon", "no picture follows from noise alone; give v_prediction")
    ] = False
    """Zero terminal SNR (Lin et al., 2024): at the last timestep there is noise alone, so that pictures may be very
    dark or bright. With --prediction_type v_prediction; sampled with trailing timesteps."""

    @property
    def changes(self) -> dict[str, Any]:
        """The same by the keys of diffusers' schedulers, what is not said left out."""
        keys = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
        return {key: value for key in keys if (value := getattr(self, key, None))}


_COMPARED = Rule(
    # Only `evaluate` has it.
    lambda values: "tuned" in values and not (values["lora"] or values["embedding"] or values["tuned"]),
    "--lora: missing; name the adapter to compare the base with, or an --embedding, or a tuned model",
    of_default=True,
)


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(BaseModelConfig):
    """The base model and the adapters on it."""

    lora: Annotated[list[str], PATH, _COMPARED] = field(default_factory=list)
    """Adapter files or folders, or owner/name or owner/name/file on the Hugging Face hub; several are added up. New
    words in them or beside them in their folder are read, too."""
    lora_scale: Annotated[
        list[float],
        Range("finite numbers", lambda scales: len(scales) > 0 and all(map(FINITE.holds, scales))),
        only_with("lora"),
        Rule(
            lambda values: values["lora"] and len(values["lora_scale"]) not in (1, len(values["lora"])),
            "--lora_scale: expected one number, or one for each of --lora {lora}, got {lora_scale}",
        ),
    ] = field(default_factory=lambda: [1.0])
    """Strength of the adapters, one for all or one for each: 0 is the base model, 1 is as trained."""
    embedding: Annotated[list[str], PATH] = field(default_factory=list)
    """Embeddings of new words (textual inversion): files or folders, or owner/name or owner/name/file on the Hugging
    Face hub. The word of a file that names none is the file's name. Words have no strength."""


_REPOSITORY = Range(
    "name or owner/name",
    lambda name: bool(re.fullmatch(r"(\w[\w-]*/)?\w[\w.-]*(?<!\.git)", name)) and ".." not in name,
)

# `push` has no such flag.
_PUSHED = no_effect("without --push_to_hub", when=lambda values: not values.get("push_to_hub", True))


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Publishing on the Hugging Face hub: the result, a model card and pictures."""

    hub_model_id: Annotated[str | None, _REPOSITORY, _PUSHED, Resume.MAY_CHANGE] = None
    """Repository to upload to, made if it is not there: owner/name, or a name of your own account. None: the name of
    the run's folder."""
    hub_token: Annotated[str | None, NOT_EMPTY, SECRET, _PUSHED, Resume.MAY_CHANGE] = None
    """Token that may write; it is written into no file, but other users of the machine see it in the list of processes.
    None: HF_TOKEN, or that of `hf auth login`."""
    hub_private_repo: Annotated[bool, _PUSHED, Resume.MAY_CHANGE] = False
    """Make the repository private, if it is not there yet."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How pictures are generated."""

    num_inference_steps: Annotated[int, STEPS] = 25
    """Denoising steps."""
    guidance_scale: Annotated[float, at_least(0)] = 7.5
    """Classifier-free guidance: how closely to follow the prompt; 1 turns it off."""
    scheduler: SamplingScheduler = "ddim"
    """Sampling method. Those that begin with edm_ are for models trained in EDM's formulation."""
    eta: Annotated[float, PART, only_with("scheduler", "ddim")] = 0.0
    """Noise that each step of ddim adds, as a share of what ddpm adds (Song et al., 2021, eq. 16); 0 adds none."""
    seed: Annotated[int, SEED] = 0
    """The same seed generates the same pictures, whatever the batch size."""
    batch_size: Annotated[int, at_least(1)] = 4
    """Pictures generated at a time."""
