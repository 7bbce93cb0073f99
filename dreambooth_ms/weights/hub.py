"""From what a user names as the base model to a folder on this machine."""

import os
from pathlib import Path

from dreambooth_ms.errors import WeightError

# An autoencoder may be a repository of its own, with its weights at the top.
WANTED_FILES = ["*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors", "diffusion_pytorch_model.safetensors"]


def find_model(name_or_path: str, revision: str | None = None, variant: str | None = None) -> Path:
    """A local folder or file as it is; any other name is looked up on the Hugging Face hub and downloaded once.

    Raises:
        WeightError: neither a folder or file here nor a model on the hub, or the hub cannot be reached.
    """
    # Of os.path, because those of pathlib raise on names that are too long and on unknown users.
    path = os.path.expanduser(name_or_path)
    if os.path.exists(path):
        return Path(path)
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise WeightError(f"{name_or_path}: no such folder, and not a hub name of the form owner/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    plain = [] if variant else ["*/*.fp16.safetensors", "*/*.non_ema.safetensors"]
    try:
        return Path(
            snapshot_download(name_or_path, revision=revision, allow_patterns=WANTED_FILES, ignore_patterns=plain)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise WeightError(f"{name_or_path}: no such folder here, and the hub did not give it ({reason})") from error
