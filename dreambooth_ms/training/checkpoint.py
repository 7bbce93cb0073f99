"""What a run leaves in its folder: checkpoints and its result.

A checkpoint is a folder that appears whole or not at all, with a manifest that says what it must hold.

checkpoint-500/
  manifest.json                      step, configuration, digests of what it learnt from, size and digest of every file
  training_state.safetensors         trained parameters and optimiser moments, bit for bit
  pytorch_lora_weights.safetensors   the adapter, for other tools; or the trained networks, unet/ and text_encoder/
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mindspore import Parameter, Tensor

from dreambooth_ms.adapters.file import CUSTOM_DIFFUSION, FILE_NAME
from dreambooth_ms.atomic import file_digest, new_folder, remove_leftovers, sync
from dreambooth_ms.errors import WeightError, count_of
from dreambooth_ms.formats.files.open import read_metadata, read_tensors, write_tensors
from dreambooth_ms.formats.folder_layout import WEIGHT_NAMES
from dreambooth_ms.training.content import Content

ADAPTER = Path(FILE_NAME)
MODEL = Path("unet") / f"{WEIGHT_NAMES['unet']}.safetensors"
"""The file of a model folder that is written last."""
REPLACEMENTS = Path(CUSTOM_DIFFUSION)
STEP_KEY = "dreambooth_ms_step"
"""In the metadata of what a run writes: the optimiser steps it was trained for."""

FORMAT = 1
MANIFEST, STATE = "manifest.json", "training_state.safetensors"
REPLACED = "-replaced"
_NAME = re.compile(rf"checkpoint-(\d+)({REPLACED})?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there and unchanged."""

    path: Path
    step: int
    content: Content = field(default_factory=dict)
    """What it learnt from; empty where an earlier version wrote it."""
    measured: Sequence[dict[str, Any]] = ()
    """What was measured up to it, see `training.stopping.Measured`."""
    config: str = ""
    """Of its run, as YAML."""


def save_checkpoint(
    folder: Path,
    step: int,
    state: Sequence[Parameter],
    config: str,
    write_results: Callable[[Path, int], Any],
    keep: int | None = None,
    content: Content | None = None,
    measured: Sequence[dict[str, Any]] = (),
    spared: int | None = None,
) -> Path:
    """Write `checkpoint-<step>` into a run's folder, then remove the oldest beyond `keep`, if that is a number, but not
    that of `spared`. The names of the `state`, trained parameters and moments, must be unique; `config` is YAML.
    `write_results` writes the weights for other tools, after so many steps, into a folder. Raises WeightError if the
    folder cannot be written to, or the disk is full; what existed before is untouched then."""
    target = checkpoint_folder(folder, step)
    before = target.with_name(target.name + REPLACED)
    remove_leftovers(folder)
    with new_folder(target, "free some space and resume") as partial:
        # In one order, so that it is the same file however the state is shared out among processes.
        write_tensors(partial / STATE, {one.name: one.asnumpy() for one in sorted(state, key=lambda one: one.name)})
        write_results(partial, step)
        written = sorted(path for path in partial.rglob("*") if path.is_file())
        files = {path.relative_to(partial).as_posix(): _fingerprint(path) for path in written}
        manifest = {"format": FORMAT, "step": step, "files": files, "config": config, "content": content or {}}
        manifest |= {"measured": list(measured)} if measured else {}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        sync(partial / MANIFEST)
        sync(partial)
        if target.exists():  # It counts, under its other name too, until the new one is there.
            shutil.rmtree(before, ignore_errors=True)
            target.rename(before)
    shutil.rmtree(before, ignore_errors=True)
    if keep is not None:
        stays = {target, checkpoint_folder(folder, step if spared is None else spared)}
        others = [path for path in checkpoint_folders(folder) if path not in stays]
        for old in others[: max(len(others) - (keep - 1), 0)]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def restore(
    checkpoint: Checkpoint, state: Sequence[Parameter], elsewhere: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Set the parameters to the checkpoint's values, bit for bit. `elsewhere` are names and shapes of what other
    processes keep of it; those in `state` may be among them. Raises WeightError if it belongs to another training."""
    tensors, _ = read_tensors(checkpoint.path / STATE)
    wanted = {**(elsewhere or {}), **{parameter.name: tuple(parameter.shape) for parameter in state}}
    held = {name: tensor.shape for name, tensor in tensors.items()}
    if wanted != held:
        differing = sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name))
        raise WeightError(
            f"{checkpoint.path}: belongs to another training ({count_of(len(differing), 'other parameter')}, "
            f"such as {differing[0]}); repeat that training's flags, or start anew in another --output_dir"
        )
    for parameter in state:
        # Not ascontiguousarray: that would give a scalar an axis.
        parameter.set_data(Tensor(np.asarray(tensors[parameter.name], order="C")))


def open_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint's files against its manifest. Raises WeightError if it is none, a file is cut or changed, or
    its format is of another version."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, step, files = manifest["format"], int(manifest["step"]), dict(manifest["files"])
        content = {group: dict(digests) for group, digests in manifest.get("content", {}).items()}
        measured = [dict(one) for one in manifest.get("measured", ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(
            f"{path}: not a checkpoint of this program ({MANIFEST} is missing or damaged); "
            "name a folder checkpoint-<step> of a run, or latest"
        ) from error
    if version != FORMAT:
        raise WeightError(
            f"{path}: written in format {version}, this version reads format {FORMAT}; "
            "go on with the version that wrote it, or start anew in another --output_dir"
        )
    for name, fingerprint in files.items():
        with suppress(OSError):
            if _fingerprint(path / name) == fingerprint:
                continue
        raise WeightError(f"{path}: {name} is missing, cut short or changed; resume from another checkpoint")
    return Checkpoint(path, step, content, measured, str(manifest.get("config", "")))


def find_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole, or None."""
    for path in reversed(checkpoint_folders(folder)):
        with suppress(WeightError):
            return open_checkpoint(path)
    return None


def checkpoint_folders(folder: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first; one that was to be replaced by another of its step before that."""
    if not os.path.isdir(folder):
        return []
    matches = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [folder / match[0] for match in sorted(matches, key=lambda match: (int(match[1]), not match[2]))]


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_digest(path)}


class Result(NamedTuple):
    """A result, and the optimiser steps it was trained for; 0 if the file does not say."""

    path: Path
    steps: int


def result_of(folder: Path) -> Result | None:
    """The result that a folder holds, as its last file; None if there is none."""
    results = (ADAPTER, REPLACEMENTS, REPLACEMENTS.with_suffix(".bin"), MODEL)
    path = next((folder / name for name in results if os.path.isfile(folder / name)), None)
    # A file of a new word has its name. Of os.path, because pathlib raises on names that are too long.
    if path is None and os.path.isdir(folder):
        files = (one for one in sorted(folder.iterdir(), reverse=True) if one.suffix in (".safetensors", ".bin"))
        path = next((one for one in files if STEP_KEY in read_metadata(one)), None)
    return Result(path, int(read_metadata(path).get(STEP_KEY, 0))) if path else None
