"""Where the files are in a model folder in diffusers' layout, and its JSON files.

model_index.json   unet/  vae/  text_encoder/  text_encoder_2/  tokenizer/  tokenizer_2/  scheduler/
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from dreambooth_ms.atomic import write_bytes
from dreambooth_ms.errors import WeightError, show_names

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
NOISING = "image_noising_scheduler/scheduler_config.json"
"""Of a second stage: how its small pictures are noisy."""
CONFIG = "{}/config.json"
"""Of a network, by the name of its folder."""

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""The folders whose weights are read and written."""

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Text encoders by the names of their folders, and their tokenizers'."""

ABSENT = [None, None]
"""What model_index.json says of a part that is not there."""

WEIGHT_NAMES = {
    **dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model"),
    **dict.fromkeys(("text_encoder", "text_encoder_2", "clip", "encoder"), "model"),
}
"""What the weight files of a part are called, without the variant and the extension."""

_TEXT_FILE = re.compile(r"(scheduler|image_noising_scheduler|tokenizer|tokenizer_2)/[^/]+\.(json|txt|model)")
"""Configurations and vocabularies."""
_PICKLE_NAMES = {"model": "pytorch_model"}
_VARIANT = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)"
    r"(?:\.(?P<first>\w+)(?:-\d+-of-\d+)?\.(?:safetensors|bin)|\.(?:safetensors|bin)\.index\.(?P<second>\w+)\.json)"
)


def weight_file(folder: Path, network: str, variant: str | None) -> Path:
    """`weight_files` of a network's folder, of which the first is what is opened."""
    names = [path.name for path in folder.glob("*") if path.is_file()]
    try:
        return folder / weight_files(names, network, variant, f"{folder.name}/")[0]
    except WeightError as error:
        incomplete = "" if "--variant" in str(error) else "; is the download complete?"
        raise WeightError(f"{folder.parent}: {error}{incomplete}") from error


def weight_files(names: Collection[str], network: str, variant: str | None, place: str) -> list[str]:
    """The file with the weights among those of a network's folder: safetensors, else PyTorch's; or the index of its
    shards, and these.

    Without a variant, the plain files; where there are none, the only variant that is there. WeightError if the place,
    "" or a name with a slash, has none, or only several variants.
    """
    stem, dotted = WEIGHT_NAMES[network], f".{variant}" if variant else ""
    for kind, name in (("safetensors", stem), ("bin", _PICKLE_NAMES.get(stem, stem))):
        if (file := f"{name}{dotted}.{kind}") in names:
            return [file]
        if (file := f"{name}.{kind}.index{dotted}.json") in names:
            shard = re.compile(rf"{re.escape(name + dotted)}-\d+-of-\d+\.{kind}")
            return [file, *filter(shard.fullmatch, names)]
    others = variants(names)
    if variant is None and len(others) == 1:
        return weight_files(names, network, others[0], place)
    if variant is None and others:
        part = place.rstrip("/") or network
        raise WeightError(f"{part} is there in the variants {', '.join(others)}; name one with --variant")
    held = show_names(sorted(names), at_most=9) or "nothing"
    advice = "; give another --variant, or none" if variant else ""
    raise WeightError(f"{place}{stem}{dotted}.safetensors is missing (found: {held}){advice}")


def variants(names: Iterable[str]) -> list[str]:
    """The variants of the weight files among those of a part's folder, such as fp16; the plain files are none."""
    matches = map(_VARIANT.fullmatch, names)
    return sorted({match["first"] or match["second"] for match in matches if match})


def model_files(names: Collection[str], variant: str | None) -> list[str]:
    """What is read of a model folder with files of these paths; WeightError if it is none, or lacks weights."""
    if INDEX not in names:
        raise WeightError(f"{INDEX} is missing, so it is no model folder in diffusers' layout")
    parts = [part for part in NETWORKS if any(name.startswith(f"{part}/") for name in names)]
    return [
        *(name for name in names if name == INDEX or _TEXT_FILE.fullmatch(name)),
        *(name for part in parts for name in network_files(names, part, f"{part}/", variant)),
    ]


def network_files(names: Collection[str], network: str, folder: str = "", variant: str | None = None) -> list[str]:
    """What is read of a network whose folder, "" or with a slash, has these of all paths; WeightError if no weights."""
    within = (name.removeprefix(folder) for name in names if name.startswith(folder))
    own = [name for name in within if "/" not in name]
    configurations = [name for name in own if name in ("config.json", "preprocessor_config.json")]
    return [folder + name for name in (*configurations, *weight_files(own, network, variant, folder))]


def read_json(path: Path, otherwise: str | None = None) -> dict[str, Any]:
    """A JSON object from a file; WeightError if it is missing, which means `otherwise`, or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightError(f"{otherwise or path.parent}: {path.name} is missing; is the download complete?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise WeightError(f"{path}: expected a JSON object; download it again")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
