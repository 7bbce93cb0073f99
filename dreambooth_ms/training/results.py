"""What a completed run leaves in its folder, whatever its method."""

import os
from dataclasses import dataclass
from pathlib import Path

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.formats.folder_layout import WEIGHT_NAMES
from dreambooth_ms.formats.tensor_file import STEP_KEY, read_metadata

ADAPTER = Path(FILE_NAME)
MODEL = Path("unet") / f"{WEIGHT_NAMES['unet']}.safetensors"
"""The file of a model folder that is written last."""


@dataclass(frozen=True)
class Result:
    """A result, and the optimiser steps it was trained for; 0 if the file does not say."""

    path: Path
    steps: int


def result_of(folder: Path) -> Result | None:
    """The result that a folder holds, as its last file; None if there is none."""
    path = next((folder / name for name in (ADAPTER, MODEL) if os.path.isfile(folder / name)), None)
    return Result(path, int(read_metadata(path).get(STEP_KEY, 0))) if path else None
