"""What the text encoders of all families have in common: a table of tokens, which new words extend.

Shapes: B texts, S tokens, D width, V tokens of a table, W new words in it.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from dreambooth_ms.ops import Embedding, look_up
from dreambooth_ms.ops.linear import times


class TextEncoder(nn.Cell):
    """An encoder as `TextEncoders` takes it: it pools nothing and leaves out no layer, unless its class says so."""

    table: str
    """The name of its table of tokens."""
    most_skipped = 0
    """How many layers `read` can leave out."""

    def construct(self, ids_BS: Tensor) -> Tensor:
        return self.read(ids_BS, (), 0)[0]

    def is_read(self, parameter: str, skip: int) -> bool:
        """Whether what `read` yields depends on a parameter."""
        return True

    @property
    def words(self) -> "Embedding | ExtendedEmbedding":
        """The table of tokens."""
        return self.get_sub_cell(self.table)

    def add_words(self, rows_WD: np.ndarray) -> None:
        """Let ids from the size of the vocabulary on stand for these vectors."""
        place, _, name = self.table.rpartition(".")
        setattr(self.get_sub_cell(place), name, ExtendedEmbedding(self.words, rows_WD))


class ExtendedEmbedding(nn.Cell):
    """A table of vectors with the rows of new words behind it, whose ids go on from the table's own.

    Ids (...,) int32 below V + W -> (..., D) float32.

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
