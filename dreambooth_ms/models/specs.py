"""Families as data: what distinguishes one Stable Diffusion from another.

The field names follow the `config.json` files of diffusers and transformers, from which
`formats/model_config.py` fills these rows; `families.yaml` has the published ones. `problems` says why no network has
the sizes of a spec, a reason each, by the names in configurations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from dreambooth_ms.config.choices import read_table

UNSAID_END = 2
"""The end token in configurations older than a correction in transformers: there it is the largest id of a text."""

TABLE = "text_model.embeddings.token_embedding"
"""The name of a text tower's table of tokens."""

Words: TypeAlias = Mapping[str, Mapping[str, np.ndarray]]
"""New word -> the name of a text encoder -> its vectors (n, D) there, one for each of the tokens that it stands for."""


def _indivisible(name: str, sizes: Sequence[int], divisor_name: str, *divisors: int) -> Iterator[str]:
    """Sizes that are no multiples of a divisor, or each of its own."""
    for size, divisor in zip(sizes, cycle(divisors)):
        if size % divisor:
            yield f"{name} {size} is not a multiple of {divisor_name} {divisor}"


def at_level(value: int | tuple[int, ...], level: int) -> int:
    """What is said once for all resolutions or for each."""
    return value if isinstance(value, int) else value[level]


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    """The denoising UNet. Tuples have one entry per resolution, from the finest to the coarsest."""

    block_out_channels: tuple[int, ...]
    has_attention: tuple[bool, ...]
    """Whether the blocks of this resolution hold transformers, or what stands in their place."""
    num_heads: tuple[int, ...]
    cross_attention_dim: int
    layers_per_block: int | tuple[int, ...] = 2
    """Residual blocks on the way down, for all resolutions or for each; there is one more on the way up."""
    use_linear_projection: bool = False
    """Whether the transformers' projections are linear layers (SD 2) or 1x1 convolutions (SD 1)."""
    in_channels: int = 4
    out_channels: int = 4
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64
    """Height and width of the latents the model was trained on."""
    transformer_layers_per_block: int | tuple[int, ...] = 1
    """Transformer blocks in each transformer, for all resolutions or for each; the middle has the last one's."""
    addition_embed_type: str | None = None
    """What is added to the time embedding: "text_time" is pooled text and sizes (SDXL), "text" the text, pooled by
    attention (DeepFloyd IF)."""
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: int | None = None
    """Width that each of the sizes is encoded to."""
    projection_class_embeddings_input_dim: int | None = None
    """Width of pooled text plus encoded sizes."""
    class_embed_type: Literal["timestep"] | None = None
    """"timestep" if a second timestep is read, as the level of noise in the small picture (IF's second stage)."""
    encoder_hid_dim: int | None = None
    """Width of the text that it reads, if that is projected to `cross_attention_dim` first."""
    time_embedding_dim: int | None = None
    """Width of the time embedding; None: four times that of the finest resolution."""
    time_embedding_act_fn: Literal["silu", "gelu"] | None = None
    """What the sum of all embeddings goes through, beside what residual blocks do with it."""

    simple_blocks: bool = False
    """Whether its blocks are diffusers' "SimpleCrossAttn" and "Resnet" ones: residual blocks change the resolution, and
    one attention to text and pixels stands in place of a transformer. Others have what follows as it is here."""
    act_fn: Literal["silu", "gelu"] = "silu"
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """Whether the time embedding is added within a residual block, or scales and shifts what is normalised."""
    resnet_skip_time_act: bool = False
    """Whether residual blocks read the time embedding without an activation of their own."""
    resnet_out_scale_factor: float = 1
    mid_block_scale_factor: float = 1
    """What residual blocks divide their sum by, and those in the middle."""
    only_cross_attention: bool = False
    """Whether pixels attend to the text alone."""
    cross_attention_norm: Literal["group_norm"] | None = None
    """How each attention normalises the text, in so many groups:"""
    text_groups: ClassVar[int] = 32

    @property
    def text_width(self) -> int:
        """Width of the text that it reads."""
        return self.encoder_hid_dim or self.cross_attention_dim

    def num_add_time_ids(self, pooled_width: int) -> int:
        """add_time_ids of a picture that are read with pooled text of this width: 6 in SDXL, 5 in its refiner.

        0 in other UNets, and where the width does not fit.
        """
        if not (self.projection_class_embeddings_input_dim and self.addition_time_embed_dim):
            return 0
        ids, rest = divmod(self.projection_class_embeddings_input_dim - pooled_width, self.addition_time_embed_dim)
        return 0 if rest else ids

    def problems(self) -> Iterator[str]:
        channels = self.block_out_channels
        by_level = {"down_block_types": self.has_attention, "attention_head_dim": self.num_heads}
        depths = {name: getattr(self, name) for name in ("transformer_layers_per_block", "layers_per_block")}
        by_level |= {name: own for name, own in depths.items() if not isinstance(own, int)}
        uneven = {name: len(values) for name, values in by_level.items() if len(values) != len(channels)}
        yield from (f"{name} has {n} entries, block_out_channels {len(channels)}" for name, n in uneven.items())
        if not channels:
            yield "block_out_channels is empty"
        if channels and not uneven:
            yield from _indivisible("block_out_channels", channels, "norm_num_groups", self.norm_num_groups)
            # The blocks in the middle always attend, with the heads of the coarsest.
            attends = [level for level, own in enumerate(self.has_attention) if own or level == len(channels) - 1]
            sizes, heads = ([values[level] for level in attends] for values in (channels, self.num_heads))
            yield from _indivisible("block_out_channels", sizes, "attention_head_dim", *heads)
            yield from _indivisible("block_out_channels", channels[:1], "sine and cosine:", 2)
        pools, pool_heads = self.addition_embed_type == "text", self.addition_embed_type_num_heads
        yield from _indivisible("width of text", [self.text_width] * pools, "addition_embed_type_num_heads", pool_heads)
        normed = [self.cross_attention_dim] * bool(self.cross_attention_norm)
        yield from _indivisible("cross_attention_dim", normed, "groups:", self.text_groups)
        if not (self.resnet_out_scale_factor and self.mid_block_scale_factor):
            yield "resnet_out_scale_factor or mid_block_scale_factor is 0"


@dataclass(frozen=True, kw_only=True)
class VaeSpec:
    """The autoencoder between pictures and latents."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    in_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    norm_eps: ClassVar[float] = 1e-6
    simple_blocks: ClassVar[bool] = False
    act_fn: ClassVar[str] = "silu"
    resnet_time_scale_shift: ClassVar[str] = "default"
    resnet_out_scale_factor: ClassVar[float] = 1
    mid_block_scale_factor: ClassVar[float] = 1
    scaling_factor: float = 0.18215
    latents_mean: tuple[float, ...] | None = None
    """Mean of each latent channel, which is taken off before scaling (Playground v2.5). None: 0."""
    latents_std: tuple[float, ...] | None = None
    """Deviation of each latent channel, which it is divided by. None: 1."""

    @property
    def downsampling(self) -> int:
        """Pixels of a picture per latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def scaled(self, latents: np.ndarray) -> np.ndarray:
        """The autoencoder's latents (..., C, h, w) -> the diffusion's, of deviation 1 or so."""
        factor = self.scaling_factor / self._by_channel(self.latents_std, 1.0)
        return (latents - self._by_channel(self.latents_mean, 0.0)) * factor

    def unscaled(self, latents: np.ndarray) -> np.ndarray:
        """The inverse of `scaled`."""
        factor = self._by_channel(self.latents_std, 1.0) / np.float32(self.scaling_factor)
        return latents * factor + self._by_channel(self.latents_mean, 0.0)

    def problems(self) -> Iterator[str]:
        channels = self.block_out_channels
        if not channels:
            yield "block_out_channels is empty"
        if min(self.scaling_factor, *(self.latents_std or (1.0,))) <= 0:
            yield "scaling_factor and latents_std are not above 0"
        yield from _indivisible("block_out_channels", channels, "norm_num_groups", self.norm_num_groups)

    @staticmethod
    def _by_channel(values: tuple[float, ...] | None, otherwise: float) -> np.ndarray:
        return np.array(otherwise if values is None else values, np.float32).reshape(-1, 1, 1)


PIXELS = VaeSpec(block_out_channels=(1,), layers_per_block=0, latent_channels=3, norm_num_groups=1, scaling_factor=1.0)
"""In place of an autoencoder's: of pictures as they are, whose pixels are the latents (DeepFloyd IF)."""


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """The transformer inside either tower of CLIP."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def problems(self) -> Iterator[str]:
        yield from _indivisible("hidden_size", [self.hidden_size], "num_attention_heads", self.num_attention_heads)


@dataclass(frozen=True, kw_only=True)
class ClipTextSpec:
    """The text tower of CLIP."""

    transformer: TransformerSpec
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    projection_dim: int | None = None
    """Width of the projected pooled text; None for a tower without a projection of its own."""

    def problems(self) -> Iterator[str]:
        yield from self.transformer.problems()
        if self.eos_token_id >= self.vocab_size:
            yield f"eos_token_id {self.eos_token_id} is none of {self.vocab_size} tokens (vocab_size)"


@dataclass(frozen=True, kw_only=True)
class T5Spec:
    """The encoder of T5 v1.1, which DeepFloyd IF reads."""

    vocab_size: int
    d_model: int
    d_kv: int
    """Width of a head."""
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    pad_token_id: ClassVar[int] = 0

    def problems(self) -> Iterator[str]:
        buckets = [self.relative_attention_num_buckets]
        yield from _indivisible("relative_attention_num_buckets", buckets, "near and far, before and after:", 4)


@dataclass(frozen=True, kw_only=True)
class RobertaSpec:
    """XLM-R with a projection, which AltDiffusion reads."""

    transformer: TransformerSpec
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    project_dim: int
    """Width of the states that it gives."""
    use_attention_mask: bool = True
    """Whether no token sees what fills up a short text."""
    has_pre_transformation: bool = False
    """Whether it gives the states before the last layer, normalised (AltDiffusion-m18)."""
    pad_token_id: ClassVar[int] = 1

    @property
    def longest(self) -> int:
        """Tokens that it has positions for: the first ones are for what fills up a text."""
        return self.max_position_embeddings - self.pad_token_id - 1

    def problems(self) -> Iterator[str]:
        yield from self.transformer.problems()
        if self.longest < 3:
            yield f"max_position_embeddings {self.max_position_embeddings} leaves no room for a text"


@dataclass(frozen=True, kw_only=True)
class ClipVisionSpec:
    """A transformer of pictures: the image tower of CLIP, or DINO's."""

    transformer: TransformerSpec
    image_size: int = 224
    patch_size: int = 32

    def problems(self) -> Iterator[str]:
        yield from self.transformer.problems()
        yield from _indivisible("image_size", [self.image_size], "patch_size", self.patch_size)


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """Both towers and the space they share."""

    text: ClipTextSpec
    vision: ClipVisionSpec
    projection_dim: int = 512

    def problems(self) -> Iterator[str]:
        yield from self.text.problems()
        yield from self.vision.problems()


class Family(Enum):
    """The families of models whose networks these are."""

    SD1 = "SD 1.x"
    SD2 = "SD 2.x"
    SDXL = "SDXL base"
    SDXL_REFINER = "SDXL refiner"
    ALT = "AltDiffusion"
    IF = "DeepFloyd IF"


TextSpec: TypeAlias = ClipTextSpec | T5Spec | RobertaSpec


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All networks of a model. Only SDXL has a second text encoder, and SDXL's refiner has nothing but that one."""

    family: Family
    unet: UNetSpec
    vae: VaeSpec
    """PIXELS: it has none."""
    text_encoder: TextSpec | None = None
    text_encoder_2: ClipTextSpec | None = None

    @property
    def networks(self) -> dict[str, Any]:
        """The specs of those that it has, by the names of their folders."""
        return {name: own for name, own in vars(self).items() if name != "family" and own not in (None, PIXELS)}


FAMILIES = read_table(Path(__file__).with_name("families.yaml"))
"""What is known of each family, by its value."""

_KINDS = {"unet": UNetSpec, "vae": VaeSpec, "transformer": TransformerSpec}
_KINDS |= {"text_encoder": ClipTextSpec, "text_encoder_2": ClipTextSpec}


def values_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """What a table such as those of families.yaml says, as the fields of specs have it."""
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
    return own | {name: kind(**values_of(own[name])) for name, kind in _KINDS.items() if name in own}


PUBLISHED_MODELS = tuple(
    ModelSpec(family=one, **values_of(FAMILIES[one.value]["networks"])) for one in Family if one.value in FAMILIES
)
"""One model of each family that names and shapes tell, with the sizes it was published with."""

SD_15, SD_21, SDXL_BASE, SDXL_REFINER = PUBLISHED_MODELS
SD_15_UNET, SD_21_UNET, SDXL_UNET, SDXL_REFINER_UNET = (model.unet for model in PUBLISHED_MODELS)
SD_VAE, SDXL_VAE = SD_15.vae, SDXL_BASE.vae
CLIP_L_TEXT, OPENCLIP_H_TEXT, OPENCLIP_BIGG_TEXT = SD_15.text_encoder, SD_21.text_encoder, SDXL_BASE.text_encoder_2
PLAYGROUND_25 = replace(SDXL_BASE, **values_of(FAMILIES["Playground v2.5"]["networks"]))
PLAYGROUND_25_VAE = PLAYGROUND_25.vae
