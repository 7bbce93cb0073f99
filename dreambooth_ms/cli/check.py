"""`dreambooth-ms check`: what is known of a training before it starts. Nothing is written, no weight is read."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from dreambooth_ms.cli.base import open_base
from dreambooth_ms.cli.device import set_up
from dreambooth_ms.cli.training_concepts import class_numbers_to_come, read_concepts
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.cli.training_needs import check_expected_disk, check_expected_memory
from dreambooth_ms.cli.training_report import report_on
from dreambooth_ms.config.check import CheckConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.data.records import Concept
from dreambooth_ms.errors import UserError, count_of
from dreambooth_ms.processes.group import ALONE


def run(argv: Sequence[str]) -> int:
    """Check by a command line; returns the exit status: 1 if `train` would not start."""
    notes, problems, concepts = list[str](), list[str](), list[Concept]()
    wanted = load(CheckConfig, argv, notes.append)
    config = replace(wanted, device=set_up(wanted.device))
    base = open_base(config.model)
    base.schedule.trained(config.loss.prediction_type)
    try:
        concepts = read_concepts(config, notes.append, problems.append)
        if to_come := len(class_numbers_to_come(config)):
            notes.append(f"{count_of(to_come, 'class picture')} to be generated first")
    except UserError as error:
        problems.append(str(error))
    concepts = [concept for concept in concepts if concept.records]
    counts = [len(concept.records) for concept in concepts[:1]]
    job = TrainingJob(ALONE, config, base, max(*counts, config.prior.num_class_images if config.prior.folder else 0, 0))
    report = report_on(job, concepts, problems, notes)
    for needed in (
        lambda: check_expected_memory(config, base, ALONE, lambda line: None),
        lambda: check_expected_disk(config, base, 0, job.total),
    ):
        try:
            needed()
        except UserError as error:
            problems.append(str(error))
    problems[:] = [line for problem in problems for line in problem.splitlines()]
    print(json.dumps(asdict(report), indent=2) if config.report.json else "\n".join(report.lines()))
    return int(bool(problems))
