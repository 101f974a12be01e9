"""`coneslab compare`: methods × subjects and their combinations × seeds, into one tidy table, on Dask.

Subjects are split: settings are chosen on `TUNING_SUBJECTS`, by the same number of trials for each method, and the
table is made with others, so that no method is crippled and none is helped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from .compare import Row, measure, rows_of, run_cells
from .edits import write_whole
from .errors import ConeslabError
from .experiments import Setting, measure_together
from .methods import METHODS, chosen_settings, make_edit
from .metrics import load_judge
from .models import load
from .paths import data_folder
from .subjects import COMBINATIONS, SUBJECTS, subjects_of, title_of

TUNING_SUBJECTS = SUBJECTS[12:]
SINGLE_SUBJECTS = SUBJECTS[:4]


@lru_cache(maxsize=2)
def _loaded(model: str, judge: str) -> tuple[Any, Any]:
    """Model and judge, once for every worker."""
    return load(model), load_judge(judge)


def compare_cell(
    method: str,
    subjects: str,
    seed: int,
    *,
    model: str = "tiny",
    judge: str = "judge",
    pictures: int = 2,
    settings: Mapping[str, Any] | None = None,
) -> list[Row]:
    """The rows of one method on one subject, or several joined by "+": alignments, seconds to make, bytes to keep."""
    pipe, critic = _loaded(model, judge)
    people = subjects_of(subjects)
    given = dict(settings or {})
    begun = time.perf_counter()
    edit = make_edit(method, pipe, people, seed=seed, **given)
    facts = {
        "count": len(people), "seconds": time.perf_counter() - begun, "bytes": edit.nbytes,
        "settings": json.dumps({**chosen_settings(method), **given}, sort_keys=True),
    }  # fmt: skip
    if len(people) == 1:
        values = measure(pipe, critic, people[0], edit, seed=seed, pictures=pictures)
    else:
        values = measure_together(Setting(pipe, critic, pictures=pictures), people, edit, seed)
    return rows_of(values, condition=method, **facts)


@contextmanager
def dask_client(scheduler: str | None = None, *, workers: int = 1, threads: int = 2) -> Any:
    """A Dask client: of the scheduler at an address, or of a cluster on this machine for the length of a block.

    workers: processes; threads: that torch uses in each, which should make the number of cores together. Every worker
    does one cell at a time.
    """
    from distributed import Client, LocalCluster

    if scheduler is not None:
        with Client(scheduler) as client:
            yield client
        return
    options: dict[str, Any] = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(processes=True, **options) as cluster, Client(cluster) as client:
        client.run(_set_threads, threads)
        yield client


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def compare_methods(
    path: str | Path | None = None,
    *,
    methods: Sequence[str] = tuple(METHODS),
    counts: Sequence[int] = (1, 2, 3, 4),
    seeds: int = 3,
    subjects: Sequence[str] | None = None,
    client: Any = None,
    model: str = "tiny",
    judge: str = "judge",
    pictures: int = 2,
    progress: bool = True,
) -> pandas.DataFrame:
    """Every method on every subject and combination with these many subjects; the table goes on where it stands.

    A cell that fails is recorded with its error. path: default `data/results/methods.csv`. subjects: names and
    combinations ("cat+car") in place of those that ship. Raises ConeslabError for an unknown method or count.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ConeslabError(f"{', '.join(unknown)}: no such method; choose from {', '.join(METHODS)}")
    wrong = [count for count in counts if count != 1 and count not in COMBINATIONS]
    if wrong:
        raise ConeslabError(f"there are no combinations of {wrong[0]} subjects: choose from 1, {list(COMBINATIONS)}")
    if subjects is None:
        subjects = [
            title_of(names)
            for count in counts
            for names in ([(name,) for name in SINGLE_SUBJECTS] if count == 1 else COMBINATIONS[count])
        ]
    cells = [
        {"method": method, "subjects": names, "seed": seed, "model": model, "judge": judge, "pictures": pictures}
        for names, method, seed in product(subjects, methods, range(seeds))
    ]
    path = Path(path) if path is not None else data_folder() / "results" / "methods.csv"
    return run_cells(cells, compare_cell, path, client=client, keep_going=True, progress=progress)


def tune_methods(
    path: str | Path | None = None,
    *,
    methods: Sequence[str] = tuple(METHODS),
    subjects: Sequence[str] = TUNING_SUBJECTS,
    model: str = "tiny",
    judge: str = "judge",
    client: Any = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Choose every method's setting by the same number of trials on tuning subjects; writes and returns them.

    The score is the sum of text and image alignment, the mean over subjects. path: of the settings, default
    `data/results/settings.json`; the trials are kept beside it, as `.csv`.
    """
    path = Path(path) if path is not None else data_folder() / "results" / "settings.json"
    cells = []
    for method, name in product(methods, subjects):
        for setting, values in METHODS[method].choices.items():
            cells += [
                {"method": method, "subjects": name, "seed": 0, "trial": json.dumps({setting: value})}
                for value in values
            ]
    table = run_cells(cells, _Trial(model, judge), path.with_suffix(".csv"), client=client, progress=progress)
    scored = table[table.measure.isin(["text alignment", "image alignment"])]
    score = scored.groupby(["method", "trial"]).value.mean()
    chosen = {method: json.loads(score[method].idxmax()) for method in methods}
    write_whole(path, (json.dumps(chosen, indent=1, sort_keys=True) + "\n").encode())
    return chosen


class _Trial:
    """`compare_cell` with the settings of a trial; a class, so that it can be sent to a worker."""

    def __init__(self, model: str, judge: str) -> None:
        self.model, self.judge = model, judge

    def __call__(self, method: str, subjects: str, seed: int, trial: str) -> list[Row]:
        how: dict[str, Any] = {"model": self.model, "judge": self.judge, "pictures": 1}
        return compare_cell(method, subjects, seed, settings=json.loads(trial), **how)


def paper_table(table: pandas.DataFrame) -> pandas.DataFrame:
    """Text / image alignment by method and number of subjects, as the paper prints it; means over subjects and seeds.

    Cells that failed are left out.
    """
    part = table[table.measure.isin(["text alignment", "image alignment"])]
    if "error" in part:
        part = part[part.error.isna()]
    means = part.groupby(["method", "count", "subjects", "measure"]).value.mean()
    means = means.groupby(["method", "count", "measure"]).mean().unstack("measure")
    shown = means.apply(lambda row: f"{row['text alignment']:.3f} / {row['image alignment']:.3f}", axis=1)
    order = [name for name in METHODS if name in shown.index.levels[0]]
    return shown.unstack("count").reindex(order).replace(np.nan, "")
