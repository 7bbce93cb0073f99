"""When a subject is learnt, and which step taught it best: rules on what is measured during a run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from dreambooth_ms.config.stopping import StoppingConfig
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.training.checkpoint import checkpoint_folder
from dreambooth_ms.training.loop import StepReport

LOSS, FIDELITY = "validation_loss", "fidelity"

Measured: TypeAlias = dict[str, Any]
"""What was measured after a step: its number as "step", LOSS, FIDELITY."""


def variance_ratio(losses: Sequence[float], newest: int) -> float:
    """Variance of the newest losses over that of all; NaN while there are no more than so many, or all are the same.
    DVAR (Voronov et al., NeurIPS 2023, "Is This Loss Informative?"): of losses L_1 ... L_t on the same pictures, noise
    and timesteps, training ends at the first t with Var(L_(t-n+1) ... L_t) / Var(L_1 ... L_t) below a threshold."""
    whole = np.var(losses) if len(losses) > newest else 0.0
    return float(np.var(losses[-newest:]) / whole) if whole else float("nan")


def settled(config: StoppingConfig, measured: Sequence[Measured]) -> str:
    """Why a run is over after what was measured, by `variance_ratio`; empty if it is not, or is not to stop early."""
    losses = [one[LOSS] for one in measured if LOSS in one]
    ratio = variance_ratio(losses, config.early_stop_patience)
    if not (config.early_stop and ratio < config.early_stop_threshold):
        return ""
    return (
        f"the validation loss has settled: the variance of the newest {config.early_stop_patience} of {len(losses)} is "
        f"{ratio:.3f} of that of all, below --early_stop_threshold {config.early_stop_threshold:g}"
    )


def end_when_settled(config: StoppingConfig, earlier: Sequence[Measured], report: StepReport) -> StepReport | None:
    """A hook: ends the run; `earlier` is what was measured before the step."""
    ended = LOSS in report.measured and settled(config, [*earlier, dict(report.measured)])
    return replace(report, ended=ended) if ended else None


def best_step(config: TrainConfig, measured: Sequence[Measured], now: int) -> int:
    """The best step by --keep_best, of equals the first: of those that have a checkpoint, and `now`; that without."""
    by = config.stopping.keep_best
    name, sign = (LOSS, -1) if by == "loss" else (FIDELITY, 1)
    scores = {one["step"]: sign * one[name] for one in measured if by and np.isfinite(one.get(name, np.nan))}
    there = [step for step in scores if step == now or checkpoint_folder(config.output_dir, step).is_dir()]
    return max(there, key=scores.__getitem__, default=now)
