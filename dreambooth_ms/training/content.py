"""What a run learns from, by its content: a run goes on with the same pictures and weights, wherever they are."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from dreambooth_ms.data.records import Concept, Source
from dreambooth_ms.errors import show_names
from dreambooth_ms.weights.bundle import ModelBundle

Content: TypeAlias = dict[str, dict[str, str]]
"""Digests that caches know, by name: of the networks under "base", of a concept's pictures, in order, under its own;
and under SETTINGS what else is said of the concepts."""

SETTINGS = "concepts"


def base_digests(base: ModelBundle) -> dict[str, str]:
    """Of a base's networks, by their names. All weights are read."""
    networks = {"unet": base.denoiser.digest, "vae": base.codec.digest} | {one.name: one.digest for one in base.text}
    return {name: digest() for name, digest in networks.items()}


def content_of(digests: Mapping[str, str], concepts: Iterable[Concept], sources: Iterable[Source] = ()) -> Content:
    """Of a base's digests, concepts and where these come from."""
    pictures = {
        concept.name: {one.path.name: digest for one, digest in zip(concept.records, digests_of(concept), strict=True)}
        for concept in concepts
    }
    settings = {key: value for source in sources for key, value in source.settings.items()}
    return {"base": dict(digests), **({SETTINGS: settings} if settings else {}), **pictures}


def digests_of(concept: Concept) -> list[str]:
    """Of each picture, with its mask, and its captions where they are its own."""
    parts = [
        (one.digest, *([one.mask.digest] if one.mask else []), *(one.captions if concept.has_captions else ()))
        for one in concept.records
    ]
    return [hashlib.sha256("\n".join(own).encode()).hexdigest() if own[1:] else own[0] for own in parts]


def changes(before: Content, now: Content, to_come: Mapping[str, Iterable[str]] | None = None) -> list[str]:
    """What is not as it was, in words; pictures may have other names. `to_come`: files that are yet to be made, by
    their concepts."""
    found = []
    # An earlier version knew no settings, and no other concepts than those of its flags.
    for group in (before | now) if before.get(SETTINGS) else before:
        old = before.get(group, {})
        new = {name: old[name] for name in (to_come or {}).get(group, ()) if name in old} | now.get(group, {})
        lost, come = _beyond(old, new), _beyond(new, old)
        names = {"removed": lost - come, "added": come - lost, "changed": lost & come}
        found += [f"{group}: {show_names(sorted(own), at_most=5)} {what}" for what, own in names.items() if own]
    return found


def _beyond(some: Mapping[str, str], others: Mapping[str, str]) -> set[str]:
    """The names of what the others lack, each as often as they hold it; of equal files those with other names."""
    left, names = Counter(others.values()), set()
    for name, digest in sorted(some.items(), key=lambda item: others.get(item[0]) != item[1]):
        left[digest] -= 1
        names |= {name} if left[digest] < 0 else set()
    return names


def in_order(concept: Concept, earlier: Content) -> Concept:
    """The pictures in the order that they had, whatever they are called now, so that every row sees what it would have
    seen; unchanged if they are others."""
    digests, own, held = list(earlier.get(concept.name, {}).values()), digests_of(concept), defaultdict(list)
    for digest, record in zip(own, concept.records, strict=True):
        held[digest].append(record)
    if sorted(digests) != sorted(own):
        return concept
    return replace(concept, records=tuple(held[digest].pop(0) for digest in digests))
