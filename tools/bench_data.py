"""Time the plan of a long run, and measure what it and its latents hold in memory, without pictures or a network.

    python -m tools.bench_data                                  # 20,000 pictures, random crops and flips, 4,000 steps
    python -m tools.bench_data --pictures 100000 --batch_size 4

Records and posteriors are made up. Planned is what a run needs before its first step: the view of every row, and which
of them have no latents yet. Then latents are written and read as batches do, more of them than stay in memory.
"""

import argparse
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dreambooth_ms.data.cache import BYTES_IN_MEMORY, ContentCache, posterior_lookup
from dreambooth_ms.data.plan import Framing, Plan, View
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Record
from dreambooth_ms.errors import count_of

POSTERIOR = (2, 4, 64, 64)
"""Of a picture of 512 x 512 pixels."""


def concept(name: str, pictures: int) -> Concept:
    """Photographs of several shapes, each with a caption of its own."""
    sizes = ((1200, 800), (800, 1200), (1024, 1024), (1920, 1080))
    return Concept(
        name,
        tuple(
            Record(Path(f"{name}/{i:06d}.png"), f"{i:064x}", sizes[i % 4], (f"a photo of {name} {i}",))
            for i in range(pictures)
        ),
    )


def megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def made_up(views: Sequence[View]) -> Iterator[tuple[View, tuple[np.ndarray]]]:
    """Stands for the autoencoder."""
    return ((view, (np.full(POSTERIOR, view.frame.left, np.float32),)) for view in views)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--batch_size", type=int, default=1)
    args = parser.parse_args()
    before = megabytes()
    concepts = (concept(INSTANCE, args.pictures), concept(CLASS, 200))
    start = time.perf_counter()
    plan = Plan(concepts, args.batch_size, Framing(((512, 512),), center_crop=False, random_flip=True), seed=0)
    views = plan.views(0, args.steps)
    planned = time.perf_counter() - start
    with TemporaryDirectory() as folder:
        posteriors = posterior_lookup(ContentCache(Path(folder)), "made up", "lanczos", lambda: abs, iter)
        posteriors = replace(posteriors, make=made_up)
        missing = posteriors.missing(views)
        looked = time.perf_counter() - start - planned
        read = views[: 2 * BYTES_IN_MEMORY // np.zeros(POSTERIOR, np.float32).nbytes]
        posteriors.prepare(read)
        start = time.perf_counter()
        for view in read:
            posteriors(view)
        each = (time.perf_counter() - start) / len(read)
    print(
        f"{count_of(args.pictures, 'picture')}, {count_of(args.steps, 'step')}: "
        f"{count_of(len(views), 'view')}, {len(missing)} without latents"
    )
    print(f"planned in {planned:.2f} s, files looked for in {looked:.2f} s; latents read in {each * 1e3:.2f} ms a row")
    print(f"memory beside the network: {megabytes() - before:.0f} MB")


if __name__ == "__main__":
    main()
