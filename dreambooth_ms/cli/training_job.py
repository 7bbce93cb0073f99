"""What a training command asks for, with all that follows from it, found once."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.pictures import Size
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.training.checkpoint import Checkpoint
from dreambooth_ms.training.lr_schedules import learning_rate_factor
from dreambooth_ms.weights.bundle import ModelBundle


@dataclass(frozen=True)
class TrainingJob:
    """A run's configuration and base, how long it is, and how far."""

    processes: Processes
    config: TrainConfig
    base: ModelBundle
    pictures: int
    """Of a pass: those that the largest concept has, or will have."""
    base_digests: Mapping[str, str] = field(default_factory=dict)
    """By the networks' names."""
    checkpoint: Checkpoint | None = None
    """What the run goes on from."""

    @property
    def epoch(self) -> int:
        """Optimiser steps of a pass over the pictures."""
        return -(-self.pictures // self.config.rows_per_step)

    @property
    def total(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.run.max_train_steps or self.config.run.num_train_epochs * self.epoch

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
