"""From what is filled in on the page to the flags of `dreambooth-ms train`."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from demo.library import ModelFacts
from demo.processes import REPOSITORY
from demo.subjects import CONCEPTS, Subject, settings
from dreambooth_ms.config.choices import Method
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import RATES, TrainConfig
from dreambooth_ms.data.plan import Framing, sizes_of
from dreambooth_ms.models.specs import Family

CONFIGS = REPOSITORY / "configs" / "training"
SMALL, PRESETS = (
    "quickstart.yaml",
    {
        Family.SD1: ("sd_v1_5_dreambooth_lora.yaml",),
        Family.ALT: ("sd_v1_5_dreambooth_lora.yaml",),
        Family.IF: ("if_1_dreambooth_lora.yaml",),
        Family.SD2: ("sd_v2_1_dreambooth_lora.yaml",),
        Family.SDXL: (
            "sd_xl_base_finetune_dreambooth_lora_910b.yaml",
            "sd_xl_base_finetune_dreambooth_lora_910a.yaml",
            "sd_xl_base_finetune_dreambooth_textencoder_lora_910b.yaml",
        ),
    },
)


METHODS: dict[Method, str] = {
    "lora": "LoRA",
    "full": "All weights",
    "custom_diffusion": "Custom Diffusion",
    "textual_inversion": "New words alone",
}
"""As the page calls them."""
BY_WORDS: tuple[Method, ...] = ("custom_diffusion", "textual_inversion")
"""Those that learn the subject by new words."""
_SMALL_RATES: dict[Method, float] = {"full": 1e-4, "custom_diffusion": 1e-3, "textual_inversion": 5e-3}
"""For networks as small as the embedded base's."""

_WORD = re.compile(r"[A-Za-z0-9]+")
_FILLERS = re.compile(r"an?|the|of|my|this|that|one|photo(graph)?|picture|image|painting|drawing|portrait")
_PLACES = re.compile(r"in|on|at|by|with|under|near|and|wearing|holding|sitting|standing")


@dataclass(frozen=True)
class Preset:
    """A configuration of the repository, with the values that the page starts from."""

    file: Path
    with_prior_preservation: bool
    num_class_images: int
    max_train_steps: int
    learning_rate: float
    rank: int
    center_crop: bool
    train_text_encoder: bool
    checkpointing_steps: int


def preset_files(facts: ModelFacts) -> list[Path]:
    """The configurations that are made for a model, the most usual first."""
    return [CONFIGS / name for name in ((SMALL,) if facts.is_small else PRESETS[facts.family])]


@lru_cache(maxsize=16)
def read_preset(file: Path) -> Preset:
    """Read a configuration, without what the page asks for itself.

    Raises:
        ConfigError: it is no configuration of `dreambooth-ms train`.
    """
    asked = [
        "pretrained_model_name_or_path",
        "instance_data_dir",
        "instance_prompt",
        "class_data_dir",
        "class_prompt",
    ]
    placeholders = [word for name in asked for word in (f"--{name}", f"a {name}")]
    config = load(TrainConfig, ["--config", str(file), *placeholders], tell=lambda note: None)
    return Preset(
        file=file,
        with_prior_preservation=config.prior.with_prior_preservation,
        num_class_images=config.prior.num_class_images,
        max_train_steps=config.run.max_train_steps or 500,
        learning_rate=config.learning_rate,
        rank=config.method.rank,
        center_crop=config.data.center_crop,
        train_text_encoder=config.method.train_text_encoder,
        checkpointing_steps=config.run.checkpointing_steps,
    )


def rate_of(preset: Preset, method: Method) -> float:
    """The learning rate that a method starts from: the preset's own is for a LoRA."""
    rates = _SMALL_RATES if preset.file.name == SMALL else RATES
    return preset.learning_rate if method == "lora" else rates[method]


@dataclass(frozen=True, kw_only=True)
class TrainingWishes:
    """What is filled in."""

    base: Path
    preset: Preset
    resolution: int
    buckets: bool
    """Whether pictures are trained at sizes of several shapes."""
    side_step: int
    """Sides are multiples of it."""
    method: Method = "lora"
    new_words: Sequence[str] = ()
    """Empty for methods that take none."""
    initial_words: Sequence[str] = ()
    """What these start from, as many, or none."""
    num_class_images: int
    max_train_steps: int
    learning_rate: float
    rank: int
    center_crop: bool
    train_text_encoder: bool
    validation_prompts: Sequence[str]
    validation_steps: int
    num_validation_images: int
    seed: int

    @property
    def framing(self) -> Framing:
        """How pictures are cropped."""
        sizes = sizes_of(self.resolution, self.side_step) if self.buckets else [(self.resolution, self.resolution)]
        return Framing(tuple(sizes), self.center_crop, random_flip=False)


def name_of(words: Sequence[tuple[str, str | None]]) -> str:
    """A name for a training, of the rare word and the class of each of its subjects."""
    return "-".join(filter(None, itertools.starmap(_name, words)))[:40].strip("-") or "subject"


def _name(prompt: str, class_prompt: str | None) -> str:
    """ "sks-dog" of "a photo of sks dog in the snow"."""
    words, of_class = (_WORD.findall(text.lower()) for text in (prompt, class_prompt or ""))
    of_subject = itertools.takewhile(lambda word: not _PLACES.fullmatch(word), words)
    telling = [word for word in of_subject if not _FILLERS.fullmatch(word)]
    ends = [number for number, word in enumerate(telling, 1) if word in of_class]
    return "-".join(telling[: ends[-1] if ends else 3])


def flags(wishes: TrainingWishes, subjects: Sequence[Subject], target: Path) -> dict[str, Any]:
    """Flags by name, a list of those that are given more than once; None for one that is left out."""
    prior, shows = subjects[0].class_prompt is not None, bool(wishes.validation_prompts)
    return {
        "pretrained_model_name_or_path": wishes.base,
        **(settings(subjects, target)[0] if len(subjects) == 1 else {"concepts_list": target / CONCEPTS}),
        "resolution": wishes.resolution,
        "use_aspect_ratio_bucket": wishes.buckets,
        "center_crop": wishes.center_crop,
        "with_prior_preservation": prior,
        "num_class_images": wishes.num_class_images if prior else None,
        "method": wishes.method,
        "modifier_token": "+".join(wishes.new_words) or None,
        "initializer_token": "+".join(wishes.initial_words) or None,
        "train_text_encoder": wishes.train_text_encoder,
        "rank": wishes.rank if wishes.method == "lora" else None,
        "learning_rate": wishes.learning_rate,
        "max_train_steps": wishes.max_train_steps,
        "seed": wishes.seed,
        "checkpointing_steps": min(wishes.preset.checkpointing_steps, wishes.max_train_steps),
        "validation_prompt": list(wishes.validation_prompts),
        "validation_steps": wishes.validation_steps if shows else None,
        "num_validation_images": wishes.num_validation_images if shows else None,
        "output_dir": target,
    }
