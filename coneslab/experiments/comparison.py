"""`coneslab compare`: methods × subjects and their combinations × seeds, into one tidy table, on Dask.

Subjects are split: settings are chosen on some of `world.TUNING_SUBJECTS`, with the same number of trials for each
method, and the table is made with others, so that no method is put at a disadvantage or favoured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from .. import checks
from ..diffusion.pipelines import Pipeline
from ..errors import ArgumentError, ConeslabError
from ..files import data_folder, read_json, require_writable, write_json
from ..measure.judge import Judge
from ..world.subjects import (
    COMBINATIONS,
    TUNING_COMBINATIONS,
    names_in,
    subjects_of,
    table_subjects,
    title_of,
)
from .cluster import loaded
from .methods import METHODS, Method, chosen_settings, how_many, make_edit
from .setting import Setting, identity_of, measure, on_record, stored_bytes
from .table import Row, open_table, rows_of, run_cells
from .unions import measure_together

SINGLE_SUBJECTS = table_subjects(4)
_PAIRS = TUNING_COMBINATIONS[0], TUNING_COMBINATIONS[2]  # near subjects, and far ones
#: The subjects of a near and of a far pair, alone, and all combinations: a share of ten pictures says little.
TUNING_TITLES = (*_PAIRS[0], *_PAIRS[1], *map(title_of, TUNING_COMBINATIONS))
SCORED = ("text alignment", "image alignment", "every subject found")  # the last one of combinations alone
TRIAL: dict[str, Any] = {"pictures": 1, "sampler_steps": 12, "samples": 16}  # of tuning, which uses no losses


def table_titles(counts: Sequence[int] = (1, 2, 3, 4)) -> list[str]:
    """The subjects and combinations of the table, of these sizes; none contains a tuning subject."""
    groups = {**COMBINATIONS, 1: tuple((name,) for name in SINGLE_SUBJECTS)}
    return [title_of(names) for count in counts for names in groups[count]]


@dataclass(frozen=True)
class _Settings:
    """The settings of a method by the number of subjects: those chosen for it, if it has a name, and `given` ones."""

    name: str | None
    given: Mapping[str, Any]

    def __call__(self, subjects: int) -> dict[str, Any]:
        return {**(chosen_settings(self.name, subjects) if self.name else {}), **self.given}


@dataclass(frozen=True)
class _Cell:
    """Measures one method on one subject, or several joined by "+"; a class, so that it can be sent to a worker."""

    methods: Mapping[str, tuple[Method, Callable[[int], dict[str, Any]]]]  # each with its settings, by size
    model: str
    judge: str
    budget: Mapping[str, Any]  # pictures, sampler_steps, samples
    folder: Path | None

    def settings_of(self, subject: str, condition: str, trial: str = "{}") -> dict[str, Any]:
        method, settings_for = self.methods[condition]
        return {**method.settings, **settings_for(len(names_in(subject))), **json.loads(trial)}

    def identity(self) -> Callable[[Row], dict[str, Any]]:
        """What a cell's values depend on besides itself."""
        common = identity_of(*loaded(self.model, self.judge), **self.budget)

        def of_cell(cell: Row) -> dict[str, Any]:
            if cell["condition"] not in self.methods:  # an earlier run compared other methods as well
                return common
            return common | {"settings": self.settings_of(cell["subject"], cell["condition"], cell.get("trial", "{}"))}

        return of_cell

    def __call__(self, subject: str, condition: str, seed: int, trial: str = "{}") -> list[Row]:
        pipe, judge = loaded(self.model, self.judge)
        return on_record(pipe, partial(self._measured, pipe, judge, subject, condition, seed, trial))

    def _measured(self, pipe: Pipeline, judge: Judge, subject: str, condition: str, seed: int, trial: str) -> list[Row]:
        subjects, (method, _) = subjects_of(subject), self.methods[condition]
        settings = self.settings_of(subject, condition, trial)
        edit, seconds = make_edit(method, pipe, subjects, seed=seed, folder=self.folder, **settings)
        facts = {
            "count": len(subjects),
            "seconds": seconds,
            "bytes": stored_bytes(edit),
        }
        if len(subjects) == 1:
            values = measure(pipe, judge, subjects[0], edit, seed=seed, **self.budget)
        else:
            values = measure_together(Setting(pipe, judge, **self.budget), subjects, edit, seed)
        return rows_of(values, **facts)


def compare_methods(
    path: str | Path | None = None,
    *,
    methods: Sequence[str] | Mapping[str, Method] = tuple(METHODS),
    counts: Sequence[int] = (1, 2, 3, 4),
    seeds: int = 3,
    subjects: Sequence[str] | None = None,
    client: Any = None,
    model: str = "tiny",
    judge: str = "judge",
    pictures: int = 2,
    sampler_steps: int = 12,
    samples: int = 64,
    settings: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> pandas.DataFrame:
    """Run every method on every subject and combination of these sizes; an existing table is continued.

    One row per (subject, condition, seed, measure); the condition is the method. A cell that fails is recorded with its
    error. A table of another model, judge, version, number of pictures, steps or samples, or settings is not continued.
    path: default `data/results/methods.csv`. methods: names, or name -> a `Method` of your own. subjects: names and
    combinations ("cat+car") instead of those that ship. pictures: per prompt; sampler_steps: of each (means over 12
    steps differ from those over 25 by less than 0.003); samples: of the denoising loss. settings: for all methods,
    overriding those chosen. folder: where edits are kept, so that methods and combinations share those of single
    subjects, and `make_edit` has all of them; on a cluster, one that all workers can see.
    Raises ConeslabError for an unknown method, subject or count, WriteError if table or folder cannot be written.
    """
    seeds, pictures = checks.count("seeds", seeds), checks.count("pictures", pictures)
    sampler_steps, samples = checks.count("sampler_steps", sampler_steps), checks.count("samples", samples)
    chosen, subjects, path, folder = require_comparison(path, methods, counts, subjects, folder, settings)
    settings = settings or {}
    cells = [
        {"subject": title, "condition": name, "seed": seed}
        for seed, title, name in product(range(seeds), subjects, chosen)
    ]
    ready = {
        name: (method, _Settings(name if METHODS.get(name) is method else None, settings))
        for name, method in chosen.items()
    }
    budget: dict[str, Any] = {"pictures": pictures, "sampler_steps": sampler_steps, "samples": samples}
    run = _Cell(ready, model, judge, budget, folder)
    return run_cells(cells, run, path, identity=run.identity(), client=client, keep_going=True, progress=progress)


def require_comparison(
    path: str | Path | None,
    methods: Sequence[str] | Mapping[str, Method],
    counts: Sequence[int],
    subjects: Sequence[str] | None,
    folder: str | Path | None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Method], list[str], Path, Path | None]:
    """What `compare_methods` is asked for, checked before a cluster starts: methods, titles, table, folder of edits.

    Raises what `compare_methods` raises.
    """
    chosen = _named(methods)
    settings = checks.mapping("settings", {} if settings is None else settings, least=0)
    for name, method in chosen.items():
        if unknown := method.unknown(settings):
            raise ArgumentError(
                f"settings has {', '.join(unknown)}, which {name!r} does not take: give what all of the methods take "
                "that are compared, or compare fewer"
            )
    counts = [checks.count("one of counts", count) for count in checks.items("counts", counts)]
    wrong = [count for count in counts if count != 1 and count not in COMBINATIONS]
    if wrong:
        raise ConeslabError(f"there are no combinations of {wrong[0]} subjects: choose from 1, {list(COMBINATIONS)}")
    titles = table_titles(counts) if subjects is None else checks.texts("subjects", subjects)
    titles = list(dict.fromkeys(title_of(names_in(title)) for title in titles))
    for title in titles:
        subjects_of(title)  # refuse an unknown name now, not cell by cell
    table, _ = open_table(
        path if path is not None else data_folder() / "results" / "methods.csv", ("subject", "condition", "seed")
    )
    return chosen, titles, table, _kept_in(folder)


def _kept_in(folder: str | Path | None) -> Path | None:
    """The folder of edits, checked, as all workers find it."""
    return None if folder is None else require_writable(folder, folder=True).absolute()


def _named(methods: Sequence[str] | Mapping[str, Method]) -> dict[str, Method]:
    if isinstance(methods, Mapping):
        for name, method in checks.mapping("methods", methods).items():
            checks.of_kind(f"methods[{name!r}]", method, Method)
        return dict(methods)
    methods = checks.texts("methods", methods)
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ConeslabError(f"{'; '.join(unknown)}: no such method; choose from {'; '.join(METHODS)}")
    return {name: METHODS[name] for name in methods}


def tune_methods(
    path: str | Path | None = None,
    *,
    methods: Sequence[str] = tuple(METHODS),
    subjects: Sequence[str] = TUNING_TITLES,
    model: str = "tiny",
    judge: str = "judge",
    folder: str | Path | None = None,
    client: Any = None,
    progress: bool = True,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Choose each method's settings with the same number of trials on tuning subjects; write and return them.

    Those for one subject are chosen on single ones, those for several on combinations. The score is the sum of text
    alignment, image alignment and, for several, the share of pictures in which every subject is found; of that, the
    mean over titles. path: of the settings, default `data/results/settings.json`, in which other methods'
    settings are kept; the trials are saved beside it, as `.csv`. folder: as in `compare_methods`. Returns
    {"one subject": {method: settings}, "several subjects": {...}}.
    """
    chosen, subjects, folder = _named(methods), checks.texts("subjects", subjects), _kept_in(folder)
    path = require_writable(path if path is not None else data_folder() / "results" / "settings.json")
    others = read_json(path, remedy="restore it, or delete it and tune again") if path.is_file() else {}
    cells = [
        {"subject": title, "condition": name, "seed": 0, "trial": json.dumps(trial)}
        for name, title in product(chosen, subjects)
        for trial in chosen[name].trials(len(names_in(title)))
    ]
    ready = {name: (method, _Settings(None, {})) for name, method in chosen.items()}
    run = _Cell(ready, model, judge, TRIAL, folder)
    trials = path.with_suffix(".csv")
    table = run_cells(cells, run, trials, identity=run.identity(), client=client, progress=progress)
    tried = {(cell["subject"], cell["condition"], cell["trial"]) for cell in cells}
    own = np.array([key in tried for key in zip(table.subject, table.condition, table.trial, strict=True)])
    scored = table[own & table.measure.isin(SCORED)]
    best = {}
    for part, scores in scored.groupby(scored.subject.map(lambda title: how_many(len(names_in(title))))):
        score = scores.groupby(["condition", "trial"]).value.sum()  # titles and measures are as many for all trials
        new = {name: json.loads(score[name].idxmax()) for name in chosen if name in score}
        best[str(part)] = dict(sorted({**others.get(part, {}), **new}.items()))
    best = {**others, **best}
    write_json(path, best)
    return best


def paper_table(table: pandas.DataFrame) -> pandas.DataFrame:
    """Text / image alignment by method and number of subjects, as the paper prints it; means over subjects and seeds.

    Failed cells are left out. Raises ConeslabError if all failed.
    """
    part = table[table.error.isna()] if "error" in table else table
    if not len(part):
        raise ConeslabError("this table holds no cell that was measured: run the comparison again")
    part = part[part.measure.isin(["text alignment", "image alignment"])]
    means = part.groupby(["condition", "count", "subject", "measure"]).value.mean()
    means = means.groupby(["condition", "count", "measure"]).mean().unstack("measure")
    shown = means.apply(lambda row: f"{row['text alignment']:.3f} / {row['image alignment']:.3f}", axis=1)
    order = list(dict.fromkeys(part.condition))
    return shown.unstack("count").reindex(order).replace(np.nan, "")
