"""Experiments over subjects and seeds: tidy tables, written cell by cell, so that an interruption loses one cell.

`measure_controls` is the experiment behind notebook 03: concept neurons beside every control, on the same prompts
and the same start noises. `coneslab controls` runs it; `summarise` turns its rows into means with intervals.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from tqdm.auto import tqdm

from .concept_loss import concept_loss, prior_pictures
from .controls import Criterion, finetune_kv, random_neurons, reversed_neurons, top_k_neurons
from .diffusion import generate
from .edits import Edit
from .errors import ConeslabError
from .metrics import Judge, bootstrap_interval
from .neurons import find_concept_neurons
from .paths import data_folder
from .subjects import SUBJECTS, Subject, subject
from .world import STYLE_WORDS, STYLES, article

MEASURES = {
    "text alignment": "cosine of picture and prompt",
    "image alignment": "cosine of picture and references",
    "subject share": "share of pictures the judge takes for the subject's own style",
    "concept loss": "denoising loss on the subject",
}
CONDITIONS = (
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
DEFAULT_SUBJECTS = SUBJECTS[:8]
Row = dict[str, Any]


def run_cells(
    cells: Iterable[Mapping[str, Any]],
    measure: Callable[..., list[Row]],
    path: str | Path,
    *,
    progress: bool = True,
) -> pandas.DataFrame:
    """Run `measure(**cell)` for every cell that the table at `path` does not hold yet; returns the whole table.

    A cell is a set of plain values, such as {"subject": "cat", "seed": 0}; they become columns of its rows. The CSV
    file is replaced whole after each cell, so a kill at any point loses at most the cell under way and doubles none.
    Raises ConeslabError if the file at `path` is no table of these cells.
    """
    path = Path(path)
    table = pandas.read_csv(path) if path.exists() else pandas.DataFrame()
    todo = [dict(cell) for cell in cells]
    names = list(todo[0]) if todo else []
    if len(table) and not set(names) <= set(table.columns):
        raise ConeslabError(
            f"{path} has the columns {', '.join(table.columns)}, cells need {', '.join(names)}: name another file"
        )
    done = set(table[names].itertuples(index=False, name=None)) if len(table) and names else set()
    for cell in tqdm(todo, desc="cells", disable=not progress):
        if tuple(cell.values()) in done:
            continue
        rows = pandas.DataFrame([{**cell, **row} for row in measure(**cell)])
        table = pandas.concat([table, rows], ignore_index=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        table.to_csv(unfinished, index=False, float_format="%.6g")
        os.replace(unfinished, path)
    return table


def subject_share(judge: Judge, images: Sequence[Any], about: Subject) -> np.ndarray:
    """Whether the judge takes each picture for the subject's own art style, (n,) bool.

    Only for subjects of the sticker world: "a sticker cat" must be nearer than "a 3d cat", "a flat cat" and so on.
    """
    labels = [[f"{article(word)} {word} {about.class_word}" for word in STYLE_WORDS[style][:1]] for style in STYLES]
    return judge.classify(list(images), labels).numpy() == STYLES.index(about.records[0].objects[0].style)


def conditions(
    pipe: Any, about: Subject, *, seed: int, rounds: int, finetune_steps: int, progress: bool = False
) -> Iterator[tuple[str, Edit | None, float]]:
    """Make every edit of the experiment in turn: (condition, edit or None, seconds to make it)."""
    prior = prior_pictures(pipe, about, seed=seed)
    common: dict[str, Any] = {"prior": prior, "seed": seed, "progress": progress}

    def timed(make: Callable[[], Any]) -> tuple[Any, float]:
        begun = time.perf_counter()
        made = make()
        return made, time.perf_counter() - begun

    yield CONDITIONS[0], None, 0.0
    found, seconds = timed(lambda: find_concept_neurons(pipe, about, rounds=rounds, **common))
    binary = found.binary()
    yield CONDITIONS[1], found, seconds
    yield CONDITIONS[2], binary, seconds
    yield CONDITIONS[3], random_neurons(binary, seed=seed), 0.0
    backwards, seconds = timed(lambda: reversed_neurons(pipe, about, rounds=rounds, **common).binary())
    yield CONDITIONS[4], backwards, seconds
    criteria: tuple[Criterion, ...] = ("gradient", "gradient_times_weight", "weight")
    for name, criterion in zip(CONDITIONS[5:8], criteria, strict=True):
        make = partial(top_k_neurons, pipe, about, criterion=criterion, like=binary, rounds=max(1, rounds // 4))
        edit, seconds = timed(partial(make, **common))
        yield name, edit, seconds
    tuned, seconds = timed(lambda: finetune_kv(pipe, about, steps=finetune_steps, **common))
    yield CONDITIONS[8], tuned, seconds


def measure_controls(
    pipe: Any,
    judge: Judge,
    *,
    subjects: Sequence[str] = DEFAULT_SUBJECTS,
    seeds: int = 3,
    rounds: int = 60,
    finetune_steps: int = 200,
    pictures: int = 2,
    steps: int = 25,
    guidance_scale: float = 3.0,
    path: str | Path | None = None,
    progress: bool = True,
) -> pandas.DataFrame:
    """Concept neurons and their controls, for every subject and seed; a row a (cell, condition, measure).

    Each condition draws `pictures` pictures for each of a subject's ten prompts, from the same start noises. Rows go
    to `path`, by default `data/results/concept_neurons.csv`, and a second call goes on where it stands. The columns:
    subject, seed, condition, measure, value (mean over the pictures), density, seconds.
    """

    def cell(**names: Any) -> list[Row]:
        about, seed = subject(names["subject"]), names["seed"]
        prompts = [prompt for prompt in about.prompts for _ in range(pictures)]
        plain = [about.plain(prompt) for prompt in prompts]
        prior = prior_pictures(pipe, about, seed=seed)
        rows = []
        for name, edit, seconds in conditions(pipe, about, seed=seed, rounds=rounds, finetune_steps=finetune_steps):
            block: AbstractContextManager = nullcontext() if edit is None else edit.applied(pipe)
            with block:
                drawn = generate(
                    pipe, prompts, seed=1000 * seed, steps=steps, guidance_scale=guidance_scale, batch_size=20
                )
            loss = concept_loss(pipe, about, edit=edit, prior=prior)
            values = {
                "text alignment": judge.text_alignment(drawn, plain),
                "image alignment": judge.image_alignment(drawn, about.images),
                "subject share": float(subject_share(judge, drawn, about).mean()),
                "concept loss": loss.subject,
            }
            density = float(getattr(edit, "density", np.nan))
            rows += [
                {"condition": name, "measure": measure, "value": value, "density": density, "seconds": seconds}
                for measure, value in values.items()
            ]
        return rows

    path = path or data_folder() / "results" / "concept_neurons.csv"
    cells = [{"subject": name, "seed": seed} for name in subjects for seed in range(seeds)]
    return run_cells(cells, cell, path, progress=progress)


def summarise(table: pandas.DataFrame, *, minus: str | None = None) -> pandas.DataFrame:
    """Mean and 95 % bootstrap interval of every condition and measure, over subjects and the seeds within them.

    minus: a condition to subtract from the others, pairing subject and seed; then the interval is of the difference.
    Returns the columns condition, measure, value, low, high, density, seconds.
    """
    rows = []
    for (measure, condition), part in table.groupby(["measure", "condition"], sort=False):
        part = part.set_index(["subject", "seed"]).sort_index()
        other = None
        if minus is not None:
            if condition == minus:
                continue
            base = table[(table.measure == measure) & (table.condition == minus)]
            other = base.set_index(["subject", "seed"]).sort_index().loc[part.index, "value"]
        interval = bootstrap_interval(
            part.value.to_numpy(),
            clusters=[part.index.get_level_values(0).tolist(), part.index.get_level_values(1).tolist()],
            minus=None if other is None else other.to_numpy(),
        )
        rows.append(
            {
                "condition": condition,
                "measure": measure,
                "value": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "density": part.density.mean(),
                "seconds": part.seconds.mean(),
            }
        )
    return pandas.DataFrame(rows)
