"""What a training command asks for, with all that follows from it, found once."""

from collections.abc import Mapping
from dataclasses import dataclass

from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.pictures import Size
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.training.checkpoint import Checkpoint
from dreambooth_ms.training.lr_schedules import learning_rate_factor
from dreambooth_ms.weights.bundle import ModelBundle


@dataclass(frozen=True)
class TrainingJob:
    """A run's configuration and base, and how far the run is."""

    processes: Processes
    config: TrainConfig
    base: ModelBundle
    base_digests: Mapping[str, str]
    """By the networks' names."""
    epoch: int
    """Optimiser steps of a pass over the pictures."""
    total: int
    """Optimiser steps of the whole run."""
    checkpoint: Checkpoint | None
    """What the run goes on from."""

    @property
    def done(self) -> int:
        """Steps that were taken before."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def seed(self) -> int:
        """Names all random draws of the run."""
        assert self.config.run.seed is not None, "agree_on_config comes first"
        return self.config.run.seed

    @property
    def size(self) -> Size:
        """Of the pictures."""
        return self.config.data.resolution, self.config.data.resolution

    @property
    def batches_per_step(self) -> int:
        """Of all processes."""
        return self.config.run.gradient_accumulation_steps * self.processes.count

    @property
    def validation_interval(self) -> int:
        """Optimiser steps from one validation to the next."""
        wanted = self.config.validation
        return (wanted.validation_epochs or 0) * self.epoch or wanted.validation_steps

    def learning_rate(self, update: int) -> float:
        """The learning rate of an update, counted from 0."""
        o = self.config.optimiser
        highest = self.config.learning_rate * (self.config.rows_per_step if o.scale_lr else 1)
        return highest * learning_rate_factor(o, update, self.total, highest)


def steps_of_epoch(config: TrainConfig, pictures: int) -> int:
    """Optimiser steps of a pass over so many pictures."""
    return -(-pictures // config.rows_per_step)


def total_steps(config: TrainConfig, pictures: int) -> int:
    """Optimiser steps of the run; an epoch goes through so many pictures."""
    return config.run.max_train_steps or config.run.num_train_epochs * steps_of_epoch(config, pictures)
