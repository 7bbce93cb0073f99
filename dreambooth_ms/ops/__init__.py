"""The backend seam: every operation whose fast form differs between CPU and Ascend.

A *formulation* says how an operation is written, and an image has the formulation's own layout:

- `cpu`: channels last, (B, H, W, C). A convolution is one lookup of its taps and one matrix product, so nothing is
  ever transposed (docs/performance.md has the measurements behind each choice).
- `ascend`: channels first, (B, C, H, W), native convolution and fused attention.

Networks are built from these cells and never name an axis of an image themselves.
"""

from dreambooth_ms.ops.anywhere import SumOfSquares, bitwise_and, equal_parts, exclusive_or, look_up, mean, part, total
from dreambooth_ms.ops.attention import BiasedAttention, MultiHeadAttention, hidden_keys
from dreambooth_ms.ops.conv import Conv2d, Padding, convolution
from dreambooth_ms.ops.graph import shared
from dreambooth_ms.ops.layout import average_pool, upsample_nearest
from dreambooth_ms.ops.linear import Dense, Embedding, GatedGelu, Gelu, QuickGelu, TanhGelu
from dreambooth_ms.ops.norm import GroupNorm, LayerNorm, RmsNorm
