"""A network's parameters under their public names and shapes, and loading into them, strictly."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from dreambooth_ms.errors import WeightError
from dreambooth_ms.ops import StoredLayout
from dreambooth_ms.weights.files.stored import StoredTensor
from dreambooth_ms.weights.tensor_file import read_value


@dataclass(frozen=True)
class PublicParameter:
    """A parameter and what stands between its stored form and the public one."""

    parameter: Parameter
    layout: StoredLayout | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The public shape."""
        return self.layout.public_shape(self.parameter.shape) if self.layout else tuple(self.parameter.shape)

    def read(self) -> np.ndarray:
        """The value in its public form, as float32."""
        value = self.parameter.asnumpy()
        return self.layout.restore(value) if self.layout else value.copy()

    def write(self, value: np.ndarray) -> None:
        """Set the value, given in its public form; it is cast to the parameter's dtype."""
        stored = self.layout.store(value) if self.layout else value
        dtype = np.float16 if self.parameter.dtype == ms.float16 else np.float32
        # Not ascontiguousarray: that would give a scalar an axis.
        self.parameter.set_data(Tensor(np.asarray(stored, dtype=dtype, order="C")))


def name_prefix(root: nn.Cell) -> str:
    """What tells a network's parameters from those of another with the same public names; "" for most."""
    return getattr(root, "name_prefix", "")


def public_parameters(root: nn.Cell) -> dict[str, PublicParameter]:
    """Every parameter of a network by its public name, in the order of the module tree.

    The parameters themselves are renamed to the same names, behind the root's `name_prefix`: attaching a
    cell prefixes only relative to its parent, so names can repeat until they are set once from the root.
    """
    prefix_of_root = name_prefix(root)
    layouts = {}
    for cell_name, cell in root.cells_and_names():
        prefix = f"{cell_name}." if cell_name else ""
        layouts.update({prefix + name: layout for name, layout in getattr(cell, "stored_layouts", {}).items()})
    found = {}
    for name, parameter in root.parameters_and_names():
        parameter.name = prefix_of_root + name
        found[name] = PublicParameter(parameter, layouts.get(name))
    return found


def read_parameters(root: nn.Cell) -> dict[str, np.ndarray]:
    """The values of all parameters, by public name and in public form."""
    return {name: parameter.read() for name, parameter in public_parameters(root).items()}


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
        WeightError: lists all missing, unexpected and mis-shaped names together.
    """
    wanted = public_parameters(root)
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys() - set(ignore_unexpected))
    misshaped = [
        f"{name}: expected {parameter.shape}, got {tuple(tensors[name].shape)}"
        for name, parameter in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != parameter.shape
    ]
    problems = [
        _summary(kind, names)
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if names
    ]
    if problems:
        raise WeightError(f"{source} does not fit {type(root).__name__}: " + "; ".join(problems))
    for name, parameter in wanted.items():
        value = tensors[name]
        parameter.write(read_value(value) if isinstance(value, StoredTensor) else value)


def _summary(kind: str, names: list[str], at_most: int = 5) -> str:
    shown = ", ".join(names[:at_most])
    rest = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{len(names)} {kind} ({shown}{rest})"
