"""What is known of a training before it starts: its pictures, its prompt, and what it will take."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.cli.training_needs import expected_memory, kind_of_step
from dreambooth_ms.cli.training_plan import sizes_of_run
from dreambooth_ms.data.buckets import lost_area, nearest
from dreambooth_ms.data.looks import BLURRED, near_duplicates
from dreambooth_ms.data.pictures import Size
from dreambooth_ms.data.plan import of_records
from dreambooth_ms.data.records import Concept, Record
from dreambooth_ms.data.text import PromptTokenizer
from dreambooth_ms.errors import count_of
from dreambooth_ms.formats.naming.report import show_names
from dreambooth_ms.training.memory import MemoryEstimate
from dreambooth_ms.training.speed import Speed, read_speed

MUCH = 0.4
"""Above this share so much of a picture is cut off that the subject may be."""
COMMON = 0.8
"""CLIP's vocabulary is in the order of frequency. A word that is one token within this share of it is common: "dog" is
at 0.04, "picasso" at 0.43, "corgi" at 0.63; "sks" is at 0.97."""


@dataclass(frozen=True, kw_only=True)
class ConceptReport:
    """A concept's pictures."""

    name: str
    pictures: int
    smallest: Size
    largest: Size
    sizes: dict[str, int]
    """Those that pictures are trained at -> how many are."""
    cut_off: float
    """Share of a picture that its crop leaves out, on average."""
    seen: float
    """How often each picture comes up in the run."""
    odd: dict[str, dict[str, str]]
    """What may be wrong -> files -> what was found of each."""

    def __str__(self) -> str:
        of = " to ".join(f"{width}x{height}" for width, height in sorted({self.smallest, self.largest}))
        return (
            f"{self.name}: {count_of(self.pictures, 'picture')} of {of}, trained at {', '.join(self.sizes)}, "
            f"{self.cut_off:.0%} cut off; each comes up {self.seen:.1f} times"
        )

    def lines(self) -> list[str]:
        """It, and what is odd with names."""
        named = {what: [f"{name} ({detail})" for name, detail in of.items()] for what, of in self.odd.items()}
        return [str(self), *(f"{self.name}: {what}: {show_names(of, at_most=20)}" for what, of in named.items())]


@dataclass(frozen=True, kw_only=True)
class NameReport:
    """The words by which the subject is told from its class."""

    prompt: str
    rare: dict[str, int]
    """Those that are not common -> tokens."""

    def __str__(self) -> str:
        if not self.rare:
            return f"prompt {self.prompt!r}: all its words are common; name the subject by a rare one, such as sks"
        words = [f"{word} ({count_of(tokens, 'token')})" for word, tokens in self.rare.items()]
        return f"prompt {self.prompt!r}: rare {'is' if len(words) == 1 else 'are'} {', '.join(words)}"


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """How long the steps take, by what was measured on this machine."""

    steps: int
    speed: Speed

    def __str__(self) -> str:
        low, middle, high = (tqdm.format_interval(self.steps * seconds) for seconds in self.speed.of_step)
        compilation = tqdm.format_interval(self.speed.compilation)
        return (
            f"expected time: {count_of(self.steps, 'step')} in {middle} ({low} to {high}, by the last "
            f"{count_of(len(self.speed.steps), 'step')} like these on this machine) after at most {compilation} of "
            "compilation for each size; class pictures, encoding and validation come on top"
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of it, and what keeps the training from starting."""

    problems: list[str]
    notes: list[str]
    """What is not used, or not as it is."""
    concepts: list[ConceptReport]
    name: NameReport
    memory: MemoryEstimate
    time: TimeEstimate | None
    """None while no such step was measured on this machine."""

    def lines(self) -> list[str]:
        """For people."""
        of_concepts = [line for concept in self.concepts for line in concept.lines()]
        time = self.time or "expected time: not known before a first run with such steps on this machine"
        mended = [f"to mend: {line}" for line in self.problems]
        return [*of_concepts, *self.notes, *map(str, (self.name, self.memory, time)), *mended]


def report_on(job: TrainingJob, concepts: Sequence[Concept], problems: list[str], notes: list[str]) -> Report:
    """What is known of a run; `problems` and `notes` are those that were found before."""
    config, tokenizer = job.config, PromptTokenizer(job.base.text, warns=False)
    processes = config.processes.num_processes or 1
    speed = read_speed(kind_of_step(config, job.base, processes))
    prompt, of_class = config.data.instance_prompt, config.prior.class_prompt or ""
    return Report(
        problems=problems,
        notes=notes,
        concepts=reports_of(job, concepts, tokenizer),
        name=NameReport(prompt=prompt, rare=rare_words(tokenizer, prompt, of_class)),
        memory=expected_memory(config, job.base, processes),
        time=TimeEstimate(steps=job.total, speed=speed) if speed else None,
    )


def rare_words(tokenizer: PromptTokenizer, prompt: str, of_class: str) -> dict[str, int]:
    """The words of a prompt that are neither common nor in that of the class -> tokens."""
    words = [word for word in re.findall(r"\w+", prompt.lower()) if word not in of_class.lower()]
    tokens = {word: tokenizer.tokens(word) for word in words}
    return {word: len(own) for word, own in tokens.items() if len(own) > 1 or own[0] > COMMON * tokenizer.size}


def reports_of(job: TrainingJob, concepts: Sequence[Concept], tokenizer: PromptTokenizer) -> list[ConceptReport]:
    """A report for each concept."""
    sizes = of_records(sizes_of_run(job, concepts[0]), concepts[0].records) if concepts else []
    rows, reports = job.total * job.config.rows_per_step, []
    for concept in concepts:
        group = [one for one in concepts if (one.group or one.name) == (concept.group or concept.name)]
        pictures = [record.size for record in concept.records]
        own, lost = [sizes[at] for at in nearest(sizes, pictures)], lost_area(sizes, pictures)
        of_area = sorted(pictures, key=lambda size: size[0] * size[1])
        reports.append(
            ConceptReport(
                name=concept.name,
                pictures=len(pictures),
                smallest=of_area[0],
                largest=of_area[-1],
                sizes=dict(Counter(f"{width}x{height}" for width, height in own)),
                cut_off=float(lost.mean()),
                seen=float(rows * concept.repeats / sum(one.repeats * len(one.records) for one in group)),
                odd=_odd(concept.records, own, lost.tolist(), tokenizer),
            )
        )
    return reports


def _odd(
    records: Sequence[Record], sizes: Sequence[Size], lost: Sequence[float], tokenizer: PromptTokenizer
) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    twins = near_duplicates([record.looks for record in records])
    for at, (record, (across, down)) in enumerate(zip(records, sizes, strict=True)):
        (width, height), sharpness = record.size, record.looks.sharpness
        enlarged = max(across / width, down / height)
        odd = {
            "near-duplicate": f"like {records[twins[at]].path.name}" if at in twins else "",
            "very blurred": f"sharpness {sharpness:.0f}, expected {BLURRED:.0f}" if sharpness < BLURRED else "",
            "smaller than trained at": f"enlarged {enlarged:.1f} times" if enlarged > 1 else "",
            "cropped much": f"{lost[at]:.0%} cut off" if lost[at] > MUCH else "",
            "captions too long": f"not read: {cut!r}" if (cut := _cut(record, tokenizer)) else "",
        }
        for what, detail in odd.items():
            if detail:
                found.setdefault(what, {})[record.path.name] = detail
    return found


def _cut(record: Record, tokenizer: PromptTokenizer) -> str | None:
    return next(filter(None, map(tokenizer.lost, record.captions)), None)


def in_short(concepts: Sequence[ConceptReport]) -> list[str]:
    """A line on the pictures, and one on what is odd of them, if anything is."""
    odd = [f"{one.name}: {', '.join(f'{len(of)} {what}' for what, of in one.odd.items())}" for one in concepts if one.odd]
    lines = ["; ".join(map(str, concepts))]
    return lines + ([f"{'; '.join(odd)}; `dreambooth-ms check` with the same flags names them"] if odd else [])
