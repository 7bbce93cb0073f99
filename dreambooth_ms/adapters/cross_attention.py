"""Custom Diffusion's training of cross-attention (Kumari et al., 2023): its keys and values, or all four products."""

import numpy as np
from mindspore import Tensor, nn, ops

from dreambooth_ms.adapters.lora import adaptable_layers, put_in_place
from dreambooth_ms.models.parameters import PublicParameter, public_parameters
from dreambooth_ms.ops import Dense

CROSS_ATTENTION: dict[str, tuple[str, ...]] = {
    "crossattn_kv": ("attn2.to_k", "attn2.to_v"),
    "crossattn": ("attn2.to_k", "attn2.to_v", "attn2.to_q", "attn2.to_out.0"),
}
"""The layers of a UNet whose weights are replaced, by the ends of their names."""


class TokenDense(Dense):
    """A linear layer of tokens (B, S, I) -> (B, S, O) with no gradient through the first, which starts every text. It
    has the parameters of the layer that it stands in for."""

    def __init__(self, base: Dense) -> None:
        super().__init__(base.in_channels, base.out_channels, has_bias=base.has_bias)
        self.weight = base.weight
        self.but_first = ButFirst()

    def construct(self, x_BSI: Tensor) -> Tensor:
        return self.but_first(super().construct(x_BSI))


class ButFirst(nn.Cell):
    """Tokens (B, S, C) as they are; the first one's gradient is 0."""

    def construct(self, x_BSC: Tensor) -> Tensor:
        return x_BSC

    def bprop(self, x_BSC: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        kept_1S1 = Tensor(np.arange(x_BSC.shape[1])[None, :, None] > 0)
        return (dout * ops.broadcast_to(kept_1S1.astype(dout.dtype), dout.shape),)


def free_cross_attention(unet: nn.Cell, which: str) -> dict[str, dict[str, PublicParameter]]:
    """Let the cross-attention of a UNet be trained, and nothing else of it; gives the parameters of each layer that is
    trained, by their names in it, in the order of the network."""
    chosen = {name: cell for name, cell in adaptable_layers(unet).items() if name.endswith(CROSS_ATTENTION[which])}
    of_text = [name for name in chosen if name.endswith(CROSS_ATTENTION["crossattn_kv"])]
    put_in_place(unet, {name: TokenDense(chosen[name]) for name in of_text})
    parameters, freed = public_parameters(unet), dict[str, dict[str, PublicParameter]]()
    for name, cell in chosen.items():
        names = ("weight", "bias") if cell.has_bias else ("weight",)
        freed[name] = {own: parameters[f"{name}.{own}"] for own in names}
        # After put_in_place, which freezes all.
        for one in freed[name].values():
            one.parameter.requires_grad = True
    return freed
