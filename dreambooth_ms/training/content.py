"""What a run learns from, by its content: a run goes on with the same pictures and weights, wherever they are."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dreambooth_ms.data.records import Concept
from dreambooth_ms.weights.bundle import ModelBundle

_LISTED = 5


@dataclass(frozen=True)
class Content:
    """Digests of the base's networks, and of each concept's pictures in their order: what caches are keyed by."""

    base: Mapping[str, str]
    """By the networks' names."""
    pictures: Mapping[str, Sequence[tuple[str, str]]]
    """By the concepts' names: (file name, digest)."""

    @classmethod
    def of(cls, base: Mapping[str, str], concepts: Iterable[Concept]) -> "Content":
        """Of a base's digests and concepts."""
        return cls(base, {one.name: [(record.path.name, record.digest) for record in one.records] for one in concepts})

    @classmethod
    def from_json(cls, value: Any) -> "Content":
        """What `to_json` gave.

        Raises:
            ValueError, TypeError, AttributeError, KeyError: it did not.
        """
        base = {str(name): str(digest) for name, digest in value["base"].items()}
        pictures = {
            str(concept): [(str(name), str(digest)) for name, digest in pairs]
            for concept, pairs in value["pictures"].items()
        }
        return cls(base, pictures)

    def to_json(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return asdict(self)

    def changes(self, now: "Content", to_come: Iterable[str] = ()) -> list[str]:
        """What is not as it was, in words; pictures may have other names. `to_come`: files that are still to be made."""
        networks = [name for name, digest in now.base.items() if self.base.get(name) != digest]
        found = [f"other weights of the base's {' and '.join(networks)}"] if networks else []
        for concept, pairs in self.pictures.items():
            before, after = dict(pairs), dict(now.pictures.get(concept, ()))
            after = {name: before[name] for name in to_come if name in before} | after
            if sorted(before.values()) != sorted(after.values()):
                found += _changed_files(concept, before, after)
        return found


def _changed_files(concept: str, before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    groups = {
        "removed": [name for name in before if name not in after],
        "added": [name for name in after if name not in before],
        "changed": [name for name in after if before.get(name, after[name]) != after[name]],
    }
    for what, names in groups.items():
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            yield f"{concept} pictures {what}: {', '.join(names[:_LISTED])}{more}"


def base_digests(base: ModelBundle) -> dict[str, str]:
    """Of a base's networks, by their names. All weights are read."""
    networks = {"unet": base.denoiser.digest, "vae": base.codec.digest} | {one.name: one.digest for one in base.text}
    return {name: digest() for name, digest in networks.items()}


def in_order(concept: Concept, earlier: Content | None) -> Concept:
    """The pictures in the order that they had, whatever they are called now, so that every row sees what it would have
    seen; unchanged if they are others."""
    digests = [digest for _, digest in earlier.pictures.get(concept.name, ())] if earlier else []
    held = defaultdict(list)
    for record in concept.records:
        held[record.digest].append(record)
    if sorted(digests) != sorted(record.digest for record in concept.records):
        return concept
    return replace(concept, records=tuple(held[digest].pop(0) for digest in digests))
