"""The settings of `train` that say when a subject is learnt, and which checkpoint is the result."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dreambooth_ms.config.ranges import INNER_SHARE, NOT_EMPTY, PATH, at_least
from dreambooth_ms.config.rules import Resume, Rule, excludes, needs, no_effect, only_with

_NEVER = Rule(
    lambda values: (
        (total := values["max_train_steps"])
        and values["early_stop_patience"] * values["validation_loss_steps"] >= total
    ),
    "--early_stop: never stops, since the first {early_stop_patience} losses, one in {validation_loss_steps} steps, "
    "are not there before --max_train_steps {max_train_steps}; lower --early_stop_patience",
    is_note=True,
)
_LOSS_FOR_BEST = Rule(
    lambda values: values["keep_best"] == "loss" and not values["validation_loss"],
    "--keep_best loss: needs --validation_loss, the loss that is compared",
)
_LOSS_OF_EACH = Rule(
    lambda values: values["keep_best"] == "loss" and values["checkpointing_steps"] % values["validation_loss_steps"],
    "--keep_best loss: --checkpointing_steps {checkpointing_steps} is no multiple of --validation_loss_steps "
    "{validation_loss_steps}, so that checkpoints have no loss; change one of them",
)
_PROMPTS_FOR_BEST = Rule(
    lambda values: values["keep_best"] == "fidelity" and not (values["instance_prompt"] and values["class_prompt"]),
    "--keep_best fidelity: needs --instance_prompt and --class_prompt, of which pictures are compared; for several "
    "subjects give --keep_best loss",
)
_NOTHING_TO_KEEP = Rule(
    lambda values: (total := values["max_train_steps"]) and values["checkpointing_steps"] >= total,
    "--keep_best: there is no checkpoint before --max_train_steps {max_train_steps}; lower --checkpointing_steps "
    "{checkpointing_steps}",
)
_COMPARED = no_effect(
    "without --validation_loss or --keep_best fidelity",
    lambda values: not values["validation_loss"] and values["keep_best"] != "fidelity",
)


@dataclass(frozen=True, kw_only=True)
class StoppingConfig:
    """When the subject is learnt, and which checkpoint is the result."""

    validation_loss: Annotated[bool, Resume.MAY_CHANGE] = False
    """Measure the loss of 16 rows whose pictures, noise and timesteps stay the same, the latter spread over all."""
    validation_loss_steps: Annotated[int, at_least(1), only_with("validation_loss")] = 10
    """Optimiser steps from one such loss to the next; there is also one after the last step."""
    held_out_data_dir: Annotated[
        str | None,
        NOT_EMPTY,
        PATH,
        _COMPARED,
        excludes("concepts_list", message="is of one subject; leave it out with --concepts_list"),
        Resume.BY_CONTENT,
    ] = None
    """Folder with two or more photographs of the subject that are not trained on, for this loss and for keep_best
    fidelity. None: those that are trained on."""
    early_stop: Annotated[
        bool, needs("validation_loss", "the loss that says when to stop"), _NEVER, Resume.MAY_CHANGE
    ] = False
    """End the run once this loss has settled: when its variance over the newest early_stop_patience values falls below
    early_stop_threshold of that over all values."""
    early_stop_patience: Annotated[int, at_least(2), only_with("early_stop"), Resume.MAY_CHANGE] = 20
    """Number of newest losses that have to agree."""
    early_stop_threshold: Annotated[float, INNER_SHARE, only_with("early_stop"), Resume.MAY_CHANGE] = 0.15
    """Share of the whole variance below which they do."""
    keep_best: Annotated[
        Literal["fidelity", "loss"] | None,
        _LOSS_FOR_BEST,
        _LOSS_OF_EACH,
        _PROMPTS_FOR_BEST,
        _NOTHING_TO_KEEP,
        Resume.MAY_CHANGE,
    ] = None
    """The result is the best of all checkpoints and the last step, by the lowest validation loss, or for fidelity by
    the highest subject similarity minus class drift (as `evaluate` has them) of 8 pictures of instance_prompt and 8 of
    class_prompt; what the last step left stays, as the newest checkpoint."""
    clip: Annotated[str | None, NOT_EMPTY, PATH, only_with("keep_best", "fidelity"), Resume.MAY_CHANGE] = None
    """CLIP model that measures them, as with `evaluate`. None: the base model's own clip folder."""
