"""Damage to a mask: how much of it can be wrong before the concept is lost?

The Cones paper claims that coarse masks do as well as fine ones; these functions go further, entry by entry. Each takes
a mask, a fraction and a seed, and returns a binary mask; at a fraction of 0, the mask's own binary form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .. import checks
from .mask import ConceptNeurons


def flipped(found: ConceptNeurons, fraction: float, *, seed: int = 0) -> ConceptNeurons:
    """Flip a fraction of all n entries, shut to open and open to shut: noise on the stored bits.

    A mask is sparse, so most flips shut neurons that have nothing to do with the concept.
    """
    rng = _generator(found, fraction, seed)
    hit = rng.choice(found.n, size=round(fraction * found.n), replace=False)
    return _binary(found, np.setxor1d(found.shut(), hit, assume_unique=True), f"{fraction:.2%} flipped")


def dropped(found: ConceptNeurons, fraction: float, *, seed: int = 0) -> ConceptNeurons:
    """Reopen a fraction of the shut neurons."""
    rng, shut = _generator(found, fraction, seed), found.shut()
    kept = rng.choice(len(shut), size=len(shut) - round(fraction * len(shut)), replace=False)
    return _binary(found, np.sort(shut[kept]), f"{fraction:.2%} dropped")


def moved(found: ConceptNeurons, fraction: float, *, seed: int = 0) -> ConceptNeurons:
    """Move a fraction of the shut neurons to an open neighbour in the same row of the same matrix.

    The neighbour reads the next component of the text for the same output channel, so the density of each layer and
    each channel stays the same. Neurons whose neighbours are both shut, or already taken, stay where they are.
    """
    rng, shut = _generator(found, fraction, seed), found.shut().astype(np.int64)
    mask = np.zeros(found.n, bool)
    mask[shut] = True
    width = np.zeros(found.n, np.int32)
    place = np.zeros(found.n, np.int32)
    for layer in found.layout:
        width[layer.slice] = layer.shape[1]
        place[layer.slice] = np.arange(layer.size) % layer.shape[1]
    for j in rng.choice(shut, size=round(fraction * len(shut)), replace=False):
        steps = [step for step in (-1, 1) if 0 <= place[j] + step < width[j] and not mask[j + step]]
        if steps:
            mask[j], mask[j + rng.choice(steps)] = False, True
    return _binary(found, np.flatnonzero(mask), f"{fraction:.2%} moved")


DAMAGES: dict[str, Callable[..., ConceptNeurons]] = {"flipped": flipped, "dropped": dropped, "moved": moved}


def _generator(found: ConceptNeurons, fraction: float, seed: int) -> np.random.Generator:
    checks.of_kind("found", found, ConceptNeurons)
    checks.number("fraction", fraction, checks.SHARE, kind="share")
    return np.random.default_rng(checks.seed("seed", seed))


def _binary(found: ConceptNeurons, shut: np.ndarray, what: str) -> ConceptNeurons:
    settings = {**found.settings, "precision": "binary", "damage": what}
    name = f"{found.subject}, {what}"
    return replace(found, indices=shut, scales=np.zeros(len(shut), np.float32), subject=name, settings=settings)
