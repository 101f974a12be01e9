"""Experiments on several subjects in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np

from ..diffusion.sampling import generate
from ..edits.base import Combined, Edit, applied
from ..measure.asking import finds_objects
from ..neurons.controls import random_neurons
from ..neurons.loss import concept_loss
from ..neurons.mask import ConceptNeurons
from ..neurons.union import (
    TunedNeurons,
    additivity,
    concatenate,
    finetune_together,
    joint_prompt,
)
from ..seeds import derived
from ..world import SCENES
from ..world.subjects import Subject
from .methods import METHODS, chosen_settings
from .setting import VARIANTS, Setting, density_of
from .table import Row, rows_of

COMBINED_SCENES = ("grass", "beach", "room", "night", "white")


TUNING_STEPS = (10, 20, 40, 80)
DOSES = (0.2, 0.35, 0.5, 0.7, 1.0)


def measure_together(
    setting: Setting, subjects: Sequence[Subject], edit: Edit | None, seed: int, dose: float = 1.0
) -> dict[str, float]:
    """Measures of pictures that should show all subjects; alignment with each of them, with all, with the weakest."""
    pipe, judge = setting.pipe, setting.judge
    prompts = [f"{joint_prompt(subjects)} {SCENES[scene][0]}" for scene in COMBINED_SCENES]
    prompts = [prompt for prompt in prompts for _ in range(2 * setting.pictures)]
    with applied(edit, pipe, dose):
        first = derived(seed, "evaluation", *(subject.name for subject in subjects))
        drawn = generate(pipe, prompts, seed=first, batch_size=20, **setting.drawing)
    plain = [reduce(lambda text, subject: subject.plain(text), subjects, prompt) for prompt in prompts]
    classes = [subject.class_word for subject in subjects]
    options: dict[str, Any] = {"edit": edit, "dose": dose, "samples": setting.samples}
    losses = [concept_loss(pipe, subject, **options).subject for subject in subjects]
    near = {subject.name: judge.image_alignment(drawn, subject.images) for subject in subjects}
    return {
        "text alignment": judge.text_alignment(drawn, plain),
        "image alignment": float(np.mean(list(near.values()))),
        "image alignment, weakest subject": min(near.values()),
        **{f"image alignment, {name}": value for name, value in near.items()},
        "every subject found": float(finds_objects(judge, drawn, [classes] * len(drawn)).mean()),
        "concept loss": float(np.mean(losses)),
    }


def searched(setting: Setting, subjects: Sequence[Subject], seed: int, **options: Any) -> list[ConceptNeurons]:
    """The subjects' masks from a search with these options, and the settings chosen for so many subjects."""
    method = "Cones, token-local" if options.get("scope") else "Cones, binary"
    chosen = METHODS[method].of_single(chosen_settings(method, len(subjects)))
    return [setting.found(subject, seed, **{**chosen, **options}) for subject in subjects]


def joined(found: Sequence[ConceptNeurons]) -> Edit:
    """Binary masks, all on at once: as one mask, or side by side if each acts at its own words."""
    binary = [mask.binary() for mask in found]
    return Combined(tuple(binary)) if binary[0].scope else concatenate(*binary)


def together(setting: Setting, subjects: Sequence[Subject], seed: int) -> list[Row]:
    """Several subjects in one picture: the union of their masks, before and after collaborative fine-tuning.

    Masks are searched for with the settings chosen for so many subjects; "union, as for one subject" has the masks of
    the other experiments.
    """
    found = searched(setting, subjects, seed)
    union = concatenate(*[mask.binary() for mask in found])
    own_seed = derived(seed, *(subject.name for subject in subjects))
    conditions: list[tuple[str, int, Edit | None]] = [  # name, steps of tuning, edit
        ("untouched model", 0, None),
        ("random mask", 0, random_neurons(union, seed=own_seed)),
        ("union, float", 0, concatenate(*found)),
        ("union", 0, union),
        ("union, as for one subject", 0, joined([setting.found(subject, seed) for subject in subjects])),
        *((f"union, {name}", 0, joined(searched(setting, subjects, seed, **own))) for name, own in VARIANTS.items()),
    ]

    def keep(state: Mapping[str, Any]) -> None:
        steps = state["step"] + 1
        if steps in TUNING_STEPS:
            tuned = TunedNeurons(union, state["weights"]["values"].cpu().numpy())
            conditions.append((f"union, {steps} steps", steps, tuned))

    options: dict[str, Any] = {"steps": max(TUNING_STEPS), "seed": own_seed, "progress": False, "callback": keep}
    if union.density:
        finetune_together(setting.pipe, union, subjects, **options)
    else:  # the searches found nothing, so there is nothing to tune
        conditions += [(f"union, {steps} steps", steps, union) for steps in TUNING_STEPS]
    rows = []
    for name, steps, edit in conditions:
        values = measure_together(setting, subjects, edit, seed)
        rows += rows_of(values, condition=name, count=len(subjects), steps=steps, density=density_of(edit))
    own = [
        concept_loss(setting.pipe, subject, edit=mask.binary(), samples=setting.samples).subject
        for subject, mask in zip(subjects, found, strict=True)
    ]
    facts = {"condition": "own mask alone", "count": len(subjects), "steps": 0}
    rows += rows_of({"concept loss": float(np.mean(own))}, **facts)
    sums = additivity(setting.pipe, [mask.binary() for mask in found], subjects)
    shares = {f"additivity: {name}": value for name, value in asdict(sums).items()}
    shares["overlap (Jaccard)"] = np.mean([a.overlap(b).jaccard for a, b in combinations(found, 2)])
    shares["overlap by chance"] = np.mean([a.overlap(b).expected_jaccard for a, b in combinations(found, 2)])
    return rows + rows_of(shares, condition="union", count=len(subjects), steps=0, density=union.density)


def doses(setting: Setting, subjects: Sequence[Subject], seed: int) -> list[Row]:
    """How much of the subjects' masks, joined, is best: every dose of the union and of the masks at their words."""
    facts = {"count": len(subjects)}
    rows = rows_of(measure_together(setting, subjects, None, seed), condition="untouched model", dose=0.0, **facts)
    for name, options in {"union": {}, "at its words": VARIANTS["at its words"]}.items():
        edit = joined(searched(setting, subjects, seed, **options))
        for dose in DOSES:
            values = measure_together(setting, subjects, edit, seed, dose)
            rows += rows_of(values, condition=f"{name}, dose {dose:g}", dose=dose, density=density_of(edit), **facts)
    return rows
