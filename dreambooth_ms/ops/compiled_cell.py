"""What is compiled by itself: the one place where MindSpore's compiler is called."""

from typing import Any

from mindspore import Tensor, nn

from dreambooth_ms.ops.backend import formulation
from dreambooth_ms.ops.compile_cache import compile_cache
from dreambooth_ms.ops.host_memory import give_back_freed_memory


class CompiledCell(nn.Cell):
    """A cell that is called from outside, and so compiled: once for each shape of its inputs, through the cache.

    Cells inside of it need not be of this kind: they are parts of its graph.
    """

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """MindSpore calls this before each run; it compiles what is not compiled for such inputs."""
        cache, signature = compile_cache(), (self.training, _signature(args))
        known = vars(self).setdefault("_compiled_for", set())
        if cache is None or signature in known:
            super().compile(*args, **kwargs)
        else:
            cache.compile(self, args, formulation(), lambda: super(CompiledCell, self).compile(*args, **kwargs))
        if signature not in known:
            known.add(signature)
            give_back_freed_memory()


def _signature(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((one.shape, str(one.dtype)) if isinstance(one, Tensor) else repr(one) for one in inputs)
