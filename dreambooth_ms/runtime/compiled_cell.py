"""What is compiled by itself: the one place where MindSpore's compiler is called."""

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.graph.api import _cell_graph_executor, _convert_python_data

from dreambooth_ms.runtime.compile_cache import compile_cache
from dreambooth_ms.runtime.device import formulation
from dreambooth_ms.runtime.host_memory import give_back_freed_memory


class CompiledCell(nn.Cell):
    """A cell that is called from outside, and so compiled: once for each shape of its inputs, through the cache.

    Cells inside of it need not be of this kind: they are parts of its graph.
    """

    def __init__(self, auto_prefix: bool = True) -> None:
        super().__init__(auto_prefix)
        self._compiled_for: dict[tuple[Any, ...], str] = {}
        """MindSpore's name of the graph for each signature."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph for such inputs, after compiling it if there is none."""
        phase = self._compiled_for.get(self._signature(args))
        plain = all(type(one) is Tensor for one in args)  # Their shapes and dtypes alone decide the graph.
        if phase is None or kwargs or not plain or ms.get_context("mode") != ms.GRAPH_MODE:
            return super().__call__(*args, **kwargs)
        # MindSpore would note in every cell of it which graph is run, 3 ms in a small UNet (measured).
        executor = _cell_graph_executor._graph_executor
        return _convert_python_data(executor(args, phase))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """MindSpore calls this before a run; it compiles what is not compiled for such inputs."""
        cache, signature = compile_cache(), self._signature(args)
        is_new = signature not in self._compiled_for
        if cache and is_new:
            cache.compile(self, args, formulation(), lambda: super(CompiledCell, self).compile(*args, **kwargs))
        else:
            super().compile(*args, **kwargs)
        if is_new:
            self._compiled_for[signature] = self.current_phase
            give_back_freed_memory()

    def _signature(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.training, *((one.shape, one.dtype) if isinstance(one, Tensor) else repr(one) for one in inputs)
