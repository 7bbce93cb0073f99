"""New words of a text tower: rows behind its table of tokens, whose ids go on from the table's own.

Shapes: V tokens of the table, W new rows, D width.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from dreambooth_ms.ops import Embedding, look_up
from dreambooth_ms.ops.linear import times


class ExtendedEmbedding(nn.Cell):
    """A table of vectors with new rows behind it: ids (...,) int32 below V + W -> (..., D) float32.

    The table keeps its parameter and its name. What is looked up in the new rows is a product, so that their gradient
    is one.
    """

    def __init__(self, base: Embedding, rows_WD: np.ndarray) -> None:
        super().__init__()
        self.weight, self.size = base.weight, base.weight.shape[0]
        self.new_rows = Parameter(Tensor(rows_WD, ms.float32))
        self.numbers_1W = Tensor(np.arange(self.size, self.size + len(rows_WD), dtype=np.int32)[None])

    def construct(self, ids: Tensor) -> Tensor:
        ids_N1 = ops.reshape(ids, (-1, 1))
        count, width = ids_N1.shape[0], self.weight.shape[1]
        known_N = ops.reshape(ops.minimum(ids_N1, self.size - 1), (-1,))
        old_ND = look_up(self.weight, known_N).astype(ms.float32)
        shape = (count, self.numbers_1W.shape[1])
        chosen_NW = (ops.broadcast_to(ids_N1, shape) == ops.broadcast_to(self.numbers_1W, shape)).astype(ms.float32)
        new_ND = times(chosen_NW, self.new_rows)
        is_old_ND = ops.broadcast_to(ids_N1 < self.size, (count, width))
        return ops.reshape(ops.select(is_old_ND, old_ND, new_ND), ids.shape + (width,))
