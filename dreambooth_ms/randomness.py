"""Randomness as a function: every draw is named by (seed, purpose, step, row), and nothing keeps a state."""

import hashlib
import secrets
from functools import lru_cache

import numpy as np


def generator(seed: int, purpose: str, step: int = 0, row: int = 0) -> np.random.Generator:
    """A fresh generator for one draw: Philox 4x64 (Salmon et al., 2011), keyed by seed and purpose.

    Args:
        seed: 0 .. 2**64 - 1.
        purpose: what is drawn ("noise", "timestep", "crop" …); different purposes are independent.
        step: what is counted, 0-based: epochs, or the rows of a run, or steps.
        row: row within it, 0-based.
    """
    # As uint64 from the start: a list of large and small integers would pass through float64 and merge seeds.
    key, counter = np.array([seed, _purpose_key(purpose)], np.uint64), np.array([0, 0, step, row], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@lru_cache(maxsize=256)
def _purpose_key(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


def standard_normal(shape: tuple[int, ...], seed: int, purpose: str, step: int = 0, row: int = 0) -> np.ndarray:
    """Float32 draws from N(0, 1) of the given shape."""
    return generator(seed, purpose, step, row).standard_normal(shape, dtype=np.float32)


def draw_seed() -> int:
    """A seed from the operating system's own randomness, for a run that names none."""
    return secrets.randbits(32)
