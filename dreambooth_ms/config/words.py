"""The settings of new words, whose vectors are trained."""

from dataclasses import dataclass
from typing import Annotated

from dreambooth_ms.config.ranges import INNER_SHARE, NOT_EMPTY, Range, at_least
from dreambooth_ms.config.rules import Rule, needs, only_with

OF_CUSTOM_DIFFUSION = "ktn+pll+ucd"
"""What new words start from, as in diffusers' script: rare words that are one token each."""


def split_words(joined: str | None) -> list[str]:
    """The words of a flag."""
    return [word.strip() for word in (joined or "").split("+")] if joined else []


_WORDS = Range(
    "different words put together by +, such as <new1>+<new2>, without a slash",
    lambda joined: all(words := split_words(joined) or [""]) and len(set(words)) == len(words) and "/" not in joined,
)
_TRAINED = Rule(
    lambda values: values["method"] == "full" or (values["method"] == "lora" and not values["train_new_words"]),
    "--modifier_token: new words are trained by --method custom_diffusion or textual_inversion, or beside a LoRA with "
    "--train_new_words",
)
_ENOUGH = Rule(
    lambda values: len(split_words(values["initializer_token"])) < len(split_words(values["modifier_token"])),
    "--initializer_token {initializer_token!r}: expected a word for each of --modifier_token {modifier_token!r}",
)


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """New words, whose vectors are trained."""

    modifier_token: Annotated[str | None, _WORDS, _TRAINED] = None
    """New words for the subjects, put together by +: "<new1>+<new2>". Prompts name the subjects by them."""
    initializer_token: Annotated[str | None, NOT_EMPTY, only_with("modifier_token"), _ENOUGH] = None
    """Words that are one token each, put together by +, whose vectors the new words start from. None: ktn+pll+ucd
    with custom_diffusion, where the vocabulary has them; else random vectors as large as those of the vocabulary."""
    num_vectors: Annotated[int, at_least(1), only_with("modifier_token")] = 1
    """Tokens that each new word stands for; each has a vector of its own."""
    train_new_words: Annotated[
        bool,
        needs("modifier_token", "the new words"),
        only_with("method", "lora"),
    ] = False
    """With lora: train the vectors of new words, too (pivotal tuning)."""
    train_text_encoder_ti_frac: Annotated[float | None, INNER_SHARE, only_with("modifier_token")] = None
    """Share of the run after which new words stay as they are. None: they are trained to the end."""

    @property
    def words(self) -> list[str]:
        """The new words."""
        return split_words(self.modifier_token)
