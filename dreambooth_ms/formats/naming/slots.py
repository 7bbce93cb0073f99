"""Where a file keeps a public tensor, and what must be done to it on the way.

Every change moves elements and computes nothing, so it holds for any dtype, bfloat16's bit patterns in uint16 included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

Shape = tuple[int, ...]


class Layout(Enum):
    """How a tensor lies in a file: what becomes of a public one and of its shape."""

    AS_IS = (lambda value: value, lambda shape: shape)
    TRANSPOSED = (lambda value: value.T, lambda shape: shape[::-1])
    """(I, O) for a linear layer's (O, I): OpenCLIP's text projection is a bare matrix, multiplied from the right."""
    CONVOLUTION = (lambda value: value[..., None, None], lambda shape: (*shape, 1, 1))
    """(O, I, 1, 1) for (O, I)."""
    LINEAR = (lambda value: value[..., 0, 0], lambda shape: shape[:-2])
    """(O, I) for (O, I, 1, 1)."""

    @property
    def keeps_order(self) -> bool:
        """Whether the elements follow each other alike in both forms."""
        return self is not Layout.TRANSPOSED

    @property
    def inverse(self) -> "Layout":
        """The layout that undoes this one."""
        return {Layout.CONVOLUTION: Layout.LINEAR, Layout.LINEAR: Layout.CONVOLUTION}.get(self, self)

    def store(self, value: np.ndarray) -> np.ndarray:
        """Public form -> stored form, as a view."""
        return self.value[0](value)

    def stored_shape(self, shape: Shape) -> Shape:
        """The stored form's shape for a public shape."""
        return self.value[1](shape)


@dataclass(frozen=True)
class Slot:
    """The tensor of a file that holds a public one: all of it, or one of equal blocks of its rows."""

    name: str
    layout: Layout = Layout.AS_IS
    block: int = 0
    blocks: int = 1

    def restore(self, stored: np.ndarray) -> np.ndarray:
        """The file's tensor -> the public one, as a view."""
        own = np.split(stored, self.blocks)[self.block] if self.blocks > 1 else stored
        return self.layout.inverse.store(own)

    def stored_shape(self, shape: Shape) -> Shape:
        """The shape of the file's tensor for a public shape."""
        own = self.layout.stored_shape(shape)
        return (self.blocks * own[0], *own[1:]) if self.blocks > 1 else own

    def public_shape(self, stored: Shape) -> Shape:
        """The public shape for the shape of the file's tensor."""
        own = (stored[0] // self.blocks, *stored[1:]) if self.blocks > 1 else stored
        return self.layout.inverse.stored_shape(own)


@dataclass(frozen=True)
class Assembly:
    """A tensor of a file, and the public ones it is made of, in the order of their rows."""

    pieces: tuple[str, ...]
    layout: Layout = Layout.AS_IS
    shared: bool = False
    """Whether the pieces are all this one tensor, instead of its blocks of rows."""

    def build(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The public tensors, in the order of the pieces -> the file's tensor."""
        stored = [self.layout.store(value) for value in values]
        if self.shared:
            assert all(np.array_equal(stored[0], other) for other in stored[1:]), self.pieces
        return stored[0] if self.shared or len(stored) == 1 else np.concatenate(stored)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the file's tensor for the public shapes, in the order of the pieces."""
        own = self.layout.stored_shape(shapes[0])
        return own if self.shared or len(shapes) == 1 else (len(shapes) * own[0], *own[1:])


def slot_as_found(slot: Slot, shape: Shape, stored: Shape) -> Slot | None:
    """The slot with the layout that leads from the stored shape to the public one, or None if there is none.

    Tools disagree on whether a 1x1 convolution is kept as a linear layer.
    """
    layouts = [slot.layout]
    if slot.layout is not Layout.TRANSPOSED and len(shape) == 2:
        layouts += [Layout.AS_IS, Layout.CONVOLUTION]
    elif shape[2:] == (1, 1):
        layouts += [Layout.AS_IS, Layout.LINEAR]
    candidates = (replace(slot, layout=layout) for layout in layouts)
    return next((candidate for candidate in candidates if candidate.stored_shape(shape) == stored), None)
