"""Adapters on networks that draw: the sum of several, each with a strength that can be set again."""

from collections.abc import Mapping, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn

from dreambooth_ms.adapters.adapter import Adapter, Update
from dreambooth_ms.adapters.lora import adaptable_layers, put_in_place
from dreambooth_ms.adapters.lora_update import LoraUpdate, side_by_side
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.parameters import PublicParameter, public_parameters
from dreambooth_ms.ops import Dense


class AttachedAdapters:
    """The adapted layers of some networks, and how strong their adapters are at present."""

    def __init__(self, layers: Sequence["_Beside | _Folded"] = (), count: int = 0) -> None:
        self._layers, self._count = layers, count
        self._scales: tuple[float, ...] = ()
        self.set_scales((1.0,))

    def set_scales(self, scales: Sequence[float]) -> None:
        """One for all adapters, or one for each; what is as it should be already costs nothing."""
        if self._layers and tuple(scales) != self._scales:
            self._scales = tuple(scales)
            for layer in self._layers:
                layer.set_scales(np.broadcast_to(np.array(scales, np.float32), self._count))


def attach(networks: Mapping[str, nn.Cell], adapters: Sequence[Adapter]) -> AttachedAdapters:
    """Put the sum of some adapters on networks, as strong as they were trained.

    A LoRA stands beside a linear layer, with its scale as a parameter of the graph. Every other update is added to the
    layer's weight.

    Args:
        networks: by the names of their folders; adapters of others are passed over.
        adapters: all adapters of the model.

    Raises:
        WeightError: an adapter was trained on another network.
    """
    layers: list[_Beside | _Folded] = []
    for part, network in networks.items():
        updates: dict[str, dict[int, Update]] = {}
        for number, adapter in enumerate(adapters):
            for name, update in adapter.parts.get(part, {}).items():
                updates.setdefault(name, {})[number] = update
        if updates:
            layers += _attach(network, updates)
    return AttachedAdapters(layers, len(adapters))


def _attach(network: nn.Cell, updates: Mapping[str, Mapping[int, Update]]) -> list["_Beside | _Folded"]:
    """Put updates, by layer and number of the adapter, on a network."""
    plain, parameters = adaptable_layers(network), public_parameters(network)
    if not all(f"{name}.weight" in parameters for name in updates):
        raise WeightError("the adapter was trained on another base")
    layers: list[_Beside | _Folded] = []
    beside: dict[str, nn.Cell] = {}
    for name, own in updates.items():
        loras = {number: update for number, update in own.items() if isinstance(update, LoraUpdate)}
        if loras.keys() == own.keys() and isinstance(plain.get(name), Dense):
            beside[name] = side_by_side(list(loras.values())).layer(plain[name])
            layers.append(_Beside(beside[name], [number for number, one in loras.items() for _ in range(one.rank)]))
        else:
            layers.append(_Folded(parameters[f"{name}.weight"], own))
    if beside:
        put_in_place(network, beside)
    return layers


class _Beside:
    """A linear layer with several LoRAs side by side."""

    def __init__(self, layer: nn.Cell, owners: Sequence[int]) -> None:
        """`owners`: the number of the adapter that each row of A belongs to."""
        self._layer, self._owners = layer, np.array(owners)
        layer.lora_scale = Parameter(Tensor(np.ones(len(owners), np.float32)), requires_grad=False)

    def set_scales(self, scales: np.ndarray) -> None:
        """A scale for each row of A, which a compiled graph reads."""
        self._layer.lora_scale.set_data(Tensor(scales[self._owners]))


class _Folded:
    """Updates in a layer's weight, which is the base's own bits where all scales are 0."""

    def __init__(self, weight: PublicParameter, updates: Mapping[int, Update]) -> None:
        self._weight, self._base = weight, weight.read()
        self._deltas = {number: update.delta(self._base) for number, update in updates.items()}

    def set_scales(self, scales: np.ndarray) -> None:
        """Write the sum into the weight."""
        value = self._base
        for number, delta in self._deltas.items():
            value = value + scales[number] * delta if scales[number] else value
        self._weight.write(value)
