"""What is compiled by itself: the one place where MindSpore's compiler is called."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.graph.api import _cell_graph_executor, _convert_python_data

from dreambooth_ms.runtime.compile_cache import Outlook, compile_cache
from dreambooth_ms.runtime.device import formulation, give_back_freed_memory

Watch = Callable[[str, Outlook], AbstractContextManager[None]]
"""What is entered while a graph is made ready: its title, and what is known of that before it begins."""

_watch: Watch = lambda title, outlook: nullcontext()  # noqa: E731


def watch_compilations(watch: Watch) -> None:
    """From now on, enter this around each compilation."""
    global _watch
    _watch = watch


class CompiledCell(nn.Cell):
    """A cell that is called from outside, and so compiled: once for each shape of its inputs, through the cache."""

    title = "a network"
    """What it is, in words for a user who waits for its compilation."""

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
        return _convert_python_data(_cell_graph_executor._graph_executor(args, phase))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """MindSpore calls this before a run; it compiles what is not compiled for such inputs."""
        cache, signature, compile_by_mindspore = compile_cache(), self._signature(args), super().compile
        if signature in self._compiled_for:
            return compile_by_mindspore(*args, **kwargs)

        def compile_watched(outlook: Outlook) -> None:
            with _watch(self.title, outlook):
                compile_by_mindspore(*args, **kwargs)

        if cache:
            cache.compile(self, args, formulation(), self._kind(signature), compile_watched)
        else:
            compile_watched(Outlook())
        self._compiled_for[signature] = self.current_phase
        return give_back_freed_memory()

    def _signature(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.training, *((one.shape, one.dtype) if isinstance(one, Tensor) else repr(one) for one in inputs)

    def _kind(self, signature: tuple[Any, ...]) -> str:
        """Names the graphs that take about as long to compile: of as many such cells, for such inputs."""
        cells = sorted(type(cell).__name__ for _, cell in self.cells_and_names())
        return hashlib.sha256(repr((self.title, signature, formulation(), cells)).encode()).hexdigest()[:32]
