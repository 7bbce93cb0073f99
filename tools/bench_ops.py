"""Time the operations of a UNet at SD 1.5 size (512 px, 2 rows) on this CPU: ours, the library's own, and PyTorch's.

    python -m tools.bench_ops        # needs tests/requirements.txt, for PyTorch

Prints milliseconds, the least of five runs, forward and forward + backward to the input, in one process.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mindspore import Tensor, nn, ops

from dreambooth_ms.ops import Conv2d, Gelu, GroupNorm, LayerNorm, MultiHeadAttention
from dreambooth_ms.runtime.device import Formulation, set_up_device
from tools.formulation import use_formulation

RUNS, ROWS = 5, 2


class Backward(nn.Cell):
    """The gradient of a cell with respect to all its inputs."""

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *inputs_and_sensitivity: Tensor) -> Any:
        return self.gradient(self.cell)(*inputs_and_sensitivity)


def least(run: Callable[[], Any]) -> float:
    """Milliseconds of the fastest of five runs, after one to warm up."""
    run()
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


def time_cell(cell: nn.Cell, *shapes: tuple[int, ...]) -> tuple[float, float]:
    """Forward, and backward with what it recomputes; the sum is what a training step pays."""
    inputs = [Tensor(np.random.default_rng(0).standard_normal(shape, np.float32)) for shape in shapes]
    sensitivity = cell(*inputs)
    backward = Backward(cell)

    def wait(result: Any) -> None:
        first = result[0] if isinstance(result, tuple) else result
        ops.reshape(first, (-1,))[:1].asnumpy()

    forward_time = least(lambda: wait(cell(*inputs)))
    return forward_time, forward_time + least(lambda: wait(backward(*inputs, sensitivity)))


def time_torch(function: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> tuple[float, float]:
    """The same for PyTorch."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    sensitivity = torch.randn_like(function(*inputs))

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    return least(forward), least(lambda: function(*inputs).backward(sensitivity))


def frozen(module: torch.nn.Module) -> torch.nn.Module:
    """A module whose parameters get no gradient, as the base's under LoRA."""
    return module.requires_grad_(False)


def report(name: str, timings: dict[str, tuple[float, float]]) -> None:
    """One line of the table."""
    cells = "  ".join(f"{who} {forward:7.1f} {both:8.1f}" for who, (forward, both) in timings.items())
    print(f"{name:34} {cells}", flush=True)


def main() -> None:
    """Print the table."""
    set_up_device("CPU", 0)
    print(f"{torch.get_num_threads()} threads; ms forward, ms forward + backward")
    for channels, side in ((320, 64), (640, 32), (1280, 16)):
        last, first = (ROWS, side, side, channels), (ROWS, channels, side, side)
        report(
            f"3x3 convolution {channels} x {side}^2",
            {
                "ours": time_cell(Conv2d(channels, channels), last),
                "torch": time_torch(frozen(torch.nn.Conv2d(channels, channels, 3, padding=1)), first),
            },
        )
        with use_formulation(Formulation.ASCEND):
            library = GroupNorm(32, channels, 1e-5)
        report(
            f"group norm {channels} x {side}^2",
            {
                "ours": time_cell(GroupNorm(32, channels, 1e-5), last),
                "library": time_cell(library, first),
                "torch": time_torch(frozen(torch.nn.GroupNorm(32, channels)), first),
            },
        )
        tokens, hidden = (ROWS, side * side, channels), (ROWS, side * side, 4 * channels)
        report(
            f"layer norm {channels} x {side}^2",
            {
                "ours": time_cell(LayerNorm(channels), tokens),
                "library": time_cell(nn.LayerNorm((channels,)), tokens),
                "torch": time_torch(frozen(torch.nn.LayerNorm(channels)), tokens),
            },
        )
        report(
            f"gelu {4 * channels} x {side}^2",
            {
                "ours": time_cell(Gelu(), hidden),
                "library": time_cell(nn.GELU(approximate=False), hidden),
                "torch": time_torch(torch.nn.functional.gelu, hidden),
            },
        )
        heads, dim = 8, channels // 8
        split = (ROWS, heads, side * side, dim)
        report(
            f"self-attention {channels} x {side}^2",
            {
                "ours": time_cell(MultiHeadAttention(heads, dim), tokens, tokens, tokens),
                "torch": time_torch(torch.nn.functional.scaled_dot_product_attention, split, split, split),
            },
        )


if __name__ == "__main__":
    main()
