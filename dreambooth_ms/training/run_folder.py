"""A run's folder: which run it holds, and how a command that names it goes on."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dreambooth_ms.atomic import remove_leftovers, write_bytes
from dreambooth_ms.config.load import load, to_yaml
from dreambooth_ms.config.rules import Resume
from dreambooth_ms.config.schema import schema_fields
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError, Tell
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.randomness import draw_seed
from dreambooth_ms.training.checkpoint import Checkpoint, checkpoint_folders, find_latest, open_checkpoint, result_of
from dreambooth_ms.training.content import Content, changes
from dreambooth_ms.training.history import HISTORY

CONFIG = "config.yaml"


def settle_config(config: TrainConfig) -> TrainConfig:
    """The configuration with its learning rate, and with a seed: if none was given, that of the folder, or a drawn one.
    Raises ConfigError if the folder holds a run with another configuration, naming every difference, or weights of
    another program."""
    earlier, output = config_of_run(config.output_dir), config.output_dir
    if earlier is None and (foreign := result_of(output)):
        raise ConfigError(f"{foreign.path}: would be replaced, and is of no run there; choose another --output_dir")
    config = _settled(config, earlier.run.seed if earlier else draw_seed())
    if earlier and _was_trained(output) and (found := _differences(earlier, config)):
        listed = "; ".join(found)
        raise ConfigError(f"{output} holds a run with another configuration ({listed}); choose another --output_dir")
    return config


def checkpoint_of(config: TrainConfig, tell: Tell) -> Checkpoint | None:
    """The checkpoint that was asked for; without asking, the newest of a run that was stopped."""
    asked = config.run.resume_from_checkpoint
    if asked not in (None, "latest"):
        own, is_name = config.output_dir / asked, len(Path(asked).parts) == 1
        return open_checkpoint(own if is_name and (os.path.exists(own) or not os.path.exists(asked)) else Path(asked))
    found = find_latest(config.output_dir)
    if asked == "latest" and found is None:
        tell(f"--resume_from_checkpoint latest: no checkpoint in {config.output_dir}, starting from the beginning")
    return found


def check_data(
    config: TrainConfig, checkpoint: Checkpoint | None, now: Content, to_come: Mapping[str, Iterable[str]], tell: Tell
) -> None:
    """Stop if a run would go on with other pictures or weights than it began with; with --accept_changed_data tell it.
    Where no checkpoint knows its content, paths count. `to_come`: files of class pictures that are yet to be sampled,
    by their concepts. Raises ConfigError of every change."""
    if checkpoint and checkpoint.content:
        found = changes(checkpoint.content, now, to_come)
    else:
        earlier = config_of_run(config.output_dir) if _was_trained(config.output_dir) else None
        found = _differences(earlier, config, Resume.BY_CONTENT) if earlier else []
    if found and not config.run.accept_changed_data:
        where = checkpoint.path if checkpoint else config.output_dir
        raise ConfigError(
            f"{where}: was trained on other data ({'; '.join(found)}); bring back what it had, choose another "
            "--output_dir, or go on with this by --accept_changed_data"
        )
    if found:
        tell(f"{config.output_dir}: going on with changed data ({'; '.join(found)})")


def check_method(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError, with every difference, if a checkpoint, perhaps of another folder, is of other parameters."""
    sections, here = yaml.safe_load(checkpoint.config) or {}, vars(config.method) | vars(config.words)
    there = sections.get("method", {}) | sections.get("words", {})
    names = ["method", "train_text_encoder", "clip_skip", "rank", "lora_target_modules", "use_ema", "freeze_model"]
    names += ["modifier_token", "num_vectors", "train_new_words", "adapter", "init_lora_weights", "rank_pattern"]
    if differences := _told([name for name in names if name in there], there, here):
        raise ConfigError(
            f"{checkpoint.path}: belongs to another training ({'; '.join(differences)}); repeat that training's flags, "
            "or start anew in another --output_dir"
        )


def config_of_run(folder: Path, advice: str = "choose another --output_dir") -> TrainConfig | None:
    """The configuration of a folder's run; None if it has none. Raises ConfigError, with advice, if that is another."""
    file = folder / CONFIG
    if not os.path.isfile(file):
        return None
    try:
        return _settled(load(TrainConfig, ["--config", str(file)], tell=lambda note: None), None)
    except ConfigError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{file}: not the configuration of a run ({reason}); {advice}") from error


def _was_trained(folder: Path) -> bool:
    """Whether a step was taken; a run that failed before may be started again with a mended configuration."""
    return bool(result_of(folder) or checkpoint_folders(folder)) or os.path.isfile(folder / HISTORY)


def agree_on_config(processes: Processes, config: TrainConfig) -> TrainConfig:
    """`settle_config` for one of several processes: rank 0 looks into the folder. Raises ConfigError as that does, or
    if these processes were not meant to train together."""
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
    config = replace(config, processes=replace(config.processes, num_processes=processes.count))
    for rank, others in enumerate(processes.exchange("the configuration", to_yaml(config))):
        if others != to_yaml(config):
            raise ConfigError(f"rank {rank} was started with other flags than rank {processes.rank}")
    return _settled(config, processes.from_first("the run's seed", lambda: settle_config(config).run.seed))


def write_config(config: TrainConfig) -> None:
    """Write the resolved configuration into the run's folder, and clear it of what a killed run left half-written."""
    remove_leftovers(config.output_dir)
    write_bytes(config.output_dir / CONFIG, to_yaml(config).encode())


def _settled(config: TrainConfig, seed: int | None) -> TrainConfig:
    """The same with a seed if it names none, and the learning rate of its method spelt out as if it were named."""
    run = replace(config.run, seed=seed if config.run.seed is None else config.run.seed)
    return replace(config, run=run, optimiser=replace(config.optimiser, learning_rate=config.learning_rate))


def _differences(earlier: TrainConfig, now: TrainConfig, of: Resume | None = None) -> list[str]:
    """Of the fields with this mark, or of those that must not differ. Paths are equal that lead to the same place."""
    marks = {of} | ({Resume.CUTS_ROWS} if of is None and earlier.rows_per_step != now.rows_per_step else set())
    fields = {name: one for name, one in schema_fields(TrainConfig).items() if one.resume in marks}
    there, here = earlier.values(), now.values()
    paths = [name for name, one in fields.items() if one.is_path and there[name] and here[name]]
    same = [name for name in paths if os.path.realpath(there[name]) == os.path.realpath(here[name])]
    return _told([name for name in fields if name not in same], there, here)


def _told(names: Iterable[str], there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [f"--{name}: {there[name]!r} there, {here[name]!r} here" for name in names if there[name] != here[name]]
