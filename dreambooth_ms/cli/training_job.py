"""What a training command asks for, with all that follows from it, found once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.pictures import Size
from dreambooth_ms.data.plan import Framing, Plan, View, least_losing, sizes_of
from dreambooth_ms.data.records import INSTANCE, Concept, Source
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.training.checkpoint import Checkpoint
from dreambooth_ms.training.optimisers import learning_rate_factor
from dreambooth_ms.weights.bundle import ModelBundle


@dataclass(frozen=True)
class TrainingJob:
    """A run's configuration and base, how long it is, and how far."""

    processes: Processes
    config: TrainConfig
    base: ModelBundle
    pictures: int
    """Of a pass: those that the subjects have together, or their classes if these have more."""
    sources: tuple[Source, ...] = ()
    """Of its concepts, the subjects first."""
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
    def masked(self) -> bool:
        """Whether some rows have masks."""
        return self.config.augments or any(source.masked for source in self.sources)

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

    def sizes(self, concepts: Sequence[Concept]) -> tuple[Size, ...]:
        """Those that pictures are trained at, by those of the subjects."""
        data = self.config.data
        if not data.use_aspect_ratio_bucket:
            return (self.size,)
        pictures = [record.size for one in concepts if one.group == INSTANCE for record in one.records]
        sizes = sizes_of(data.resolution, self.base.side_multiple)
        return tuple(least_losing(sizes, pictures, data.max_buckets) if data.max_buckets else sizes)

    def plan(self, concepts: Sequence[Concept]) -> Plan:
        """The rows of the run."""
        data, rows = self.config.data, self.config.run.train_batch_size
        framing = Framing(self.sizes(concepts), data.center_crop, data.random_flip, self.config.augments)
        return Plan(tuple(concepts), rows, framing, self.seed, self.batches_per_step)

    def views(self, plan: Plan) -> Iterator[View]:
        """What each row of the rest of the run sees; one after the other, since a long run has millions."""
        batches = range(self.done * self.batches_per_step, self.total * self.batches_per_step)
        return (row.view for batch in batches for row in plan.rows(batch))
