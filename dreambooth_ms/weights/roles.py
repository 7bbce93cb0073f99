"""The roles that the networks of a model play, as values, and how they are filled. Whoever builds one may put anything
into it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from mindspore import nn

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec
from dreambooth_ms.errors import WeightError, show_names
from dreambooth_ms.formats.clip_tokenizer import ClipTokenizer
from dreambooth_ms.formats.files.open import read_value
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.model_config import Config, check_scheduler_config, read_config, read_scheduler_config
from dreambooth_ms.models.clip import CLIPTextModel
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.models.specs import ClipTextSpec, UNetSpec, VaeSpec
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import DECODER_LAYERS, ENCODER_LAYERS, AutoencoderKL
from dreambooth_ms.weights.opened_model import StoredNetwork

Network = TypeVar("Network", bound=nn.Cell)

CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Layers of a text tower of CLIP that get an update, as in diffusers' scripts."""


@dataclass(frozen=True)
class Denoiser:
    """What predicts noise or velocity."""

    spec: UNetSpec
    load: Callable[[], Any]
    """Gives the cell, filled."""
    digest: Callable[[], str]
    """By which a run that goes on knows it."""

    @classmethod
    def of_unet(cls, stored: StoredNetwork[UNetSpec]) -> "Denoiser":
        """A UNet in a file."""
        return cls(stored.spec, lambda: fill(UNet2DConditionModel(stored.spec), stored), stored.digest)


@dataclass(frozen=True)
class Codec:
    """Pictures <-> latents: an autoencoder, or nothing but the pixels."""

    spec: Any
    """Sizes and scale of latents: what `VaeSpec` has, but for its layers."""
    load: Callable[..., Any]
    """(encodes=True, decodes=True) -> a cell with `encode` and `decode`, as `AutoencoderKL` has them, or with one."""
    digest: Callable[[], str]
    """What caches of latents are keyed by."""

    @classmethod
    def of_vae(cls, stored: StoredNetwork[VaeSpec]) -> "Codec":
        """An autoencoder in a file; one of its directions alone takes less memory."""

        def load(encodes: bool = True, decodes: bool = True) -> AutoencoderKL:
            unused = (*(() if encodes else ENCODER_LAYERS), *(() if decodes else DECODER_LAYERS))
            return fill(AutoencoderKL(stored.spec, encodes, decodes), stored, unused)

        return cls(stored.spec, load, stored.digest)


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """What reads a prompt for the denoiser. A model has one, or several whose states stand side by side."""

    name: str
    """Of the network, in folders and adapters."""
    spec: Any
    """Its sizes."""
    width: int
    """Of the states of a token."""
    pooled_width: int = 0
    """Of the text's pooled state; 0: it gives none."""
    pooled_at: int | None = None
    """The token where a text ends and is pooled; None: it is not."""
    most_skipped: int = 0
    """How many of its last layers can be left out."""
    adapted_layers: tuple[str, ...]
    """The ends of the names of the layers that an adapter changes."""
    tokenizer: Callable[[], Any]
    """Gives what has the methods of `ClipTokenizer`."""
    load: Callable[[], Any]
    """Gives a cell that `models.text.TextEncoders` takes, filled."""
    digest: Callable[[], str]
    """What caches of embeddings are keyed by."""

    @classmethod
    def of_clip(
        cls, name: str, stored: StoredNetwork[ClipTextSpec], tokenizer_folder: Path, last_layer: bool
    ) -> "TextReader":
        """A text tower of CLIP in a file, which pools the text if it has a projection.

        With `last_layer` it yields the normalised states after its last layer (SD 1 and 2), else those before (SDXL).
        """
        spec = stored.spec
        return cls(
            name=name,
            spec=spec,
            width=spec.transformer.hidden_size,
            pooled_width=spec.projection_dim or 0,
            pooled_at=spec.eos_token_id if spec.projection_dim else None,
            most_skipped=spec.transformer.num_hidden_layers - (1 if last_layer else 2),
            adapted_layers=CLIP_TARGETS,
            tokenizer=partial(ClipTokenizer, tokenizer_folder, spec.max_position_embeddings, spec.vocab_size),
            load=lambda: fill(CLIPTextModel(spec, last_layer), stored),
            digest=stored.digest,
        )


@dataclass(frozen=True)
class Schedule:
    """How a model was trained to denoise."""

    source: Path
    """What is named where it is wrong: the model, or a file in its folder."""
    config: Config
    """The configuration of its scheduler."""

    def trained(self, prediction_type: str | None = None) -> NoiseScheduleSpec:
        """The forward process that training follows, predicting something else if that is named.

        Raises:
            WeightError: it was trained in EDM's formulation or another that ours does not follow; or what is named
                cannot be predicted with its noise.
        """
        more = {"prediction_type": prediction_type} if prediction_type else {}
        return read_config(self.source, {**self.config, **more}, read_scheduler_config)

    def check(self) -> None:
        """Stop if models are neither trained nor sampled so.

        Raises:
            WeightError: it was trained otherwise, or a key of its configuration is not known or not supported.
        """
        read_config(self.source, self.config, check_scheduler_config)


def fill(network: Network, stored: StoredNetwork[Any], unused: Collection[str] = ()) -> Network:
    """Fill a cell from its file; it has all layers but the `unused` ones at the top of the module tree.

    Raises:
        WeightError: lists all names that are missing, unexpected or mis-shaped.
    """
    tensors = {name: one for name, one in stored.tensors.items() if name.partition(".")[0] not in unused}
    load_strict(network, tensors, str(stored.file))
    return network


def load_strict(
    root: nn.Cell,
    tensors: Mapping[str, np.ndarray | StoredTensor],
    source: str,
    ignore_unexpected: Iterable[str] = (),
) -> None:
    """Fill every parameter of a network. Nothing is written unless everything fits.

    Args:
        root: the network.
        tensors: values by public name. Those that are in files are read one at a time, so that memory holds them once.
        source: the file or folder they come from, for the message.
        ignore_unexpected: names that may be there although the network has no use for them.

    Raises:
        WeightError: lists all missing, unexpected and mis-shaped names.
    """
    wanted = public_parameters(root)
    misfits = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - wanted.keys() - set(ignore_unexpected)),
        "of another shape": [
            f"{name}: expected {parameter.shape}, got {tuple(tensors[name].shape)}"
            for name, parameter in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != parameter.shape
        ],
    }
    problems = [f"{len(names)} {kind} ({show_names(names, at_most=5)})" for kind, names in misfits.items() if names]
    if problems:
        raise WeightError(f"{source} does not fit {type(root).__name__}: " + "; ".join(problems))
    for name, parameter in wanted.items():
        value = tensors[name]
        parameter.write(read_value(value) if isinstance(value, StoredTensor) else value)
