"""Pictures in rows, curves over steps, means with their intervals, and two measures in one plane."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import seaborn
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from ... import checks
from ...errors import ArgumentError
from ...pictures import Images, as_pictures
from .frame import PALETTE, PLAIN, as_labels, as_texts, finish, folded, head_and_note, require_columns

if TYPE_CHECKING:
    import pandas
    from matplotlib.axis import Axis


def picture_grid(
    pictures: Images | Iterable[Images],
    *,
    columns: int | None = None,
    row_labels: str | Iterable[str] = (),
    column_labels: str | Iterable[str] = (),
    captions: str | Iterable[str] = (),
    title: str = "",
    size: float = 1.1,
) -> Figure:
    """Show pictures in a grid; small ones are enlarged without smoothing.

    pictures: a flat sequence with `columns`, or one sequence per row. captions: one per picture, below it; row_labels
    and column_labels: left of the rows and above the columns. size: inches per picture. Raises ConeslabError if empty.
    """
    size, title = checks.number("size", size, "(0, 100]"), as_texts(title=title)[0]
    row_labels, captions = as_labels("row_labels", row_labels), as_labels("captions", captions)
    column_labels = as_labels("column_labels", column_labels)
    whole = isinstance(pictures, str | Path | Image.Image | np.ndarray) or hasattr(pictures, "detach")
    given: Any = pictures if whole else checks.items("pictures", pictures)
    if not whole and (isinstance(given[0], list | tuple) or getattr(given[0], "ndim", 0) == 4):
        rows: list[list[Image.Image]] = [as_pictures(row) for row in given]
    else:
        flat = as_pictures(given)
        columns = min(len(flat), 8) if columns is None else checks.count("columns", columns)
        rows = [flat[i : i + columns] for i in range(0, len(flat), columns)]
    width = max(len(row) for row in rows)
    captions, column_labels = folded(captions, size, 6.5), folded(column_labels, size, 8)
    side, gap = 0.75 * size, 0.05 * size
    below = 0.04 + 0.12 * max((text.count("\n") + 1 for text in captions), default=0) if captions else 0.0
    across, down = width * (side + gap) - gap, len(rows) * (side + below + gap) - gap
    figure = Figure(figsize=(across, down))
    axes = figure.add_axes((0, 0, 1, 1))  # one for all pictures, in inches: one each takes five times as long
    axes.set_axis_off()
    axes.set(xlim=(0, across), ylim=(down, 0))
    words: dict[str, Any] = {"xycoords": "data", "textcoords": "offset points", "annotation_clip": False, **PLAIN}
    centred, number = words | {"ha": "center"}, 0
    for r, row in enumerate(rows):
        top = r * (side + below + gap)
        if r < len(row_labels):
            axes.annotate(row_labels[r], (0, top + side / 2), (-4, 0), ha="right", va="center", fontsize=8, **words)
        for c, picture in enumerate(row):
            middle = c * (side + gap) + side / 2
            place = _centred(picture, middle, top + side / 2, side)
            smooth = None if picture.height > 128 else "nearest"
            axes.imshow(np.asarray(picture), extent=place, interpolation=smooth, aspect="auto")
            if r == 0 and c < len(column_labels):
                axes.annotate(column_labels[c], (middle, 0), (0, 6), va="bottom", fontsize=8, **centred)
            if number < len(captions):
                axes.annotate(captions[number], (middle, top + side), (0, -3), va="top", fontsize=6.5, **centred)
            number += 1
    if title:
        lines = max((text.count("\n") + 1 for text in column_labels), default=0)
        figure.suptitle(title, fontsize=10, y=1 + (0.12 + 0.13 * lines) / down, va="bottom", **PLAIN)
    labels = ", ".join([*row_labels, *column_labels]) or title
    return finish(figure, f"A grid of {number} pictures{': ' + labels if labels else ''}")


def _centred(picture: Image.Image, x: float, y: float, side: float) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of a picture in a square of this side; x, y: its centre, y downwards."""
    half = side / 2 / max(picture.size)
    return x - picture.width * half, x + picture.width * half, y + picture.height * half, y - picture.height * half


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]] | tuple[Sequence[float], Sequence[float], Any, Any]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    baseline: Mapping[str, float] | None = None,
    band_means: str = "95 % bootstrap interval",
) -> Figure:
    """Draw one line per name; a line is (x, y), or (x, y, low, high) with a band.

    baseline: name -> height of a dashed horizontal line. band_means: what the bands are, for the legend.
    """
    x_label, y_label, title = as_texts(x_label=x_label, y_label=y_label, title=title)
    for name, line in checks.mapping("lines", lines).items():
        if len(checks.items(f"the line {name!r}", line)) not in (2, 4) or len({len(part) for part in line}) != 1:
            raise ArgumentError(f"the line {name!r} has to be (x, y), or (x, y, low, high), all of one length")
    baseline = checks.mapping("baseline", {} if baseline is None else baseline, least=0)
    figure = Figure(figsize=(5.2, 3.2))
    axes = figure.subplots()
    banded = False
    for (name, line), colour in zip(lines.items(), PALETTE * 4, strict=False):
        axes.plot(line[0], line[1], label=name, color=colour, linewidth=1.8)
        if len(line) == 4:
            axes.fill_between(line[0], line[2], line[3], color=colour, alpha=0.2, linewidth=0)
            banded = True
    for (name, height), style in zip((baseline or {}).items(), ("--", ":", "-.") * 4, strict=False):
        axes.axhline(height, color="0.4", linestyle=style, linewidth=1.2, label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10, **PLAIN)
    if log_x:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    if log_y:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    if len(lines) + len(baseline or {}) > 1 or banded:
        note = f"band: {band_means}" if banded else None
        legend = axes.legend(fontsize=7.5, title=note, title_fontsize=7, framealpha=0.85, edgecolor="none")
        for text in legend.get_texts():
            text.set(**PLAIN)
    seaborn.despine(figure)
    return finish(figure, f"Line plot of {y_label} against {x_label}: {', '.join(lines)}")


def _plain_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10, … as plain numbers, if it spans at most three decades."""
    low, high = axis.get_view_interval()
    if high <= 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())


def intervals(
    table: pandas.DataFrame,
    *,
    value: str = "value",
    by: str = "condition",
    panels: str | None = "measure",
    columns: int | None = None,
    title: str = "",
    note: str = "",
    highlight: Sequence[str] = (),
    zero: bool = False,
    log: Sequence[str] = (),
) -> Figure:
    """Draw estimates with their intervals: one row per condition, one panel per measure.

    table: one row per (condition, measure) with the columns `value`, `low`, `high`. columns: panels side by side,
    default all. note: what the interval is and over how many subjects and seeds, shown below. highlight: the conditions
    the claim is about, drawn in colour. zero: draw a line at 0, for differences. log: panels with a logarithmic axis,
    where intervals that are not above 0 are left out. A row whose low and high are NaN has no interval: a hollow mean,
    with the numbers in its column `points`, such as each subject's mean, as dots.
    """
    require_columns(table, value, "low", "high", by, *([] if panels is None else [panels]))
    if columns is not None:
        columns = checks.count("columns", columns)
    names = list(dict.fromkeys(table[by]))
    groups = list(dict.fromkeys(table[panels])) if panels else [""]
    columns = len(groups) if columns is None else min(columns, len(groups))
    lines = -(-len(groups) // columns)
    height = 0.3 * len(names) + 0.9
    figure = Figure(figsize=(3.1 * columns + 1.8, height * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, group in zip(grid.flat, groups, strict=False):
        part = table[table[panels] == group] if panels else table
        for _, row in part.iterrows():
            place = len(names) - 1 - names.index(row[by])
            colour = PALETTE[0] if row[by] in highlight else "0.45"
            if group in log and (row["low"] <= 0 or row[value] <= 0):
                continue
            axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2.4, solid_capstyle="round")
            if points := row.get("points", ()):
                axes.plot(points, [place] * len(points), ".", color=colour, markersize=4.5, alpha=0.6)
            filled = colour if np.isfinite(row["low"]) else "white"
            axes.plot(row[value], place, "o", color=colour, markerfacecolor=filled, markersize=5.5)
        if zero:
            axes.axvline(0, color="0.3", linestyle="--", linewidth=1)
        axes.set_xlabel(group or value, fontsize=9, **PLAIN)
        axes.tick_params(labelsize=8)
        if group in log:
            axes.set_xscale("log")
        else:
            axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(names)), names[::-1], **PLAIN)
        axes.set_ylim(-0.6, len(names) - 0.4)
    seaborn.despine(figure, left=True)
    head_and_note(figure, title, note)
    return finish(figure, f"Interval plot of {', '.join(groups) or value} for {', '.join(names)}")


_MARKERS = "osD^vPX*<>"


def plane(
    table: pandas.DataFrame,
    *,
    x: str = "text alignment",
    y: str = "image alignment",
    by: str = "condition",
    highlight: Sequence[str] = (),
    origin: bool = False,
    title: str = "",
    note: str = "",
) -> Figure:
    """Draw conditions as points in the plane of two measures: what a gain in one costs in the other.

    table: as for `intervals`, with the measures `x` and `y` in its column "measure"; a condition that lacks one of them
    is left out. Crosses are the two intervals, where there are any. highlight: the conditions the claim is about, drawn
    filled. origin: for differences: draw lines at 0, and say "change" on the axes. Raises ArgumentError if no condition
    has both measures.
    """
    require_columns(table, "value", "low", "high", by, "measure")
    x, y, title, note = as_texts(x=x, y=y, title=title, note=note)
    across, up = (table[table.measure == one].drop_duplicates(by).set_index(by) for one in (x, y))
    names = [name for name in dict.fromkeys(table[by]) if name in across.index and name in up.index]
    if not names:
        known = ", ".join(map(str, dict.fromkeys(table.measure)))
        raise ArgumentError(f"no {by} has both {x!r} and {y!r}: the measures are {known}")
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        colour, marker = PALETTE[number % len(PALETTE)], _MARKERS[number % len(_MARKERS)]
        here, there = across.loc[name], up.loc[name]
        axes.plot([here.low, here.high], [there.value, there.value], color=colour, linewidth=1.2, alpha=0.7)
        axes.plot([here.value, here.value], [there.low, there.high], color=colour, linewidth=1.2, alpha=0.7)
        filled = colour if name in highlight or not len(highlight) else "white"
        axes.plot(here.value, there.value, marker, color=colour, markerfacecolor=filled, markersize=7, label=name)
    if origin:
        axes.axvline(0, color="0.3", linestyle="--", linewidth=1, zorder=0)
        axes.axhline(0, color="0.3", linestyle="--", linewidth=1, zorder=0)
    change = ", change" if origin else ""
    axes.set_xlabel(x + change, fontsize=9, **PLAIN)
    axes.set_ylabel(y + change, fontsize=9, **PLAIN)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5)  # small differences have long numbers, which would run into each other
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    for text in figure.legend(loc="outside right center", fontsize=7.5, frameon=False).get_texts():
        text.set(**PLAIN)
    seaborn.despine(figure)
    head_and_note(figure, title, note)
    return finish(figure, f"{y} against {x}, a point for each of {', '.join(map(str, names))}")
