"""The experiments behind the notebooks, each a table in `data/results` that `coneslab experiment NAME` makes.

Each runs over subjects and seeds, cell by cell, continues an existing table, and can be run on a small scale:
`coneslab experiment precision --subjects cat,dog --seeds 1 --rounds 20 --out small.csv`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from .. import checks
from ..errors import ConeslabError
from ..files import data_folder, require_writable
from ..world.subjects import COMBINATIONS, TUNING_COMBINATIONS, names_in, subject, subjects_of, table_subjects, title_of
from .ablation import ABLATIONS, OBJECTS, ablation, ablation_target, collateral, conditions
from .conceptor import PLANTED, conceptor, planted
from .many_concepts import SIZES, many_concepts, many_conditions, several_pairs
from .masks import damage, precision, storage
from .neurons import agreement, controls, density, finders, references
from .parts import parts, sharing
from .setting import Setting, on_record
from .table import Row, open_table, run_cells
from .unions import doses, together


@dataclass(frozen=True)
class Experiment:
    """measure(setting, what a cell is about, seed) -> rows; table: its file in `data/results`; names: its cells.

    resolve: turns a name into what its cell is about: a subject, several, or anything else. conditions: of what it is
    about, if each is a cell of its own, which `measure` is then given as well: where one takes minutes.
    """

    measure: Callable[..., list[Row]]
    table: str
    names: tuple[str, ...] = table_subjects(8)
    resolve: Callable[[str], Any] = subject
    conditions: Callable[[Any], tuple[str, ...]] | None = None

    def cells(self, known: dict[str, Any], seeds: int) -> list[Row]:
        """What to measure, cell by cell."""
        made: list[Row] = []
        for title, about in known.items():
            named = ({},) if self.conditions is None else [{"condition": one} for one in self.conditions(about)]
            made += [{"subject": title, "seed": seed, **condition} for seed in range(seeds) for condition in named]
        return made

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns that say what a cell is."""
        return ("subject", "seed") if self.conditions is None else ("subject", "seed", "condition")


COMBINATION_NAMES = tuple(title_of(names) for size in sorted(COMBINATIONS) for names in COMBINATIONS[size])
EXPERIMENTS = {
    "controls": Experiment(controls, "concept_neurons.csv"),
    "precision": Experiment(precision, "mask_precision.csv"),
    "storage": Experiment(storage, "mask_storage.csv"),
    "damage": Experiment(damage, "mask_damage.csv"),
    "parts": Experiment(parts, "mask_parts.csv"),
    "sharing": Experiment(sharing, "mask_sharing.csv"),
    "density": Experiment(density, "mask_density.csv", table_subjects(4)),
    "references": Experiment(references, "reference_pictures.csv", table_subjects(4)),
    "agreement": Experiment(agreement, "mask_agreement.csv"),
    "finders": Experiment(finders, "finders.csv", table_subjects(4)),
    "together": Experiment(together, "concatenation.csv", COMBINATION_NAMES, subjects_of),
    "doses": Experiment(
        doses, "doses_together.csv", (*map(title_of, TUNING_COMBINATIONS), *COMBINATION_NAMES), subjects_of
    ),
    "conceptor": Experiment(conceptor, "conceptor.csv", PLANTED, planted),
    "ablation": Experiment(ablation, "ablation.csv", ABLATIONS, ablation_target, conditions),
    "many-concepts": Experiment(many_concepts, "many_concepts.csv", SIZES, several_pairs, many_conditions),
    "collateral": Experiment(collateral, "collateral.csv", ABLATIONS[: len(OBJECTS)], ablation_target),
}


def run_experiment(
    name: str,
    setting: Setting,
    *,
    subjects: Sequence[str] | None = None,
    seeds: int = 3,
    path: str | Path | None = None,
    client: Any = None,
    progress: bool = True,
) -> pandas.DataFrame:
    """Run an experiment, or what its table still lacks; return it, one row per (subject, seed, condition, measure).

    subjects: names, by default the experiment's own; for "together" and "doses" combinations such as "cat+car", for
    "conceptor" planted facts such as "hypernym:pet", for "ablation" targets such as "object:cat".
    client: a `distributed.Client` (Dask) whose workers share the cells, for a setting made by `Setting.named`.
    path: of the table, by default in `data/results`. A table of another model, judge, version or options is not
    continued. Raises ConeslabError for it, for an unknown experiment and for nothing to do, WorldError for an unknown
    subject, WriteError for a table or a folder of masks that cannot be written, before anything is computed.
    """
    seeds = checks.count("seeds", seeds)
    known, path = require_experiment(name, subjects, path)
    experiment = EXPERIMENTS[name]
    checks.of_kind("setting", setting, Setting)
    if setting.masks is not None:
        require_writable(setting.masks, folder=True)

    cells = experiment.cells(known, seeds)
    return run_cells(cells, _Cell(name, setting), path, identity=setting.identity, client=client, progress=progress)


@dataclass(frozen=True)
class _Cell:
    """Measures one cell of an experiment; a class, so that it can be sent to a worker."""

    name: str
    setting: Setting

    def __call__(self, subject: str, seed: int, **condition: str) -> list[Row]:
        experiment = EXPERIMENTS[self.name]
        about = experiment.resolve(subject)
        return on_record(self.setting.pipe, partial(experiment.measure, self.setting, about, seed, **condition))


def require_experiment(
    name: str, subjects: Sequence[str] | None = None, path: str | Path | None = None
) -> tuple[dict[str, Any], Path]:
    """What `run_experiment` is asked for, checked before a model is loaded: title -> what a cell is about, the table.

    Raises what `run_experiment` raises.
    """
    if not isinstance(name, str) or name not in EXPERIMENTS:
        raise ConeslabError(f"{name!r} is not an experiment: choose one of {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    chosen = experiment.names if subjects is None else checks.texts("subjects", subjects)
    titles = [title_of(names_in(title)) for title in chosen]
    table, _ = open_table(path if path is not None else data_folder() / "results" / experiment.table, experiment.keys)
    return {title: experiment.resolve(title) for title in titles}, table
