"""Tables of measurements: written cell by cell, so an interruption loses only one, and summarised with intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import pandas
from tqdm.auto import tqdm

from .. import files
from ..errors import ConeslabError, FileFormatError
from ..measure.statistics import MIN_CLUSTERS, bootstrap_interval, cluster_means, share_interval

Row = dict[str, Any]


Identity: TypeAlias = Mapping[str, Any] | Callable[[Row], Mapping[str, Any]]


def run_cells(
    cells: Iterable[Mapping[str, Any]],
    measure: Callable[..., list[Row]],
    path: str | Path,
    *,
    identity: Identity = MappingProxyType({}),
    client: Any = None,
    keep_going: bool = False,
    progress: bool = True,
) -> pandas.DataFrame:
    """Run `measure(**cell)` for every cell that the table at `path` does not hold yet; returns the whole table.

    A cell is a set of plain values, such as {"subject": "cat", "seed": 0}; they become columns of its rows. identity:
    what else its values depend on, such as model and settings, by name, for all cells or as a function of the cell; it
    becomes columns too, and a table with rows of another identity is refused. The CSV file is replaced whole after each
    cell, with rows in the order of the cells, so a kill at any point loses at most the running cells and repeats none.
    Numbers that are measured are kept to six digits.
    client: a `distributed.Client` (Dask) whose workers share the cells; `measure` must then be picklable. keep_going: a
    cell that fails becomes one row with its message in the column error, and the others go on; the next call retries
    it. Otherwise the error is raised.
    The file's checksum is beside it (see `files`). Raises ConeslabError, before anything is measured, if the file at
    `path` is damaged, is not a table of these cells, was made otherwise, or cannot be written.
    """
    wanted: dict[tuple, Row] = {tuple(cell.values()): dict(cell) for cell in cells}
    names = list(next(iter(wanted.values()))) if wanted else []
    path, begun = open_table(path, names)
    rows = _rows_of_table(path, begun, wanted)
    _require_identity(path, rows, names, identity)
    known: dict[tuple, list[Row]] = {}
    for row in rows:
        known.setdefault(tuple(row[name] for name in names), []).append(row)
    todo = [cell for key, cell in wanted.items() if key not in known]

    def table() -> pandas.DataFrame:
        others = [key for key in known if key not in wanted]
        ordered = [row for key in (*others, *wanted) for row in known.get(key, [])]
        return pandas.DataFrame(ordered)

    bar = tqdm(total=len(known) + len(todo), initial=len(known), desc="cells", disable=not progress)
    for cell, result in _results(todo, measure, client):
        if isinstance(result, Exception):
            if not keep_going:
                raise result
            result = [{"error": f"{type(result).__name__}: {result}"}]
        about = cell | _identity_of(cell, identity)
        known[tuple(cell.values())] = [about | {name: _rounded(value) for name, value in row.items()} for row in result]
        files.write_table(path, table())
        bar.update()
    bar.close()
    return table()


CELL_SECONDS = "cell_seconds"  # the column that says how long a whole cell took
# Columns that never hold numbers.
_TEXT = ("subject", "condition", "measure", "kind", "component", "error", "model", "judge", "version", "machine")


def read_table(path: str | Path, *, text: Iterable[str] = ()) -> pandas.DataFrame:
    """Read a table of measurements. text: columns that are left as they are written, down to an empty name.

    Raises what `files.read_table` raises.
    """
    table = files.read_table(path, dtype=str, keep_default_na=False)
    for name in set(table.columns) - {*text}:
        table[name] = table[name].replace("", np.nan)
        if name not in _TEXT:
            with suppress(ValueError):
                table[name] = pandas.to_numeric(table[name])
    return table


def open_table(path: str | Path, names: Sequence[str]) -> tuple[Path, pandas.DataFrame]:
    """The path of a table and what it holds, empty if there is none. names: the columns that say what a cell is.

    Raises ConeslabError if the file is damaged, is not a table of such cells, or cannot be written.
    """
    path = files.require_writable(path)
    if not path.exists():
        return path, pandas.DataFrame()
    table = read_table(path, text=names)
    if not set(names) <= set(table.columns):
        raise ConeslabError(
            f"{path} has the columns {', '.join(table.columns)}, cells need {', '.join(names)}: name another file"
        )
    return path, table


def _rows_of_table(path: Path, table: pandas.DataFrame, wanted: Mapping[tuple, Row]) -> list[Row]:
    """The rows of a table that was begun, without those of cells that failed; cells as plain values again."""
    if "error" in table:
        table = table[table.error.isna()].drop(columns="error")
    for name, like in next(iter(wanted.values()), {}).items() if len(table) else ():
        try:
            table[name] = [_like(like, text) for text in table[name]]
        except ValueError as error:
            raise FileFormatError(f"{path} has something else than numbers as {name} ({error}): correct it") from error
    return [{name: value for name, value in row.items() if value == value} for row in table.to_dict("records")]


def _like(value: Any, text: str) -> Any:
    """A cell's value as it was before it was written, when values of its name are like this one."""
    if isinstance(value, bool):
        return text == "True"
    if isinstance(value, int | float):
        return float(text) if set(text.lower()) & set(".en") else int(text)
    return text


def _identity_of(cell: Row, identity: Identity) -> Row:
    """The identity of one cell, as text that a table can hold."""
    own = identity(cell) if callable(identity) else identity
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for name, value in own.items()
    }


def _require_identity(path: Path, rows: Iterable[Row], names: Sequence[str], identity: Identity) -> None:
    for row in rows:
        cell = {name: row[name] for name in names}
        for name, now in _identity_of(cell, identity).items():
            was = row.get(name)
            if str(was) != now:
                said = "does not say" if was is None else f"was made with {name} {was}, not"
                raise ConeslabError(
                    f"{path} {said} {f'with what {name}' if was is None else now}: its rows cannot be continued here; "
                    "name another file (--out), or delete it to measure everything anew"
                )


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float | np.floating) else value


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


SHARES = (  # what measures of pictures begin with that are shares of them
    "subject share",
    "every subject found",
    "CLIP accuracy",
    "accuracy before",
    "share of others kept",
    "share before",
    "share after",
    "comes back: ",
    "right class",
    "precision at ",
    "recall at ",
    "in the dictionary",
    "blue, pictures",
    "target on it",
    "target still drawn",
    "others kept",
    "back by ",
    "found without",
    "share in the densest heads",
)


def summarise(table: pandas.DataFrame, *, minus: str | None = None, level: float = 0.95) -> pandas.DataFrame:
    """Mean and interval of every condition and measure, over subjects and the seeds within them.

    minus: a condition to subtract from the others, pairing subject and seed; the interval is then of the difference.
    level: of the interval, which is `share_interval` for `SHARES` and what is 0 or 1 in every condition, and
    `bootstrap_interval` for all else. Returns the columns condition, measure, value, low, high, clusters (the number of
    subjects), points, and means of all other numbers. With fewer than five subjects low and high are NaN, and points
    has each subject's mean to show instead. Values that are not defined (NaN), such as the order of equal shares, are
    left out.
    Raises ConeslabError if `minus` was not measured where another condition was, or several times for one of its pairs.
    """
    others = [name for name in table.select_dtypes("number") if name not in ("subject", "seed", "value", CELL_SECONDS)]
    table = table[table.value.notna()]
    all_or_nothing = table.value.isin([0, 1]).groupby(table.measure).all()
    in_order = table.groupby(["measure", "condition"], sort=False).groups
    grouped = table.sort_values(["subject", "seed"], kind="stable").groupby(["measure", "condition"])
    means, places = grouped[others].mean(), grouped.indices
    subjects, seeds, numbers = (grouped.obj[name].to_numpy() for name in ("subject", "seed", "value"))
    rows = []
    for measure, condition in in_order:
        if condition == minus:
            continue
        here, named = places[measure, condition], str(measure).startswith(SHARES)
        values, clusters, other = numbers[here], [subjects[here].tolist(), seeds[here].tolist()], None
        if minus is not None:
            base = places.get((measure, minus), np.empty(0, dtype=int))
            of_pair = dict(zip(zip(subjects[base], seeds[base], strict=True), numbers[base], strict=True))
            pairs = list(zip(*clusters, strict=True))
            if alone := sorted(set(pairs) - set(of_pair)):
                subject, seed = alone[0]
                raise ConeslabError(
                    f"{condition!r} was measured on {subject!r} with seed {seed}, and {minus!r} was not ({measure}): "
                    "measure what is missing, or leave out what has no pair"
                )
            if len(of_pair) < len(base):
                raise ConeslabError(
                    f"{minus!r} has {len(base)} values of {measure} and {len(of_pair)} subjects and seeds: "
                    "expected one for each, such as their mean"
                )
            other = np.array([of_pair[pair] for pair in pairs])
        if other is None and named and ((values >= 0) & (values <= 1)).all():
            interval = share_interval(values, clusters=clusters, level=level)
        else:
            options: dict[str, Any] = {"minus": other, "shares": named or bool(all_or_nothing[measure]), "level": level}
            interval = bootstrap_interval(values, clusters=clusters, **options)
        points: tuple[float, ...] = ()
        if interval.clusters < MIN_CLUSTERS:
            points = cluster_means(values if other is None else values - other, clusters)
        bounds = {"value": interval.estimate, "low": interval.low, "high": interval.high}
        counted = {"clusters": interval.clusters, "points": points}
        rows.append(
            {"condition": condition, "measure": measure, **bounds, **counted, **means.loc[(measure, condition)]}
        )
    return pandas.DataFrame(rows)


def equivalence(table: pandas.DataFrame, *, minus: str, margins: Mapping[str, float]) -> pandas.DataFrame:
    """Test whether conditions are as good as `minus`, to within a margin set beforehand for each measure.

    Two one-sided tests at 5 % (Schuirmann 1987): a condition is equivalent if the 90 % interval of its paired
    difference lies within plus and minus the margin. Adds the columns margin and equivalent to `summarise`.
    Raises ConeslabError for fewer than five subjects: so few can show no equivalence.
    """
    count = table.subject.nunique()
    if count < MIN_CLUSTERS:
        raise ConeslabError(
            f"got {count} subjects, expected at least {MIN_CLUSTERS} for a test of equivalence: measure more of them"
        )
    result = summarise(table[table.measure.isin(list(margins))], minus=minus, level=0.9)
    result["margin"] = result.measure.map(margins)
    result["equivalent"] = (result.low > -result.margin) & (result.high < result.margin)
    return result
