"""Flags that ask of a base what it does not do."""

from collections.abc import Iterator
from pathlib import Path

from dreambooth_ms.cli.training_concepts import numbers_to_come, sources_of
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.conditioning import PromptTokenizer
from dreambooth_ms.data.pictures import open_picture
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.models.specs import FAMILIES, PIXELS, ClipTextSpec
from dreambooth_ms.weights.bundle import ModelBundle


def check_base(config: TrainConfig, base: ModelBundle) -> None:
    """Raise ConfigError, a line for each, if there are; and as what reads tokenizers, and pictures to enlarge."""
    if found := [*_of_text(config, base), *(_of_second_stage if base.enlarges else _of_others)(config, base)]:
        raise ConfigError("\n".join(found))


def _of_text(config: TrainConfig, base: ModelBundle) -> Iterator[str]:
    method, wanted, longest = config.method, config.method.tokenizer_max_length, PromptTokenizer(base.text).length
    if wanted and wanted != longest:
        yield f"--tokenizer_max_length {wanted}: a prompt is {longest} tokens with this base; leave it out"
    side, pixels = config.data.resolution, base.denoiser.spec.sample_size
    if base.codec.spec == PIXELS and side > pixels:
        yield f"--resolution {side}: {base.path} was trained on pictures of {pixels} px; give {pixels}"
    if method.method == "custom_diffusion" and base.denoiser.spec.simple_blocks:
        yield f"--method custom_diffusion: trains cross-attention of SD and SDXL, which {base.path} has not; use lora"
    if method.output_kohya_format and (family := base.opened().spec.family.value) not in FAMILIES:
        yield f"--output_kohya_format: programs that read kohya's names have no {family}; leave it out"
    for reader in base.text:
        if method.text_encoder_use_attention_mask and not reader.hides_filling:
            yield f"--text_encoder_use_attention_mask: {reader.name} sees what fills up a prompt; leave it out"
        if method.train_text_encoder and not reader.adapted_layers:
            yield f"--train_text_encoder: {reader.name} of {base.path} is T5, which is read as it is; leave it out"
        if config.words.words and not isinstance(reader.spec, ClipTextSpec):
            yield f"--modifier_token: new words are for CLIP, and {base.path} reads text otherwise; leave it out"


def _of_second_stage(config: TrainConfig, base: ModelBundle) -> Iterator[str]:
    validation, prior = config.validation, config.prior
    for path in validation.validation_images or ():
        open_picture(Path(path))
    if validation.validation_prompt and not validation.validation_images:
        yield "--validation_images: missing; this base enlarges pictures, name small ones beside --validation_prompt"
    if any(numbers_to_come(sources_of(config, lambda line: None)).values()):
        yield f"--class_data_dir: this base enlarges pictures and generates none; put {prior.num_class_images} there"
    if config.stopping.keep_best == "fidelity":
        yield "--keep_best fidelity: samples pictures from noise, and this base enlarges pictures; give loss"


def _of_others(config: TrainConfig, base: ModelBundle) -> Iterator[str]:
    asked = vars(config.loss) | vars(config.validation)
    for name in ("class_labels_conditioning", "low_res_conditioning", "validation_images"):
        if asked[name]:
            yield f"--{name}: is for a second stage, which enlarges pictures, and {base.path} is none; leave it out"
