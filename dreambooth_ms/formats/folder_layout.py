"""Where the files are in a model folder in diffusers' layout, and its JSON files.

model_index.json   unet/  vae/  text_encoder/  text_encoder_2/  tokenizer/  tokenizer_2/  scheduler/
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth_ms.atomic import write_bytes
from dreambooth_ms.errors import WeightError

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""The folders whose weights are read and written."""

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Text encoders by the names of their folders, and their tokenizers'."""

ABSENT = [None, None]
"""What model_index.json says of a part that is not there."""

WEIGHT_NAMES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "clip": "model",
}
"""What the weight files of a part are called, without the variant and the extension."""

_PICKLE_NAMES = {"model": "pytorch_model"}
_VARIANT = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)"
    r"(?:\.(?P<first>\w+)(?:-\d+-of-\d+)?\.(?:safetensors|bin)|\.(?:safetensors|bin)\.index\.(?P<second>\w+)\.json)"
)


def weight_file(folder: Path, network: str, variant: str | None) -> Path:
    """The file with the weights in a network's folder, or the index of its shards: safetensors, else PyTorch's.

    Without a variant, the plain files; where there are none, the only variant that is there.

    Raises:
        WeightError: there is none, or there are only several variants.
    """
    stem, dotted = WEIGHT_NAMES[network], f".{variant}" if variant else ""
    for kind, name in (("safetensors", stem), ("bin", _PICKLE_NAMES.get(stem, stem))):
        for file in (folder / f"{name}{dotted}.{kind}", folder / f"{name}.{kind}.index{dotted}.json"):
            if file.is_file():
                return file
    others, model, part = variants(folder) if variant is None else [], folder.parent, folder.name
    if len(others) > 1:
        raise WeightError(f"{model}: {part} is there in the variants {', '.join(others)}; name one with --variant")
    if others:
        return weight_file(folder, network, others[0])
    held = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
    raise WeightError(
        f"{model}: {part}/{stem}{dotted}.safetensors is missing (found: {held}); is the download complete?"
    )


def variants(folder: Path) -> list[str]:
    """The variants of the weight files in a part's folder, such as fp16; the plain files are none."""
    matches = (_VARIANT.fullmatch(path.name) for path in folder.glob("*"))
    return sorted({match["first"] or match["second"] for match in matches if match})


def read_json(path: Path, otherwise: str | None = None) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WeightError: missing or not a JSON object; `otherwise` says what that means.
    """
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
