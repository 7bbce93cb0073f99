"""Multi-head attention (Vaswani et al., 2017). Softmax runs in float32.

CPU: heads are gathered, and above a size only a slice of the score matrix exists at a time, forward and backward.
Ascend: `flash_attention_score` within its limits, the plain form otherwise.

Shapes: B batch, N heads, M = B * N, L queries, S keys, D channels of a head.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.ops import ascend
from dreambooth_ms.ops.graph import after, constant, interchanged, shared
from dreambooth_ms.ops.linear import batch_times, batch_times_transposed, batch_transposed_times
from dreambooth_ms.runtime.device import Formulation, formulation

MAX_SCORES = 1 << 24
"""At most this many scores exist at a time on CPU (64 MiB in float32): one head of 64 x 64 tokens."""

MAX_SLICES = 32
"""Above so many slices, slices are larger instead. Each is some 20 operations, and every operation of a compiled graph
takes 240 kB and its time to compile: with 256 slices, a step of SD 1.5 at 1024 px was not compiled after 10 minutes."""


class MultiHeadAttention(nn.Cell):
    """softmax(q k^T / sqrt(D)) v: (B, L, N * D), (B, S, N * D), (B, S, N * D) -> (B, L, N * D).

    With `causal`, a token sees itself and the ones before it.
    """

    def __init__(self, num_heads: int, head_dim: int, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        on_cpu = formulation() is Formulation.CPU
        self.interchange = shared(GatherInterchange) if on_cpu else transpose_interchange
        self.attend = shared(SlicedAttention, head_dim, causal)
        # Documented limits of the fused kernel: half precision, head size a multiple of 16 up to 512.
        self.fused_dim = fused_head(head_dim)
        self.fuses = not on_cpu and not causal and self.fused_dim <= 512

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fuses and q.dtype != ms.float32:
            # Zeros behind a head change no score and no sum.
            dim = self.fused_dim
            q, k, v = self._resized(q, dim), self._resized(k, dim), self._resized(v, dim)
            scale = 1 / math.sqrt(self.head_dim)
            out = ops.flash_attention_score(q, k, v, self.num_heads, scalar_value=scale, input_layout="BSH")
            return self._resized(out, self.head_dim)
        out_MLD = self.attend(self._split_heads(q), self._split_heads(k), self._split_heads(v))
        return self._interchanged(out_MLD, q.shape[0], self.num_heads, q.shape[1], q.shape)

    def _resized(self, x_BLC: Tensor, dim: int) -> Tensor:
        """Each head with so many channels: with zeros behind it, or without what is behind."""
        batch, length, channels = x_BLC.shape
        before = channels // self.num_heads
        if before == dim:
            return x_BLC
        heads = ops.reshape(x_BLC, (batch, length, self.num_heads, before))
        heads = ascend.widen(heads, dim) if before < dim else ascend.part(heads, 3, 0, dim)
        return ops.reshape(heads, (batch, length, self.num_heads * dim))

    def _split_heads(self, x_BLC: Tensor) -> Tensor:
        """(B, L, N * D) -> (M, L, D)."""
        batch, length, _ = x_BLC.shape
        return self._interchanged(x_BLC, batch, length, self.num_heads, (-1, length, self.head_dim))

    def _interchanged(self, x: Tensor, batch: int, outer: int, inner: int, shape: tuple[int, int, int]) -> Tensor:
        """Rows of (outer, inner) -> rows of (inner, outer), as a tensor of this shape."""
        if self.num_heads == 1:
            return x
        return ops.reshape(self.interchange(ops.reshape(x, (batch, -1, self.head_dim)), outer, inner), shape)


def fused_head(head_dim: int) -> int:
    """The size of a head within the fused kernel."""
    return -(-head_dim // 16) * 16


def transpose_interchange(x_BRD: Tensor, outer: int, inner: int) -> Tensor:
    """Rows of (outer, inner) -> rows of (inner, outer): (B, R, D) with R = outer * inner -> (B, R, D)."""
    batch, _, dim = x_BRD.shape
    return ops.reshape(ops.transpose(ops.reshape(x_BRD, (batch, outer, inner, dim)), (0, 2, 1, 3)), x_BRD.shape)


class GatherInterchange(nn.Cell):
    """The same by a gather of rows of D numbers; on CPU a transpose is slower and keeps memory (measured)."""

    def construct(self, x_BRD: Tensor, outer: int, inner: int) -> Tensor:
        return ops.gather(x_BRD, interchanged(outer, inner), 1)

    def bprop(self, x_BRD: Tensor, outer: int, inner: int, out: Tensor, dout: Tensor) -> tuple[Tensor, int, int]:
        return ops.gather(dout, interchanged(inner, outer), 1), 0, 0


class BiasedAttention(MultiHeadAttention):
    """softmax(scale q k^T + bias) v, with bias (M, L, S) float32 or None; for texts, whose scores are few."""

    def __init__(self, num_heads: int, head_dim: int, scale: float) -> None:
        super().__init__(num_heads, head_dim)
        self.scale, self.softmax = scale, ops.Softmax(-1)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, bias_MLS: Tensor | None) -> Tensor:
        scores = batch_times_transposed(self._split_heads(q) * self.scale, self._split_heads(k)).astype(ms.float32)
        if bias_MLS is not None:
            scores = scores + bias_MLS
        out_MLD = batch_times(self.softmax(scores).astype(v.dtype), self._split_heads(v))
        return self._interchanged(out_MLD, q.shape[0], self.num_heads, q.shape[1], q.shape)


class SlicedAttention(nn.Cell):
    """Attention of M independent heads: (M, L, D), (M, S, D), (M, S, D) -> (M, L, D).

    Keeps q, k, v and the result; the backward pass computes the scores again, slice by slice.
    """

    def __init__(self, head_dim: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.scale = 1 / math.sqrt(head_dim)
        self.softmax, self.slice = ops.Softmax(-1), ops.Slice()

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, queries, dim = q.shape
        keys = k.shape[1]
        out = ()
        for head, num_heads in _head_slices(heads, queries, keys):
            k_part = self._part(k, (head, 0, 0), (num_heads, keys, dim))
            v_part = self._part(v, (head, 0, 0), (num_heads, keys, dim))
            rows = ()
            for row, num_rows in _row_slices(heads, num_heads, queries, keys):
                q_part = self._part(q, (head, row, 0), (num_heads, num_rows, dim))
                rows = rows + (batch_times(self._weights(q_part * self.scale, k_part, row), v_part),)
                q = after(q, rows[-1])
            out = out + (_concat(rows, 1),)
        return _concat(out, 0)

    def bprop(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, queries, dim = q.shape
        keys = k.shape[1]
        q = after(q, dout)
        # The softmax gradient p * (dp - sum(dout * out)) takes its second term from one more column of the product
        # that gives dp: [dout, -sum] [v, 1]^T. So nothing is broadcast over the scores.
        minus_total = batch_times(dout * out, constant(-1.0, (heads, dim, 1)).astype(q.dtype))
        dout_and_total = ops.concat((dout, minus_total), 2)
        v_and_one = ops.concat((v, constant(1.0, (heads, keys, 1)).astype(v.dtype)), 2)
        dq, dk, dv = (), (), ()
        for head, num_heads in _head_slices(heads, queries, keys):
            k_part = self._part(k, (head, 0, 0), (num_heads, keys, dim))
            v_part = self._part(v_and_one, (head, 0, 0), (num_heads, keys, dim + 1))
            dq_rows, dk_sum, dv_sum = (), (), ()
            for row, num_rows in _row_slices(heads, num_heads, queries, keys):
                q_part = self._part(q, (head, row, 0), (num_heads, num_rows, dim)) * self.scale
                dout_part = self._part(dout_and_total, (head, row, 0), (num_heads, num_rows, dim + 1))
                weights = self._weights(q_part, k_part, row)
                dscores = weights * batch_times_transposed(dout_part, v_part)
                dq_rows = dq_rows + (batch_times(dscores, k_part) * self.scale,)
                dk_sum = dk_sum + (batch_transposed_times(dscores, q_part),)
                dout_part = self._part(dout, (head, row, 0), (num_heads, num_rows, dim))
                dv_sum = dv_sum + (batch_transposed_times(weights, dout_part),)
                slice_done = (dq_rows[-1], dk_sum[-1], dv_sum[-1])
                q, dout_and_total = after(q, slice_done), after(dout_and_total, slice_done)
            dq, dk, dv = dq + (_concat(dq_rows, 1),), dk + (_sum(dk_sum),), dv + (_sum(dv_sum),)
        return _concat(dq, 0), _concat(dk, 0), _concat(dv, 0)

    def _part(self, x: Tensor, first: tuple[int, int, int], size: tuple[int, int, int]) -> Tensor:
        return x if size == x.shape else self.slice(x, first, size)

    def _weights(self, scaled_q: Tensor, k: Tensor, first_row: int) -> Tensor:
        scores = batch_times_transposed(scaled_q, k).astype(ms.float32)
        if self.causal:
            scores = scores + ops.broadcast_to(_causal_mask(first_row, scaled_q.shape[1], k.shape[1]), scores.shape)
        return self.softmax(scores).astype(scaled_q.dtype)


def hidden_keys(visible_BS: Tensor, num_heads: int) -> Tensor:
    """The bias (B * N, S, S) float32 that hides keys from all queries; visible (B, S) is 1 at the others, 0 there."""
    batch, length = visible_BS.shape
    bias = ops.reshape((visible_BS - 1) * float(np.finfo(np.float32).max), (batch, 1, 1, length))
    return ops.reshape(ops.broadcast_to(bias, (batch, num_heads, length, length)), (-1, length, length))


def _concat(parts: tuple[Tensor, ...], axis: int) -> Tensor:
    return ops.concat(parts, axis) if len(parts) > 1 else parts[0]


def _sum(parts: tuple[Tensor, ...]) -> Tensor:
    return ops.addn(parts) if len(parts) > 1 else parts[0]


def scores_at_a_time(heads: int, queries: int, keys: int) -> int:
    """How many scores of M heads may exist at a time on CPU."""
    total = heads * queries * keys
    return min(total, max(MAX_SCORES, total // MAX_SLICES))


@constexpr
def _head_slices(heads: int, queries: int, keys: int) -> tuple[tuple[int, int], ...]:
    """(first head, number of heads): as many whole heads as may exist at a time, and at least one."""
    return _slices(heads, scores_at_a_time(heads, queries, keys) // (queries * keys))


@constexpr
def _row_slices(heads: int, heads_of_slice: int, queries: int, keys: int) -> tuple[tuple[int, int], ...]:
    """(first query, number of queries) of the score matrices of some of the heads."""
    return _slices(queries, scores_at_a_time(heads, queries, keys) // (heads_of_slice * keys))


def _slices(length: int, at_most: int) -> tuple[tuple[int, int], ...]:
    step = max(1, min(length, at_most))
    return tuple((start, min(step, length - start)) for start in range(0, length, step))


@constexpr
def _causal_mask(first_row: int, rows: int, keys: int) -> Tensor:
    visible = np.arange(keys)[None, :] <= first_row + np.arange(rows)[:, None]
    return Tensor(np.where(visible, 0.0, np.finfo(np.float32).min)[None], ms.float32)
