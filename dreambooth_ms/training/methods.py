"""The methods: what each trains of a base model, and how its result is written."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn

from dreambooth_ms.adapters import lora_file
from dreambooth_ms.adapters.lora import (
    DropoutState,
    check_rank,
    initialise_lora,
    inject_lora,
    lora_trainables,
    lora_weights,
)
from dreambooth_ms.config.choices import Method
from dreambooth_ms.config.train import MethodConfig
from dreambooth_ms.formats.folder_layout import WEIGHT_NAMES, write_json
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.tensor_file import STEP_KEY, read_metadata
from dreambooth_ms.models.clip import TextEncoders
from dreambooth_ms.models.parameters import name_prefix, public_parameters
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.weights.bundle import ModelBundle, save_network
from dreambooth_ms.weights.model_writing import plan_model, write_parts

TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Layers of the text encoder that get an update, as in diffusers' scripts."""


@dataclass(frozen=True)
class Learner:
    """What a method trains, and how it writes it."""

    denoiser: nn.Cell
    """(noisy latents, timesteps, *conditioning) -> prediction; its text is ids where text encoders are trained."""
    trainables: list[Parameter]
    is_of_text_encoder: list[bool]
    """Which of the trainables belong to a text encoder."""
    text_encoders: TextEncoders | None
    """The text encoders, if they are trained."""
    dropout: DropoutState | None
    write_part: Callable[[Path, int], None]
    """Writes what was trained, after so many steps, into the folder of a checkpoint."""
    write_result: Callable[[Path, int], None]
    """Writes the result of the run into its folder."""

    def part(self, start: int, stop: int) -> "Learner":
        """The same with a part of the trainables."""
        return replace(
            self, trainables=self.trainables[start:stop], is_of_text_encoder=self.is_of_text_encoder[start:stop]
        )


class TextConditioned(nn.Cell):
    """A UNet that reads token ids: noisy latents, timesteps (B,), ids, SDXL's ends and add_time_ids -> prediction."""

    def __init__(self, unet: UNet2DConditionModel, text_encoders: TextEncoders) -> None:
        super().__init__(auto_prefix=False)
        self.unet, self.text_encoders = unet, text_encoders

    def construct(self, noisy_BCHW: Tensor, timesteps_B: Tensor, ids: Tensor, *ends_and_add_time_ids: Tensor) -> Tensor:
        encoded = self.text_encoders(ids, *ends_and_add_time_ids[:1])
        return self.unet(noisy_BCHW, timesteps_B, *encoded, *ends_and_add_time_ids[1:])


def lora(
    config: MethodConfig,
    folder: ModelBundle,
    unet: UNet2DConditionModel,
    text_encoders: TextEncoders | None,
    seed: int,
) -> Learner:
    """Low-rank updates of the attention layers; the result is one small file."""
    alpha = float(config.lora_alpha or config.rank)
    dropout = DropoutState(config.lora_dropout, seed) if config.lora_dropout else None
    networks = _networks(unet, text_encoders)
    targets = {name: config.lora_target_modules if name == "unet" else list(TEXT_ENCODER_TARGETS) for name in networks}
    layers = {}
    for name, network in networks.items():
        layers[name] = inject_lora(network, config.rank, alpha, targets[name], dropout)
        check_rank(config.rank, layers[name])
        initialise_lora(layers[name], seed, name_prefix(network))
    trainables = {
        name: lora_trainables({layer: cell for layer, cell in adapted.items() if _is_read(text_encoders, name, layer)})
        for name, adapted in layers.items()
    }

    def write(target: Path, step: int) -> None:
        adapters = {name: lora_weights(adapted, targets[name]) for name, adapted in layers.items()}
        lora_file.write_lora(target, adapters, step)

    return Learner(
        denoiser=_denoiser(unet, text_encoders),
        trainables=[parameter for parameters in trainables.values() for parameter in parameters],
        is_of_text_encoder=[name != "unet" for name, parameters in trainables.items() for _ in parameters],
        text_encoders=text_encoders,
        dropout=dropout,
        write_part=write,
        write_result=write,
    )


def full(
    config: MethodConfig,
    folder: ModelBundle,
    unet: UNet2DConditionModel,
    text_encoders: TextEncoders | None,
    seed: int,
) -> Learner:
    """All weights of the UNet, and with `train_text_encoder` of the text encoders; the result is a model folder."""
    networks = _networks(unet, text_encoders)
    trainables = {
        name: [
            public.parameter
            for parameter, public in public_parameters(network).items()
            if _is_read(text_encoders, name, parameter)
        ]
        for name, network in networks.items()
    }

    def write_networks(target: Path, step: int) -> None:
        # The UNet last: `result_of` takes its file for a whole result.
        for name, network in reversed(networks.items()):
            save_network(target, name, network, folder.config(name), np.float32, {STEP_KEY: str(step)})

    def write_folder(target: Path, step: int) -> None:
        copy_base(folder, target, networks.keys())
        write_networks(target, step)

    return Learner(
        denoiser=_denoiser(unet, text_encoders),
        trainables=[parameter for parameters in trainables.values() for parameter in parameters],
        is_of_text_encoder=[name != "unet" for name, parameters in trainables.items() for _ in parameters],
        text_encoders=text_encoders,
        dropout=None,
        write_part=write_networks,
        write_result=write_folder,
    )


METHODS: dict[Method, Callable[..., Learner]] = {"lora": lora, "full": full}

_RESULTS: dict[Method, Path] = {
    "lora": Path(lora_file.FILE_NAME),
    "full": Path("unet") / f"{WEIGHT_NAMES['unet']}.safetensors",
}


def result_of(method: Method, folder: Path) -> tuple[Path, int]:
    """The file that a completed run of this method leaves, and the steps it was trained for; 0 if there is none."""
    path = folder / _RESULTS[method]
    return path, int(read_metadata(path).get(STEP_KEY, 0)) if path.is_file() else 0


def copy_base(folder: ModelBundle, target: Path, trained: Collection[str]) -> None:
    """Write what was not trained of a base model: networks, tokenizer, scheduler and the index.

    Weights have plain names whatever variant they were, so that the result loads without naming one.
    """
    base = folder.opened()
    planned = plan_model(base, Format.DIFFUSERS)
    trained = {"unet", *trained}
    kept = {name: tensor for name, tensor in planned.tensors.items() if name.partition(".")[0] not in trained}
    write_parts(target, base, kept)
    if folder.vae:
        write_json(target / "vae" / "config.json", folder.config("vae"))


def _denoiser(unet: UNet2DConditionModel, text_encoders: TextEncoders | None) -> nn.Cell:
    return unet if text_encoders is None else TextConditioned(unet, text_encoders)


def _networks(unet: UNet2DConditionModel, text_encoders: TextEncoders | None) -> dict[str, nn.Cell]:
    """What is trained, by the names of the networks' folders."""
    return {"unet": unet} | (text_encoders.networks() if text_encoders else {})


def _is_read(text_encoders: TextEncoders | None, network: str, name: str) -> bool:
    """Whether the prediction depends on a layer or parameter; what has no gradient would only decay."""
    return text_encoders is None or text_encoders.is_read(network, name)
