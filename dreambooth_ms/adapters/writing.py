"""An adapter -> a file or folder in any format."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.adapters.adapter import Adapter, folded, folded_adapter
from dreambooth_ms.adapters.file import CUSTOM_DIFFUSION, FILE_NAME, METADATA_KEY, PEFT_CONFIG, PEFT_WEIGHTS, TWICE_KEY
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.peft_settings import TRAINED_KEY, peft_settings
from dreambooth_ms.atomic import check_room, new_folder
from dreambooth_ms.errors import show_names
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.mindspore_ckpt import write_mindspore_ckpt
from dreambooth_ms.formats.files.open import write_as_named
from dreambooth_ms.formats.files.safetensors_file import LORA_HASHES, lora_hashes, write_safetensors
from dreambooth_ms.formats.files.stored import StoredTensor, total_bytes
from dreambooth_ms.formats.folder_layout import write_json
from dreambooth_ms.formats.naming import TABLES
from dreambooth_ms.formats.naming.lora_formats import LoraFormat, lora_layers, shared_layers, write_plan
from dreambooth_ms.formats.naming.update_kinds import ALPHA, DOWN, MAGNITUDE, UP, Shape, kind_of
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import ModelSpec

Tensors = dict[str, np.ndarray]

KOHYAS = (LoraFormat.KOHYA, LoraFormat.KOHYA_DIFFUSERS)
FOLDED = (LoraFormat.DIFFUSERS, LoraFormat.DIFFUSERS_PEFT, LoraFormat.DIFFUSERS_PROCESSORS)
"""Formats some of whose readers take alpha for the rank."""

_KOHYAS = ("ss_network_module", "ss_network_dim", "ss_network_alpha")
_OWN_METADATA = ("format", METADATA_KEY, TRAINED_KEY, TWICE_KEY, *_KOHYAS, *LORA_HASHES)
"""What is written anew, whatever the file said that an adapter comes from."""

_SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
"""Settings that say what the scale of a layer is."""

_NOT_KOHYAS = re.compile(r"\.(?:conv_in|conv_out|(?:time|add)_embedding\.linear_[12]|text_projection)$")
"""Layers outside the modules that kohya's scripts put adapters into."""


def write_adapter(
    adapter: Adapter,
    path: Path,
    form: LoraFormat,
    model: ModelSpec,
    dtype: DType = DType.F32,
    metadata: Mapping[str, str] | None = None,
    source: Path | None = None,
) -> None:
    """Write an adapter in a format; it appears whole or not at all. A file that has the name is replaced.

    The path is a folder for PEFT, with one folder per network where there are several; a folder or a file for diffusers
    and kohya; else a file. The metadata stand beside the tensors, in formats that have a place for them; `source` is
    where the adapter comes from, for the message.

    Raises:
        WeightError: the format has no place for a layer, a factor is not finite in the type, or the place cannot be
            written to.
    """
    kept = folded_adapter(adapter) if form in FOLDED else adapter
    name_of = source or path

    def stored(own: Adapter) -> dict[str, StoredTensor]:
        named = file_tensors(own, form, model, str(name_of)).items()
        tensors = {name: StoredTensor.of(np.asarray(values), label=f"{name_of}: {name}") for name, values in named}
        return {name: tensor.cast_to(dtype) for name, tensor in tensors.items()}

    if form is LoraFormat.PEFT:
        files = {part: stored(Adapter({part: layers})) for part, layers in kept.parts.items()}
        text, marks = files.get("text_encoder", {}), {"text_encoder": {TWICE_KEY: "without text_model."}}
        # peft looks for the names of the transformers that is there: those of CLIPTextModel changed with 5.6.
        text |= {name.replace(".text_model.", ".", 1): tensor for name, tensor in text.items()}
        settings = _settings(kept, model, str(name_of))
        check_room(path, sum(map(total_bytes, files.values())))
        with new_folder(path) as folder:
            for part, tensors in files.items():
                place = folder / part if len(files) > 1 else folder
                write_safetensors(place / PEFT_WEIGHTS[0], tensors, {"format": "pt", **marks.get(part, {})})
                common = TABLES["peft_settings"][kind_of(next(iter(kept.parts[part].values())).factors)]
                more = {"auto_mapping": TABLES["peft_classes"][part]}
                write_json(place / PEFT_CONFIG, common | settings[part] | more)
        return
    tensors, beside = stored(kept), {"format": "pt"}
    if form in FOLDED:
        settings, trained = (_settings(one, model, str(name_of)) for one in (kept, adapter))
        beside[METADATA_KEY] = _as_text(settings)
        beside |= {TRAINED_KEY: _as_text(trained, _SCALES)} if trained != settings else {}
    elif form in KOHYAS:
        beside |= _kohyas_metadata(adapter)
    beside |= {name: value for name, value in (metadata or {}).items() if name not in _OWN_METADATA}
    if form is LoraFormat.MINDONE:
        write_mindspore_ckpt(path, tensors)
        return
    # Programs that look for these do so beside what kohya's scripts write.
    beside |= lora_hashes(tensors, beside) if any(name.startswith("ss_") for name in beside) else {}
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, beside)
    else:
        check_room(path, total_bytes(tensors))
        with new_folder(path) as folder:
            write_safetensors(folder / FILE_NAME, tensors, beside)


def write_replacements(updates: Mapping[str, Update], path: Path, dtype: DType, metadata: Mapping[str, str]) -> None:
    """Write layers of a UNet's cross-attention as a file of diffusers' Custom Diffusion, or into a folder. In .bin,
    diffusers looks for the layers of self-attention, too, with nothing in them."""
    path = path / CUSTOM_DIFFUSION if path.is_dir() else path
    tensors: dict[str, StoredTensor | None] = {}
    for layer, update in updates.items():
        attention, _, which = layer.partition(".to_")
        tensors[f"{attention.removesuffix('attn2')}attn1.processor"] = None
        for parameter, values in update.tensors().items():
            kind, dot, number = which.partition(".")
            name = f"{attention}.processor.to_{kind}_custom_diffusion{dot}{number}.{parameter}"
            tensors[name] = StoredTensor.of(values, label=f"{path}: {name}").cast_to(dtype)
    write_as_named(path, tensors, metadata)


def file_tensors(adapter: Adapter, form: LoraFormat, model: ModelSpec, source: str = "") -> Tensors:
    """The tensors of a file in a format; in mindone's, which has no place for an alpha, the scale is in the factors.
    Raises as `write_plan`."""
    is_mindone, weights = form is LoraFormat.MINDONE, lora_layers(model)
    layers = {name: (folded(own) if is_mindone else own).tensors() for name, own in adapter.updates.items()}
    for name, own in layers.items():
        if MAGNITUDE in own:
            own[MAGNITUDE] = own[MAGNITUDE].reshape(_norms_shape(form, weights[name]))
        if not own.keys().isdisjoint(("oft_blocks", "lokr_w1")):
            # LyCORIS looks for one: of a rotation no bound, of two whole factors no scale.
            own.setdefault(ALPHA, np.array(float("lokr_w1" in own)))
    if is_mindone:
        layers = _with_common_down(shared_layers(form, model), layers)
    plan = write_plan(form, model, layers, source)
    values = {f"{layer}.{factor}": value for layer, tensors in layers.items() for factor, value in tensors.items()}
    return {name: made.build([values[piece] for piece in made.pieces]) for name, made in plan.tensors.items()}


def _norms_shape(form: LoraFormat, weight: Shape) -> Shape:
    """How a format has DoRA's norms of rows: by the axes of what the layer gives, or as LyCORIS of its weight."""
    beside = tuple(1 for _ in weight[2:])
    return (-1, 1, *beside) if form in KOHYAS else (1, -1, *beside) if beside else (-1,)


def writing_notes(adapter: Adapter, form: LoraFormat) -> Iterator[str]:
    """What a user should know of an adapter in a format, one sentence each."""
    for part, layers in adapter.parts.items() if form in FOLDED else ():
        if len(own := {update.rank for update in layers.values()}) > 1:
            yield f"{part}: ranks {min(own)} to {max(own)} are filled up to {max(own)}; older readers take one for all."
    if form in KOHYAS and (strange := [layer for layer in adapter.updates if _NOT_KOHYAS.search(layer)]):
        count = f"{len(strange)} of {len(adapter.updates)} layers"
        yield f"{count} are none that kohya's scripts adapt, and they leave them out ({show_names(strange)})."


def _with_common_down(groups: Iterable[Sequence[str]], layers: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """The same updates, with one A for the layers that the format keeps as one: different A are stacked, and each B is
    widened by zeros for the rows of the others, also that of a layer that is not adapted."""
    common = dict(layers)
    for group in groups:
        adapted = [name for name in group if DOWN in layers.get(name, ())]
        if not adapted:
            continue
        downs, ups = ([layers[name][factor] for name in adapted] for factor in (DOWN, UP))
        is_one = all(np.array_equal(downs[0], other) for other in downs)
        down, start = downs[0] if is_one else np.concatenate(downs), 0
        for name in group:
            up = np.zeros((len(ups[0]), len(down)), np.result_type(*ups))
            if name in adapted:
                own = layers[name][UP]
                up[:, start : start + own.shape[1]] = own
                start += 0 if is_one else own.shape[1]
            common[name] = {DOWN: down, UP: up, ALPHA: np.array(len(down))}
    return common


def _settings(adapter: Adapter, model: ModelSpec, source: str) -> dict[str, dict[str, Any]]:
    """What peft keeps beside the tensors of each network."""
    settings, names = {}, [name.split(".") for name in model_shapes(model)]
    for part, layers in adapter.parts.items():
        modules = {".".join(words[1:end]) for words in names if words[0] == part for end in range(2, len(words))}
        weights = {name.partition(".")[2]: shape for name, shape in lora_layers(model, (part,)).items()}
        tensors = {name: own.tensors() for name, own in layers.items()}
        settings[part] = peft_settings(tensors, weights, modules, source)
    return settings


def _kohyas_metadata(adapter: Adapter) -> dict[str, str]:
    """What made it, with the rank and alpha that most layers of its first network have."""
    module = "networks.lora" if all(own.is_lora for own in adapter.updates.values()) else "lycoris.kohya"
    scales = [(own.rank, own.alpha_or_rank) for own in next(iter(adapter.parts.values())).values() if own.rank]
    common = (f"{Counter(values).most_common(1)[0][0]:g}" for values in zip(*scales, strict=True))
    return dict(zip(_KOHYAS, (module, *common), strict=bool(scales)))


def _as_text(settings: Mapping[str, Mapping[str, Any]], keys: Sequence[str] = ()) -> str:
    """Settings of parts, or some of them, by part, a dot and their key, in JSON."""
    named = {f"{part}.{key}": own[key] for part, own in settings.items() for key in keys or own}
    return json.dumps(named, sort_keys=True)
