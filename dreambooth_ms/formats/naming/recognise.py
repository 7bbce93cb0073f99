"""What a file holds, told from the names and shapes of its tensors alone."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from dreambooth_ms.errors import WeightError, count_of
from dreambooth_ms.formats.naming import stability
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.formats.naming.infer import StoredModel, infer_model, infer_vae, with_channels
from dreambooth_ms.formats.naming.plan import Naming, unwrapped
from dreambooth_ms.formats.naming.slots import Shape
from dreambooth_ms.formats.naming.tables import TABLES
from dreambooth_ms.models.specs import PUBLISHED_MODELS, SD_15, SDXL_BASE, Family, ModelSpec

OTHER_METHODS: dict[str, str] = TABLES["other_methods"]
_OTHER_KINDS = TABLES["other_kinds"] | {"a LoRA": "|".join((TABLES["other_kinds"]["a LoRA"], *OTHER_METHODS.values()))}


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
    cleaned = {unwrapped(name): shape for name, shape in stored.items()}
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
    forms = matching(TABLES["vae_marks"], names)
    if not forms:
        raise WeightError(f"{source}: this is {other_kind(stored)}; expected an autoencoder (VAE) of Stable Diffusion")
    form = Format[forms[0]]
    prefix = "vae." if form is Format.DIFFUSERS else stability.VAE_PREFIX
    shapes = {prefix + unwrapped(name): shape for name, shape in stored.items()}
    model = replace(SD_15, vae=infer_vae(StoredModel(shapes, form, SD_15)))
    naming = replace(naming_of(form, model), prefix=prefix)
    return Recognition(form, model, naming, None, ())


def other_kind(names: Iterable[str]) -> str:
    """What a file is, as far as its names tell: for a message to someone who expected another kind."""
    held = [unwrapped(name) for name in names]
    if _form(held):
        return "a whole model"
    if kinds := matching(_OTHER_KINDS, held):
        return kinds[0]
    shown = ", ".join(sorted(held)[:3]) or "nothing"
    return f"of an unknown kind (it holds {shown})"


def matching(patterns: Mapping[str, str], names: Collection[str]) -> list[str]:
    """The keys of those patterns that any of the names fits."""
    return [kind for kind, pattern in patterns.items() if any(map(re.compile(pattern).search, names))]


def _form(names: Collection[str]) -> Format | None:
    first = (*matching(TABLES["model_marks"], names), "OTHER")[0]
    return None if first == "OTHER" else Format[first]


def _family(stored: Mapping[str, Shape], form: Format) -> Family:
    """SDXL adds pooled text to the time; SD 1 and SD 2 differ in the projections of their transformers."""
    file = StoredModel(stored, form, SDXL_BASE)
    added = file.shape("unet.add_embedding.linear_1.weight")
    if added is None:
        projection = file.shape("unet.mid_block.attentions.0.proj_in.weight")
        return Family.SD2 if projection and len(projection) == 2 else Family.SD1
    found = matching(TABLES["sdxl_marks"], stored)
    return Family[found[0]] if found else Family.SDXL_REFINER if added[1:] == (2560,) else Family.SDXL


def _notes(stored: Mapping[str, Shape], model: ModelSpec, naming: Naming, prediction_type: str | None) -> Iterator[str]:
    if model.family is Family.SD2 and prediction_type is None:
        yield "Names do not tell whether an SD 2.x model predicts noise (512 px) or velocity (768 px)."
    if "edm_mean" in stored:
        yield "Playground v2.5: its latents have a mean and deviation of their own, in the same file."
    if use := TABLES["special_inputs"].get(model.unet.in_channels):
        yield f"Its UNet takes {model.unet.in_channels} channels: a model for {use}."
    averages = {slot.name for slot in naming.averages.values()} & stored.keys()
    if averages:
        yield f"Moving averages (EMA) of {count_of(len(averages), 'weight')} are there besides the weights."
    if with_channels(model, 4, 4) not in PUBLISHED_MODELS:
        yield "Its sizes are not those of a published model; heads and norm groups are assumed."
