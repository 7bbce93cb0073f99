"""`dreambooth-ms check`: what is known of a training before it starts. Nothing is written."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dreambooth_ms.cli.base_flags import check_base
from dreambooth_ms.cli.best import measuring_clip
from dreambooth_ms.cli.device import open_base, set_up
from dreambooth_ms.cli.training_concepts import (
    check_words,
    numbers_to_come,
    read_concepts,
    sources_of,
    starting_words,
    tell_cut_prompts,
)
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.cli.training_needs import StepTimes, check_expected_disk, check_expected_memory
from dreambooth_ms.cli.validation_loss import read_held_out
from dreambooth_ms.config.commands import CheckConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.data_set import with_folder_of_data_set
from dreambooth_ms.data.looks import BLURRED, near_duplicates
from dreambooth_ms.data.plan import lost_area, nearest, of_records
from dreambooth_ms.data.records import CLASS, INSTANCE
from dreambooth_ms.errors import UserError, count_of, show_names
from dreambooth_ms.formats.clip_tokenizer import SIZE, ClipTokenizer
from dreambooth_ms.processes.group import ALONE
from dreambooth_ms.training.trackers import installed_trackers

MUCH = 0.4
"""Above this share so much of a picture is cut off that the subject may be."""
COMMON = 0.8
"""CLIP's tokens are in the order of their frequency. A word that is one token within this share of them is common:
"dog" is at 0.04, "picasso" at 0.43, "corgi" at 0.63; "sks" is at 0.97."""


def run(argv: Sequence[str]) -> int:
    """Check by a command line; returns the exit status: 1 if something is to be mended before `train` starts."""
    notes, problems = list[str](), list[str]()

    def attempt(look: Callable[[], Any]) -> Any:
        try:
            return look()
        except UserError as error:
            problems.extend(str(error).splitlines())

    wanted = dict(vars(load(CheckConfig, argv, notes.append)))
    as_json, device = wanted.pop("report").json, set_up(wanted["device"])
    config = TrainConfig(**wanted | {"device": device})
    base = open_base(config.model)
    check_base(config, base)
    base = base.with_words(starting_words(config, base))
    base.schedule.trained(config.loss)
    sources = attempt(lambda: sources_of(with_folder_of_data_set(config), notes.append)) or ()
    concepts = [found for one in sources for found in attempt(partial(read_concepts, [one], notes.append)) or ()]
    if to_come := sum(map(len, numbers_to_come(sources).values())) if concepts else 0:
        notes.append(f"{count_of(to_come, 'class picture')} to be generated first")
    job = TrainingJob(ALONE, config, base, sources, concepts)
    job = replace(job, held_out=attempt(lambda: read_held_out(job, notes.append)) or ())
    attempt(lambda: check_words(job))
    attempt(lambda: measuring_clip(config, base))
    attempt(lambda: installed_trackers(config.run.report_to))
    prompts, class_prompts = ([one.prompt for one in sources if one.concept.group == of] for of in (INSTANCE, CLASS))
    tell_cut_prompts(job, class_prompts, notes.append)
    tokenizer, of_classes = base.text[0].tokenizer(), " ".join(class_prompts)
    rare = {prompt: rare_words(tokenizer, prompt, of_classes) for prompt in prompts if prompt}
    for prompt, words in rare.items():
        named = ", ".join(f"{word} ({count_of(tokens, 'token')})" for word, tokens in words.items())
        notes.append(f"rare words of {prompt!r}: {named or 'none; name the subject by one, such as sks'}")
    memory = attempt(lambda: check_expected_memory(config, base, ALONE, notes.append))
    attempt(lambda: check_expected_disk(job))
    says, seconds = StepTimes(config, base).expected(job.total)

    described = describe_concepts(job)
    report: dict[str, Any] = {"to_mend": problems, "notes": [*notes, says], "concepts": described, "rare_words": rare}
    report |= {"steps": job.total, "memory": memory, "time": seconds}
    odd = [
        f"{one['name']}, {what}: {show_names([f'{name} ({how})' for name, how in files.items()], at_most=20)}"
        for one in described
        for what, files in one["odd"].items()
    ]
    lines = [*map(in_short, described), *odd, *report["notes"], *(f"to mend: {line}" for line in problems)]
    text = json.dumps(report, indent=2) if as_json else "\n".join(lines)
    print(text.encode(errors="backslashreplace").decode())
    return int(bool(problems))


def describe_concepts(job: TrainingJob) -> list[dict[str, Any]]:
    """Of each concept its pictures, as JSON: `cut_off` is the mean share, `seen` how often each comes up in the run;
    `odd` names for each oddity the files, and what was found of them."""
    if not job.subjects:
        return []
    sizes, described = of_records(job.sizes, [record for one in job.subjects for record in one.records]), []
    for concept in (one for one in job.concepts if not one.drawn_as):
        group = [one for one in job.concepts if one.group == concept.group]
        of_group = sum(one.repeats * len(one.records) for one in group)
        pictures = sorted((record.size for record in concept.records), key=lambda size: size[0] * size[1])
        odd: dict[str, dict[str, str]] = {}
        own = {
            "name": concept.name,
            "pictures": len(pictures),
            "sizes": list(dict.fromkeys("{}x{}".format(*size) for size in (pictures[0], pictures[-1]))),
            "trained_at": Counter("{}x{}".format(*sizes[at]) for at in nearest(sizes, pictures)),
            "cut_off": float(lost_area(sizes, pictures).min(1).mean()),
            "seen": float(job.total * job.config.rows_per_step * concept.repeats / of_group),
            "odd": odd,
        }
        described.append(own)
        like = near_duplicates([record.looks for record in concept.records])
        for at, record in enumerate(concept.records):
            (size,), lost = of_records(sizes, [record]), lost_area(sizes, [record.size]).min()
            enlarged, sharpness = max(size[0] / record.size[0], size[1] / record.size[1]), record.looks.sharpness
            for what, is_so, how in (
                ("near-duplicate", at in like, f"like {concept.records[like.get(at, at)].path.name}"),
                ("very blurred", sharpness < BLURRED, f"sharpness {sharpness:.1f}, expected {BLURRED:.0f}"),
                ("small", enlarged > 1, f"enlarged {enlarged:.1f} times"),
                ("much cropped", lost > MUCH, f"{lost:.0%} cut off"),
            ):
                if is_so:
                    odd.setdefault(what, {})[record.path.name] = how
    return described


def in_short(one: Mapping[str, Any]) -> str:
    """A line on a concept's pictures."""
    odd = ", ".join(f"{len(files)} {what}" for what, files in one["odd"].items())
    return (
        f"{one['name']}: {count_of(one['pictures'], 'picture')} of {' to '.join(one['sizes'])}, trained at "
        f"{', '.join(one['trained_at'])}, {one['cut_off']:.0%} cut off, each seen {one['seen']:.1f} times"
    ) + (f"; {odd}" if odd else "")


def rare_words(tokenizer: ClipTokenizer, prompt: str, of_class: str) -> dict[str, int]:
    """A prompt's words that are new, or neither common nor in that of the class -> into how many tokens they fall."""
    new = "".join(f"{re.escape(word)}|" for word in sorted(tokenizer.words, key=len, reverse=True))
    words = [word for word in re.findall(rf"{new}\w+", prompt) if not re.search(rf"\b{re.escape(word)}\b", of_class)]
    tokens = {word: tokenizer.tokens(word) for word in words}
    rare = [word for word, own in tokens.items() if word in tokenizer.words or len(own) > 1 or own[0] > COMMON * SIZE]
    return {word: len(tokens[word]) for word in rare}
