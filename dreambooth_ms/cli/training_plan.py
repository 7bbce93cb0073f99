"""Which rows a run has, and what there is to say and to show of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dreambooth_ms.cli.output import tell
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.config.choices import Interpolation
from dreambooth_ms.data.pictures import Size, frame_of, open_picture, resize_and_crop
from dreambooth_ms.data.plan import Framing, Plan, View, least_losing, sizes_of, table_of_sizes
from dreambooth_ms.data.records import INSTANCE, Concept
from dreambooth_ms.errors import count_of
from dreambooth_ms.evaluation.sheet import Row, write_sheet


def plan_of(job: TrainingJob, concepts: Sequence[Concept]) -> Plan:
    """The rows of the run."""
    data, rows = job.config.data, job.config.run.train_batch_size
    framing = Framing(sizes_of_run(job, concepts), data.center_crop, data.random_flip)
    return Plan(tuple(concepts), rows, framing, job.seed, job.batches_per_step)


def sizes_of_run(job: TrainingJob, concepts: Sequence[Concept]) -> tuple[Size, ...]:
    """Those that pictures are trained at, by those of the subjects."""
    data = job.config.data
    if not data.use_aspect_ratio_bucket:
        return (job.size,)
    pictures = [record.size for one in concepts if one.group == INSTANCE for record in one.records]
    sizes = sizes_of(data.resolution, job.base.side_multiple)
    return tuple(least_losing(sizes, pictures, data.max_buckets) if data.max_buckets else sizes)


def views_of(job: TrainingJob, plan: Plan) -> Iterator[View]:
    """What each row of the rest of the run sees; one after the other, since a long run has millions."""
    batches = range(job.done * job.batches_per_step, job.total * job.batches_per_step)
    return (row.view for batch in batches for row in plan.rows(batch))


def prompts_of(job: TrainingJob, plan: Plan) -> list[str]:
    """All prompts that the rest of the run reads, each once."""
    return list(dict.fromkeys(view.prompt for view in views_of(job, plan)))


def tell_sizes(plan: Plan, total: int) -> None:
    """A line for each size of the run: its pictures, what is cut off them, and its steps."""
    for (width, height), pictures, lost, steps in table_of_sizes(plan, total):
        tell(f"{width}x{height}: {count_of(pictures, 'picture')}, {lost:.1%} cut off, {count_of(steps, 'step')}")


def write_crops(plan: Plan, interpolation: Interpolation, path: Path, at_most: int = 8) -> None:
    """A sheet of the first pictures of each size, cropped in the middle."""
    rows = []
    for bucket in plan.buckets:
        records = [record for concept in bucket.groups[0] for record in concept.records]
        crops = [
            resize_and_crop(open_picture(one.path, one.background), frame_of(one.size, bucket.size), interpolation)
            for one in records[:at_most]
        ]
        names = [one.path.name for one in records[:at_most]]
        width, height = bucket.size
        label = f"{width}x{height}\n{count_of(len(records), 'picture')}"
        rows.append(Row(label, [np.asarray(crop) for crop in crops], names))
    write_sheet(path, "What is left of the pictures at each size", rows)
    tell(f"wrote {path}")
