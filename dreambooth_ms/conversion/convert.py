"""Any format -> any other: what a source is, which format a target asks for, and the way between."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from dreambooth_ms.adapters.lora_file import FILE_NAME
from dreambooth_ms.adapters.lora_writing import write_lora_as
from dreambooth_ms.adapters.opened_lora import OpenedLora, holds_lora, open_lora
from dreambooth_ms.atomic import check_free
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.stored import Progress
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.models.specs import PUBLISHED_MODELS
from dreambooth_ms.weights.model_writing import ModelTarget, plan_model
from dreambooth_ms.weights.opened_model import OpenedModel, open_model

DTYPES = {"fp32": DType.F32, "fp16": DType.F16, "bf16": DType.BF16}

MODEL_FORMATS = {form.value: form for form in Format}
"""As users name them."""

LORA_FORMATS = {
    "diffusers": LoraFormat.DIFFUSERS,
    "diffusers_peft": LoraFormat.DIFFUSERS_PEFT,
    "diffusers_processors": LoraFormat.DIFFUSERS_PROCESSORS,
    "peft": LoraFormat.PEFT,
    "kohya": LoraFormat.KOHYA,
    "kohya_diffusers": LoraFormat.KOHYA_DIFFUSERS,
    "mindone": LoraFormat.MINDONE,
}
"""As users name them."""

Tell = Callable[[str], object]
ProgressBar = Callable[[int], AbstractContextManager[Progress]]
"""From the number of bytes to write to what is told how many were written."""

_PICKLES = (".bin", ".pt", ".pth")
_EXTENSIONS = {
    Format.DIFFUSERS: ("",),
    Format.STABILITY: (".safetensors",),
    Format.MINDONE: (".ckpt",),
    LoraFormat.PEFT: ("",),
    LoraFormat.MINDONE: (".ckpt",),
}
_LORA_FILE = ("", ".safetensors")


def convert(
    source: Path,
    target: Path,
    *,
    form: str | None = None,
    dtype: str | None = None,
    base: Path | None = None,
    alpha: float | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    use_averages: bool = False,
    tell: Tell,
    progress: ProgressBar,
) -> None:
    """Write the model or the LoRA of a source in another format.

    Args:
        source: a file or folder in any format that is read.
        target: the file or folder to write, whose name says the format, together with `form`.
        form: the format by its name in MODEL_FORMATS or LORA_FORMATS; None where the target's name is enough.
        dtype: fp32, fp16 or bf16; None keeps it.
        base: the model that a LoRA is for, where its sizes are not those of a published one.
        alpha: of a LoRA whose file does not hold it.
        variant: which of the files of a folder are read.
        prediction_type: what the model predicts, where the source does not tell.
        use_averages: take the moving averages (EMA) instead of the weights.
        tell: is given what the user should know, line by line.
        progress: shows how far it is.

    Raises:
        WeightError: anything is wrong with the source or the target; nothing is left of the target.
    """
    check_free(target)
    if holds_lora(source):
        models = [open_model(base).spec] if base else PUBLISHED_MODELS
        lora = open_lora(source, models).with_alpha(alpha)
        write_lora_as(lora, target, lora_format_of(target, form), DTYPES[dtype] if dtype else None)
        for note in lora.notes:
            tell(note)
        tell(f"wrote {target}: {describe_lora(lora)}")
        return
    model = open_model(source, variant, use_averages)
    if prediction_type:
        model = replace(model, prediction_type=prediction_type)
    planned = plan_model(model, model_format_of(target, form), DTYPES[dtype] if dtype else None)
    write_planned(planned, target, tell, progress)


def write_planned(planned: ModelTarget, target: Path, tell: Tell, progress: ProgressBar) -> None:
    """Write a model's file or folder, and say so."""
    planned.check_place(target)
    with progress(planned.byte_count) as count:
        planned.write(target, count)
    for note in (*planned.model.notes, *planned.notes):
        tell(note)
    tell(f"wrote {target}: {describe_model(planned.model)}, {planned.byte_count / 1e6:,.1f} MB")


def describe_model(model: OpenedModel) -> str:
    """The model in a few words."""
    return f"{model.spec.family.value} with {', '.join(model.parts)}"


def describe_lora(lora: OpenedLora) -> str:
    """The LoRA in a few words."""
    return f"a LoRA of {len(lora.factors)} layers of {', '.join(lora.parts)} of {' or '.join(lora.families)}"


def model_format_of(target: Path, form: str | None) -> Format:
    """The format of a model that a target's name and the user ask for.

    Raises:
        WeightError: they do not go together, or the format is not written.
    """
    chosen = MODEL_FORMATS.get(form) if form else None
    if form and chosen is None:
        raise WeightError(f"--format {form}: for LoRAs only; for a model choose one of {', '.join(MODEL_FORMATS)}")
    _refuse_pickles(target)
    by_name = next((one for one in Format if _extension(target) in _EXTENSIONS[one]), None)
    if by_name is None:
        raise WeightError(
            f"{target}: {target.suffix} is no kind of file that is written; end it in .safetensors or .ckpt "
            "(MindSpore), or give the name of a folder without an extension"
        )
    if chosen and chosen is not by_name:
        raise WeightError(f"{target}: --format {form} is written to {_kinds(_EXTENSIONS[chosen])}; name one")
    return by_name


def lora_format_of(target: Path, form: str | None) -> LoraFormat:
    """The format of a LoRA that a target's name and the user ask for.

    Raises:
        WeightError: they do not go together, the name leaves it open, or the format is not written.
    """
    chosen = LORA_FORMATS.get(form) if form else None
    if form and chosen is None:
        raise WeightError(f"--format {form}: for models only; for a LoRA choose one of {', '.join(LORA_FORMATS)}")
    _refuse_pickles(target)
    if chosen:
        if _extension(target) not in _EXTENSIONS.get(chosen, _LORA_FILE):
            raise WeightError(f"{target}: --format {form} is written to {_kinds(_EXTENSIONS.get(chosen, _LORA_FILE))}")
        return chosen
    if target.suffix == ".ckpt":
        return LoraFormat.MINDONE
    if target.name == FILE_NAME:
        return LoraFormat.DIFFUSERS
    open_ended = "peft or diffusers" if not target.suffix else "kohya or diffusers"
    raise WeightError(f"{target}: may be {open_ended}; say which with --format ({', '.join(LORA_FORMATS)})")


def _extension(target: Path) -> str:
    """The extension; a folder has none, though its name may have a dot in it, as `sd-v1.5`."""
    return target.suffix if not target.suffix[1:2].isdigit() else ""


def _refuse_pickles(target: Path) -> None:
    if target.suffix in _PICKLES:
        raise WeightError(f"{target}: PyTorch's pickles can run code and are not written; end it in .safetensors")


def _kinds(extensions: tuple[str, ...]) -> str:
    return " or ".join(f"a file that ends in {one}" if one else "a folder" for one in extensions)
