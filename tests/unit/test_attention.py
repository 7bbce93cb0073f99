"""Attention is torch's, however many heads it has, however it is cut, and by whichever kernel."""

import inspect
import math

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, ops

from dreambooth_ms.ops import MultiHeadAttention, attention
from dreambooth_ms.runtime.device import Formulation
from tests.parity.reference import InputGradients, normal, relative_error
from tools.formulation import use_formulation

# Float32 sums of at most some dozen products in another order: measured below 1e-6.
TOLERANCE = 5e-6
# Float16 keeps eleven bits of the inputs, the weights and the result.
HALF_PRECISION = 5e-3

HEAD_DIM = 16


def rows(batch, queries, keys, num_heads):
    """Queries, keys and values with all heads side by side, and a sensitivity of the result."""
    width = num_heads * HEAD_DIM
    lengths = (queries, keys, keys, queries)
    return [normal(batch, length, width, seed=seed) for seed, length in enumerate(lengths)]


def torch_attention(q, k, v, sensitivity, num_heads, causal=False):
    """Result, and gradients of q, k and v."""
    inputs = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    heads = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in inputs)
    out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal)
    out = out.transpose(1, 2).flatten(2)
    (out * torch.tensor(sensitivity)).sum().backward()
    return [out, *(x.grad for x in inputs)]


def compare(batch, queries, keys, num_heads, causal=False):
    """Worst relative error of the result and the three gradients in the present formulation."""
    q, k, v, sensitivity = rows(batch, queries, keys, num_heads)
    cell = InputGradients(MultiHeadAttention(num_heads, HEAD_DIM, causal))
    out, gradients = cell(*(Tensor(x) for x in (sensitivity, q, k, v)))
    expected = torch_attention(q, k, v, sensitivity, num_heads, causal)
    return max(relative_error(*pair) for pair in zip((out, *gradients), expected, strict=True))


@pytest.mark.parametrize(
    "form",
    [
        {"queries": 12, "keys": 12, "num_heads": 1},
        {"queries": 12, "keys": 7, "num_heads": 3},
        {"queries": 9, "keys": 9, "num_heads": 2, "causal": True},
    ],
    ids=["one head", "text as keys", "causal"],
)
def test_attention_and_its_gradients_are_torchs(form):
    assert compare(2, **form) < TOLERANCE


# Each case has lengths of its own, and leaves a last slice that is shorter than the others.
@pytest.mark.parametrize(
    ("max_scores", "queries", "keys", "causal", "head_slices", "row_slices"),
    [
        (4 * 11 * 13, 11, 13, False, (4, 2), (11,)),
        (13 * 5, 13, 13, True, (1,) * 6, (5, 5, 3)),
        (1, 3, 5, False, (1,) * 6, (1, 1, 1)),
    ],
    ids=["by heads", "by heads and rows, causal", "one row at a time"],
)
def test_attention_cut_into_slices_is_the_same(monkeypatch, max_scores, queries, keys, causal, head_slices, row_slices):
    monkeypatch.setattr(attention, "MAX_SCORES", max_scores)
    assert tuple(size for _, size in attention._head_slices(6, queries, keys)) == head_slices
    assert tuple(size for _, size in attention._row_slices(6, head_slices[0], queries, keys)) == row_slices
    assert compare(2, queries, keys, num_heads=3, causal=causal) < TOLERANCE


@pytest.mark.parametrize("max_scores", [1, 60, 10**4])
def test_slices_cover_everything_once_and_keep_their_scores_below_the_limit(monkeypatch, max_scores):
    heads, queries, keys = 7, 10, 6
    monkeypatch.setattr(attention, "MAX_SCORES", max_scores)
    monkeypatch.setattr(attention, "MAX_SLICES", heads * queries)
    covered = []
    for head, num_heads in attention._head_slices(heads, queries, keys):
        for row, num_rows in attention._row_slices(heads, num_heads, queries, keys):
            assert num_heads * num_rows * keys <= max_scores or num_heads == num_rows == 1
            covered += [(h, r) for h in range(head, head + num_heads) for r in range(row, row + num_rows)]
    assert sorted(covered) == [(h, r) for h in range(heads) for r in range(queries)]


@pytest.mark.parametrize("side", [64, 128, 256])
def test_a_large_picture_has_larger_slices_and_not_many_more(side):
    """Of SD 1.5, two rows, at 512, 1024 and 2048 px."""
    heads, tokens = 16, side * side
    slices = [
        num_heads * num_rows * tokens
        for _, num_heads in attention._head_slices(heads, tokens, tokens)
        for _, num_rows in attention._row_slices(heads, num_heads, tokens, tokens)
    ]
    assert sum(slices) == heads * tokens * tokens
    assert len(slices) <= 32
    assert max(slices) == max(2**24, sum(slices) // 32)


def test_a_token_never_sees_the_ones_after_it(pynative):
    q, k, v, _ = rows(1, 6, 6, 2)
    attend = MultiHeadAttention(2, HEAD_DIM, causal=True)
    before = attend(Tensor(q), Tensor(k), Tensor(v)).asnumpy()
    k[:, 4:], v[:, 4:] = 50.0, -50.0
    after = attend(Tensor(q), Tensor(k), Tensor(v)).asnumpy()
    assert np.array_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])


def test_scores_of_a_hundred_do_not_overflow(pynative):
    q, k, v, sensitivity = rows(1, 8, 8, 1)
    out = MultiHeadAttention(1, HEAD_DIM)(Tensor(100 * q), Tensor(k), Tensor(v))
    # Rounding of a score of some hundred is 1e-5 of a weight.
    assert relative_error(out, torch_attention(100 * q, k, v, sensitivity, 1)[0]) < 1e-4


@pytest.mark.parametrize("causal", [False, True])
def test_the_plain_form_of_ascend_is_the_same(causal):
    with use_formulation(Formulation.ASCEND):
        assert compare(2, 10, 10, num_heads=3, causal=causal) < TOLERANCE


class TestFlashAttention:
    """The fused kernel runs on Ascend alone; here its documented mathematics stands in for it."""

    @pytest.fixture
    def calls(self, monkeypatch, pynative):
        """What the kernel was asked for, under its parameters' own names."""
        signature, calls = inspect.signature(ops.flash_attention_score), []

        def documented(*args, **kwargs):
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            calls.append(call.arguments)
            assert call.arguments["input_layout"] == "BSH"
            assert call.arguments["attn_mask"] is None
            assert call.arguments["query"].dtype in (ms.float16, ms.bfloat16)
            num_heads, scale = call.arguments["head_num"], call.arguments["scalar_value"]
            q, k, v = (
                x.asnumpy().astype(np.float32).reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)
                for x in (call.arguments["query"], call.arguments["key"], call.arguments["value"])
            )
            scores = scale * q @ k.transpose(0, 1, 3, 2)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out = (weights / weights.sum(-1, keepdims=True)) @ v
            return Tensor(out.transpose(0, 2, 1, 3).reshape(call.arguments["query"].shape).astype(np.float16))

        monkeypatch.setattr(ops, "flash_attention_score", documented)
        with use_formulation(Formulation.ASCEND):
            yield calls

    def test_it_attends_as_torch_does(self, calls):
        q, k, v, sensitivity = rows(2, 12, 7, 3)
        out = MultiHeadAttention(3, HEAD_DIM)(*(Tensor(x.astype(np.float16)) for x in (q, k, v)))
        assert [call["scalar_value"] for call in calls] == [1 / math.sqrt(HEAD_DIM)]
        assert out.dtype == ms.float16
        assert relative_error(out, torch_attention(q, k, v, sensitivity, 3)[0]) < HALF_PRECISION

    def test_heads_of_another_size_get_zeros_behind_them(self, calls):
        """Of 40 as in SD 1's finest level: the kernel sees 48, and the scale is still that of 40."""
        q, k, v, sensitivity = (normal(2, length, 3 * 40, seed=length) for length in (12, 7, 7, 12))
        out = MultiHeadAttention(3, 40)(*(Tensor(x.astype(np.float16)) for x in (q, k, v)))
        assert [call["query"].shape for call in calls] == [(2, 12, 3 * 48)]
        assert [call["scalar_value"] for call in calls] == [1 / math.sqrt(40)]
        assert relative_error(out, torch_attention(q, k, v, sensitivity, 3)[0]) < HALF_PRECISION

    @pytest.mark.parametrize(
        ("dtype", "head_dim", "causal"),
        [(np.float32, 16, False), (np.float16, 528, False), (np.float16, 16, True)],
        ids=["single precision", "head size above 512", "causal"],
    )
    def test_it_is_not_asked_for_what_it_cannot_do(self, calls, dtype, head_dim, causal):
        x = Tensor(normal(1, 4, head_dim).astype(dtype))
        out = MultiHeadAttention(1, head_dim, causal)(x, x, x)
        assert out.shape == x.shape
        assert not calls
