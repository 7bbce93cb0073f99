"""Tensors -> the parameters of a network, strictly."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from mindspore import nn

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.naming.report import show_names
from dreambooth_ms.formats.tensor_file import read_value
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.weights.opened_model import StoredNetwork

Network = TypeVar("Network", bound=nn.Cell)


def fill(network: Network, stored: StoredNetwork[Any], unused: Collection[str] = ()) -> Network:
    """Fill a cell from its file; it has all layers but the `unused` ones at the top of the module tree.

    Raises:
        WeightError: lists all names that are missing, unexpected or mis-shaped.
    """
    tensors = {name: one for name, one in stored.tensors.items() if name.partition(".")[0] not in unused}
    load_strict(network, tensors, str(stored.file))
    return network


def load_strict(
    root: nn.Cell,
    tensors: Mapping[str, np.ndarray | StoredTensor],
    source: str,
    ignore_unexpected: Iterable[str] = (),
) -> None:
    """Fill every parameter of a network. Nothing is written unless everything fits.

    Args:
        root: the network.
        tensors: values by public name. Those that are in files are read one at a time, so that memory holds them once.
        source: the file or folder they come from, for the message.
        ignore_unexpected: names that may be there although the network has no use for them.

    Raises:
        WeightError: lists all missing, unexpected and mis-shaped names.
    """
    wanted = public_parameters(root)
    misfits = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - wanted.keys() - set(ignore_unexpected)),
        "of another shape": [
            f"{name}: expected {parameter.shape}, got {tuple(tensors[name].shape)}"
            for name, parameter in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != parameter.shape
        ],
    }
    problems = [f"{len(names)} {kind} ({show_names(names, at_most=5)})" for kind, names in misfits.items() if names]
    if problems:
        raise WeightError(f"{source} does not fit {type(root).__name__}: " + "; ".join(problems))
    for name, parameter in wanted.items():
        value = tensors[name]
        parameter.write(read_value(value) if isinstance(value, StoredTensor) else value)
