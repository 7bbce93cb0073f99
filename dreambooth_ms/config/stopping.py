"""The settings of `train` that say when a subject is learnt, and which checkpoint is the result."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dreambooth_ms.config.ranges import INNER_SHARE, NOT_EMPTY, PATH, at_least
from dreambooth_ms.config.rules import Resume, Rule, excludes, needs, no_effect, only_with

_COMPARED = no_effect(
    "without --validation_loss or --keep_best fidelity",
    lambda values: not values["validation_loss"] and values["keep_best"] != "fidelity",
)
_OF_ONE = excludes("concepts_list", message="and --concepts_list: only photographs of one subject are held out")
_NEVER = Rule(
    lambda values: (
        values["early_stop_patience"] * values["validation_loss_steps"] >= (values["max_train_steps"] or float("inf"))
    ),
    "--early_stop: {early_stop_patience} losses, one in {validation_loss_steps} steps, are not there before the end; "
    "lower --early_stop_patience",
    is_note=True,
)
_HAS_LOSS = Rule(
    lambda values: (
        values["keep_best"] == "loss"
        and (not values["validation_loss"] or values["checkpointing_steps"] % values["validation_loss_steps"])
    ),
    "--keep_best loss: needs --validation_loss, and --checkpointing_steps that are a multiple of its steps "
    "({validation_loss_steps}), so that each checkpoint has a loss",
)
_HAS_PROMPTS = Rule(
    lambda values: values["keep_best"] == "fidelity" and not (values["instance_prompt"] and values["class_prompt"]),
    "--keep_best fidelity: needs --instance_prompt and --class_prompt, whose pictures are compared; without them, as "
    "with several subjects, give --keep_best loss",
)
_HAS_CHECKPOINTS = Rule(
    lambda values: values["checkpointing_steps"] >= (values["max_train_steps"] or float("inf")),
    "--keep_best: there is no checkpoint before the end; lower --checkpointing_steps {checkpointing_steps}",
)


@dataclass(frozen=True, kw_only=True)
class StoppingConfig:
    """When the subject is learnt, and which checkpoint is the result."""

    validation_loss: Annotated[bool, Resume.MAY_CHANGE] = False
    """Measure the loss of 16 rows whose pictures, noise and timesteps stay the same, the latter spread over all."""
    validation_loss_steps: Annotated[int, at_least(1), only_with("validation_loss"), Resume.MAY_CHANGE] = 10
    """Optimiser steps from one such loss to the next; there is also one after the last step."""
    held_out_data_dir: Annotated[str | None, NOT_EMPTY, PATH, _COMPARED, _OF_ONE, Resume.BY_CONTENT] = None
    """Folder with two or more photographs of the subject that are not trained on, for this loss and for keep_best
    fidelity. None: those that are trained on."""
    early_stop: Annotated[bool, needs("validation_loss", "which says when"), _NEVER, Resume.MAY_CHANGE] = False
    """End the run once this loss has settled: when the variance of the newest early_stop_patience values falls below
    early_stop_threshold of that of all."""
    early_stop_patience: Annotated[int, at_least(2), only_with("early_stop"), Resume.MAY_CHANGE] = 20
    """Number of newest losses that have to agree."""
    early_stop_threshold: Annotated[float, INNER_SHARE, only_with("early_stop"), Resume.MAY_CHANGE] = 0.15
    """Share of the whole variance below which they do."""
    keep_best: Annotated[
        Literal["fidelity", "loss"] | None, _HAS_LOSS, _HAS_PROMPTS, _HAS_CHECKPOINTS, Resume.MAY_CHANGE
    ] = None
    """The result is the best of all checkpoints and the last step: by the lowest validation loss, or for fidelity by
    the highest subject similarity minus class drift (as `evaluate` has them) of 8 pictures of instance_prompt and 8 of
    class_prompt; what the last step left stays, as the newest checkpoint."""
    clip: Annotated[str | None, NOT_EMPTY, PATH, only_with("keep_best", "fidelity"), Resume.MAY_CHANGE] = None
    """CLIP model that measures them, as with `evaluate`. None: the base model's own clip folder."""
