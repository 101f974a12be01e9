"""Tables of measurements: written cell by cell, so an interruption loses only one, and summarised with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from tqdm.auto import tqdm

from ..errors import ConeslabError
from ..files import write_whole
from ..measure.statistics import bootstrap_interval

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
    file is replaced whole after each cell, so a kill at any point loses at most the running cells and repeats none.
    client: a `distributed.Client` (Dask) whose workers share the cells; `measure` must then be picklable. keep_going: a
    cell that fails becomes one row with its message in the column error, and the others go on; the next call retries
    it. Otherwise the error is raised.
    Raises ConeslabError if the file at `path` is not a table of these cells.
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
    finally:  # if interrupted: what has not begun need not begin
        client.cancel(list(futures))


def rows_of(values: Mapping[str, float], **columns: Any) -> list[Row]:
    """One row per measure, all with the same other columns."""
    return [{**columns, "measure": name, "value": value} for name, value in values.items()]


def summarise(table: pandas.DataFrame, *, minus: str | None = None, level: float = 0.95) -> pandas.DataFrame:
    """Mean and bootstrap interval of every condition and measure, over subjects and the seeds within them.

    minus: a condition to subtract from the others, pairing subject and seed; the interval is then of the difference.
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
    """Test whether conditions are as good as `minus`, to within a margin set beforehand for each measure.

    Two one-sided tests at 5 % (Schuirmann 1987): a condition is equivalent if the 90 % interval of its paired
    difference lies within plus and minus the margin. Adds the columns margin and equivalent to `summarise`.
    """
    result = summarise(table[table.measure.isin(list(margins))], minus=minus, level=0.9)
    result["margin"] = result.measure.map(margins)
    result["equivalent"] = (result.low > -result.margin) & (result.high < result.margin)
    return result
