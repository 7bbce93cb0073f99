"""What a file holds, told from the names and shapes of its tensors alone."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from dreambooth_ms.errors import WeightError, count_of
from dreambooth_ms.formats.naming import mindone, stability
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.formats.naming.infer import StoredModel, infer_model, infer_vae, with_channels
from dreambooth_ms.formats.naming.plan import Naming, unwrapped
from dreambooth_ms.formats.naming.slots import Shape
from dreambooth_ms.models.specs import PUBLISHED_MODELS, SD_15, Family, ModelSpec

# Methods whose tensors stand beside or instead of A and B, so that reading these alone would give another update.
OTHER_METHODS = {
    "DoRA": r"\.dora_scale$|lora_magnitude_vector",
    "LoHa": r"\.hada_w[12]",
    "LoKr": r"\.lokr_w[12]",
    "GLoRA": r"\.[ab][12]\.weight$",
    "DyLoRA": r"\.(?:up|down)_list\.\d+$|\.lora_[AB]\.\d+$",
    "AdaLoRA": r"\.lora_E(?:\.[^.]+)?$",
    "OFT": r"\.oft_(?:R|s|diag)(?:\.|$)",
    "OFT or BOFT": r"\.oft_blocks$",
    "BOFT": r"\.boft_[Rs](?:\.|$)",
    "VeRA": r"\.vera_lambda_[bd](?:\.|$)|(?:^|\.)vera_[AB](?:\.|$)",
    "IA3": r"\.on_input$|\.ia3_l(?:\.|$)",
    "LoCon with a third factor": r"\.lora_mid\.",
    "LoRA of embeddings": r"\.lora_embedding_[AB](?:\.|$)",
    "full differences of weights (.diff)": r"\.diff(?:_b)?$",
    "norms (.w_norm)": r"\.[wb]_norm$",
    "weights set anew or reshaped (.set_weight, .reshape_weight)": r"\.(?:set_weight|reshape_weight)$",
    "a factor besides alpha (.scalar)": r"\.scalar$",
    "a trained bias": r"lora_(?:B|up)(?:\.[^.]+)?\.bias$",
    "embeddings of new words beside it (bundle_emb)": r"^bundle_emb\.",
}
# What a file may be instead -> names that only such files have. The first that fits is said.
_OTHER_KINDS = {
    "a CosXL model, trained with the noise of EDM": r"^edm_vpred\.",
    "a LoRA": "|".join((r"(?:^|[._])lora[._]|^lycoris_", *OTHER_METHODS.values())),
    "an SD 3 model": r"joint_blocks\.\d+\.",
    "a Flux model": r"double_blocks\.\d+\.img_|single_transformer_blocks\.\d+\.",
    "a ControlNet": r"^control_model\.|controlnet_|input_hint_block\.",
    "a T2I-Adapter": r"^(?:adapter\.)?body\.\d+\.",
    "an IP-Adapter": r"^(?:ip_adapter|image_proj)\.",
    "an AnimateDiff motion module": r"motion_modules\.",
    "a textual inversion embedding": r"^(?:emb_params|\*|string_to_(?:param|token)\b.*|clip_[lg]|<.+>)$",
    "an upscaler": r"^model\.diffusion_model\.label_emb\.weight$",
    "a diffusion transformer": r"adaLN_modulation|scale_shift_table|adaln_single",
    "a model with another UNet": r"^(?:model\.diffusion_model|unet)\.",
    "a model without its UNet": r"^(?:cond_stage_model|conditioner|text_encoder|text_encoder_2)\.",
    "a text encoder alone": r"^(?:text_model|transformer\.resblocks|encoder\.block|encoder\.layers|embeddings)\.",
    "an autoencoder alone": r"^(?:first_stage_model\.)?(?:encoder|decoder)\.(?:conv_in|mid_block|mid)\.",
    "a UNet alone, in diffusers' naming without its folder": r"^(?:down_blocks|mid_block|up_blocks)\.",
    "a UNet alone, in LDM naming without its prefix": r"^(?:input_blocks|middle_block|output_blocks)\.",
}
# Whole models by their format: each has one of these, also if the other is missing.
_MODEL_MARKS = {
    Format.DIFFUSERS: ("unet.conv_in.weight", "unet.conv_in.bias"),
    Format.MINDONE: (f"{stability.UNET_PREFIX}out.0.gamma", f"{stability.UNET_PREFIX}out.0.beta"),
    Format.STABILITY: (f"{stability.UNET_PREFIX}out.0.weight", f"{stability.UNET_PREFIX}out.0.bias"),
}
_OTHER_MODELS_MARKS = ("model.diffusion_model.label_emb.weight", "edm_vpred.sigma_max")
# What SDXL's base has in single files and its refiner, whose one text encoder is OpenCLIP's, has not.
_SDXL_BASE_MARKS = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.")
_SPECIAL_INPUTS = {5: "depth", 7: "upscaling", 8: "editing by instruction", 9: "inpainting"}

# How names begin that autoencoders alone in a file have -> the format, and what is before them in a whole model.
_LONE_VAES = {
    "encoder.down_blocks.0.resnets.0.norm1.": (Format.DIFFUSERS, "vae."),
    "encoder.down.0.block.0.norm1.": (Format.STABILITY, stability.VAE_PREFIX),
}


@dataclass(frozen=True)
class Recognition:
    """A model in a file."""

    form: Format
    model: ModelSpec
    """A published one if all sizes agree, else with the sizes of the file."""
    naming: Naming
    prediction_type: str | None
    """"epsilon" or "v_prediction"; None if the names do not tell."""
    notes: tuple[str, ...]
    """What a user should know about it, one sentence each."""


def recognise_model(stored: Mapping[str, Shape], source: str) -> Recognition:
    """Format, family and sizes of a model.

    Args:
        stored: names and shapes of a file's tensors; for a folder in diffusers' layout the names of each part with the
            part and a dot in front.
        source: the file or folder, for the message.

    Raises:
        WeightError: it is something else, which the message names where it is known.
    """
    cleaned = {mindone.clean(unwrapped(name)): shape for name, shape in stored.items()}
    form = _form(cleaned)
    if form is None:
        raise WeightError(f"{source}: this is {other_kind(stored)}; expected a model of SD 1.x, SD 2.x or SDXL")
    model = infer_model(cleaned, form, _family(cleaned, form))
    naming = naming_of(form, model)
    is_open = model.family is Family.SD2 or "edm_mean" in cleaned
    # Fine-tuned models that predict velocity say so by a tensor that holds nothing.
    prediction_type = "v_prediction" if "v_pred" in cleaned else None if is_open else "epsilon"
    return Recognition(form, model, naming, prediction_type, tuple(_notes(cleaned, model, naming, prediction_type)))


def recognise_vae(stored: Mapping[str, Shape], source: str) -> Recognition:
    """Format, sizes and naming of an autoencoder that is alone in a file; the rest of the model is SD 1.5's.

    Raises:
        WeightError: it is something else.
    """
    names = [unwrapped(name) for name in stored]
    found = next((place for mark, place in _LONE_VAES.items() if any(name.startswith(mark) for name in names)), None)
    if found is None:
        raise WeightError(f"{source}: this is {other_kind(stored)}; expected an autoencoder (VAE) of Stable Diffusion")
    form, prefix = found
    shapes = {prefix + unwrapped(name): shape for name, shape in stored.items()}
    model = replace(SD_15, vae=infer_vae(StoredModel(shapes, form, SD_15)))
    naming = replace(naming_of(form, model), clean=lambda name: prefix + name.removeprefix(prefix))
    return Recognition(form, model, naming, None, ())


def other_kind(names: Iterable[str]) -> str:
    """What a file is, as far as its names tell: for a message to someone who expected another kind."""
    held = [unwrapped(name) for name in names]
    if _form(held):
        return "a whole model"
    for kind, pattern in _OTHER_KINDS.items():
        if any(map(re.compile(pattern).search, held)):
            return kind
    shown = ", ".join(sorted(held)[:3]) or "nothing"
    return f"of an unknown kind (it holds {shown})"


def _form(names: Collection[str]) -> Format | None:
    if any(mark in names for mark in _OTHER_MODELS_MARKS):
        return None
    return next((form for form, marks in _MODEL_MARKS.items() if any(mark in names for mark in marks)), None)


def _family(stored: Mapping[str, Shape], form: Format) -> Family:
    """SDXL adds pooled text to the time; SD 1 and SD 2 differ in the projections of their transformers."""
    if form is Format.DIFFUSERS:
        added, projection = "unet.add_embedding.linear_1.weight", "unet.mid_block.attentions.0.proj_in.weight"
        has_first_encoder = any(name.startswith("text_encoder.") for name in stored)
    else:
        added = stability.UNET_PREFIX + "label_emb.0.0.weight"
        projection = stability.UNET_PREFIX + "middle_block.1.proj_in.weight"
        has_first_encoder = any(name.startswith(_SDXL_BASE_MARKS) for name in stored)
    if added in stored:
        has_encoders = has_first_encoder or any(name.startswith(("conditioner.", "text_encoder_2.")) for name in stored)
        is_refiner = not has_first_encoder if has_encoders else stored[added][1:] == (2560,)
        return Family.SDXL_REFINER if is_refiner else Family.SDXL
    return Family.SD2 if len(stored.get(projection, ())) == 2 else Family.SD1


def _notes(stored: Mapping[str, Shape], model: ModelSpec, naming: Naming, prediction_type: str | None) -> Iterator[str]:
    if model.family is Family.SD2 and prediction_type is None:
        yield "Names do not tell whether an SD 2.x model predicts noise (512 px) or velocity (768 px)."
    if "edm_mean" in stored:
        yield "Playground v2.5: its latents have a mean and deviation of their own, in the same file."
    if model.unet.in_channels in _SPECIAL_INPUTS:
        use = _SPECIAL_INPUTS[model.unet.in_channels]
        yield f"Its UNet takes {model.unet.in_channels} channels: a model for {use}."
    averages = {slot.name for slot in naming.averages.values()} & stored.keys()
    if averages:
        yield f"Moving averages (EMA) of {count_of(len(averages), 'weight')} are there besides the weights."
    if with_channels(model, 4, 4) not in PUBLISHED_MODELS:
        yield "Its sizes are not those of a published model; heads and norm groups are assumed."
