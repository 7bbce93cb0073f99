"""What a UNet reads beside noisy latents and timestep: all that the families of models differ in.

SD 1 and 2 read the prompt alone. SDXL also takes the prompt's pooled text and numbers of the picture, which are here
called add_time_ids. Shapes: B rows, S text tokens, E text width, P width of pooled text, N add_time_ids.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dreambooth_ms.data.plan import View

NOTHING = np.zeros(0, np.float32)

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""What SDXL's refiner reads of pictures and of what to keep away from, as in diffusers' pipeline."""


class PromptText(NamedTuple):
    """What a network reads of one prompt."""

    text: np.ndarray
    """Embedding (S, E); or, for a network that encodes it, token ids (T * S,) int32 of T tokenizers side by side."""
    pooled: np.ndarray = NOTHING
    """Pooled text (P,), or beside token ids 1 where the prompt ends, (S,). Empty where the UNet reads none."""

    @property
    def input_names(self) -> tuple[str, str]:
        """What the two are called by the network that takes them."""
        is_tokens = np.issubdtype(self.text.dtype, np.integer)
        return ("input_ids", "end_mask") if is_tokens else ("encoder_hidden_states", "text_embeds")


def conditioning(
    prompts: Sequence[PromptText], add_time_ids: Sequence[np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """What a network reads of the rows of a batch beside sample and timestep.

    Args:
        prompts: of each row.
        add_time_ids: (N,) of each row, if there are any.

    Returns:
        Rows (B, ...) by the network's `input_names`, in their order; what is empty is left out.
    """
    of_rows = (*zip(*prompts, strict=True), add_time_ids or [NOTHING] * len(prompts))
    named = zip((*prompts[0].input_names, "time_ids"), map(np.stack, of_rows), strict=True)
    return {name: rows for name, rows in named if rows.size}


def add_time_ids(
    count: int,
    original_size: tuple[int, int],
    crop: tuple[int, int],
    target_size: tuple[int, int],
    aesthetic_score: float = AESTHETIC_SCORE,
) -> np.ndarray:
    """The `count` numbers (N,) float32 that a UNet takes of a picture (Podell et al., 2023, section 2.2).

    Args:
        count: 6 for SDXL: height and width before the picture was resized, top and left of the crop after it, height
            and width of the crop. 5 for its refiner, which has a score in place of the last two. 0 for others.
        original_size: (width, height), as all sizes.
        crop: (top, left) of its corner in the resized picture.
        target_size: size of what is cropped.
        aesthetic_score: how beautiful the picture is, from 0 to 10.
    """
    ends: dict[int, tuple[float, ...]] = {6: target_size[::-1], 5: (aesthetic_score,)}
    return np.array((*original_size[::-1], *crop, *ends[count]), np.float32) if count else NOTHING


def add_time_ids_of_view(count: int, view: View) -> np.ndarray:
    """The add_time_ids (N,) of a picture: its own size and crop. A mirrored crop counts from the right."""
    frame = view.frame
    left = frame.highest[1] - frame.left if view.flip else frame.left
    return add_time_ids(count, view.record.size, (frame.top, left), frame.size)
