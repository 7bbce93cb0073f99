"""Time the plan of a long run, and measure what it and its latents hold in memory, without pictures or a network.

    python -m tools.bench_data                                  # 20,000 pictures, random crops and flips, 4,000 steps
    python -m tools.bench_data --pictures 100000 --batch_size 4
    python -m tools.bench_data --pictures 10000 --steps 40000 --batches 40000 --center_crop

Records and posteriors are made up. Planned is what a run needs before its first step: the prompts of all rows, and
which of their views have no latents yet. Then latents are written and read as batches do, more of them than stay in
memory. With `--batches` so many batches of captions are made, of small latents and embeddings, and the memory that the
process has is printed as they go: captions without class pictures, as native training has them.
"""

import argparse
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np

from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.cache import BYTES_IN_MEMORY, ContentCache, embedding_lookup, posterior_lookup
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.plan import Framing, Plan, View
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Record
from dreambooth_ms.diffusion import NoiseScheduleSpec, draw_columns
from dreambooth_ms.errors import count_of

POSTERIOR = (2, 4, 64, 64)
"""Of a picture of 512 x 512 pixels."""
SMALL, TEXT = (2, 4, 8, 8), (77, 64)
"""Of what batches are made of: 10,000 embeddings are three times what stays in memory."""


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


def now() -> float:
    """The memory that this process has at the moment, in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def views_of(plan: Plan, steps: int) -> Iterator[View]:
    """As a run goes through them."""
    return (row.view for batch in range(steps) for row in plan.rows(batch))


def make_batches(plan: Plan, folder: Path, count: int) -> list[float]:
    """Make so many batches as a run does; returns the memory after each tenth of them."""
    cache = ContentCache(folder)
    posteriors = posterior_lookup(cache, "small", "lanczos", lambda: abs, iter)
    texts = embedding_lookup(
        cache, "small", lambda missing: ((one, PromptText(np.full(TEXT, len(one), np.float32))) for one in missing)
    )
    batches = BatchMaker(
        plan=plan,
        posteriors=replace(posteriors, make=lambda views: ((view, (np.zeros(SMALL, np.float32),)) for view in views)),
        texts=texts,
        objective=draw_columns(NoiseScheduleSpec()),
        scaled=lambda latents: latents,
    )
    found = []
    # What is made up need not be on the disk.
    with patch("dreambooth_ms.atomic.sync"):
        for number in range(count):
            batches(number)
            if (number + 1) % max(count // 10, 1) == 0:
                found.append(now())
    return found


def made_up(views: Sequence[View]) -> Iterator[tuple[View, tuple[np.ndarray]]]:
    """Stands for the autoencoder."""
    return ((view, (np.full(POSTERIOR, view.frame.left, np.float32),)) for view in views)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--batches", type=int, default=0)
    parser.add_argument("--center_crop", action="store_true")
    args = parser.parse_args()
    before = megabytes()
    concepts = (concept(INSTANCE, args.pictures), concept(CLASS, 200))
    start = time.perf_counter()
    framing = Framing(((512, 512),), args.center_crop, random_flip=True)
    plan = Plan(concepts, args.batch_size, framing, seed=0)
    prompts = {view.prompt for view in views_of(plan, args.steps)}
    planned = time.perf_counter() - start
    with TemporaryDirectory() as folder:
        posteriors = posterior_lookup(ContentCache(Path(folder)), "made up", "lanczos", lambda: abs, iter)
        posteriors = replace(posteriors, make=made_up)
        missing = posteriors.missing(views_of(plan, args.steps))
        looked = time.perf_counter() - start - planned
        read = missing[: 2 * BYTES_IN_MEMORY // np.zeros(POSTERIOR, np.float32).nbytes]
        posteriors.prepare(read)
        start = time.perf_counter()
        for view in read:
            posteriors(view)
        each = (time.perf_counter() - start) / len(read)
    print(
        f"{count_of(args.pictures, 'picture')}, {count_of(args.steps, 'step')}: "
        f"{count_of(args.steps * args.batch_size * len(concepts), 'view')}, {len(missing)} without latents"
    )
    print(f"planned in {planned:.2f} s, files looked for in {looked:.2f} s; latents read in {each * 1e3:.2f} ms a row")
    print(f"memory beside the network: {megabytes() - before:.0f} MB ({count_of(len(prompts), 'prompt')})")
    if args.batches:
        with TemporaryDirectory() as folder:
            found = make_batches(Plan(concepts[:1], args.batch_size, framing, seed=0), Path(folder), args.batches)
        print(f"making {args.batches} batches, MB after each tenth:", *(f"{one:.0f}" for one in found))


if __name__ == "__main__":
    main()
