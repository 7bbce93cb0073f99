"""The denoising UNet of Stable Diffusion and DeepFloyd IF, with the module tree of diffusers' UNet2DConditionModel.

Shapes: B batch, C latent channels, H, W height and width of the latents, S text tokens, E text width, T time width,
P width of pooled text, N add_time_ids.
"""

import math
from dataclasses import dataclass
from itertools import count

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from dreambooth_ms.models.layers import LAYERS, CellMethod, attach
from dreambooth_ms.models.layout import Layer, LayerKind, time_width, unet_inputs, unet_layout
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.models.specs import UNetSpec
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.ops import Conv2d, Dense, GroupNorm, LayerNorm, MultiHeadAttention, mean
from dreambooth_ms.ops.graph import select, shared
from dreambooth_ms.ops.layout import from_public_layout, to_public_layout
from dreambooth_ms.ops.linear import activation, empty_parameter


@dataclass(frozen=True)
class Segment:
    """A part of a network: what it computes, and from which values, numbered as in `models.layout`."""

    cell: nn.Cell
    reads: tuple[int, ...]
    parts: tuple[nn.Cell, ...]
    """The cells of the network whose parameters it uses; no two segments use the same."""
    num_results: int | None = None
    """Tensors in the tuple that it returns; None if it returns a tensor."""


_OUTER = {
    LayerKind.UNET_INPUT: "embed_latents",
    LayerKind.TIME_EMBEDDING: "embed_time",
    LayerKind.TEXT: "cast_text",
    LayerKind.UNET_OUTPUT: "predict",
}
"""The first layers, in this order, and the last one. They are methods of the network, because their modules are its own
and an adapter may take the place of one."""


class UNet2DConditionModel(nn.Cell):
    """Noisy latents (B, C, H, W), timesteps (B,), text (B, S, E) -> prediction (B, C', H, W).

    SDXL's also takes pooled text (B, P) and add_time_ids (B, N), and IF's second stage another timestep (B,), which are
    added to the time embedding. Inputs and prediction are float32, whatever it computes in.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec, self.compute_dtype = spec, ms.float32
        self.input_names = unet_inputs(spec)
        """What it takes, in order, by diffusers' names."""
        width, temb_dim = spec.block_out_channels[0], time_width(spec)
        self.time_proj = TimestepEncoding(width)
        self.time_embedding = TimestepEmbedding(width, temb_dim, spec.act_fn)
        self.class_embedding = TimestepEmbedding(width, temb_dim, spec.act_fn) if spec.class_embed_type else None
        self.adds_text = spec.addition_embed_type == "text"
        if self.adds_text:
            self.add_embedding = TextTimeEmbedding(spec.text_width, temb_dim, spec.addition_embed_type_num_heads)
        self.adds_text_and_sizes = "text_embeds" in self.input_names
        if self.adds_text_and_sizes:
            self.add_time_proj = TimestepEncoding(spec.addition_time_embed_dim)
            self.add_embedding = TimestepEmbedding(spec.projection_class_embeddings_input_dim, temb_dim)
        self.time_act = activation(spec.time_embedding_act_fn) if spec.time_embedding_act_fn else None
        self.act = None if spec.resnet_skip_time_act else activation(spec.act_fn)
        self.encoder_hid_proj = Dense(spec.text_width, spec.cross_attention_dim) if spec.encoder_hid_dim else None
        self.conv_in = Conv2d(spec.in_channels, width)
        self.time_reads = unet_layout(spec)[list(_OUTER).index(LayerKind.TIME_EMBEDDING)].reads
        inner = [layer for layer in unet_layout(spec) if layer.kind not in _OUTER]
        cells = [self._attach(layer) for layer in inner]
        self.conv_norm_out = GroupNorm(spec.norm_num_groups, width, spec.norm_eps, spec.act_fn)
        self.conv_out = Conv2d(width, spec.out_channels)
        self.reads = tuple(layer.reads for layer in inner)
        # Last, so that every cell is found by its public name first.
        self.inner = nn.CellList(cells, auto_prefix=False)
        # Names the parameters, which `attach` and the list before do not.
        public_parameters(self)

    def _attach(self, layer: Layer) -> nn.Cell:
        """The cell of a layer, whose module is put at its public name."""
        if layer.kind is LayerKind.TRANSFORMER_OUTPUT:
            return CellMethod(self.get_sub_cell(layer.name).project_out)
        cell = attach(self, layer.name, LAYERS[layer.kind](layer, self.spec))
        return CellMethod(cell.project_in) if layer.kind is LayerKind.TRANSFORMER_INPUT else cell

    def construct(self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BSE: Tensor, *added: Tensor) -> Tensor:
        values = (latents_BCHW, timesteps_B, text_BSE) + added
        temb_BT = self.embed_time(*select(values, self.time_reads))
        values = values + (self.embed_latents(latents_BCHW), temb_BT, self.cast_text(text_BSE))
        for i in range(len(self.reads)):
            values = values + (self.inner[i](*select(values, self.reads[i])),)
        return self.predict(values[-1])

    def embed_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Latents -> an image with the channels of the finest resolution."""
        return self.conv_in(from_public_layout(latents_BCHW).astype(self.compute_dtype))

    def embed_time(self, timesteps_B: Tensor, *added: Tensor) -> Tensor:
        """Timesteps, and what the spec adds to them -> what residual blocks read, after their activation (B, T)."""
        dtype = self.compute_dtype
        temb_BT = self.time_embedding(self.time_proj(timesteps_B).astype(dtype))
        if self.class_embedding is not None:
            temb_BT = temb_BT + self.class_embedding(self.time_proj(added[0]).astype(dtype))
        if self.adds_text:
            temb_BT = temb_BT + self.add_embedding(added[-1].astype(dtype))
        if self.adds_text_and_sizes:
            pooled_BP, sizes_BN = added[-2:]
            encoded = ops.reshape(self.add_time_proj(ops.reshape(sizes_BN, (-1,))), (sizes_BN.shape[0], -1))
            temb_BT = temb_BT + self.add_embedding(ops.concat((pooled_BP, encoded), 1).astype(dtype))
        if self.time_act is not None:
            temb_BT = self.time_act(temb_BT)
        return temb_BT if self.act is None else self.act(temb_BT)

    def cast_text(self, text_BSE: Tensor) -> Tensor:
        """Text -> the same in the type and width that the transformers compute in."""
        text_BSE = text_BSE.astype(self.compute_dtype)
        return text_BSE if self.encoder_hid_proj is None else self.encoder_hid_proj(text_BSE)

    def predict(self, x: Tensor) -> Tensor:
        """The image of the finest resolution -> the prediction (B, C, H, W)."""
        return to_public_layout(self.conv_out(self.conv_norm_out(x))).astype(ms.float32)


class TimestepEncoding(nn.Cell):
    """Timesteps (B,) -> cosines and sines (B, D) (Vaswani et al., 2017, with the cosines first)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.half = dim // 2
        self.frequencies = Tensor(np.exp(-math.log(10000) * np.arange(self.half) / self.half)[None], ms.float32)

    def construct(self, timesteps_B: Tensor) -> Tensor:
        shape = (timesteps_B.shape[0], self.half)
        timesteps_B1 = ops.reshape(timesteps_B.astype(ms.float32), (-1, 1))
        angles = ops.broadcast_to(timesteps_B1, shape) * ops.broadcast_to(self.frequencies, shape)
        return ops.concat((ops.cos(angles), ops.sin(angles)), 1)


class TimestepEmbedding(nn.Cell):
    """(B, D) -> (B, T)."""

    def __init__(self, dim: int, temb_dim: int, act_fn: str = "silu") -> None:
        super().__init__()
        self.linear_1, self.act = Dense(dim, temb_dim), activation(act_fn)
        self.linear_2 = Dense(temb_dim, temb_dim)

    def construct(self, encoding_BD: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(encoding_BD)))


class TextTimeEmbedding(nn.Cell):
    """Text (B, S, E) -> (B, T), by attention of its mean to it."""

    def __init__(self, width: int, temb_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.pool = LayerNorm(width), AttentionPooling(width, num_heads)
        self.proj, self.norm2 = Dense(width, temb_dim), LayerNorm(temb_dim)

    def construct(self, text_BSE: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(text_BSE))))


class AttentionPooling(nn.Cell):
    """(B, S, E) -> (B, E): the mean of all tokens, at a place of its own, attends to itself and to them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.positional_embedding = empty_parameter((1, width))
        self.q_proj, self.k_proj, self.v_proj = Dense(width, width), Dense(width, width), Dense(width, width)
        self.attend = shared(MultiHeadAttention, num_heads, width // num_heads)

    def construct(self, x_BSE: Tensor) -> Tensor:
        mean_B1E = mean(x_BSE, (1,), True)
        mean_B1E = mean_B1E + ops.broadcast_to(self.positional_embedding.astype(x_BSE.dtype), mean_B1E.shape)
        all_BSE = ops.concat((mean_B1E, x_BSE), 1)
        pooled_B1E = self.attend(self.q_proj(mean_B1E), self.k_proj(all_BSE), self.v_proj(all_BSE))
        return ops.reshape(pooled_B1E, (x_BSE.shape[0], -1))


class Segments:
    """A denoiser as a list of segments, for a backward pass that computes each one again (Chen et al., 2016).

    Noisy latents, timesteps, conditioning -> the prediction, which the last one gives. They are the network's layers,
    with the cells that it has now.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoders: TextEncoders | None = None) -> None:
        """With text encoders the conditioning is what `training.methods.TextConditioned` takes."""
        self.num_inputs = len(unet.input_names)
        self.segments: list[Segment] = []
        # Of each value that a layer reads, its number among those of the segments.
        numbers, made = list(range(self.num_inputs)), count(self.num_inputs)
        if text_encoders is not None:
            names = enumerate(unet.input_names)
            texts = tuple(i for i, name in names if name in ("encoder_hidden_states", "text_embeds"))
            self.segments.append(Segment(text_encoders, texts, (text_encoders,), len(texts)))
            for i in texts:
                numbers[i] = next(made)
        outer = {kind: CellMethod(getattr(unet, method)) for kind, method in _OUTER.items()}
        inner = iter(unet.inner)
        for layer in unet_layout(unet.spec):
            cell, reads = outer.get(layer.kind) or next(inner), tuple(numbers[i] for i in layer.reads)
            self.segments.append(Segment(cell, reads, tuple(map(unet.get_sub_cell, layer.modules))))
            numbers.append(next(made))
