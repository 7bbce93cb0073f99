"""The settings of the commands; those of `train` and `sample`, which are many, have files of their own."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from dreambooth_ms.config.choices import FloatType, PredictionType
from dreambooth_ms.config.ranges import FINITE, NOT_EMPTY, PATH, SHARE, SIDE, Range, at_least
from dreambooth_ms.config.rules import Rule, excludes, needed_without, only_with
from dreambooth_ms.config.sample import SampleConfig  # noqa: F401 - every command's schema is found here.
from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import (
    Background,
    BaseModelConfig,
    DeviceConfig,
    GenerationConfig,
    HubConfig,
    WeightsConfig,
)
from dreambooth_ms.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The report."""

    json: bool = False
    """Print it as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig(TrainConfig):
    """Look at the pictures and the command of a training before it starts."""

    report: ReportConfig = field(default_factory=ReportConfig)


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """From pictures to those that a training reads, cropped in the middle."""

    source: Annotated[str, NOT_EMPTY, PATH]
    """Folder with pictures; captions and metadata beside them are kept."""
    target: Annotated[str, NOT_EMPTY, PATH]
    """Folder to make. Nothing is overwritten."""
    resolution: Annotated[int, SIDE] = 512
    """Side of the squares, in pixels."""
    use_aspect_ratio_bucket: bool = False
    """Sizes of several aspect ratios with about that area, each picture at the one that cuts off least of it."""
    max_buckets: Annotated[int | None, at_least(1), only_with("use_aspect_ratio_bucket")] = None
    """At most so many sizes. None: all that some picture needs."""
    transparent_background: Background = "white"
    """What pictures are put on where they are transparent: white, black, grey or #rrggbb."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Schema):
    """Crop pictures to the sizes of a training, near-duplicates left out."""

    POSITIONAL = ("source", "target")

    preparation: PreparationConfig


_ADAPTED = Rule(lambda values: values["lora"] or values["embedding"], "--tuned: leave out --lora and --embedding")


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(GenerationConfig):
    """What base and adapted model are compared on."""

    instance_data_dir: Annotated[str, NOT_EMPTY, PATH]
    """Folder with photographs of the subject, two or more."""
    held_out_data_dir: Annotated[str | None, NOT_EMPTY, PATH] = None
    """Folder with photographs of the subject that it was not trained on, to see that it was learnt, not memorised."""
    other_data_dir: Annotated[str | None, NOT_EMPTY, PATH] = None
    """Folder with photographs of another subject of the class, whose fidelity is the floor. None: there is no floor."""
    transparent_background: Background = "white"
    """What they are put on where they are transparent: white, black, grey or #rrggbb."""
    tuned: Annotated[str | None, NOT_EMPTY, PATH, _ADAPTED] = None
    """In place of adapters: the model that training made of the base, such as --method full writes."""
    prompt: Annotated[str, NOT_EMPTY]
    """What the pictures of the subject show: a prompt, or the path of a text file with one prompt per line."""
    token: Annotated[str | None, NOT_EMPTY] = None
    """Rare word in them that CLIP-T leaves out, as it does new words. None: it reads them as they are."""
    class_prompt: Annotated[str, NOT_EMPTY]
    """Prompt of the class, to see what the training did to it."""
    clip: Annotated[str | None, NOT_EMPTY, PATH] = None
    """CLIP model that measures: a folder in transformers' layout, or a name on the Hugging Face hub, such as
    openai/clip-vit-base-patch32. None: the base model's own clip folder."""
    dino: Annotated[str | None, NOT_EMPTY, PATH] = None
    """DINO model that measures too, named in the same way: papers have facebook/dino-vits16. None: CLIP alone does."""
    num_images_per_prompt: Annotated[int, at_least(1)] = 1
    """Pictures per prompt from each seed."""
    num_class_images: Annotated[int, at_least(2)] = 16
    """Pictures of the class prompt from each seed. Figures of a class need 48 or so over all seeds."""
    num_seeds: Annotated[int, at_least(1)] = 3
    """Seeds, from --seed on; the spread of a figure is that over these."""
    output_dir: Annotated[str, NOT_EMPTY, PATH] = "evaluation"
    """Folder for before_after.png and metrics.json."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Schema):
    """Compare base and adapted model, by the same prompts and noise."""

    USUAL = (
        *("pretrained_model_name_or_path", "lora", "embedding", "instance_data_dir", "held_out_data_dir", "prompt"),
        *("class_prompt", "clip", "dino", "num_images_per_prompt", "num_seeds", "guidance_scale", "output_dir"),
    )
    EXAMPLE = """--pretrained_model_name_or_path sd15 --lora runs/dog --instance_data_dir photographs/dog \\
    --prompt "a photo of sks dog" --class_prompt "a photo of a dog" --clip openai/clip-vit-base-patch32"""

    weights: WeightsConfig
    comparison: ComparisonConfig
    device: DeviceConfig = field(default_factory=DeviceConfig)


_FLAGS = Range("names, none of them none, with flags of `train` such as {rank: 8}", lambda named: named and all(
    re.fullmatch(r"(?!none$)\w[\w-]*", name) and isinstance(flags, dict) for name, flags in named.items()
))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TeachingConfig:
    """Who is taught, by which methods."""

    subjects_dir: Annotated[str, NOT_EMPTY, PATH]
    """Folder with a folder of photographs of each subject, and a list of their classes and prompts: google/dreambooth,
    or one with subjects.yaml in it (docs/learning.md)."""
    subjects: list[str] = field(default_factory=list)
    """Those of it that are taught. Empty: all."""
    prompts: Annotated[tuple[str, ...] | None, NOT_EMPTY] = None
    """What pictures of each subject show, with {token} and {class} in it. None: what the list has."""
    held_out_data_dir: Annotated[str | None, NOT_EMPTY, PATH] = None
    """Folder with a folder, of the same name, of photographs of each subject that it is not trained on."""
    token: Annotated[str, NOT_EMPTY] = "sks"
    """What {token} stands for; for a method with --modifier_token it is that."""
    instance_prompt: Annotated[str, NOT_EMPTY] = "a photo of {token} {class}"
    """Prompt of the photographs."""
    class_prompt: Annotated[str, NOT_EMPTY] = "a photo of {class}"
    """Prompt of the class."""
    methods: Annotated[dict[str, Any], _FLAGS]
    """Under a name of each method flags of `train`. The base without training is there by itself, as none."""
    train: dict[str, Any] = field(default_factory=dict)
    """Flags of `train` that all methods have. In any flag {token} and {class} are filled in."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Flags of `evaluate`, such as clip, dino, num_class_images and num_seeds."""
    num_trainings: Annotated[int, at_least(1)] = 3
    """Trainings of each subject by each method, with the seeds 0, 1, and so on."""
    output_dir: Annotated[str, NOT_EMPTY, PATH] = "benchmark"
    """Folder for table.md, and for the runs: subject/method-seed, with figures.json when it is done."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Schema):
    """Compare methods, by what subjects that they teach are evaluated to."""

    POSITIONAL = ("config",)

    model: BaseModelConfig
    teaching: TeachingConfig
    device: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A file or folder to read."""

    source: Annotated[str, NOT_EMPTY, PATH]
    """Model or LoRA: a file or a folder, in any format that is read."""
    base: Annotated[str | None, NOT_EMPTY, PATH] = None
    """For a LoRA: its model, where no run's config.yaml beside it names one and sizes are not the published ones."""
    variant: str | None = None
    """Variant of the weight files in a model folder, such as fp16. None: the plain files, or the only variant."""


@dataclass(frozen=True, kw_only=True)
class WritingConfig:
    """A file or folder to write."""

    target: Annotated[str, NOT_EMPTY, PATH]
    """What to write: NAME.safetensors is a single file, NAME.ckpt a MindSpore checkpoint, without suffix a folder."""
    dtype: FloatType | None = None
    """Type of the numbers to write. None: as in the source."""


@dataclass(frozen=True, kw_only=True)
class TargetConfig(WritingConfig):
    """A model or adapter to write, and what its source may not say."""

    alpha: Annotated[float | None, FINITE] = None
    """Alpha of a LoRA whose file does not hold it, such as mindone's. None: its rank, a scale of 1."""
    prediction_type: PredictionType | None = None
    """What the model predicts, where its files do not say. None: velocity for SD 2.x, noise for all others."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Schema):
    """Say what a file or folder is."""

    POSITIONAL = ("source",)

    inspection: SourceConfig


_Format: TypeAlias = Literal[
    "diffusers", "stability", "mindone", "kohya", "kohya_diffusers", "peft", "diffusers_peft", "diffusers_processors",
    "custom_diffusion", "embedding"
]  # fmt: skip
_LoraFormat: TypeAlias = Literal[
    "diffusers", "mindone", "kohya", "kohya_diffusers", "peft", "diffusers_peft", "diffusers_processors"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(TargetConfig, SourceConfig):
    """From any format to any other; the files and the target's name say which."""

    format: _Format | None = None
    """Format to write, where the target's name leaves it open. None: the name decides."""
    use_ema: bool = False
    """Take the moving averages that a single file may hold, in place of the weights."""
    rank: Annotated[int | None, at_least(1)] = None
    """Make a LoRA of this rank of updates of any other kind or of a larger rank, by their largest singular values.
    None: only of Custom Diffusion weights, of which each layer keeps what makes up 60 % of its singular values."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Schema):
    """Write a model or a LoRA in another format."""

    POSITIONAL = ("source", "target")

    conversion: ConversionConfig


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig(WritingConfig):
    """From two models to what one has learnt, of linear layers and convolutions of UNet and text encoders."""

    base: Annotated[str, NOT_EMPTY, PATH]
    """The model that was trained: a file or a folder, in any format that is read, or a name on the Hugging Face hub."""
    tuned: Annotated[str, NOT_EMPTY, PATH]
    """The model that it became, of the same sizes."""
    rank: Annotated[
        int | None,
        at_least(1),
        excludes("extract_ratio", message="decides as --extract_ratio does; leave one out"),
        needed_without("extract_ratio", "rank", "name one, or an --extract_ratio"),
    ] = None
    """Of each layer's LoRA."""
    extract_ratio: Annotated[float | None, SHARE] = None
    """In place of a rank: a layer keeps the largest singular values whose sum is below this share of all, or one."""
    format: _LoraFormat | None = None
    """Format to write, where the target's name leaves it open. None: the name decides."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(Schema):
    """Write a LoRA of what a model differs by from its base."""

    extraction: ExtractionConfig


_MERGED = needed_without("concepts", "lora", "name the LoRA to merge, or --concepts")
_NO_MODEL = Rule(
    lambda values: any(values[name] for name in ("lora", "format", "alpha", "prediction_type")),
    "--concepts: an adapter is made of them, not a model; leave out --lora, --format, --alpha and --prediction_type",
)
_OF_EACH = Rule(
    lambda values: values["concepts"] and len(values["concept_prompts"]) != len(values["concepts"]),
    "--concept_prompts: expected one for each of --concepts {concepts}, got {concept_prompts}",
)


@dataclass(frozen=True, kw_only=True)
class MergingConfig(TargetConfig):
    """One or several LoRAs become part of a model's weights, or several concepts of Custom Diffusion become one."""

    base: Annotated[str, NOT_EMPTY, PATH]
    """The model: a file or a folder, in any format that is read, or a name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub. None: its main branch."""
    lora: Annotated[list[str], PATH, _MERGED] = field(default_factory=list)
    """LoRA files or folders of any format and rank, or owner/name[/file] on the Hugging Face hub; they are added up."""
    scale: Annotated[float, FINITE] = 1.0
    """Strength of the LoRAs: 1 is as trained; -1 takes out again what was merged at 1."""
    format: Literal["diffusers", "stability", "mindone"] | None = None
    """Format to write. None: the target's name decides."""
    variant: str | None = None
    """Variant of the weight files in a model folder, such as fp16. None: the plain files, or the only variant."""
    concepts: Annotated[list[str], PATH, Range("two or more", lambda paths: len(paths) != 1), _NO_MODEL] = field(
        default_factory=list
    )
    """In place of lora: results of Custom Diffusion, files or folders, of which one is made without training. It is the
    folder that the target names. Where several use the same word, those of the later ones are renamed."""
    concept_prompts: Annotated[tuple[str, ...] | None, NOT_EMPTY, only_with("concepts"), _OF_EACH] = None
    """What the subject of each is called, such as "<new1> dog", by its own words. None: as in the prompt of its run,
    whose config.yaml is beside it, or else by its words alone."""
    regularization_prompts: Annotated[str | None, NOT_EMPTY, PATH, only_with("concepts")] = None
    """Text file of a few hundred captions, one per line, which stay as the base reads them. None: own captions."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Schema):
    """Merge LoRAs into a model, or concepts into one."""

    merging: MergingConfig


@dataclass(frozen=True, kw_only=True)
class PublicationConfig:
    """What is uploaded."""

    folder: Annotated[str, NOT_EMPTY, PATH]
    """The --output_dir of a training: its result, a model card and the last validation pictures are uploaded, never
    checkpoints, photographs, logs or caches."""


@dataclass(frozen=True, kw_only=True)
class PushConfig(Schema):
    """Upload what was trained to the Hugging Face hub."""

    POSITIONAL = ("folder",)

    publication: PublicationConfig
    hub: HubConfig = field(default_factory=HubConfig)


@dataclass(frozen=True, kw_only=True)
class InstallationReportConfig:
    """What is written."""

    report: Annotated[str | None, NOT_EMPTY, PATH] = None
    """File to write everything into that helps others to help: the lines, versions of all packages, and what MindSpore,
    CANN and launchers read of the environment. A new file. None: nothing is written."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Schema):
    """Check that the installation works on this machine."""

    device: DeviceConfig = field(default_factory=DeviceConfig)
    report: InstallationReportConfig = field(default_factory=InstallationReportConfig)
