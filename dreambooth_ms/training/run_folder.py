"""A run's folder: which run it holds, and how a command that names it goes on."""

from dataclasses import fields, replace

from dreambooth_ms.config.load import load, to_yaml
from dreambooth_ms.config.schema import TrainConfig
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.randomness import draw_seed
from dreambooth_ms.weights.atomic import write_bytes

CONFIG = "config.yaml"

# How long a run is, what it keeps and where it computes may change when it goes on; what it learns may not.
MAY_CHANGE = frozenset(
    {
        "resume_from_checkpoint",
        "max_train_steps",
        "num_train_epochs",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_prompt",
        "num_validation_images",
        "validation_steps",
        "validation_scheduler",
        "device_target",
        "ms_mode",
    }
)


def settle_config(config: TrainConfig) -> TrainConfig:
    """The configuration with its seed: the folder's own if a run is there, otherwise a drawn one if none was given.

    Raises:
        ConfigError: the folder holds a run with another configuration; every difference is named.
    """
    file = config.output_dir / CONFIG
    if not file.is_file():
        seed = draw_seed() if config.run.seed is None else config.run.seed
        return replace(config, run=replace(config.run, seed=seed))
    earlier = load(TrainConfig, ["--config", str(file)]).config
    if config.run.seed is None:
        config = replace(config, run=replace(config.run, seed=earlier.run.seed))
    differences = _differences(earlier, config)
    if differences:
        listed = "; ".join(differences)
        raise ConfigError(
            f"{config.output_dir} holds a run with another configuration ({listed}); choose another --output_dir"
        )
    return config


def seed_of(config: TrainConfig) -> int:
    """The seed of a settled configuration."""
    assert config.run.seed is not None, "settle_config comes first"
    return config.run.seed


def write_config(config: TrainConfig) -> None:
    """Write the resolved configuration into the run's folder."""
    write_bytes(config.output_dir / CONFIG, to_yaml(config).encode())


def _differences(earlier: TrainConfig, now: TrainConfig) -> list[str]:
    lines = []
    for section in fields(TrainConfig):
        before, after = vars(getattr(earlier, section.name)), vars(getattr(now, section.name))
        lines += [
            f"--{name}: {before[name]!r} there, {value!r} here"
            for name, value in after.items()
            if name not in MAY_CHANGE and before[name] != value
        ]
    return lines
