"""What the user sees after a training step: the progress bar and the validation pictures."""

from dataclasses import dataclass
from typing import Any

from dreambooth_ms.cli.training_setup import Training
from dreambooth_ms.cli.validation import Validator
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.training.loop import StepReport
from dreambooth_ms.training.trackers import Tracker


@dataclass(frozen=True)
class ShowProgress:
    """A hook: the bar with the losses of the step."""

    bar: Any
    """As tqdm makes it."""

    def __call__(self, report: StepReport) -> None:
        """Move the bar by this step."""
        shown: dict[str, object] = {name: f"{value:.4f}" for name, value in report.concept_losses.items()}
        self.bar.set_postfix(shown | ({"skipped": report.skipped_steps} if report.skipped_steps else {}))
        self.bar.update()


@dataclass(frozen=True)
class ShowValidation:
    """A hook: pictures of the validation prompt after every so many steps, by the first process."""

    every: int
    training: Training
    validator: Validator | None
    tracker: Tracker | None
    processes: Processes

    def __call__(self, report: StepReport) -> None:
        """Sample after this step, if it is time and the run goes on."""
        if report.step % self.every or report.stop_asked:
            return
        if self.validator and self.tracker:
            with self.training.result_weights():
                self.tracker.log_pictures(report.step, "validation", self.validator.sample(report.step))
        self.processes.wait_for_all("the validation pictures")
