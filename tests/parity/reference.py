"""The reference networks, small and with seeded weights, and how their results are compared with ours."""

from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.deprecated.alt_diffusion import RobertaSeriesModelWithTransformation
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import RobertaSeriesConfig
from mindspore import ParameterTuple, Tensor, nn, ops
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from dreambooth_ms.models.parameters import public_parameters

SD_1_FORM = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "use_linear_projection": False,
}
"""SD 1: projections by convolution, the same number of heads everywhere."""

SD_2_FORM = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
}
"""SD 2: linear projections, heads by resolution."""


SDXL_FORM = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
"""SDXL: no transformer at the finest resolution, several blocks in others; pooled text of width 20, 6 add_time_ids."""

REFINER_FORM = SDXL_FORM | {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 4, 4),
    "transformer_layers_per_block": 2,
    "projection_class_embeddings_input_dim": 20 + 5 * 8,
}
"""SDXL's refiner: four resolutions, none of the outer ones with transformers; 5 ids."""


class ValueAndGradients(nn.Cell):
    """A cell's result and all its gradients in one compilation: (sensitivity, *inputs) -> result, gradients.

    The gradients are those of sum(result * sensitivity): with float inputs a pair (of the inputs, of the parameters).
    """

    def __init__(self, cell: nn.Cell, of_inputs: bool = True) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.parameters = ParameterTuple(list(cell.get_parameters()))
        self.differentiate = ops.GradOperation(get_all=of_inputs, get_by_list=True, sens_param=True)

    def construct(self, sensitivity, *inputs):
        return self.cell(*inputs), self.differentiate(self.cell, self.parameters)(*inputs, sensitivity)


class InputGradients(nn.Cell):
    """The same for a cell without parameters: (sensitivity, *inputs) -> result, gradients of the inputs."""

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.differentiate = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, sensitivity, *inputs):
        return self.cell(*inputs), self.differentiate(self.cell)(*inputs, sensitivity)


def relative_error(ours, reference) -> float:
    """max |ours - reference| / max |reference|."""
    ours, reference = as_array(ours), as_array(reference)
    assert ours.shape == reference.shape, f"{ours.shape} is not {reference.shape}"
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def as_array(values) -> np.ndarray:
    """A tensor of either library as float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().numpy()
    elif isinstance(values, Tensor):
        values = values.asnumpy()
    return np.asarray(values, np.float64)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Seeded float32 draws from N(0, 1)."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def weights_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """A reference network's parameters by name."""
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def public_gradients(network: nn.Cell, gradients: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    """Gradients of all parameters of a network, by public name and in public form."""
    named = {id(public.parameter): (name, public.layout) for name, public in public_parameters(network).items()}
    found = {}
    for parameter, gradient in zip(network.get_parameters(), gradients, strict=True):
        name, layout = named[id(parameter)]
        found[name] = layout.restore(gradient.asnumpy()) if layout else gradient.asnumpy()
    return found


def gradients_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Gradients of a reference network's parameters by name."""
    return {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}


def worst_gradient_error(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest relative error of any weight's gradient, and its name.

    A gradient below a thousandth of the largest in the network is measured against that thousandth: some are zero in
    exact arithmetic (a bias right before a norm), and there both libraries hold nothing but rounding.
    """
    assert ours.keys() == reference.keys()
    floor = 1e-3 * max(np.abs(gradient).max() for gradient in reference.values())
    errors = {
        name: float(np.abs(ours[name] - gradient).max() / max(np.abs(gradient).max(), floor))
        for name, gradient in reference.items()
    }
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def small_unet(form: dict, layers_per_block: int = 1, seed: int = 0) -> UNet2DConditionModel:
    """diffusers' UNet in one of the two forms above: two resolutions, one layer each unless stated otherwise."""
    torch.manual_seed(seed)
    return disturbed(
        UNet2DConditionModel(
            sample_size=16, cross_attention_dim=24, norm_num_groups=8, layers_per_block=layers_per_block, **form
        )
    )


def small_vae(seed: int = 0) -> AutoencoderKL:
    """diffusers' autoencoder: two resolutions, one layer each."""
    torch.manual_seed(seed)
    return disturbed(
        AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=32,
        )
    )


def small_clip(hidden_act: str, eos_token_id: int, seed: int = 0) -> CLIPModel:
    """transformers' CLIP: towers of two layers and of different widths."""
    torch.manual_seed(seed)
    transformer = {"num_hidden_layers": 2, "hidden_act": hidden_act}
    text = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "vocab_size": 60,
        "max_position_embeddings": 12,
        "eos_token_id": eos_token_id,
        "projection_dim": 24,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 3,
        "image_size": 20,
        "patch_size": 4,
        "projection_dim": 24,
    }
    return disturbed(
        CLIPModel(CLIPConfig(text_config=text | transformer, vision_config=vision | transformer, projection_dim=24))
    )


def small_vit() -> ViTModel:
    """transformers' vision transformer, for pictures of 28 pixels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    return disturbed(ViTModel(ViTConfig(**sizes, image_size=28, patch_size=4)))


def small_text_encoder(seed: int = 0, kind: type = CLIPTextModel, **settings) -> CLIPTextModel:
    """transformers' text tower alone, or another kind of it."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    words = {"vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": 59}
    return disturbed(kind(CLIPTextConfig(**sizes | words | settings)))


def small_t5(**settings) -> T5EncoderModel:
    """transformers' encoder of T5 v1.1: two layers, heads whose widths do not add up to the states' width."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    config = T5Config(**sizes | buckets | settings, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return disturbed(T5EncoderModel(config))


def small_roberta(**settings) -> RobertaSeriesModelWithTransformation:
    """diffusers' text encoder of AltDiffusion: three layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    words = {"vocab_size": 60, "max_position_embeddings": 20, "type_vocab_size": 2, "project_dim": 24}
    config = RobertaSeriesConfig(**sizes | words | settings, layer_norm_eps=1e-5)
    return disturbed(RobertaSeriesModelWithTransformation(config))


def disturbed(module: torch.nn.Module) -> torch.nn.Module:
    """Move norms and biases away from one and zero, where a forgotten or exchanged one would not be seen."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def as_drawn(objective):
    """The same draws with the clean latents as what the network reads, and the noise as its target."""

    def columns_of(generators):
        columns = objective(generators)
        zeros = np.zeros(len(columns.time))
        return replace(columns, in_x=zeros + 1, in_n=zeros, out_x=zeros, out_n=zeros + 1)

    return columns_of
