"""The adapters of a model that is sampled with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mindspore import nn

from dreambooth_ms.adapters.lora import Adapted, load_lora
from dreambooth_ms.adapters.opened_lora import read_adapters
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import ModelBundle


class ModelAdapters:
    """Adapters of any format, read at once and put on the networks of their base as these are loaded.

    Raises:
        WeightError: an adapter is none, or is for another base.
    """

    def __init__(self, bundle: ModelBundle, paths: Sequence[str | Path]) -> None:
        self.paths = tuple(str(path) for path in paths)
        self._base = bundle.path
        self._files = [read_adapters(Path(path), lambda: bundle.opened().spec) for path in self.paths]
        for path, file in zip(self.paths, self._files, strict=True):
            if not file.keys() <= {"unet", *bundle.text_encoders}:
                raise self._of_another_base(path)

    @property
    def adapt_text(self) -> bool:
        """Whether one of them changes how prompts are read."""
        return any(file.keys() - {"unet"} for file in self._files)

    def scales(self, request: SampleRequest) -> tuple[float, ...]:
        """The strength of each adapter, or one number for all.

        Raises:
            ConfigError: it asks for another number of strengths.
        """
        scales = (1.0,) * len(self.paths) if request.lora_scales is None else request.lora_scales
        if len(scales) not in (1, len(self.paths)) and self.paths:
            raise ConfigError(
                f"--lora_scale: expected one number, or one for each of {len(self.paths)} adapters, got {len(scales)}"
            )
        return scales

    def put_on(self, networks: Mapping[str, nn.Cell]) -> "AttachedAdapters":
        """Put them on some of the networks, by the names of their folders."""
        layers: list[Adapted] = []
        for name, network in networks.items():
            own = [file.get(name) for file in self._files]
            if any(own):
                try:
                    layers += load_lora(network, own, [1.0]).values()
                except WeightError as error:
                    raise self._of_another_base(", ".join(self.paths), f": {error}") from error
        return AttachedAdapters(layers)

    def _of_another_base(self, adapter: str, why: str = ": the adapter was trained on another base") -> WeightError:
        return WeightError(f"{adapter}{why}; this one is {self._base}")


class AttachedAdapters:
    """The adapted layers of some networks, and how strong their adapters are at present."""

    def __init__(self, layers: Sequence[Adapted] = ()) -> None:
        self._layers = layers
        self._scales: Sequence[float] = (1.0,)

    def set_scales(self, scales: Sequence[float]) -> None:
        """One for all adapters, or one for each; what is as it should be already costs nothing."""
        if scales != self._scales:
            self._scales = scales
            for layer in self._layers:
                layer.set_scale(*scales)
