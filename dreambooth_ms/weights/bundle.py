"""A base model as its roles: denoiser, codec, text readers and schedule, from a folder or a single file of any format.

The roles are values: whoever builds one may put anything into it. A model in a single file is read as the folder that
it would be converted to.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise, starmap
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from mindspore import nn

from dreambooth_ms.config.train import LossConfig
from dreambooth_ms.diffusion import DEFAULT, EdmSpec, NoiseSchedule, NoiseScheduleSpec
from dreambooth_ms.errors import ConfigError, WeightError, show_names
from dreambooth_ms.formats import clip_tokenizer, folder_layout, model_config
from dreambooth_ms.formats.clip_tokenizer import LENGTH
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file, read_value, recognise
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.folder_layout import TOKENIZERS, read_json, write_json
from dreambooth_ms.formats.model_config import Config, read_config
from dreambooth_ms.formats.sentencepiece_tokenizer import SentencePieceTokenizer
from dreambooth_ms.models.clip import CLIPModel, CLIPTextModel
from dreambooth_ms.models.parameters import public_parameters, read_parameters
from dreambooth_ms.models.roberta import RobertaSeriesModelWithTransformation
from dreambooth_ms.models.specs import PIXELS, UNSAID_END, ClipTextSpec, RobertaSpec, T5Spec, VaeSpec, Words
from dreambooth_ms.models.t5 import T5EncoderModel
from dreambooth_ms.models.text import TextEncoders, check_clip_skip
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import DECODER_LAYERS, ENCODER_LAYERS, AutoencoderKL, Pixels
from dreambooth_ms.models.vit import ViTModel
from dreambooth_ms.weights.opened_model import OpenedModel, StoredNetwork, open_model, with_other_vae

Network = TypeVar("Network", bound=nn.Cell)

CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Layers of a text tower of CLIP that get an update, as in diffusers' scripts."""
XLM_R_TARGETS = ("query", "key", "value", "attention.output.dense")
"""The same layers of XLM-R."""

# Buffers that some versions of the libraries wrote into weight files although they hold no knowledge.
BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
POOLER = ("pooler.dense.weight", "pooler.dense.bias")  # Of ViTModel, which DINO did not train.


@dataclass(frozen=True)
class Role:
    """A network of a model, not loaded yet."""

    spec: Any
    """Its sizes."""
    load: Callable[..., Any]
    """Gives the cell, filled."""
    digest: Callable[[], str]
    """What caches of its results are keyed by, and a run that goes on knows it by."""


class Codec(Role):
    """Pictures <-> latents: an autoencoder, or nothing but the pixels. Its spec has what `VaeSpec` has, but for layers.

    load(encodes=True, decodes=True) gives a cell with `encode` and `decode`, as `AutoencoderKL` has them, or with one.
    """

    @classmethod
    def of_vae(cls, stored: StoredNetwork[VaeSpec]) -> "Codec":
        """An autoencoder in a file; one of its directions alone takes less memory."""

        def load(encodes: bool = True, decodes: bool = True) -> AutoencoderKL:
            unused = (*(() if encodes else ENCODER_LAYERS), *(() if decodes else DECODER_LAYERS))
            return fill(AutoencoderKL(stored.spec, encodes, decodes), stored, unused)

        return cls(stored.spec, load, stored.digest)

    @classmethod
    def of_pixels(cls) -> "Codec":
        """Of a model without an autoencoder: its latents are the pixels."""
        return cls(PIXELS, lambda encodes=True, decodes=True: Pixels(), lambda: "pixels")


@dataclass(frozen=True, kw_only=True)
class TextReader(Role):
    """What reads a prompt for the denoiser, by a cell that `TextEncoders` takes. A model has one, or several whose
    states stand side by side."""

    name: str
    """Of the network, in folders and adapters."""
    width: int
    """Of the states of a token."""
    pooled_width: int = 0
    """Of the text's pooled state; 0: it gives none."""
    pooled_at: int | None = None
    """The token where a text ends and is pooled; None: it is not."""
    most_skipped: int = 0
    """How many of its last layers can be left out."""
    hides_filling: bool = False
    """Whether no token sees what fills up a short text."""
    adapted_layers: tuple[str, ...]
    """The ends of the names of the layers that an adapter changes; none: it is not trained."""
    tokenizer: Callable[[], Any]
    """Gives what has the methods of `ClipTokenizer`."""
    words: Mapping[str, slice] = field(default_factory=dict)
    """New words that it reads beside those of its vocabulary, each with its rows among those of all."""

    def with_words(self, words: Words) -> "TextReader":
        """The same, which reads new words too, by their vectors of its name."""
        own = {word: vectors[self.name] for word, vectors in words.items()}
        for word, rows in own.items():
            if rows.shape[1:] != (self.width,):
                raise WeightError(f"{word}: vectors of width {rows.shape[-1]}, its {self.name} has {self.width}")

        def load() -> Any:
            network = self.load()
            network.add_words(np.concatenate(list(own.values())))
            return network

        def digest() -> str:
            values = b"".join(word.encode() + rows.astype(np.float32).tobytes() for word, rows in own.items())
            return hashlib.sha256(self.digest().encode() + values).hexdigest()

        counts = {word: len(rows) for word, rows in own.items()}
        tokenizer = lambda: self.tokenizer().with_words(counts)  # noqa: E731
        places = dict(zip(own, starmap(slice, pairwise(accumulate(counts.values(), initial=0))), strict=True))
        # Where the end token is only the largest one of old configurations, new words are larger.
        end = min(clip_tokenizer.SIZE, self.spec.vocab_size) - 1 if self.pooled_at == UNSAID_END else self.pooled_at
        return replace(self, words=places, load=load, digest=digest, tokenizer=tokenizer, pooled_at=end)

    @classmethod
    def of_clip(cls, name: str, stored: StoredNetwork[ClipTextSpec], folder: Path, last_layer: bool) -> "TextReader":
        """A text tower of CLIP in a file, with its tokenizer's folder; it pools the text if it has a projection. With
        `last_layer` it yields the normalised states after its last layer (SD 1, SD 2), else those before (SDXL)."""
        spec = stored.spec
        return cls(
            name=name,
            spec=spec,
            width=spec.transformer.hidden_size,
            pooled_width=spec.projection_dim or 0,
            pooled_at=spec.eos_token_id if spec.projection_dim else None,
            most_skipped=spec.transformer.num_hidden_layers - (1 if last_layer else 2),
            adapted_layers=CLIP_TARGETS,
            tokenizer=partial(clip_tokenizer.ClipTokenizer, folder, spec.max_position_embeddings, spec.vocab_size),
            load=lambda: fill(CLIPTextModel(spec, last_layer), stored),
            digest=stored.digest,
        )

    @classmethod
    def of_sentences(cls, name: str, stored: StoredNetwork[T5Spec | RobertaSpec], folder: Path) -> "TextReader":
        """T5's encoder, which reads lower case, or XLM-R, with its tokenizer's folder. A text is cut and filled up to
        what diffusers' pipelines read, and no token sees what fills it up, if the model does not say otherwise."""
        spec, layers = stored.spec, tuple[str, ...]()
        if isinstance(spec, T5Spec):
            longest, width, cell = LENGTH, spec.d_model, partial(T5EncoderModel, spec, True)
        else:
            longest, width, layers = min(LENGTH, spec.longest), spec.project_dim, XLM_R_TARGETS
            cell = partial(RobertaSeriesModelWithTransformation, spec)
        return cls(
            name=name,
            spec=spec,
            width=width,
            hides_filling=isinstance(spec, T5Spec) or spec.use_attention_mask,
            adapted_layers=layers,
            tokenizer=partial(SentencePieceTokenizer, folder, longest, spec.vocab_size),
            load=lambda: fill(cell(), stored),
            digest=stored.digest,
        )


_ONLY_FOR = {False: ("snr_gamma", "debiased_estimation_loss"), True: ("edm_sampling", "edm_weighting")}
"""Settings of the loss, by whether they are for EDM's formulation."""

MARKS = "dreambooth_ms.schedule."
"""What keys begin with in the metadata of adapters: of a scheduler's configuration what its base has otherwise, and its
class if it is EDM's."""


@dataclass(frozen=True)
class Schedule:
    """How a model was trained to denoise."""

    source: Path
    """What is named where it is wrong: the model, or a file in its folder."""
    config: Config
    """The configuration of its scheduler."""
    changes: Config = field(default_factory=dict)
    """What of it does not come from the model's own files."""

    def trained(self, loss: LossConfig = DEFAULT) -> NoiseScheduleSpec | EdmSpec:
        """The forward process that training follows; WeightError if it is none that is known, or what is to be
        predicted cannot be with its noise; ConfigError if a setting means nothing to a model like this."""
        spec = self.changed(loss.changes).spec
        is_edm = isinstance(spec, EdmSpec)
        flags = [f"--{name}" for name in _ONLY_FOR[not is_edm] if getattr(loss, name) != getattr(DEFAULT, name)]
        if is_edm and loss.loss_type != "l2" and loss.huber_schedule == "exponential":
            flags.append("--huber_schedule exponential")
        if flags:
            own = "EDM" if is_edm else "DDPM"
            raise ConfigError(f"{', '.join(flags)}: {self.source} was trained in {own}'s formulation; leave it out")
        if loss.min_timestep >= spec.num_train_timesteps:
            most = spec.num_train_timesteps
            raise ConfigError(f"--min_timestep {loss.min_timestep}: expected less than the {most} of {self.source}")
        return spec

    @property
    def spec(self) -> NoiseScheduleSpec | EdmSpec:
        """The forward process; WeightError if it is not known, or a key of the configuration is not."""
        return read_config(self.source, self.config, model_config.read_scheduler_config)

    def changed(self, changes: Config) -> "Schedule":
        """The same with other values of keys, ConfigError if EDM has no such key; with zero terminal SNR as DDIM, which
        every program has that knows it, and with trailing timesteps if nothing else is said."""
        unknown = [f"--{key}" for key in changes if model_config.is_edm(self.config) and key != "prediction_type"]
        if unknown:
            raise ConfigError(f"{', '.join(unknown)}: {self.source} was trained in EDM's formulation; leave it out")
        schedule = replace(self, config={**self.config, **changes}, changes={**self.changes, **changes})
        if "rescale_betas_zero_snr" in changes and isinstance(spec := schedule.spec, NoiseScheduleSpec):
            config = {**schedule.config, **model_config.write_scheduler_config(spec), **changes}
            schedule = replace(schedule, config=config)
        return schedule

    @property
    def marks(self) -> dict[str, str]:
        """What the metadata of an adapter say of it: nothing, if it is its base's and DDPM's."""
        keys = ("_class_name", *self.changes) if model_config.is_edm(self.config) else self.changes
        return {f"{MARKS}{key}": str(self.config[key]) for key in keys}

    def as_marked(self, metadata: Mapping[str, str], path: Path) -> tuple[Config, list[str]]:
        """The changes with which an adapter was trained, by its metadata, and what a user should know of it. What was
        changed already stays as it is. WeightError if it was trained in EDM's formulation, and the model was not."""
        # The variance that IF predicts does not follow what is learnt, whoever trains an adapter.
        unsaid = {"variance_type": "fixed_small"} if self.config.get("variance_type") == "learned_range" else {}
        said = unsaid | {key.removeprefix(MARKS): own for key, own in metadata.items() if key.startswith(MARKS)}
        is_edm = said.pop("_class_name", None)
        if is_edm and not model_config.is_edm(self.config):
            raise WeightError(
                f"{path}: was trained in EDM's formulation, and {self.source} was not; use the base of its training"
            )
        if model_config.is_edm(self.config) and not is_edm:
            return {}, [f"{path}: does not say that its base was trained in EDM's formulation; SDXL's give noise"]
        known = {"prediction_type", "rescale_betas_zero_snr", "variance_type"} - self.changes.keys()
        changes = {key: {"True": True}.get(value, value) for key, value in said.items() if key in known}
        return changes, [f"{path}: was trained with {key} {value}, and is sampled so" for key, value in changes.items()]


@dataclass(frozen=True)
class ModelBundle:
    """A model by its roles; no weight has been read yet."""

    path: Path
    denoiser: Role
    """What predicts noise or velocity, by a cell like `UNet2DConditionModel`."""
    codec: Codec
    text: tuple[TextReader, ...]
    schedule: Schedule
    zeros_for_empty_prompt: bool = False
    """Whether pictures without a negative prompt are guided by zeros in place of an encoded empty prompt."""
    clip_skip: int = 0
    """Layers of the text readers that are left out at the end, more than the model itself leaves out."""
    source: OpenedModel | None = None
    """What it was opened from; None if it was built otherwise."""
    notes: tuple[str, ...] = ()
    """What a user should know about it, one sentence each."""

    @property
    def num_add_time_ids(self) -> int:
        """add_time_ids of a picture that the denoiser reads."""
        return self.denoiser.spec.num_add_time_ids(sum(reader.pooled_width for reader in self.text))

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser reads, beside noisy latents, a mask and latents of the masked picture."""
        return bool(self.denoiser.spec.in_channels == 2 * self.codec.spec.latent_channels + 1)

    @property
    def enlarges(self) -> bool:
        """Whether the denoiser reads, beside noisy pictures, small ones: it is a second stage."""
        return bool(self.denoiser.spec.in_channels == 2 * self.codec.spec.latent_channels)

    @property
    def noise_of_small(self) -> NoiseSchedule:
        """That of a second stage's small pictures; WeightError if it is missing, or not mixed with a picture."""
        name = folder_layout.NOISING
        spec = read_config(self.path / name, self.opened().configuration(name), model_config.read_scheduler_config)
        if isinstance(spec, EdmSpec):
            raise WeightError(f"{self.path / name}: is of EDM's formulation; take the original model's")
        return NoiseSchedule.from_spec(spec)

    @property
    def predicts_variance(self) -> bool:
        """Whether the denoiser predicts, behind the noise, the variance of a step in as many channels."""
        return bool(self.denoiser.spec.out_channels == 2 * self.codec.spec.latent_channels)

    @property
    def picture_size(self) -> int:
        """Height and width the model was trained at, in pixels."""
        return self.denoiser.spec.sample_size * self.codec.spec.downsampling

    @property
    def side_multiple(self) -> int:
        """What the sides of pictures must be multiples of: the networks halve them so often."""
        return self.codec.spec.downsampling * 2 ** (len(self.denoiser.spec.block_out_channels) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of this size in pixels; WeightError if it is not of `side_multiple`."""
        step, factor = self.side_multiple, self.codec.spec.downsampling
        if height % step or width % step:
            raise WeightError(f"{self.path}: {width}x{height} pixels do not fit; sides must be multiples of {step}")
        return self.codec.spec.latent_channels, height // factor, width // factor

    @property
    def words(self) -> Mapping[str, slice]:
        """New words that its text readers read, each with its rows among those of all."""
        return self.text[0].words if self.text else {}

    def opened(self) -> OpenedModel:
        """The tensors of the whole model by public name, none of which is read; for a model from a file or folder."""
        assert self.source is not None, f"{self.path} was not opened"
        return self.source

    def load_text_encoders(self) -> TextEncoders:
        """All text readers as one network, filled."""
        return TextEncoders({reader.name: reader.load() for reader in self.text}, self.clip_skip)

    def with_words(self, words: Words) -> "ModelBundle":
        """The same model, whose text readers read new words too; WeightError if a word has no vectors for a reader."""
        for word, vectors in words.items():
            if vectors.keys() != {reader.name for reader in self.text}:
                raise WeightError(
                    f"{word}: has vectors for {' and '.join(vectors)}, {self.path} has "
                    f"{' and '.join(reader.name for reader in self.text)}; use a word of the same family"
                )
        return replace(self, text=tuple(reader.with_words(words) for reader in self.text)) if words else self

    def with_schedule(self, changes: Config) -> "ModelBundle":
        """The same model, denoised otherwise, see `Schedule.changed`; what it was opened from says so, too."""
        schedule = self.schedule.changed(changes)
        if self.source is None or not changes:
            return replace(self, schedule=schedule)
        index, config = self.source.configuration(folder_layout.INDEX), schedule.config
        if "_class_name" in config:
            index = {**index, "scheduler": ["diffusers", config["_class_name"]]}
        source = replace(
            self.source,
            prediction_type=config.get("prediction_type", "epsilon"),
            zero_snr=config.get("rescale_betas_zero_snr") is True,
            configurations={**self.source.configurations, folder_layout.SCHEDULER: config, folder_layout.INDEX: index},
        )
        return replace(self, schedule=schedule, source=source)

    def with_clip_skip(self, clip_skip: int) -> "ModelBundle":
        """The same model with another `clip_skip`; ConfigError if a text reader has not so many layers."""
        check_clip_skip(clip_skip, [reader.most_skipped for reader in self.text])
        return replace(self, clip_skip=clip_skip)

    def check(self) -> None:
        """Stop, by a WeightError, where what the denoiser takes of latents, text and add_time_ids is not what codec and
        readers give, or the schedule is not known."""
        _ = self.schedule.spec, self.enlarges and self.source and self.noise_of_small
        unet, latent_channels = self.denoiser.spec, self.codec.spec.latent_channels
        names = " and ".join(reader.name for reader in self.text)
        is_known = self.inpaints or self.enlarges == (unet.class_embed_type is not None)
        is_known &= self.inpaints or self.enlarges or unet.in_channels == latent_channels
        if not (is_known and (self.predicts_variance or unet.out_channels == latent_channels)):
            raise WeightError(
                f"{self.path}: its unet takes {unet.in_channels} channels and gives {unet.out_channels}, a picture has "
                f"{latent_channels}; use a text-to-image or an inpainting model, not one for depth or upscaling"
            )
        width = sum(reader.width for reader in self.text)
        if self.text and unet.text_width != width:
            raise WeightError(
                f"{self.path}: its unet reads text of width {unet.text_width}, its {names} "
                f"{'gives' if len(self.text) == 1 else 'give'} {width}; take both from one model"
            )
        pools = any(reader.pooled_width for reader in self.text)
        # SDXL's base reads 6, its refiner 5.
        if not (self.num_add_time_ids in (5, 6) if pools else unet.addition_embed_type in (None, "text")):
            raise WeightError(
                f"{self.path}: its unet reads {self.num_add_time_ids} add_time_ids beside the text of its {names}; "
                "use SD 1.x, 2.x, SDXL or its refiner"
            )


def open_bundle(path: Path, variant: str | None = None, vae: Path | None = None) -> ModelBundle:
    """Check a folder, or a model in a single file, and read its configurations.

    `variant` is that of a folder's weight files; `vae` is another autoencoder to be used in place of its own: its
    folder, a model folder with one, or a file that holds it alone. WeightError if it is no model, a part is missing, or
    it holds another kind of model.
    """
    model, tokenizers = _opened(path, variant, unused=("vae",) if vae else ())
    unet = model.network("unet", model_config.read_unet_config)
    has_pixels = model.spec.vae == PIXELS
    if vae and has_pixels:
        raise WeightError(f"{path}: denoises pixels, without an autoencoder; leave {vae} out")
    if vae:
        model = with_other_vae(model, vae, unet.spec.sample_size)
    is_xl = "text_encoder_2" in tokenizers
    text = []
    for name, folder in tokenizers.items():
        stored = model.network(name, model_config.NETWORK_READERS[name])
        is_clip = isinstance(stored.spec, ClipTextSpec)
        reader = partial(TextReader.of_clip, last_layer=not is_xl) if is_clip else TextReader.of_sentences
        text.append(reader(name, stored, folder))
    scheduler = model.configuration(folder_layout.SCHEDULER)
    source = path if path.is_file() or model_config.is_edm(scheduler) else path / folder_layout.SCHEDULER
    force_zeros = model.configuration(folder_layout.INDEX).get("force_zeros_for_empty_prompt", True)
    bundle = ModelBundle(
        path=path,
        denoiser=Role(unet.spec, lambda: fill(UNet2DConditionModel(unet.spec), unet), unet.digest),
        codec=Codec.of_pixels() if has_pixels else Codec.of_vae(model.network("vae", model_config.read_vae_config)),
        text=tuple(text),
        schedule=Schedule(source, scheduler),
        zeros_for_empty_prompt=is_xl and bool(force_zeros),
        source=model,
        notes=() if path.is_dir() else model.notes,
    )
    bundle.check()
    return bundle


def _opened(path: Path, variant: str | None, unused: Collection[str]) -> tuple[OpenedModel, dict[str, Path]]:
    """A model, which must hold every network, and its text encoders' tokenizers: its own, or on board for a file."""
    is_folder = path.is_dir()
    if not is_folder:
        try:
            recognise(path)
        except WeightError as error:
            raise WeightError(f"{path}: expected a model folder, got a file that holds no model ({error})") from error
    model = open_model(path, variant, unused=unused)
    model.check()
    tokens = clip_tokenizer.pad_tokens(model.spec)
    if lacking := [part for part in model.missing_parts if part not in unused]:
        advice = "is the download complete?" if is_folder else "convert it into a folder and put them into that"
        raise WeightError(f"{path}: holds no {' and no '.join(lacking)}; {advice}")
    if is_folder:
        for name in tokens:
            clip_tokenizer.check_clip_tokenizer(path / TOKENIZERS[name])
        return model, {name: path / TOKENIZERS[name] for name in model.spec.networks if name in TOKENIZERS}
    if None in tokens.values():
        raise WeightError(f"{path}: its words are not CLIP's; convert it into a folder and put its tokenizer into that")
    if model.prediction_type is None:
        assumed = f"It is taken to predict {model.assumed_prediction}; converting can say otherwise."
        model = replace(model, notes=(*model.notes, assumed))
    return model, {name: clip_tokenizer.tokenizer_on_board(token) for name, token in tokens.items() if token}


def fill(network: Network, stored: StoredNetwork[Any], unused: Collection[str] = ()) -> Network:
    """`load_strict` for a cell from its file; it has all layers but the `unused` ones at the top of the module tree."""
    tensors = {name: one for name, one in stored.tensors.items() if name.partition(".")[0] not in unused}
    load_strict(network, tensors, str(stored.file))
    return network


def load_strict(
    root: nn.Cell,
    tensors: Mapping[str, np.ndarray | StoredTensor],
    source: str,
    ignore_unexpected: Iterable[str] = (),
) -> None:
    """Fill every parameter of a network by its public name. Nothing is written unless everything fits.

    Values that are in files are read one at a time, so that memory holds them once. Names to ignore may be there
    although the network has no use for them. WeightError lists all missing, unexpected and mis-shaped names of the
    source, which is the file or folder that the values come from.
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
        advice = "take its configuration and its weights from one model"
        raise WeightError(f"{source} does not fit {type(root).__name__}: {'; '.join(problems)}; {advice}")
    for name, parameter in wanted.items():
        value = tensors[name]
        parameter.write(read_value(value) if isinstance(value, StoredTensor) else value)


_ENCODERS: Mapping[type[nn.Cell], tuple[str, str, str, Callable[[Config], Any]]] = {
    CLIPModel: ("clip", "CLIP model", "openai/clip-vit-base-patch32", model_config.read_clip_config),
    ViTModel: ("vit", "DINO model", "facebook/dino-vits16", model_config.read_vit_config),
}
"""What transformers calls their type and people call them, one of the hub, and what reads their configuration."""


def load_encoder(folder: Path, kind: type[Network]) -> Network:
    """Both towers of CLIP, or DINO's vision transformer, from a folder in transformers' layout; WeightError if it
    holds none, or its weights do not fit its configuration."""
    model_type, what, example, read = _ENCODERS[kind]
    config = read_json(folder / "config.json", f"{folder} holds no {what}")
    if (found := config.get("model_type", model_type)) != model_type:
        raise WeightError(f"{folder} holds no {what} but one of the type {found}; name another, such as {example}")
    network = kind(read_config(folder / "config.json", config, read))
    file = folder_layout.weight_file(folder, "encoder", None)
    tensors = {name: replace(own, label=f"{file}: {name}") for name, own in open_tensor_file(file).tensors.items()}
    load_strict(network, tensors, str(file), ignore_unexpected=BUFFERS + POOLER)
    return network


def save_network(
    folder: Path,
    part: str,
    network: nn.Cell,
    config: Config,
    dtype: DType = DType.F32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a network's config.json and weights into `folder/part`; WeightError if one is too large for the type."""
    path = folder / part / f"{folder_layout.WEIGHT_NAMES[part]}.safetensors"
    values = read_parameters(network).items()
    tensors = {name: StoredTensor.of(one, label=f"{path}: {name}").cast_to(dtype) for name, one in values}
    write_json(folder / part / "config.json", config)
    write_safetensors(path, tensors, {"format": "pt", **(metadata or {})})
