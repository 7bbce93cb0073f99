"""What `sample` can be told."""

from dataclasses import dataclass, field

from dreambooth_ms.config.choices import SamplingScheduler, SamplingTask
from dreambooth_ms.config.ranges import Findings, _changed, out_of_range
from dreambooth_ms.config.shared import DeviceConfig, WeightsConfig, _scales_that_fit


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
