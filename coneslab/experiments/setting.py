"""Tables of measurements: edits on subjects and seeds, written cell by cell, summed up with intervals.

An interruption loses one cell. `registry.py` says which cells there are; here is what they have in common.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from tqdm.auto import tqdm

from ..diffusion.sampling import generate
from ..edits.base import Edit, applied, load_edit, model_fingerprint, write_whole
from ..errors import ConeslabError
from ..finetuning.kv_gradient import concept_loss
from ..finetuning.samples import prior_pictures
from ..measure.judge import Judge, bootstrap_interval
from ..neurons.mask import ConceptNeurons
from ..neurons.search import find_concept_neurons
from ..world.pictures import STYLE_WORDS, STYLES, with_article
from ..world.subjects import Subject

MEASURES = {
    "text alignment": "cosine of picture and prompt",
    "image alignment": "cosine of picture and references",
    "subject share": "share of pictures the judge takes for the subject's own style",
    "concept loss": "denoising loss on the subject",
}
Row = dict[str, Any]


def run_cells(
    cells: Iterable[Mapping[str, Any]],
    measure: Callable[..., list[Row]],
    path: str | Path,
    *,
    client: Any = None,
    keep_going: bool = False,
    progress: bool = True,
) -> pandas.DataFrame:
    """Run `measure(**cell)` for every cell that the table at `path` does not hold yet; returns the whole table.

    A cell is a set of plain values, such as {"subject": "cat", "seed": 0}; they become columns of its rows. The CSV
    file is replaced whole after each cell, so a kill at any point loses at most the cells under way and doubles none.
    client: a `distributed.Client` (Dask) whose workers share the cells; `measure` must then be a function that can be
    sent to them. keep_going: a cell that fails becomes one row with its message in the column error, and the others
    go on; the next call tries it again. Otherwise the error is raised.
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
    if len(table) and "error" in table:
        table = table[table.error.isna()].drop(columns="error")
    done = set(table[names].itertuples(index=False, name=None)) if len(table) and names else set()
    todo = [cell for cell in todo if tuple(cell.values()) not in done]
    bar = tqdm(total=len(done) + len(todo), initial=len(done), desc="cells", disable=not progress)
    for cell, result in _results(todo, measure, client):
        if isinstance(result, Exception):
            if not keep_going:
                raise result
            result = [{"error": f"{type(result).__name__}: {result}"}]
        rows = pandas.DataFrame([{**cell, **row} for row in result])
        table = pandas.concat([table, rows], ignore_index=True)
        write_whole(path, table.to_csv(index=False, float_format="%.6g").encode())
        bar.update()
    bar.close()
    return table


def _results(
    cells: Sequence[Row], measure: Callable[..., list[Row]], client: Any
) -> Iterator[tuple[Row, list[Row] | Exception]]:
    """Every cell with its rows or its error, as they come in."""
    if client is None:
        for cell in cells:
            try:
                yield cell, measure(**cell)
            except Exception as error:
                yield cell, error
        return
    from distributed import as_completed

    futures = {client.submit(measure, **cell, pure=False): cell for cell in cells}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result() if future.status == "finished" else future.exception()
    finally:  # interrupted: what has not begun need not begin
        client.cancel(list(futures))


def subject_share(judge: Judge, images: Sequence[Any], about: Subject) -> np.ndarray:
    """Whether the judge takes each picture for the subject's own art style, (n,) bool.

    Only for subjects of the sticker world: "a sticker cat" must be nearer than "a 3d cat", "a flat cat" and so on.
    """
    labels = [[with_article(f"{word} {about.class_word}") for word in STYLE_WORDS[style][:1]] for style in STYLES]
    return judge.classify(list(images), labels).numpy() == STYLES.index(about.records[0].objects[0].style)


def measure(
    pipe: Any,
    judge: Judge,
    about: Subject,
    edit: Edit | None,
    *,
    seed: int,
    pictures: int = 2,
    steps: int = 25,
    guidance_scale: float = 3.0,
    samples: int = 160,
) -> dict[str, float]:
    """Every measure of `MEASURES` for one edit (None: the model as it is), on a subject's evaluation prompts.

    Draws `pictures` pictures a prompt, and takes the loss over `samples` noises. All edits measured with one `seed`
    start from the same noises.
    """
    prompts = [prompt for prompt in about.prompts for _ in range(pictures)]
    with applied(edit, pipe):
        drawn = generate(pipe, prompts, seed=1000 * seed, steps=steps, guidance_scale=guidance_scale, batch_size=20)
    return {
        **alignments(judge, about, drawn),
        "concept loss": concept_loss(pipe, about, edit=edit, samples=samples).subject,
    }


def alignments(judge: Judge, about: Subject, drawn: Sequence[Any]) -> dict[str, float]:
    """Text and image alignment and subject share of pictures of the evaluation prompts, as many of each, in order."""
    prompts = [about.plain(prompt) for prompt in about.prompts for _ in range(len(drawn) // len(about.prompts))]
    return {
        "text alignment": judge.text_alignment(list(drawn), prompts),
        "image alignment": judge.image_alignment(list(drawn), about.images),
        "subject share": float(subject_share(judge, drawn, about).mean()),
    }


def rows_of(values: Mapping[str, float], **columns: Any) -> list[Row]:
    """One row for every measure, each with the same other columns."""
    return [{**columns, "measure": name, "value": value} for name, value in values.items()]


def stored_bytes(edit: Any) -> float:
    """Bytes of an edit where it is stored as small as it can be: the file of a mask, else `nbytes`; NaN without."""
    if isinstance(edit, ConceptNeurons):
        return len(edit.to_bytes())
    return float(getattr(edit, "nbytes", np.nan))


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    """What `make` returns, and the seconds it took."""
    begun = time.perf_counter()
    made = make()
    return made, time.perf_counter() - begun


def neurons(pipe: Any, about: Subject, *, seed: int, **settings: Any) -> ConceptNeurons:
    """A search without a progress bar; its prior pictures are drawn before, once for all searches from one seed."""
    prior = prior_pictures(pipe, about, seed=seed)
    return find_concept_neurons(pipe, about, prior=prior, seed=seed, progress=False, **settings)


def kept(
    make: Callable[..., Any], pipe: Any, about: Subject, *, seed: int, folder: str | Path | None, **settings: Any
) -> tuple[Any, float]:
    """The edit make(pipe, about, seed=..., **settings) and the seconds it takes to make, read from `folder` if there.

    Edits made by another function, on another model, with other pictures or settings are made anew and kept beside.
    Without a folder nothing is kept.
    """
    how = partial(make, pipe, about, seed=seed, **settings)
    if folder is None:
        return timed(how)
    facts = [make.__qualname__, model_fingerprint(pipe), about.prompt, sorted(settings.items())]
    pictures = b"".join(picture.tobytes() for picture in about.images)
    key = hashlib.sha256(repr(facts).encode() + pictures).hexdigest()[:16]
    file = Path(folder) / f"{about.name}-{seed}-{key}.safetensors"
    noted = file.with_suffix(".json")
    if noted.is_file():  # written last
        return load_edit(file), float(json.loads(noted.read_text(encoding="utf-8"))["seconds"])
    edit, seconds = timed(how)
    edit.save(file)
    write_whole(noted, json.dumps({"seconds": seconds}).encode())
    return edit, seconds


@dataclass(frozen=True)
class Setting:
    """What all cells of an experiment share.

    rounds: of a search; pictures: a prompt; steps, guidance_scale: of drawing; samples: of a denoising loss; masks:
    folder in which found neurons are kept between experiments.
    """

    pipe: Any
    judge: Judge
    rounds: int = 60
    finetune_steps: int = 100
    pictures: int = 1
    steps: int = 25
    guidance_scale: float = 3.0
    samples: int = 160
    masks: Path | None = None

    @property
    def drawing(self) -> dict[str, Any]:
        """Options of `generate`."""
        return {"steps": self.steps, "guidance_scale": self.guidance_scale}

    def quick(self, steps: int = 15) -> Setting:
        """The same with at most so many steps of drawing: for experiments that draw thousands of pictures."""
        return replace(self, steps=min(self.steps, steps))

    def search(self, about: Subject, seed: int, **how: Any) -> ConceptNeurons:
        """A search of its own. how: options of `find_concept_neurons`."""
        return neurons(self.pipe, about, seed=seed, rounds=self.rounds, **how)

    def found_in(self, about: Subject, seed: int) -> tuple[ConceptNeurons, float]:
        """The subject's neurons, searched for once for all experiments, and the seconds of that search."""
        return kept(neurons, self.pipe, about, seed=seed, folder=self.masks, rounds=self.rounds)

    def found(self, about: Subject, seed: int) -> ConceptNeurons:
        return self.found_in(about, seed)[0]

    def measure(self, about: Subject, edit: Edit | None, seed: int, **columns: Any) -> list[Row]:
        """The rows of one condition; `columns` go beside each measure."""
        how = {"pictures": self.pictures, "samples": self.samples, **self.drawing}
        values = measure(self.pipe, self.judge, about, edit, seed=seed, **how)
        return rows_of(values, **{"density": float(getattr(edit, "density", np.nan)), **columns})


def summarise(table: pandas.DataFrame, *, minus: str | None = None, level: float = 0.95) -> pandas.DataFrame:
    """Mean and bootstrap interval of every condition and measure, over subjects and the seeds within them.

    minus: a condition to subtract from the others, pairing subject and seed; then the interval is of the difference.
    level: of the interval. Returns the columns condition, measure, value, low, high, and means of all other numbers.
    """
    others = [name for name in table.select_dtypes("number") if name not in ("seed", "value")]
    rows = []
    for (measure, condition), part in table.groupby(["measure", "condition"], sort=False):
        part = part.set_index(["subject", "seed"]).sort_index()
        other = None
        if minus is not None:
            if condition == minus:
                continue
            base = table[(table.measure == measure) & (table.condition == minus)]
            other = base.set_index(["subject", "seed"]).sort_index().loc[part.index, "value"].to_numpy()
        clusters = [part.index.get_level_values(name).tolist() for name in ("subject", "seed")]
        interval = bootstrap_interval(part.value.to_numpy(), clusters=clusters, minus=other, level=level)
        bounds = {"value": interval.estimate, "low": interval.low, "high": interval.high}
        rows.append({"condition": condition, "measure": measure, **bounds, **part[others].mean()})
    return pandas.DataFrame(rows)


def equivalence(table: pandas.DataFrame, *, minus: str, margins: Mapping[str, float]) -> pandas.DataFrame:
    """Test whether conditions are as good as `minus`, to within a margin named beforehand for each measure.

    Two one-sided tests at 5 % (Schuirmann 1987): a condition is equivalent if the 90 % interval of its paired
    difference lies within plus and minus the margin. Adds the columns margin and equivalent to `summarise`.
    """
    result = summarise(table[table.measure.isin(list(margins))], minus=minus, level=0.9)
    result["margin"] = result.measure.map(margins)
    result["equivalent"] = (result.low > -result.margin) & (result.high < result.margin)
    return result
