"""The settings of `sample`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dreambooth_ms.config.choices import SD_XL_BASE_RATIOS
from dreambooth_ms.config.ranges import INNER_SHARE, NOT_EMPTY, PART, PATH, SCORE, SHARE, SIDE, STEPS, Range, at_least
from dreambooth_ms.config.rules import Rule, excludes, needs, no_effect, only_with, refused_with
from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import Background, DeviceConfig, GenerationConfig, ScheduleConfig, WeightsConfig

_GUIDED = no_effect("with a --guidance_scale of 1 or less", when=lambda values: values["guidance_scale"] <= 1)
_RATIO = Range(f"one of {', '.join(SD_XL_BASE_RATIOS)}", lambda name: name in SD_XL_BASE_RATIOS)
_BY_SHEET = excludes("num_rows", "num_cols", message="is --num_rows times --num_cols; give it without them")
_BY_RATIO = excludes("height", "width", message="is a height and a width; give it without --height and --width")


@dataclass(frozen=True, kw_only=True)
class PicturesConfig(GenerationConfig):
    """The pictures to make."""

    prompt: Annotated[str, NOT_EMPTY]
    """What the pictures show: a prompt, or the path of a text file with one prompt per line. Not required with like."""
    like: Annotated[str | None, NOT_EMPTY, PATH] = None
    """A picture to repeat: its settings, base and adapters stand for the flags that are not given, its noise too. Of a
    picture of A1111's kind its prompts, sampler, steps, guidance, seed and size."""
    negative_prompt: Annotated[str, _GUIDED] = ""
    """What the pictures should not show. Empty: nothing; SDXL is then guided by zeros where the model asks for it."""
    num_images_per_prompt: Annotated[int, at_least(1), _BY_SHEET] = 1
    """Pictures per prompt."""
    height: Annotated[int | None, SIDE] = None
    """Height in pixels. None: the model's own."""
    width: Annotated[int | None, SIDE] = None
    """Width in pixels. None: the model's own."""
    sd_xl_base_ratios: Annotated[str | None, _RATIO, _BY_RATIO] = None
    """One of the sizes that SDXL was trained at, in place of height and width, by its width over height."""
    guidance_rescale: Annotated[float, PART, _GUIDED] = 0.0
    """Share of the guided prediction that is brought back to the contrast of the unguided one. 0.7 is usual for models
    that predict velocity, whose pictures guidance makes too bright."""
    clip_skip: Annotated[int, at_least(0)] = 0
    """Layers left out at the end of the text encoders, from 0 as in diffusers (--clip_stop_at_last_layers: from 1)."""
    support_long_prompts: bool = False
    """Read prompts beyond 77 tokens in pieces of 75. Otherwise they are cut, and a warning says what was lost."""
    vae_whole_up_to: Annotated[int | None, SIDE] = None
    """Side in pixels of the largest square that the autoencoder decodes at once. What has more pixels is decoded in
    bands of rows, which takes less memory and gives the same picture. None: 256 on CPU, 2048 on Ascend."""
    num_rows: Annotated[int | None, at_least(1)] = None
    """Rows of the sheet that is written beside the pictures of each prompt; with num_cols in place of
    num_images_per_prompt. None: 1, or no sheet without num_cols."""
    num_cols: Annotated[int | None, at_least(1)] = None
    """Columns of that sheet, see num_rows. None: 1, or no sheet without num_rows."""
    output_dir: Annotated[str, NOT_EMPTY, PATH] = "outputs"
    """Folder for the pictures."""


_STARTS = Rule(
    lambda values: values["task"] == "img2img" and values["image"] is None,
    "--task img2img: needs --image, the picture to start from",
)
_INPAINTS = Rule(
    lambda values: values["task"] == "inpaint" and values["mask"] is None,
    "--task inpaint: needs --image and --mask, which is white where the picture is drawn anew",
)
_NO_START = refused_with("task", "txt2img", "a picture is started from with --task img2img only")
_NO_MASK = Rule(lambda values: values["task"] not in (None, "inpaint"), "--mask: goes with --task inpaint, not {task}")
_WHOLE_PICTURE = excludes("refiner", message="a --refiner would change what is not masked; leave one of them out")
_NO_IMAGE = no_effect("without --image", when=lambda values: values["task"] is None and values["image"] is None)


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Image to image, and inpainting: what pictures start from."""

    task: Annotated[Literal["txt2img", "img2img", "inpaint"] | None, _STARTS, _INPAINTS] = None
    """From text (txt2img) or a picture (img2img), or a part of one anew (inpaint). None: as --image and --mask say."""
    image: Annotated[str | None, NOT_EMPTY, PATH, _NO_START] = None
    """Picture to start from. Without --height and --width its shape is kept, at the model's own area."""
    mask: Annotated[str | None, NOT_EMPTY, PATH, needs("image", "the picture"), _NO_MASK, _WHOLE_PICTURE] = None
    """For a base that inpaints, which needs it: a picture of the size of --image that is white where that is drawn
    anew; what is less than half white, or transparent, stays nearly as it is."""
    strength: Annotated[float | None, SHARE, _NO_IMAGE] = None
    """How far to go from the picture: 1 keeps nothing of it, but for what --mask has not. None: 0.75, with --mask 1."""
    transparent_background: Annotated[Background, _NO_IMAGE] = "white"
    """What the picture is put on where it is transparent: white, black, grey or #rrggbb."""


def _whole(size: str) -> Rule:
    return Rule(
        lambda values: values[f"{size}_height"] is None or values[f"{size}_width"] is None,
        f"--{size}_height: give it together with --{size}_width",
    )


_ORIGINAL, _TARGET = _whole("orig"), _whole("target")


@dataclass(frozen=True, kw_only=True)
class SizesConfig:
    """Size and crop that SDXL assumes of its pictures (add_time_ids): small ones look blurred, cropped ones cut off."""

    orig_height: Annotated[int | None, at_least(1), _ORIGINAL] = None
    """Height of the picture before it was resized. None: that of the generated picture."""
    orig_width: Annotated[int | None, at_least(1), _ORIGINAL] = None
    """Width of the picture before it was resized. None: that of the generated picture."""
    target_height: Annotated[int | None, at_least(1), _TARGET] = None
    """Height of the picture. None: that of the generated picture. The refiner does not take it."""
    target_width: Annotated[int | None, at_least(1), _TARGET] = None
    """Width of the picture. None: that of the generated picture. The refiner does not take it."""
    crop_coords_top: Annotated[int, at_least(0)] = 0
    """Rows cut off at the top."""
    crop_coords_left: Annotated[int, at_least(0)] = 0
    """Columns cut off at the left."""
    aesthetic_score: Annotated[float, SCORE] = 6.0
    """How beautiful the picture is, of 10; only the refiner takes it."""
    negative_aesthetic_score: Annotated[float, SCORE] = 2.5
    """The score that comes with the negative prompt, of 10; only the refiner takes it."""

    def told(self) -> dict[str, Any]:
        """The same as the metadata of pictures has it, with (width, height) of either size, or None."""
        original, target = (self.orig_width, self.orig_height), (self.target_width, self.target_height)
        return {
            "original_size": None if None in original else original,
            "target_size": None if None in target else target,
            "crop_top": self.crop_coords_top,
            "crop_left": self.crop_coords_left,
            "aesthetic_score": self.aesthetic_score,
            "negative_aesthetic_score": self.negative_aesthetic_score,
        }


_STOPS = excludes(
    "refiner_strength", message="the base stops there, with --refiner_strength it finishes; give one of them"
)


@dataclass(frozen=True, kw_only=True)
class RefinerConfig:
    """A second model, SDXL's refiner, that goes on from the base's pictures."""

    refiner: Annotated[str | None, NOT_EMPTY, PATH] = None
    """The model: a folder, a file, or a name on the Hugging Face hub, in the base's --variant. None: there is none."""
    denoising_end: Annotated[float | None, INNER_SHARE, _STOPS, needs("refiner", "which goes on from there")] = None
    """Share of the denoising that the base does, the refiner the rest. None: 0.8, or all with --refiner_strength."""
    refiner_strength: Annotated[float | None, SHARE, only_with("refiner")] = None
    """Let the base finish its pictures, and the refiner start from them and go this far: 1 keeps nothing of them."""

    @property
    def base_share(self) -> float | None:
        """Share of the denoising that the base does; None: it finishes its pictures."""
        return None if self.refiner_strength is not None else self.denoising_end or 0.8


@dataclass(frozen=True, kw_only=True)
class TimestepsConfig(ScheduleConfig):
    """What is sampled otherwise than the base's scheduler configuration and the adapters say."""

    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    """Which of the base's timesteps the steps are at. None: as it says, or trailing with --rescale_betas_zero_snr."""


_ENLARGES = only_with("super_resolution")
_ONE_MORE = excludes("refiner", message="and --refiner are two models that go on from the pictures; give one of them")


@dataclass(frozen=True, kw_only=True)
class SuperResolutionConfig:
    """A second stage, such as DeepFloyd IF's, that enlarges the pictures of a first one to four times their sides. With
    such a model alone, --image is what is enlarged."""

    super_resolution: Annotated[str | None, NOT_EMPTY, PATH, _ONE_MORE] = None
    """The model: a folder, or a name on the Hugging Face hub, in the base's --variant. None: pictures stay as they
    are."""
    super_resolution_prompt: Annotated[str | None, NOT_EMPTY, _ENLARGES] = None
    """What it reads: without the rare token, "a dog", if it has not been taught the subject. None: the prompt."""
    super_resolution_lora: Annotated[list[str], PATH, _ENLARGES] = field(default_factory=list)
    """Adapters on it, named as those of --lora."""
    super_resolution_steps: Annotated[int, STEPS, _ENLARGES] = 50
    """Its denoising steps."""
    super_resolution_guidance_scale: Annotated[float, at_least(0), _ENLARGES] = 4.0
    """Its classifier-free guidance; 1 turns it off."""
    noise_level: Annotated[int, at_least(0)] = 250
    """Timestep of the noise that it sees on small pictures, of 1000: with more it makes up more of the details."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Schema):
    """Generate pictures with a base model and its adapters."""

    USUAL = (
        *("pretrained_model_name_or_path", "prompt", "lora", "lora_scale", "negative_prompt", "num_images_per_prompt"),
        *("embedding", "height", "width", "num_inference_steps", "guidance_scale", "scheduler", "seed", "output_dir"),
        "like",
    )
    EXAMPLE = """--pretrained_model_name_or_path sd15 --lora runs/dog \\
    --prompt "a photo of sks dog in a bucket" --num_images_per_prompt 4 --output_dir outputs"""

    weights: WeightsConfig
    pictures: PicturesConfig
    start: StartConfig = field(default_factory=StartConfig)
    sizes: SizesConfig = field(default_factory=SizesConfig)
    timesteps: TimestepsConfig = field(default_factory=TimestepsConfig)
    refinement: RefinerConfig = field(default_factory=RefinerConfig)
    enlargement: SuperResolutionConfig = field(default_factory=SuperResolutionConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)

    @property
    def num_images_per_prompt(self) -> int:
        """Pictures of each prompt: as many as were asked for, or as the sheet has room for."""
        wanted = self.pictures
        return (wanted.num_rows or 1) * (wanted.num_cols or 1) * wanted.num_images_per_prompt
