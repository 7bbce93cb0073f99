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


def weight_file(folder: Path, part: str, variant: str | None, network: str | None = None) -> Path:
    """The file with a part's weights, or the index of its shards: safetensors, else PyTorch's.

    Without a variant, the plain files; where there are none, the only variant that is there. `network` says what the
    part is, if its folder has another name.

    Raises:
        WeightError: there is none, or there are only several variants.
    """
    stem = WEIGHT_NAMES[network or part]
    file = _weight_file(folder / part, stem, variant)
    if file is None and variant is None:
        others = variants(folder / part)
        if len(others) > 1:
            raise WeightError(f"{folder}: {part} is there in the variants {', '.join(others)}; name one with --variant")
        file = _weight_file(folder / part, stem, others[0]) if others else None
    if file is None:
        wanted = f"{stem}{f'.{variant}' if variant else ''}.safetensors"
        held = sorted(p.name for p in (folder / part).glob("*")) if (folder / part).is_dir() else []
        raise WeightError(
            f"{folder}: {part}/{wanted} is missing (found: {', '.join(held) or 'nothing'}); is the download complete?"
        )
    return file


def _weight_file(folder: Path, stem: str, variant: str | None) -> Path | None:
    dotted = f".{variant}" if variant else ""
    names = [
        f"{name}{dotted}.{kind}" if not index else f"{name}.{kind}.index{dotted}.json"
        for kind, name in (("safetensors", stem), ("bin", _PICKLE_NAMES.get(stem, stem)))
        for index in (False, True)
    ]
    return next((folder / name for name in names if (folder / name).is_file()), None)


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
