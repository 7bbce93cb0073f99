"""The methods: what each trains of a base model, by which optimiser, and how its result is written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mindspore import Parameter, Tensor, nn

from dreambooth_ms.adapters.adapter import Adapter
from dreambooth_ms.adapters.cross_attention import free_cross_attention
from dreambooth_ms.adapters.file import FILE_NAME, KOHYA_NAME
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.layer_updates import LayerUpdate, layer_updates
from dreambooth_ms.adapters.lora import DropoutState, PrincipalDense, initialise_lora, inject, put_in_place
from dreambooth_ms.adapters.word_files import word_file, write_words
from dreambooth_ms.adapters.writing import write_adapter, write_replacements
from dreambooth_ms.config.train import MethodConfig, TrainConfig
from dreambooth_ms.formats.files.dtypes import DTYPES
from dreambooth_ms.formats.folder_layout import TOKENIZERS
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.formats.naming.update_kinds import UP
from dreambooth_ms.models.parameter_shapes import text_shapes, unet_shapes
from dreambooth_ms.models.parameters import PublicParameter, name_prefix, public_parameters
from dreambooth_ms.models.specs import Words
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.training.checkpoint import ADAPTER, MODEL, REPLACEMENTS, STEP_KEY
from dreambooth_ms.training.flat_vectors import AdamW8bit, Prodigy
from dreambooth_ms.training.optimisers import Adafactor, AdamW, Hyperparameters, Optimiser
from dreambooth_ms.weights.bundle import ModelBundle, save_network
from dreambooth_ms.weights.model_writing import plan_model

Write = Callable[[Path, int], None]
"""Writes into a folder what was trained for so many steps."""


@dataclass(frozen=True)
class Trainable:
    """A parameter that is trained, and the kind of network it is of, which has a learning rate and a weight decay."""

    parameter: Parameter
    kind: Literal["unet", "text_encoder"]


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What a method trains, and how it writes it."""

    denoiser: nn.Cell
    """Its inputs, by `input_names` -> prediction."""
    trainables: list[Trainable]
    text_encoders: TextEncoders | None
    """If what reads text changes: the denoiser reads token ids, and text is encoded in each step."""
    dropout: DropoutState | None = None
    layers: Sequence[Any] = ()
    """With an update beside weights of the base that stay as they are. Empty: these are trained, or words alone."""
    kept: Sequence[Parameter] = ()
    """What a resumed run needs beside what is trained."""
    write_part: Write
    """Of what was trained, into the folder of a checkpoint."""
    write_result: Write
    """Of the result of the run, into its folder."""
    result: Path
    """The last file of the result, in the run's folder."""

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters of the trainables."""
        return [one.parameter for one in self.trainables]


class TextConditioned(nn.Cell):
    """A UNet that reads token ids: noisy latents, timesteps (B,), ids, SDXL's ends and add_time_ids -> prediction."""

    def __init__(self, unet: UNet2DConditionModel, text_encoders: TextEncoders) -> None:
        super().__init__(auto_prefix=False)
        self.unet, self.text_encoders = unet, text_encoders
        names = ("sample", "timestep", "input_ids")
        self.input_names = (*names, "end_mask", "time_ids") if unet.adds_text_and_sizes else names

    def construct(self, noisy_BCHW: Tensor, timesteps_B: Tensor, ids: Tensor, *ends_and_add_time_ids: Tensor) -> Tensor:
        encoded = self.text_encoders(ids, *ends_and_add_time_ids[:1])
        return self.unet(noisy_BCHW, timesteps_B, *encoded, *ends_and_add_time_ids[1:])


def lora(
    config: MethodConfig,
    base: ModelBundle,
    unet: UNet2DConditionModel,
    text_encoders: TextEncoders | None,
    seed: int,
    of_run: Callable[[], Mapping[str, str]] | None = None,
) -> Learner:
    """Low-rank updates of the attention layers; the result is one small file, with the metadata of its run."""
    dropout = DropoutState(config.lora_dropout, seed) if config.lora_dropout else None
    layers, words, updates = {}, _words_of(base, text_encoders), updates_of(config, base)
    for name, network in _networks(config, unet, text_encoders).items():
        layers[name] = inject(network, {layer: own.layer for layer, own in updates[name].items()}, dropout)
        initialise_lora(layers[name], seed, name_prefix(network))
    model = base.opened().spec

    def write(target: Path, step: int, is_result: bool = False) -> None:
        written = {part: {n: Update(cell.tensors()) for n, cell in own.items()} for part, own in layers.items()}
        metadata, dtype = {STEP_KEY: str(step), **base.schedule.marks}, DTYPES[config.save_precision or "fp32"]
        write_words(words(), target, dtype, metadata, config.suffix)
        metadata |= {**of_run(), "ss_steps": str(step)} if of_run else {}
        if is_result and config.output_kohya_format and form_of(config) is not LoraFormat.KOHYA:
            write_adapter(Adapter(written), target / KOHYA_NAME, LoraFormat.KOHYA, model, dtype, metadata)
        # It comes last: a result is known by it.
        write_adapter(Adapter(written), target / ADAPTER, form_of(config), model, dtype, metadata)

    trained = {part: {n: cell.parts.values() for n, cell in own.items()} for part, own in layers.items()}
    cells = [cell for own in layers.values() for cell in own.values()]
    kept = [one for cell in cells if isinstance(cell, PrincipalDense) for one in cell.start()]
    more = {"result": ADAPTER, "dropout": dropout, "layers": cells, "kept": kept}
    return _learner(unet, text_encoders, trained, write_part=write, write_result=partial(write, is_result=True), **more)


def updates_of(config: MethodConfig, base: ModelBundle) -> dict[str, dict[str, LayerUpdate]]:
    """Of the layers that `lora` trains, by network; raises as `layer_updates`."""
    spec, readers = base.denoiser.spec, base.text if config.train_text_encoder else ()
    texts = {one.name: (text_shapes(one.spec), one.adapted_layers) for one in readers}
    targets = config.targets_in_if(not spec.only_cross_attention) if spec.simple_blocks else config.targets
    return layer_updates(config, {"unet": (unet_shapes(spec), targets), **texts}, spec)


def form_of(config: MethodConfig) -> LoraFormat:
    """In which an adapter's file is written: that which the most programs read of those with a place for its kind."""
    forms = {"dora": LoraFormat.DIFFUSERS_PEFT} | dict.fromkeys(("loha", "lokr", "oft"), LoraFormat.KOHYA)
    return LoraFormat.KOHYA if config.use_tucker else forms.get(config.adapter, LoraFormat.DIFFUSERS)


def readers_of(config: MethodConfig, folder: Path) -> str:
    """Which programs read the LoRA that was written into a folder, for the user."""
    file, kohyas = folder / FILE_NAME, folder / KOHYA_NAME
    if form_of(config) is LoraFormat.KOHYA:
        return "ComfyUI, A1111 and Forge read it as it is"
    if config.output_kohya_format:
        return f"diffusers reads it; ComfyUI, A1111 and Forge: {kohyas}"
    return f"diffusers reads it; for ComfyUI, A1111 and Forge: dreambooth-ms convert {file} {kohyas} --format kohya"


def full(
    config: MethodConfig, base: ModelBundle, unet: UNet2DConditionModel, text_encoders: TextEncoders | None, seed: int
) -> Learner:
    """All weights of the UNet, and with `train_text_encoder` of the text encoders; the result is a model folder."""
    networks, dtype = _networks(config, unet, text_encoders), DTYPES[config.save_precision or "fp32"]

    def write_networks(target: Path, step: int) -> None:
        # The UNet last: `result_of` takes its file for a whole result.
        for name, network in reversed(networks.items()):
            configuration = base.opened().configuration(f"{name}/config.json")
            save_network(target, name, network, configuration, dtype, {STEP_KEY: str(step)})

    def write_folder(target: Path, step: int) -> None:
        # Weights have plain names whatever variant they were, so that the result loads without naming one.
        model = base.opened().without(TOKENIZERS if config.skip_save_text_encoder else ())
        planned = plan_model(model, Format.DIFFUSERS, dtype if config.save_precision else None)
        kept = {name: tensor for name, tensor in planned.tensors.items() if name.partition(".")[0] not in networks}
        replace(planned, tensors=kept).write_parts(target)
        write_networks(target, step)

    trained = {part: {n: [one] for n, one in public_parameters(own).items()} for part, own in networks.items()}
    return _learner(unet, text_encoders, trained, write_part=write_networks, write_result=write_folder, result=MODEL)


def custom_diffusion(
    config: MethodConfig, base: ModelBundle, unet: UNet2DConditionModel, text_encoders: TextEncoders | None, seed: int
) -> Learner:
    """Layers of the UNet's cross-attention, and new words (Kumari et al., 2023); the result is a file of each."""
    freed, words = free_cross_attention(unet, config.freeze_model), _words_of(base, text_encoders)

    def write(target: Path, step: int) -> None:
        updates = {layer: Update({name: one.read() for name, one in own.items()}) for layer, own in freed.items()}
        metadata, dtype = {STEP_KEY: str(step), **base.schedule.marks}, DTYPES[config.save_precision or "fp32"]
        write_words(words(), target, dtype, metadata, config.suffix)
        write_replacements(updates, target / result, dtype, metadata)

    trained, result = {"unet": {n: own.values() for n, own in freed.items()}}, REPLACEMENTS.with_suffix(config.suffix)
    return _learner(unet, text_encoders, trained, write_part=write, write_result=write, result=result)


def textual_inversion(
    config: MethodConfig, base: ModelBundle, unet: UNet2DConditionModel, text_encoders: TextEncoders | None, seed: int
) -> Learner:
    """New words alone (Gal et al., 2023); the result is a file of each."""
    put_in_place(unet, {})
    words = _words_of(base, text_encoders)

    def write(target: Path, step: int) -> None:
        dtype = DTYPES[config.save_precision or "fp32"]
        write_words(words(), target, dtype, {STEP_KEY: str(step)}, config.suffix)

    result = word_file(Path(), list(words())[-1], config.suffix)
    return _learner(unet, text_encoders, {}, write_part=write, write_result=write, result=result)


METHODS: dict[str, Callable[..., Learner]] = {
    method.__name__: method for method in (lora, full, custom_diffusion, textual_inversion)
}


def _networks(
    config: MethodConfig, unet: UNet2DConditionModel, text_encoders: TextEncoders | None
) -> dict[str, nn.Cell]:
    """What is trained beside new words, by the names of the networks' folders."""
    return {"unet": unet} | (text_encoders.networks() if text_encoders and config.train_text_encoder else {})


def _words_of(base: ModelBundle, text_encoders: TextEncoders | None) -> Callable[[], Words]:
    """Gives new words with the vectors that they have at the time; freezes what else is in the text encoders."""
    for network in text_encoders.networks().values() if text_encoders else ():
        put_in_place(network, {})
    rows = text_encoders.new_rows() if text_encoders else {}

    def words() -> Words:
        values = {name: own.asnumpy() for name, own in rows.items()}
        return {word: {name: own[part] for name, own in values.items()} for word, part in base.words.items()}

    return words


def _learner(
    unet: UNet2DConditionModel,
    text_encoders: TextEncoders | None,
    trained: Mapping[str, Mapping[str, Iterable[PublicParameter]]],
    **writing: Any,
) -> Learner:
    """Of the parameters of each network's layers, without what the prediction does not depend on, which would only
    decay; and of new words."""
    rows = list(text_encoders.new_rows().values()) if text_encoders else []
    for own in rows:
        own.requires_grad = True
    trainables = [
        Trainable(one.parameter, "unet" if part == "unet" else "text_encoder")
        for part, layers in trained.items()
        for layer, own in layers.items()
        if text_encoders is None or text_encoders.is_read(part, layer)
        for one in own
    ]
    trainables += [Trainable(own, "text_encoder") for own in rows]
    denoiser = unet if text_encoders is None else TextConditioned(unet, text_encoders)
    return Learner(denoiser=denoiser, trainables=trainables, text_encoders=text_encoders, **writing)


def choose_optimiser(config: TrainConfig, trainables: Sequence[Trainable]) -> Optimiser:
    """The optimiser, with the learning rate and weight decay of text encoders as factors of the others'; and that of B
    as a factor of A's (LoRA+: Hayou et al., 2024, section 4)."""
    o, parameters = config.optimiser, [one.parameter for one in trainables]
    b_over_a = o.loraplus_lr_ratio or 1.0
    rates = {"unet": 1.0, "text_encoder": o.text_encoder_lr / config.learning_rate if o.text_encoder_lr else 1.0}
    own = o.adam_weight_decay_text_encoder
    decays = {"unet": o.adam_weight_decay, "text_encoder": o.adam_weight_decay if own is None else own}
    decay = max(decays.values())
    prodigy = (o.prodigy_beta3, o.prodigy_decouple, o.prodigy_use_bias_correction, o.prodigy_safeguard_warmup)
    adam = (o.adam_beta1, o.adam_beta2, decay, o.adam_epsilon)
    kinds = {"AdamW": AdamW8bit if o.use_8bit_adam else AdamW, "adafactor": Adafactor, "prodigy": Prodigy}
    return kinds[o.optimizer](
        parameters,
        Hyperparameters(*adam, *prodigy, o.adafactor_scale_parameter),
        [rates[one.kind] * (b_over_a if one.parameter.name.endswith(f".{UP}") else 1.0) for one in trainables],
        [decays[one.kind] / (decay or 1.0) for one in trainables],
    )
