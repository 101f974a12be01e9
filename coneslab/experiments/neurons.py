"""Experiments on the search: its controls, density, reference pictures, other ways to find neurons, agreement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..edits.base import Edit
from ..finetuning.samples import prior_pictures
from ..neurons.controls import Criterion, finetune_kv, reversed_neurons, top_k_neurons
from ..neurons.union import cosines, output_changes
from ..seeds import derived
from ..world.subjects import FAR, NEAR, Subject, truth, wanted_pictures
from ..world.subjects import subject as subject_named
from .setting import VARIANTS, Setting, alignments, timed
from .table import Row, rows_of

DENSITIES = (0.9, 0.98, 0.99, 0.995, 0.998)  # quantiles used as threshold


CONTROLS = (
    "real pictures",
    "untouched model",
    "concept neurons, float",
    "concept neurons, binary",
    "random mask",
    "another subject's mask",
    *VARIANTS,
    "reversed sign",
    "top-k |gradient|",
    "top-k |weight × gradient|",
    "top-k |weight|",
    "K-V fine-tuning",
)


def real_pictures(setting: Setting, subject: Subject, seed: int) -> list[Row]:
    """The measures of real pictures of the subject in the scenes asked for: the ceiling."""
    drawn = wanted_pictures(subject, n=setting.pictures, seed=derived(seed, "real", subject.name))
    return rows_of(alignments(setting.judge, subject, drawn), condition=CONTROLS[0], seconds=0.0)


def controls(setting: Setting, subject: Subject, seed: int) -> list[Row]:
    """Concept neurons beside every control; the column seconds says how long each edit took to make."""
    pipe, rounds = setting.pipe, setting.rounds
    own = derived(seed, subject.name)
    common: dict[str, Any] = {"prior": prior_pictures(pipe, subject, seed=own), "seed": own, "progress": False}

    def edits() -> Iterator[tuple[Edit | None, float]]:
        yield None, 0.0
        found, seconds = setting.found_in(subject, seed)
        binary = found.binary()
        yield found, seconds
        yield binary, seconds
        yield setting.random_mask(binary, subject, seed), 0.0
        yield setting.found(next_of_its_kind(subject), seed).binary(), 0.0
        for options in VARIANTS.values():
            found, seconds = setting.found_in(subject, seed, **options)
            yield found.binary(), seconds
        yield timed(lambda: reversed_neurons(pipe, subject, rounds=rounds, **common).binary())
        criteria: tuple[Criterion, ...] = ("gradient", "gradient_times_weight", "weight")
        for criterion in criteria:
            top: dict[str, Any] = {"criterion": criterion, "like": binary, "rounds": max(1, rounds // 4)}
            yield timed(partial(top_k_neurons, pipe, subject, **top, **common))
        yield timed(lambda: finetune_kv(pipe, subject, steps=setting.finetune_steps, **common))

    rows = real_pictures(setting, subject, seed)
    for name, (edit, seconds) in zip(CONTROLS[1:], edits(), strict=True):
        rows += setting.measure(subject, edit, seed, condition=name, seconds=seconds)
    return rows


def density(setting: Setting, subject: Subject, seed: int) -> list[Row]:
    """Searches with different thresholds, from few shut neurons to many, each beside a random mask as dense.

    Both as in the paper and at the subject's own words only.
    """
    rows = setting.measure(subject, None, seed, condition="untouched model", quantile=np.nan)
    for quantile in DENSITIES:
        for place, options in (("", {}), (" at its words", VARIANTS["at its words"])):
            found = setting.found(subject, seed, threshold_quantile=quantile, **options).binary()
            for name, edit in (("concept neurons", found), ("random mask", setting.random_mask(found, subject, seed))):
                rows += setting.measure(subject, edit, seed, condition=f"{name}{place} {quantile:g}", quantile=quantile)
    return rows


def references(setting: Setting, subject: Subject, seed: int) -> list[Row]:
    """Searches on the first one to five reference pictures; measured on all five."""
    rows = setting.measure(subject, None, seed, condition="0 pictures", references=0)
    for count in range(1, len(subject.images) + 1):
        few = replace(subject, images=subject.images[:count], records=subject.records[:count])
        edit = setting.search(few, seed).binary()
        rows += setting.measure(subject, edit, seed, condition=f"{count} picture{'s' * (count != 1)}", references=count)
    return rows


FINDERS: dict[str, dict[str, Any]] = {
    "paper's rule": {},
    "no quota per layer": {"per_layer": False},
    "curvature": {"rule": "curvature"},
    "bands of timesteps": {"rule": "bands"},
    "straight-through": {"rule": "straight-through"},
    **VARIANTS,
}


def finders(setting: Setting, subject: Subject, seed: int) -> list[Row]:
    """The paper's search rule beside others, all with as many gradients; the column seconds is the search's."""
    prior_pictures(setting.pipe, subject, seed=derived(seed, subject.name))  # drawn before the clock starts
    rows = setting.measure(subject, None, seed, condition="untouched model", seconds=0.0)
    for name, options in FINDERS.items():
        found, seconds = timed(partial(setting.search, subject, seed, **options))
        rows += setting.measure(subject, found.binary(), seed, condition=name, seconds=seconds)
    return rows


def next_of_its_kind(subject: Subject) -> Subject:
    """Another subject that is near, or far, like this one."""
    kin = NEAR if truth(subject.name).kind == "near" else FAR
    place = kin.index(subject.name) if subject.name in kin else -1
    return subject_named(kin[(place + 1) % len(kin)])


def agreement(setting: Setting, subject: Subject, seed: int) -> list[Row]:
    """How similar two masks are, as sets of neurons and in their effect on the denoiser's output."""
    here = setting.found(subject, seed).binary()
    others = {
        "same subject, other seed": setting.found(subject, derived(seed, "other seed")).binary(),
        "another subject": setting.found(next_of_its_kind(subject), seed).binary(),
        "random mask": setting.random_mask(here, subject, seed),
    }
    own, *changes = output_changes(setting.pipe, [here, *others.values()], [subject])
    rows = []
    for (name, other), change in zip(others.items(), changes, strict=True):
        both = here.overlap(other)
        values = {
            "overlap (Jaccard)": both.jaccard,
            "overlap by chance": both.expected_jaccard,
            "cosine of what they change": float(cosines(own, change).mean()),
        }
        rows += rows_of(values, condition=name, density=other.density)
    return rows
