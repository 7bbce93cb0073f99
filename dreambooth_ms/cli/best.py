"""How like the subject the pictures of a run are, and what the class lost: by which its best checkpoint is chosen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import nn

from dreambooth_ms.cli.training_job import Training, TrainingJob
from dreambooth_ms.cli.validation import lent_model, validation_request
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.pictures import open_picture
from dreambooth_ms.evaluation import drift, load_clip_embedder, similarity
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.training.loop import StepReport
from dreambooth_ms.training.stopping import FIDELITY
from dreambooth_ms.weights.bundle import ModelBundle
from dreambooth_ms.weights.hub import find_clip

PICTURES = 8
"""Of the subject, and of the class."""


def measuring_clip(config: TrainConfig, base: ModelBundle) -> Path | None:
    """The folder of the CLIP model that --keep_best fidelity measures with; ConfigError if there is none."""
    if config.stopping.keep_best != FIDELITY:
        return None
    return find_clip(config.stopping.clip, base.path, config.model.pretrained_model_name_or_path)


class MeasureFidelity:
    """A hook: at every checkpoint and after the last step `evaluate`'s subject similarity minus class drift, of
    pictures that always start from the same noise. The first process samples them."""

    def __init__(self, job: TrainingJob, unet: nn.Cell, training: Training, clip: Path) -> None:
        self._job, self._training = job, training
        if not job.processes.is_first:
            return
        prompts = job.sources[0].prompt, job.config.prior.class_prompt or ""
        self._request = replace(validation_request(job, prompts, PICTURES), batch_size=job.config.run.train_batch_size)
        self._model, self._embed = lent_model(job, unet, training, self._request), load_clip_embedder(clip).pictures
        records = (job.held_out or job.subjects)[0].records
        self._photographs = self._embed([np.asarray(open_picture(one.path, one.background)) for one in records])
        # Before its first step a training is the base, to the bit.
        base = SamplingModel(job.trained_base, mixed_precision=job.config.device.mixed_precision)
        self._of_base = self._vectors(base if job.done else self._model)[PICTURES:]

    def __call__(self, report: StepReport) -> StepReport | None:
        """The report with the fidelity, if it is time."""
        job, step = self._job, report.step
        if step % job.config.run.checkpointing_steps and step != job.total and not report.ended:
            return None
        value = job.processes.from_first("the fidelity", self._value)
        return replace(report, measured={**report.measured, FIDELITY: value})

    def _value(self) -> float:
        own = self._vectors(self._model)
        return similarity(own[:PICTURES], self._photographs) - drift(own[PICTURES:], self._of_base)

    def _vectors(self, model: SamplingModel) -> np.ndarray:
        with self._training.as_result():
            return self._embed([one.picture for one in model.sample(self._request)])
