"""The experiments behind the notebooks, each a table in `data/results` that `coneslab experiment NAME` makes.

Every one goes over subjects and seeds, cell by cell, goes on where its table stands, and can be run in small:
`coneslab experiment precision --subjects cat,dog --seeds 1 --rounds 20 --out small.csv`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from ..diffusion.sampling import generate
from ..edits.base import Combined, Edit, applied
from ..edits.low_rank import compress
from ..errors import ConeslabError
from ..files import data_folder
from ..finetuning.kv_gradient import concept_loss
from ..finetuning.samples import prior_pictures
from ..measure.evaluation import finds_objects
from ..methods.personalization import custom_diffusion, textual_inversion
from ..neurons.controls import Criterion, finetune_kv, random_neurons, reversed_neurons, top_k_neurons
from ..neurons.damage import DAMAGES
from ..neurons.encoding import PRECISIONS
from ..neurons.union import (
    TunedNeurons,
    additivity,
    concatenate,
    cosines,
    finetune_together,
    joint_prompt,
    output_changes,
)
from ..world.pictures import SCENES
from ..world.subjects import COMBINATIONS, SUBJECTS, Subject, subject, subjects_of, title_of, wanted_pictures
from .ablation import ABLATIONS, OBJECTS, ablation, ablation_target, collateral
from .conceptor import PLANTED, conceptor, planted
from .setting import Row, Setting, alignments, rows_of, run_cells, stored_bytes, timed

COMBINED_SCENES = ("grass", "beach", "room", "night", "white")
TUNING_STEPS = (10, 20, 40, 80)
DENSITIES = (0.9, 0.98, 0.99, 0.995, 0.998)  # quantiles that serve as threshold
FRACTIONS = {"flipped": (0.005, 0.02, 0.05, 0.2), "dropped": (0.1, 0.3, 0.5, 0.8), "moved": (0.1, 0.3, 0.6, 1.0)}


# --- notebook 03 ----------------------------------------------------------------------------------------

CONTROLS = (
    "real pictures",
    "untouched model",
    "concept neurons, float",
    "concept neurons, binary",
    "random mask",
    "reversed sign",
    "top-k |gradient|",
    "top-k |weight × gradient|",
    "top-k |weight|",
    "K-V fine-tuning",
)


def real_pictures(setting: Setting, about: Subject, seed: int) -> list[Row]:
    """The measures of the subject's own art in the scenes asked for: what there is to reach."""
    drawn = wanted_pictures(about, n=setting.pictures, seed=1000 * seed)
    return rows_of(alignments(setting.judge, about, drawn), condition=CONTROLS[0], seconds=0.0)


def controls(setting: Setting, about: Subject, seed: int) -> list[Row]:
    """Concept neurons beside every control; the column seconds says how long each edit took to make."""
    pipe, rounds = setting.pipe, setting.rounds
    common: dict[str, Any] = {"prior": prior_pictures(pipe, about, seed=seed), "seed": seed, "progress": False}

    def edits() -> Iterator[tuple[Edit | None, float]]:
        yield None, 0.0
        found, seconds = setting.found_in(about, seed)
        binary = found.binary()
        yield found, seconds
        yield binary, seconds
        yield random_neurons(binary, seed=seed), 0.0
        yield timed(lambda: reversed_neurons(pipe, about, rounds=rounds, **common).binary())
        criteria: tuple[Criterion, ...] = ("gradient", "gradient_times_weight", "weight")
        for criterion in criteria:
            options: dict[str, Any] = {"criterion": criterion, "like": binary, "rounds": max(1, rounds // 4)}
            yield timed(partial(top_k_neurons, pipe, about, **options, **common))
        yield timed(lambda: finetune_kv(pipe, about, steps=setting.finetune_steps, **common))

    rows = real_pictures(setting, about, seed)
    for name, (edit, seconds) in zip(CONTROLS[1:], edits(), strict=True):
        rows += setting.measure(about, edit, seed, condition=name, seconds=seconds)
    return rows


# --- notebook 04 ----------------------------------------------------------------------------------------


def precision(setting: Setting, about: Subject, seed: int) -> list[Row]:
    """One mask in four precisions, and the untouched model; the column bytes is the size of the mask's file."""
    found = setting.found(about, seed)
    rows = setting.measure(about, None, seed, condition="untouched model", bytes=0)
    for name in PRECISIONS:
        edit = found.to(name)
        rows += setting.measure(about, edit, seed, condition=name, bytes=len(edit.to_bytes()))
    return rows


ENERGIES = (0.6, 0.9)  # of a compressed delta; the first is the paper's


def storage(setting: Setting, about: Subject, seed: int) -> list[Row]:
    """Bytes of one subject as each method keeps it, beside its loss; plain encodings and the bound to compare."""
    pipe, found = setting.pipe, setting.found(about, seed)
    trained: dict[str, Any] = {"seed": seed, "steps": setting.finetune_steps, "progress": False}
    tuned: Any = custom_diffusion(pipe, about, **trained)
    vectors, delta = tuned.edits
    edits: dict[str, Edit | None] = {
        "untouched model": None,
        "Textual Inversion": textual_inversion(pipe, about, **trained),
        **{f"mask, {name}": found.to(name) for name in PRECISIONS},
        "Custom Diffusion": tuned,
    }
    for energy in ENERGIES:
        edits[f"Custom Diffusion, {energy:.0%} of its energy"] = Combined((vectors, compress(delta, energy=energy)))
    rows = []
    for name, edit in edits.items():
        size = 0 if edit is None else stored_bytes(edit)
        loss = concept_loss(pipe, about, edit=edit, samples=setting.samples).subject
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


def damage(setting: Setting, about: Subject, seed: int) -> list[Row]:
    """The binary mask with a fraction of its entries flipped, dropped or moved to a neighbour."""
    found = setting.found(about, seed).binary()
    rows = setting.measure(about, None, seed, condition="untouched model", fraction=np.nan)
    rows += setting.measure(about, found, seed, condition="whole mask", fraction=0.0)
    for kind, fractions in FRACTIONS.items():
        for fraction in fractions:
            edit = DAMAGES[kind](found, fraction, seed=seed)
            rows += setting.measure(about, edit, seed, condition=f"{kind} {fraction:g}", fraction=fraction)
    return rows


def density(setting: Setting, about: Subject, seed: int) -> list[Row]:
    """Searches with other thresholds: from few shut neurons to many, each beside a random mask as dense."""
    rows = setting.measure(about, None, seed, condition="untouched model", quantile=np.nan)
    for quantile in DENSITIES:
        found = setting.search(about, seed, threshold_quantile=quantile).binary()
        for name, edit in (("concept neurons", found), ("random mask", random_neurons(found, seed=seed))):
            rows += setting.measure(about, edit, seed, condition=f"{name} {quantile:g}", quantile=quantile)
    return rows


def references(setting: Setting, about: Subject, seed: int) -> list[Row]:
    """Searches on the first one to five reference pictures; measured on all five."""
    rows = setting.measure(about, None, seed, condition="0 pictures", references=0)
    for count in range(1, len(about.images) + 1):
        few = replace(about, images=about.images[:count], records=about.records[:count])
        edit = setting.search(few, seed).binary()
        rows += setting.measure(about, edit, seed, condition=f"{count} picture{'s' * (count != 1)}", references=count)
    return rows


FINDERS: dict[str, dict[str, Any]] = {
    "paper's rule": {},
    "no quota per layer": {"per_layer": False},
    "curvature": {"method": "curvature"},
    "bands of timesteps": {"method": "bands"},
    "straight-through": {"method": "straight-through"},
}


def finders(setting: Setting, about: Subject, seed: int) -> list[Row]:
    """The paper's rule for a search beside others, each for as many gradients; the column seconds is the search's."""
    prior_pictures(setting.pipe, about, seed=seed)  # drawn before the clock runs
    rows = setting.measure(about, None, seed, condition="untouched model", seconds=0.0)
    for name, how in FINDERS.items():
        found, seconds = timed(partial(setting.search, about, seed, **how))
        rows += setting.measure(about, found.binary(), seed, condition=name, seconds=seconds)
    return rows


def agreement(setting: Setting, about: Subject, seed: int) -> list[Row]:
    """How alike two masks are, as sets of neurons and in what they do to the denoiser's output."""
    here = setting.found(about, seed).binary()
    neighbour = subject(SUBJECTS[(SUBJECTS.index(about.name) + 1) % len(SUBJECTS)])
    others = {
        "same subject, other seed": setting.found(about, seed + 1).binary(),
        "another subject": setting.found(neighbour, seed).binary(),
        "random mask": random_neurons(here, seed=seed),
    }
    own, *changes = output_changes(setting.pipe, [here, *others.values()], [about])
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


# --- notebook 05 ----------------------------------------------------------------------------------------


def measure_together(setting: Setting, subjects: Sequence[Subject], edit: Edit | None, seed: int) -> dict[str, float]:
    """Measures of pictures that should show all subjects; alignment with each of them, with all, with the weakest."""
    pipe, judge = setting.pipe, setting.judge
    prompts = [f"{joint_prompt(subjects)} {SCENES[scene][0]}" for scene in COMBINED_SCENES]
    prompts = [prompt for prompt in prompts for _ in range(2 * setting.pictures)]
    with applied(edit, pipe):
        drawn = generate(pipe, prompts, seed=1000 * seed, batch_size=20, **setting.drawing)
    plain = [reduce(lambda text, about: about.plain(text), subjects, prompt) for prompt in prompts]
    classes = [about.class_word for about in subjects]
    losses = [concept_loss(pipe, about, edit=edit, samples=setting.samples).subject for about in subjects]
    near = {about.name: judge.image_alignment(drawn, about.images) for about in subjects}
    return {
        "text alignment": judge.text_alignment(drawn, plain),
        "image alignment": float(np.mean(list(near.values()))),
        "image alignment, weakest subject": min(near.values()),
        **{f"image alignment, {name}": value for name, value in near.items()},
        "every subject found": float(finds_objects(judge, drawn, [classes] * len(drawn)).mean()),
        "concept loss": float(np.mean(losses)),
    }


def together(setting: Setting, subjects: Sequence[Subject], seed: int) -> list[Row]:
    """Several subjects in one picture: the union of their masks, before and after collaborative fine-tuning."""
    found = [setting.found(about, seed) for about in subjects]
    union = concatenate(*[mask.binary() for mask in found])
    snapshots: dict[int, TunedNeurons] = {}

    def keep(step: int, state: dict[str, Any]) -> None:
        if step + 1 in TUNING_STEPS:
            snapshots[step + 1] = TunedNeurons(union, state["weights"]["values"].cpu().numpy())

    finetune_together(setting.pipe, union, subjects, steps=max(TUNING_STEPS), seed=seed, progress=False, callback=keep)
    edits: dict[str, Edit | None] = {
        "untouched model": None,
        "random mask": random_neurons(union, seed=seed),
        "union, float": concatenate(*found),
        "union": union,
        **{f"union, {steps} steps": edit for steps, edit in snapshots.items()},
    }
    rows = []
    for name, edit in edits.items():
        steps = int(name.split()[1]) if name.endswith("steps") else 0
        values = measure_together(setting, subjects, edit, seed)
        rows += rows_of(values, condition=name, count=len(subjects), steps=steps, density=union.density)
    own = [
        concept_loss(setting.pipe, about, edit=mask.binary(), samples=setting.samples).subject
        for about, mask in zip(subjects, found, strict=True)
    ]
    facts = {"condition": "own mask alone", "count": len(subjects), "steps": 0}
    rows += rows_of({"concept loss": float(np.mean(own))}, **facts)
    sums = additivity(setting.pipe, [mask.binary() for mask in found], subjects)
    shares = {f"additivity: {name}": value for name, value in asdict(sums).items()}
    shares["overlap (Jaccard)"] = np.mean([a.overlap(b).jaccard for a, b in combinations(found, 2)])
    shares["overlap by chance"] = np.mean([a.overlap(b).expected_jaccard for a, b in combinations(found, 2)])
    return rows + rows_of(shares, condition="union", count=len(subjects), steps=0, density=union.density)


# --- running them ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """measure(setting, what a cell is about, seed) -> rows; table: its file in `data/results`; names: its cells.

    resolve: makes a subject, several, or whatever a cell is about from its name.
    """

    measure: Callable[[Setting, Any, int], list[Row]]
    table: str
    names: tuple[str, ...] = SUBJECTS[:8]
    resolve: Callable[[str], Any] = subject


COMBINATION_NAMES = tuple(title_of(names) for size in sorted(COMBINATIONS) for names in COMBINATIONS[size])
EXPERIMENTS = {
    "controls": Experiment(controls, "concept_neurons.csv"),
    "precision": Experiment(precision, "mask_precision.csv"),
    "storage": Experiment(storage, "mask_storage.csv"),
    "damage": Experiment(damage, "mask_damage.csv"),
    "density": Experiment(density, "mask_density.csv"),
    "references": Experiment(references, "reference_pictures.csv"),
    "agreement": Experiment(agreement, "mask_agreement.csv"),
    "finders": Experiment(finders, "finders.csv"),
    "together": Experiment(together, "concatenation.csv", COMBINATION_NAMES, subjects_of),
    "conceptor": Experiment(conceptor, "conceptor.csv", PLANTED, planted),
    "ablation": Experiment(ablation, "ablation.csv", ABLATIONS, ablation_target),
    "collateral": Experiment(collateral, "collateral.csv", ABLATIONS[: len(OBJECTS)], ablation_target),
}


def run_experiment(
    name: str,
    setting: Setting,
    *,
    subjects: Sequence[str] | None = None,
    seeds: int = 3,
    path: str | Path | None = None,
    progress: bool = True,
) -> pandas.DataFrame:
    """Run an experiment, or what its table still lacks; returns it, a row a (subject, seed, condition, measure).

    subjects: names, by default the experiment's own; for "together" combinations such as "cat+car", for "conceptor"
    planted facts such as "hypernym:pet", for "ablation" targets such as "object:cat".
    path: of the table, by default in `data/results`. Raises ConeslabError for an unknown experiment, WorldError for
    an unknown subject, before anything is computed.
    """
    if name not in EXPERIMENTS:
        raise ConeslabError(f"{name!r} is no experiment: choose one of {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    chosen = subjects or experiment.names
    known = {title: experiment.resolve(title) for title in chosen}

    def cell(subject: str, seed: int) -> list[Row]:
        return experiment.measure(setting, known[subject], seed)

    cells = [{"subject": title, "seed": seed} for title in chosen for seed in range(seeds)]
    return run_cells(cells, cell, path or data_folder() / "results" / experiment.table, progress=progress)
