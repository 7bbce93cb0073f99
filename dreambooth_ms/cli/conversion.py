"""`dreambooth-ms inspect`, `convert`, `merge` and `extract`: what a file is, and models and LoRAs in other formats."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dreambooth_ms import conversion
from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.commands import ConvertConfig, ExtractConfig, InspectConfig, MergeConfig, MergingConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.config.shared import BaseModelConfig, DeviceConfig
from dreambooth_ms.weights.hub import find_adapter, find_model


def inspect(argv: Sequence[str]) -> int:
    """Inspect by a command line; returns the exit status."""
    wanted = load(InspectConfig, argv, tell).inspection
    for line in conversion.describe_source(Path(wanted.source), wanted.base, wanted.variant):
        print(line.encode(errors="backslashreplace").decode())
    return 0


def convert(argv: Sequence[str]) -> int:
    """Convert by a command line; returns the exit status."""
    for line in conversion.convert(load(ConvertConfig, argv, tell).conversion):
        tell(line)
    return 0


def merge(argv: Sequence[str]) -> int:
    """Merge by a command line; returns the exit status."""
    wanted = load(MergeConfig, argv, tell).merging
    for line in _merge_concepts(wanted) if wanted.concepts else _merge_loras(wanted):
        tell(line)
    return 0


def extract(argv: Sequence[str]) -> int:
    """Extract by a command line; returns the exit status."""
    wanted = load(ExtractConfig, argv, tell).extraction
    base, tuned = (str(find_model(name, None, None)) for name in (wanted.base, wanted.tuned))
    for line in conversion.extract(replace(wanted, base=base, tuned=tuned)):
        tell(line)
    return 0


def _merge_loras(wanted: MergingConfig) -> Iterator[str]:
    base, loras = find_model(wanted.base, wanted.revision, wanted.variant), map(find_adapter, wanted.lora)
    return conversion.merge(replace(wanted, base=str(base), lora=list(map(str, loras))))


def _merge_concepts(wanted: MergingConfig) -> Iterator[str]:
    """What is told of results of Custom Diffusion while they are merged into one."""
    # Here, because models are converted and merged without MindSpore, which takes seconds to load.
    from dreambooth_ms.cli.device import open_base, set_up
    from dreambooth_ms.cli.sample import read_prompts
    from dreambooth_ms.concept_merging import merge_concepts, plain_captions

    file, concepts = wanted.regularization_prompts, [str(find_adapter(name)) for name in wanted.concepts]
    captions = read_prompts(file, "--regularization_prompts") if file else plain_captions()
    set_up(DeviceConfig())
    base = BaseModelConfig(pretrained_model_name_or_path=wanted.base, revision=wanted.revision, variant=wanted.variant)
    return merge_concepts(replace(wanted, concepts=concepts), open_base(base), captions)
