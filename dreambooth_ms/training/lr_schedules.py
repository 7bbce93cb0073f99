"""How the learning rate changes over a run: the six schedules of diffusers.optimization, as one pure function."""

import math

from dreambooth_ms.config.train import POLYNOMIAL_END_RATE, OptimiserConfig


def learning_rate_factor(config: OptimiserConfig, step: int, total_steps: int, base_learning_rate: float) -> float:
    """The factor on the base learning rate for one optimiser step.

    All schedules but `constant` rise linearly from 0 over the warm-up.

    Args:
        config: which of the six schedules, and its settings.
        step: optimiser steps taken so far, so that the first update uses step 0.
        total_steps: length of the run, warm-up included; not used by the constant schedules.
        base_learning_rate: the learning rate that the factor multiplies; `polynomial` ends at an absolute rate.

    Raises:
        ValueError: the schedule is none of the six.
    """
    kind, warmup_steps = config.lr_scheduler, config.lr_warmup_steps
    if kind == "constant":
        return 1.0
    if step < warmup_steps:
        return step / warmup_steps
    decay_steps = max(1, total_steps - warmup_steps)
    progress = (step - warmup_steps) / decay_steps
    remaining = max(0, total_steps - step) / decay_steps
    match kind:
        case "constant_with_warmup":
            return 1.0
        case "linear":
            return remaining
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "cosine_with_restarts":
            return 0.5 * (1.0 + math.cos(math.pi * (config.lr_num_cycles * progress % 1.0))) if progress < 1.0 else 0.0
        case "polynomial":
            end = POLYNOMIAL_END_RATE / base_learning_rate
            return (1.0 - end) * remaining**config.lr_power + end
    raise ValueError(f"unknown learning rate schedule {kind!r}")
