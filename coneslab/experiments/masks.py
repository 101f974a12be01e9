"""Experiments on masks: precision, storage and damage."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..edits.base import Combined, Edit
from ..edits.low_rank import compress
from ..methods.personalization.custom_diffusion import custom_diffusion
from ..methods.personalization.textual_inversion import textual_inversion
from ..neurons.damage import DAMAGES
from ..neurons.encoding import PRECISIONS
from ..neurons.loss import concept_loss
from ..seeds import derived
from ..world.subjects import Subject
from .setting import Setting, stored_bytes
from .table import Row, rows_of

FRACTIONS = {"flipped": (0.005, 0.02, 0.05, 0.2), "dropped": (0.1, 0.3, 0.5, 0.8), "moved": (0.1, 0.3, 0.6, 1.0)}


def precision(setting: Setting, subject: Subject, seed: int) -> list[Row]:
    """One mask in four precisions, and the untouched model; the column bytes is the size of the mask's file."""
    found = setting.found(subject, seed)
    rows = setting.measure(subject, None, seed, condition="untouched model", bytes=0)
    for name in PRECISIONS:
        edit = found.to(name)
        rows += setting.measure(subject, edit, seed, condition=name, bytes=len(edit.to_bytes()))
    return rows


ENERGIES = (0.6, 0.9)  # of a compressed delta; the first is the paper's


def storage(setting: Setting, subject: Subject, seed: int) -> list[Row]:
    """Bytes that each method stores for one subject, and its loss; plain encodings and the bound, to compare."""
    pipe, found = setting.pipe, setting.found(subject, seed)
    trained: dict[str, Any] = {"seed": derived(seed, subject.name), "steps": setting.finetune_steps, "progress": False}
    tuned: Any = custom_diffusion(pipe, subject, **trained)
    vectors, delta = tuned.edits
    edits: dict[str, Edit | None] = {
        "untouched model": None,
        "Textual Inversion": textual_inversion(pipe, subject, **trained),
        **{f"mask, {name}": found.to(name) for name in PRECISIONS},
        "Custom Diffusion": tuned,
    }
    for energy in ENERGIES:
        edits[f"Custom Diffusion, {energy:.0%} of its energy"] = Combined((vectors, compress(delta, energy=energy)))
    rows = []
    for name, edit in edits.items():
        size = 0 if edit is None else stored_bytes(edit)
        loss = concept_loss(pipe, subject, edit=edit, samples=setting.samples).subject
        rows += rows_of({"bytes": size, "concept loss": loss}, condition=name)
    binary, n = found.binary(), found.layout.n
    sizes = {
        "binary mask, entropy bound": binary.entropy_bound,
        "binary mask, int32 indices": 4 * len(binary),
        "binary mask, one bit a neuron": -(-n // 8),
        "all keys and values, float16": 2 * n,
        "all keys and values, float32": 4 * n,
    }
    return rows + [row for name, size in sizes.items() for row in rows_of({"bytes": size}, condition=name)]


def damage(setting: Setting, subject: Subject, seed: int) -> list[Row]:
    """The binary mask with a fraction of its entries flipped, dropped or moved to a neighbour."""
    found = setting.found(subject, seed).binary()
    rows = setting.measure(subject, None, seed, condition="untouched model", fraction=np.nan)
    rows += setting.measure(subject, found, seed, condition="whole mask", fraction=0.0)
    for kind, fractions in FRACTIONS.items():
        for fraction in fractions:
            edit = DAMAGES[kind](found, fraction, seed=derived(seed, kind, subject.name))
            rows += setting.measure(subject, edit, seed, condition=f"{kind} {fraction:g}", fraction=fraction)
    return rows
