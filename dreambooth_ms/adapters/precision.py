"""Mixed precision (Micikevicius et al., 2018): networks compute in half precision, what is trained stays in float32.

Norms, softmax, LoRA updates, loss and optimiser are float32 by their own code; what is left are the activations between
them and the weights that stay as they are. A weight that is trained is cast where it is used, so it is its own master
copy.
"""

import mindspore as ms
from mindspore import nn

from dreambooth_ms.adapters.lora import AdaptedLayer
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType, is_finite
from dreambooth_ms.formats.files.stored import raw_bytes
from dreambooth_ms.models.words import ExtendedEmbedding
from dreambooth_ms.ops import Conv2d, Dense, Embedding


def compute_in(denoiser: nn.Cell, dtype: ms.Type) -> None:
    """From here on a denoiser's networks compute in `dtype`, and store in it what an adapter stands beside; WeightError
    if a weight is too large for it. Without adapters nothing is frozen: the full method writes whole networks, also
    layers that have no gradient."""
    for _, cell in denoiser.cells_and_names():
        if hasattr(cell, "compute_dtype"):
            cell.compute_dtype = dtype
            # If it was compiled before, such as to sample class pictures, it would go on as it was.
            cell.compile_cache.clear()
        if isinstance(cell, Dense | Conv2d | Embedding | ExtendedEmbedding | AdaptedLayer):
            for parameter in (cell.weight, getattr(cell, "bias", None)):
                if parameter is not None and not parameter.requires_grad and parameter.dtype != dtype:
                    parameter.set_dtype(dtype)
                    if dtype == ms.float16 and not is_finite(raw_bytes(parameter.asnumpy()), DType.F16):
                        what = "a number that is too large for fp16; use --mixed_precision no"
                        raise WeightError(f"{parameter.name} of the base holds {what}")
