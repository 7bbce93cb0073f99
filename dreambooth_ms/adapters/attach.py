"""Adapters on networks that sample: the sum of several, each with a strength that can be set again."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn

from dreambooth_ms.adapters.adapter import Adapter, side_by_side
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.lora import LoraLayer, adaptable_layers, lora_layer, put_in_place
from dreambooth_ms.errors import WeightError, show_names
from dreambooth_ms.models.parameters import PublicParameter, public_parameters
from dreambooth_ms.ops import Dense

SetScales = Callable[[np.ndarray], object]
"""Of an adapted layer: takes the strength of each adapter."""


class AttachedAdapters:
    """The adapted layers of some networks, and how strong their adapters are at present."""

    def __init__(self, layers: Sequence[SetScales] = (), count: int = 0) -> None:
        self._layers, self._count = layers, count
        self._scales: tuple[float, ...] = ()
        self.set_scales((1.0,))

    def set_scales(self, scales: Sequence[float]) -> None:
        """One for all adapters, or one for each; what is as it should be already costs nothing."""
        if self._layers and tuple(scales) != self._scales:
            self._scales = tuple(scales)
            for set_scales in self._layers:
                set_scales(np.broadcast_to(np.array(scales, np.float32), self._count))


def attach(networks: Mapping[str, nn.Cell], adapters: Sequence[Adapter]) -> AttachedAdapters:
    """Put the sum of a model's adapters on some of its networks, by the names of their folders, as they were trained.

    A LoRA stands beside a linear layer, with its scale as a parameter of the graph. Every other update is added to the
    layer's weight. WeightError if an adapter has layers that the network has not, or of another size.
    """
    layers: list[SetScales] = []
    for part, network in networks.items():
        updates: dict[str, dict[int, Update]] = {}
        for number, adapter in enumerate(adapters):
            for name, update in adapter.parts.get(part, {}).items():
                updates.setdefault(name, {})[number] = update
        if not updates:
            continue
        plain, parameters = adaptable_layers(network), public_parameters(network)
        if unknown := [name for name in updates if f"{name}.weight" not in parameters]:
            raise WeightError(f"the adapter has {len(unknown)} layers that the {part} has not ({show_names(unknown)})")
        beside: dict[str, LoraLayer] = {}
        for name, own in updates.items():
            loras = {number: update for number, update in own.items() if update.is_lora}
            if loras.keys() == own.keys() and isinstance(plain.get(name), Dense):
                joined = side_by_side(list(loras.values()))
                beside[name] = lora_layer(plain[name], joined.rank, joined.alpha_or_rank)
                beside[name].set_factors(joined.down, joined.up)
                layers.append(_beside(beside[name], np.repeat(list(loras), [one.rank for one in loras.values()])))
            else:
                changed = dict.fromkeys(one for update in own.values() for one in update.parameters)
                layers += [_folded(parameters[f"{name}.{one}"], one, own) for one in changed]
        if beside:
            put_in_place(network, beside)
    return AttachedAdapters(layers, len(adapters))


def _beside(layer: nn.Cell, owners: np.ndarray) -> SetScales:
    """Of a linear layer with LoRAs side by side; `owners`: the number of the adapter of each row of A."""
    layer.lora_scale = Parameter(Tensor(np.ones(len(owners), np.float32)), requires_grad=False)
    return lambda scales: layer.lora_scale.set_data(Tensor(scales[owners]))


def _folded(parameter: PublicParameter, name: str, updates: Mapping[int, Update]) -> SetScales:
    """Of updates in a layer's parameter, which is the base's own bits where all scales are 0."""
    base = parameter.read()
    deltas = {n: update.delta(base, name) for n, update in updates.items() if name in update.parameters}
    return lambda scales: parameter.write(
        sum((scales[number] * delta for number, delta in deltas.items() if scales[number]), start=base)
    )
