"""Results of Custom Diffusion, one concept each, as one without training (Kumari et al., 2023, section 3.2): layers
make of each concept's words what its own weights make, and of captions as nearly as that allows what the base makes.

Shapes: N states of the concepts' words, R of captions, D the width of a state.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path

import numpy as np

from dreambooth_ms.adapters.cross_attention import CROSS_ATTENTION
from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.word_files import write_words
from dreambooth_ms.adapters.writing import write_replacements
from dreambooth_ms.atomic import check_free, new_folder
from dreambooth_ms.config.commands import MergingConfig
from dreambooth_ms.conversion import run_setting
from dreambooth_ms.data.conditioning import PromptTokenizer, encode_prompts
from dreambooth_ms.errors import WeightError, count_of, show_names
from dreambooth_ms.formats.files.dtypes import DTYPES, DType
from dreambooth_ms.models.specs import read_table
from dreambooth_ms.weights.bundle import ModelBundle

CAPTIONS, PREFIX = 240, "photo of a "
"""Captions of our own; and what a concept's words are read behind a second time."""
RIDGE, EXACT = 1e-6, 1e-4
"""Added to the captions' second moments, as a share of them, for what no caption has; and how exact concepts are."""


def merge_concepts(wanted: MergingConfig, bundle: ModelBundle, captions: Sequence[str]) -> Iterator[str]:
    """Write results of Custom Diffusion as one, into a new folder, and yield what the user should know. WeightError if
    one is no such result, or changes other layers; their words cannot be told apart; or the target is wrong."""
    target, dtype = Path(wanted.target), DTYPES[wanted.dtype or "fp32"]
    check_free(target)
    concepts, phrases, words, updates = [], list[str](), {}, {}
    for path, said in zip(wanted.concepts, wanted.concept_prompts or [""] * len(wanted.concepts), strict=True):
        adapter = open_adapter(Path(path), [bundle.opened().spec], bundle.path).adapter
        merged, told = CROSS_ATTENTION["crossattn_kv"], said or str(run_setting(Path(path), "instance_prompt"))
        others = [name for name in adapter.updates if not (name.startswith("unet.") and name.endswith(merged))]
        if others or not (adapter.words and adapter.updates):
            found = show_names(others or [*adapter.words, *adapter.updates])
            is_more = others and all(name.endswith(CROSS_ATTENTION["crossattn"]) for name in others)
            remedy = "; train it with --freeze_model crossattn_kv" if is_more else ""
            raise WeightError(f"{path}: expected new words and {' and '.join(merged)} of a UNet, got {found}{remedy}")
        names = {}
        for word, vectors in adapter.words.items():
            free = (f"<new{number}>" for number in count(1))
            names[word] = next(name for name in chain([word], free) if name not in words)
            words[names[word]] = vectors
        pattern = "|".join(map(re.escape, names))
        if not (first := re.search(pattern, told)) and said:
            raise WeightError(f"--concept_prompts: {said!r} has no word of {path} ({show_names([*names])})")
        called = told[first.start() :] if first else " ".join(names)
        concepts.append(adapter.parts["unet"])
        phrases.append(re.sub(pattern, lambda one: names[one[0]], called))  # noqa: B023
        yield f'{path}: its subject is "{phrases[-1]}"'
    parts = projections(*_states(bundle.with_words(words), phrases, captions))
    for layer in dict.fromkeys(chain(*concepts)):
        base = bundle.opened().tensors[f"unet.{layer}.weight"].cast_to(DType.F32).read()
        own = [one[layer].delta(base) @ part for one, part in zip(concepts, parts, strict=True) if layer in one]
        updates[layer] = Update({"weight": (base + sum(own)).astype(np.float32)})
    with new_folder(target) as folder:
        write_words(words, folder, dtype, {})
        write_replacements(updates, folder, dtype, {})
    yield f"wrote {target}: {count_of(len(concepts), 'concept')} in {count_of(len(updates), 'layer')}"


def projections(captions_RD: np.ndarray, concepts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What of each concept's change is kept: W = W_0 + sum of (W_i - W_0) P_i, with P_i (D, D) in float64.

    Of all W that are W_i on the states (N, D) of each concept, the one nearest to W_0 on the captions (eq. 4 and 5):
    with their second moments G and all states C, P_i = C_i^T K_i, where K = (C G^-1 C^T)^-1 C G^-1. WeightError if the
    states depend on each other.
    """
    captions, C = captions_RD.astype(np.float64), np.concatenate(concepts).astype(np.float64)
    moments = captions.T @ captions
    moments += np.eye(len(moments)) * RIDGE * np.trace(moments) / len(moments)
    reach = np.linalg.solve(moments, C.T)
    K = np.linalg.lstsq(C @ reach, reach.T, rcond=None)[0]
    if not np.abs(K @ C.T - np.eye(len(C))).max() < EXACT:
        raise WeightError("--concepts: their words read alike; name each concept once, by a short --concept_prompts")
    ends = np.cumsum([len(own) for own in concepts])[:-1]
    return [own.T @ kept for own, kept in zip(np.split(C, ends), np.split(K, ends), strict=True)]


def _states(
    bundle: ModelBundle, phrases: Sequence[str], captions: Sequence[str]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """What layers read of captions, without the mark at the start, and of each phrase, which begins with a new word:
    what stands before it stays as it is."""
    tokenizer, prompts = bundle.text[0].tokenizer(), [*captions, *phrases, *(PREFIX + own for own in phrases)]
    read = dict(encode_prompts(PromptTokenizer(bundle.text), bundle.load_text_encoders(), prompts))

    def states(prompt: str, before: str = "") -> np.ndarray:
        return read[prompt].text[1 + len(tokenizer.tokens(before)) : 2 + len(tokenizer.tokens(prompt))]

    of_concepts = [np.concatenate([states(own), states(PREFIX + own, PREFIX)]) for own in phrases]
    return np.concatenate([states(caption) for caption in captions]), of_concepts


def plain_captions() -> list[str]:
    """Captions of ordinary pictures, all different."""
    lists = read_table(Path(__file__).with_suffix(".yaml")).values()
    return [" ".join(own[number % len(own)] for own in lists) for number in range(CAPTIONS)]
