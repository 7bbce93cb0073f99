"""Families as data: what distinguishes one Stable Diffusion from another.

The field names follow the `config.json` files of diffusers and transformers, from which `weights/model_folder.py`
fills these rows.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    """The denoising UNet. Tuples have one entry per resolution, from the finest to the coarsest."""

    block_out_channels: tuple[int, ...]
    has_attention: tuple[bool, ...]
    """Whether the blocks of this resolution hold transformers."""
    num_heads: tuple[int, ...]
    cross_attention_dim: int
    layers_per_block: int = 2
    use_linear_projection: bool = False
    """Whether the transformers' projections are linear layers (SD 2) or 1x1 convolutions (SD 1)."""
    in_channels: int = 4
    out_channels: int = 4
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64
    """Height and width of the latents the model was trained on."""


@dataclass(frozen=True, kw_only=True)
class VaeSpec:
    """The autoencoder between pictures and latents."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    in_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def downsampling(self) -> int:
        """Pixels of a picture per latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """The transformer inside either tower of CLIP."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class ClipTextSpec:
    """The text tower of CLIP."""

    transformer: TransformerSpec
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


@dataclass(frozen=True, kw_only=True)
class ClipVisionSpec:
    """The image tower of CLIP."""

    transformer: TransformerSpec
    image_size: int = 224
    patch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """Both towers and the space they share."""

    text: ClipTextSpec
    vision: ClipVisionSpec
    projection_dim: int = 512


SD_15_UNET = UNetSpec(
    block_out_channels=(320, 640, 1280, 1280),
    has_attention=(True, True, True, False),
    num_heads=(8, 8, 8, 8),
    cross_attention_dim=768,
)

SD_21_UNET = UNetSpec(
    block_out_channels=(320, 640, 1280, 1280),
    has_attention=(True, True, True, False),
    num_heads=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    sample_size=96,
)

SD_VAE = VaeSpec()

CLIP_L_TEXT = ClipTextSpec(
    transformer=TransformerSpec(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
)

OPENCLIP_H_TEXT = ClipTextSpec(
    transformer=TransformerSpec(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
    )
)
