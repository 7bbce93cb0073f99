"""Specs with every name of the published models and a few thousandths of their weights."""

from dataclasses import replace

from dreambooth_ms.models.specs import (
    OPENCLIP_BIGG_TEXT,
    SD_15,
    SD_21,
    SDXL_BASE,
    SDXL_REFINER,
    ClipTextSpec,
    ModelSpec,
)

FACTOR = 32
VOCABULARY = 11


def small(model: ModelSpec) -> ModelSpec:
    """The same model with all widths divided by 32 and eleven words."""
    unet, vae = model.unet, model.vae
    added = unet.projection_class_embeddings_input_dim
    return replace(
        model,
        unet=replace(
            unet,
            block_out_channels=tuple(width // FACTOR for width in unet.block_out_channels),
            cross_attention_dim=unet.cross_attention_dim // FACTOR,
            projection_class_embeddings_input_dim=added and added // FACTOR,
        ),
        vae=replace(vae, block_out_channels=tuple(width // FACTOR for width in vae.block_out_channels)),
        text_encoder=model.text_encoder and _small_text(model.text_encoder),
        text_encoder_2=model.text_encoder_2 and _small_text(model.text_encoder_2),
    )


def _small_text(spec: ClipTextSpec) -> ClipTextSpec:
    tower = spec.transformer
    return replace(
        spec,
        transformer=replace(
            tower, hidden_size=tower.hidden_size // FACTOR, intermediate_size=tower.intermediate_size // FACTOR
        ),
        vocab_size=VOCABULARY,
        # Not the width of the tower, so that a projection that was not transposed shows.
        projection_dim=spec.projection_dim and OPENCLIP_BIGG_TEXT.transformer.hidden_size // FACTOR + 3,
    )


PUBLISHED = {"sd15": SD_15, "sd21": SD_21, "sdxl": SDXL_BASE, "refiner": SDXL_REFINER}
SMALL = {name: small(model) for name, model in PUBLISHED.items()}
