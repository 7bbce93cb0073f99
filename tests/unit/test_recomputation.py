"""What a backward pass computes again is computed again: MindSpore has not merged it with the forward pass.

Merged, every score, norm and activation of the forward pass would stay in memory until the backward pass.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from dreambooth_ms.ops import GatedGelu, GroupNorm, LayerNorm, MultiHeadAttention
from dreambooth_ms.runtime.device import set_up_device


class Network(nn.Cell):
    def __init__(self):
        super().__init__()
        self.norm, self.layer_norm = GroupNorm(2, 8, 1e-5, act_fn="silu"), LayerNorm(8)
        self.attend, self.gelu = MultiHeadAttention(2, 4), GatedGelu()

    def construct(self, x_BHWC):
        y = ops.reshape(self.norm(x_BHWC), (2, 12, 8))
        y = self.layer_norm(self.attend(y, y, y))
        y = self.gelu(ops.reshape(y, (-1, 8)))
        return y * y


class Gradient(nn.Cell):
    def __init__(self):
        super().__init__()
        self.differentiate = ops.grad(Network())

    def construct(self, x_BHWC):
        return self.differentiate(x_BHWC)


def test_scores_and_activations_are_computed_again_in_the_backward_pass(tmp_path):
    """In a process of its own, because MindSpore reads the switches of its dump once."""
    dump = {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(tmp_path), "MS_DEV_DUMP_IR_PASSES": "graph_build"}
    command = [sys.executable, "-m", "tests.unit.test_recomputation"]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ | dump, check=True, capture_output=True)
    (executed,) = tmp_path.glob("graph_build_*.ir")
    counts = Counter(re.findall(r" = PrimFunc_(\w+)\(", executed.read_text(encoding="utf-8")))
    once_forward_and_once_backward = {"Softmax": 2, "Sigmoid": 2, "Erf": 2, "Split": 2}
    assert {name: counts[name] for name in once_forward_and_once_backward} == once_forward_and_once_backward


if __name__ == "__main__":
    set_up_device("CPU", 0)
    Gradient()(Tensor(np.ones((2, 3, 4, 8), np.float32)))
