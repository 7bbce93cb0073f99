"""The adapters of a model that is sampled with."""

from collections.abc import Sequence
from pathlib import Path

from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.errors import ConfigError, count_of
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import ModelBundle


class ModelAdapters:
    """Adapters of any format, read at once, to be put on the networks of their base as these are loaded.

    Raises:
        WeightError: an adapter is none, or is for another base.
    """

    def __init__(self, bundle: ModelBundle, paths: Sequence[str | Path]) -> None:
        self.paths = tuple(str(path) for path in paths)
        models = [bundle.opened().spec] if paths else []
        self.opened = [open_adapter(Path(path), models, bundle.path).adapter for path in paths]

    @property
    def adapt_text(self) -> bool:
        """Whether one of them changes how prompts are read."""
        return any(adapter.parts.keys() - {"unet"} for adapter in self.opened)

    def scales(self, request: SampleRequest) -> tuple[float, ...]:
        """The strength of each adapter, or one number for all.

        Raises:
            ConfigError: it asks for another number of strengths.
        """
        scales = (1.0,) * len(self.paths) if request.lora_scales is None else request.lora_scales
        if len(scales) not in (1, len(self.paths)) and self.paths:
            raise ConfigError(
                f"--lora_scale: expected one number, or one for each of {count_of(len(self.paths), 'adapter')}, "
                f"got {len(scales)}"
            )
        return scales
