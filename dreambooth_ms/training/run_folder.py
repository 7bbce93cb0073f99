"""A run's folder: which run it holds, and how a command that names it goes on."""

import os
from dataclasses import replace

from dreambooth_ms.atomic import remove_leftovers, write_bytes
from dreambooth_ms.config.describe import schema_fields
from dreambooth_ms.config.load import load, to_yaml
from dreambooth_ms.config.rules import Resume
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.randomness import draw_seed
from dreambooth_ms.training.checkpoint import checkpoint_folders
from dreambooth_ms.training.results import result_of
from dreambooth_ms.training.trackers import HISTORY

CONFIG = "config.yaml"


def settle_config(config: TrainConfig) -> TrainConfig:
    """The configuration with its learning rate and seed: the folder's own seed if a run is there, otherwise a drawn
    one if none was given.

    Raises:
        ConfigError: the folder holds a run with another configuration, and every difference is named; or weights of
            another program.
    """
    config = _with_learning_rate(config)
    file = config.output_dir / CONFIG
    if not os.path.isfile(file):
        foreign = result_of(config.output_dir)
        if foreign:
            raise ConfigError(f"{foreign.path}: would be replaced, and is of no run there; choose another --output_dir")
        seed = draw_seed() if config.run.seed is None else config.run.seed
        return replace(config, run=replace(config.run, seed=seed))
    try:
        earlier = _with_learning_rate(load(TrainConfig, ["--config", str(file)], tell=lambda note: None))
    except ConfigError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{file}: not the configuration of a run ({reason}); choose another --output_dir") from error
    if config.run.seed is None:
        config = replace(config, run=replace(config.run, seed=earlier.run.seed))
    # A run that failed before its first step may be started again with a mended configuration.
    was_trained = result_of(config.output_dir) or checkpoint_folders(config.output_dir)
    differences = _differences(earlier, config)
    if differences and (was_trained or (config.output_dir / HISTORY).is_file()):
        listed = "; ".join(differences)
        raise ConfigError(
            f"{config.output_dir} holds a run with another configuration ({listed}); choose another --output_dir"
        )
    return config


def agree_on_config(processes: Processes, config: TrainConfig) -> TrainConfig:
    """`settle_config` for one of several processes: rank 0 looks into the folder.

    Raises:
        ConfigError: as `settle_config`; or these processes were not meant to train together.
    """
    _check_processes(processes, config)
    config = replace(config, processes=replace(config.processes, num_processes=processes.count))
    for rank, others in enumerate(processes.exchange("the configuration", to_yaml(config))):
        if others != to_yaml(config):
            raise ConfigError(f"rank {rank} was started with other flags than rank {processes.rank}")
    seed = processes.from_first("the run's seed", lambda: seed_of(settle_config(config)))
    return _with_learning_rate(replace(config, run=replace(config.run, seed=seed)))


def _check_processes(processes: Processes, config: TrainConfig) -> None:
    wanted, launch = config.processes, processes.launch
    if wanted.is_parallel and launch is None:
        raise ConfigError(
            "--is_parallel True: this process was started alone; start several by mpirun -n 2 dreambooth-ms train …, "
            "or by msrun --worker_num=2 --local_worker_num=2 --join=True python -m dreambooth_ms train …"
        )
    if launch and processes.count > 1 and not wanted.is_parallel:
        raise ConfigError(
            f"{launch.launcher} started {processes.count} processes; give --is_parallel True, or start one alone"
        )
    if wanted.num_processes not in (None, processes.count):
        raise ConfigError(f"--num_processes {wanted.num_processes}: {processes.count} were started")


def seed_of(config: TrainConfig) -> int:
    """The seed of a settled configuration."""
    assert config.run.seed is not None, "settle_config comes first"
    return config.run.seed


def write_config(config: TrainConfig) -> None:
    """Write the resolved configuration into the run's folder, and clear it of what a killed run left half-written."""
    remove_leftovers(config.output_dir)
    write_bytes(config.output_dir / CONFIG, to_yaml(config).encode())


def _with_learning_rate(config: TrainConfig) -> TrainConfig:
    """The same with the default of its method spelt out, so that it equals one that names it."""
    return replace(config, optimiser=replace(config.optimiser, learning_rate=config.learning_rate))


def _differences(earlier: TrainConfig, now: TrainConfig) -> list[str]:
    may_change = {Resume.MAY_CHANGE} | ({Resume.CUTS_ROWS} if earlier.rows_per_step == now.rows_per_step else set())
    before, after = earlier.values(), now.values()
    return [
        f"--{name}: {before[name]!r} there, {after[name]!r} here"
        for name, one in schema_fields(TrainConfig).items()
        if one.resume not in may_change and before[name] != after[name]
    ]
