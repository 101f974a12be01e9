"""Figures: each function takes results and returns a matplotlib Figure with an alt text.

Colours are seaborn's colour-blind palette and cividis. `show(figure)` displays a figure in a notebook as a picture
with its alt text, which plain inline display would drop.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import seaborn
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from .. import checks
from ..errors import ArgumentError
from ..pictures import Images, as_pictures

if TYPE_CHECKING:
    import pandas
    from matplotlib.axis import Axis

PALETTE = seaborn.color_palette("colorblind").as_hex()
MAP = "cividis"
_PLAIN: dict[str, Any] = {"parse_math": False}  # for names and prompts: a "$" in them begins no formula


def _finish(figure: Figure, alt: str) -> Figure:
    figure.set_label(alt)
    return figure


def _head_and_note(figure: Figure, title: str, note: str) -> None:
    """A title above the whole figure and a note below it, where there are any."""
    if title:
        figure.suptitle(title, fontsize=10, **_PLAIN)
    if note:
        figure.supxlabel(note, fontsize=7.5, color="0.3", x=0.01, ha="left", **_PLAIN)


def _grey_frame(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def to_png(figure: Figure, dpi: int = 110, *, full_colour: int = 60_000) -> bytes:
    """Return the figure as the bytes of a PNG file.

    Above `full_colour` bytes it gets a palette of 256 colours: a third of the size, which notebooks need.
    """
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    if len(buffer.getvalue()) <= full_colour:
        return buffer.getvalue()
    picture = Image.open(buffer).convert("RGB")
    ninth = picture.resize((picture.width // 3, picture.height // 3), Image.Resampling.NEAREST)
    colours = ninth.quantize(255, kmeans=1)  # without k-means a yellow sun turns grey; on all pixels it takes 0.5 s
    palette, white = colours.getpalette() or [], Image.fromarray((np.asarray(picture) == 255).all(axis=2))
    painted = picture.quantize(palette=colours, dither=Image.Dither.NONE)
    painted.putpalette([*palette, 255, 255, 255])
    painted.paste(len(palette) // 3, mask=white)  # the white page, which the palette only approximates
    painted.save(small, "PNG")
    return small.getvalue()


def show(figure: Figure, dpi: int = 110) -> None:
    """Display a figure in a notebook as a PNG with its alt text."""
    checks.of_kind("figure", figure, Figure)
    from IPython.display import HTML, display

    data = base64.b64encode(to_png(figure, dpi)).decode()
    alt = html.escape(str(figure.get_label()))
    display(HTML(f'<img alt="{alt}" style="max-width:100%" src="data:image/png;base64,{data}">'))


def _folded(texts: Sequence[str], inches: float, points: float) -> list[str]:
    """Wrap texts to a width in inches at a font size in points: letters are 0.72 as wide, and 72 points an inch."""
    return [textwrap.fill(text, max(8, int(inches * 100 / points))) for text in texts]


def _labels(name: str, given: str | Iterable[str]) -> list[str]:
    """Labels from one text or several; any of them may be empty."""
    return checks.texts(name, given, least=0, blank=True)


def _texts(**given: str) -> list[str]:
    """Titles and the like; any of them may be empty."""
    return [checks.text(name, one, blank=True) for name, one in given.items()]


def _without_formulas(names: Sequence[str]) -> list[str]:
    """Names for seaborn, which draws them before they can be told to be plain."""
    return [str(name).replace("$", r"\$") for name in names]


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
    size, title = checks.number("size", size, "(0, 100]"), _texts(title=title)[0]
    row_labels, captions = _labels("row_labels", row_labels), _labels("captions", captions)
    column_labels = _labels("column_labels", column_labels)
    whole = isinstance(pictures, str | Path | Image.Image | np.ndarray) or hasattr(pictures, "detach")
    given: Any = pictures if whole else checks.items("pictures", pictures)
    if not whole and (isinstance(given[0], list | tuple) or getattr(given[0], "ndim", 0) == 4):
        rows: list[list[Image.Image]] = [as_pictures(row) for row in given]
    else:
        flat = as_pictures(given)
        columns = min(len(flat), 8) if columns is None else checks.count("columns", columns)
        rows = [flat[i : i + columns] for i in range(0, len(flat), columns)]
    width = max(len(row) for row in rows)
    captions, column_labels = _folded(captions, size, 6.5), _folded(column_labels, size, 8)
    extra = 0.04 + 0.12 * max((text.count("\n") + 1 for text in captions), default=0) if captions else 0.0
    figure = Figure(figsize=(width * size, len(rows) * (size + extra) + (0.3 if title or column_labels else 0)))
    grid = figure.subplots(len(rows), width, squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.06 + extra})
    number = 0
    for r, row in enumerate(rows):
        for c in range(width):
            axes = grid[r][c]
            _grey_frame(axes)
            if c >= len(row):
                continue
            axes.imshow(np.asarray(row[c]), interpolation="nearest" if np.asarray(row[c]).shape[0] <= 128 else None)
            if r == 0 and c < len(column_labels):
                axes.set_title(column_labels[c], fontsize=8, **_PLAIN)
            if number < len(captions):
                axes.set_xlabel(captions[number], fontsize=6.5, labelpad=2, **_PLAIN)
            if c == 0 and r < len(row_labels):
                axes.set_ylabel(row_labels[r], rotation=0, ha="right", va="center", fontsize=8, **_PLAIN)
            number += 1
    if title:
        lines = max((text.count("\n") + 1 for text in column_labels), default=0)
        figure.suptitle(title, fontsize=10, y=0.9 + 0.16 * lines / figure.get_figheight(), va="bottom", **_PLAIN)
    labels = ", ".join([*row_labels, *column_labels]) or title
    return _finish(figure, f"A grid of {number} pictures{': ' + labels if labels else ''}")


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
    x_label, y_label, title = _texts(x_label=x_label, y_label=y_label, title=title)
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
    axes.set_title(title, fontsize=10, **_PLAIN)
    if log_x:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    if log_y:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    if len(lines) + len(baseline or {}) > 1 or banded:
        note = f"band: {band_means}" if banded else None
        for text in axes.legend(fontsize=7.5, frameon=False, title=note, title_fontsize=7).get_texts():
            text.set(**_PLAIN)
    seaborn.despine(figure)
    return _finish(figure, f"Line plot of {y_label} against {x_label}: {', '.join(lines)}")


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
    _require_columns(table, value, "low", "high", by, *([] if panels is None else [panels]))
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
        axes.set_xlabel(group or value, fontsize=9, **_PLAIN)
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
        axes.set_yticks(range(len(names)), names[::-1], **_PLAIN)
        axes.set_ylim(-0.6, len(names) - 0.4)
    seaborn.despine(figure, left=True)
    _head_and_note(figure, title, note)
    return _finish(figure, f"Interval plot of {', '.join(groups) or value} for {', '.join(names)}")


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
    filled. origin: draw lines at 0, for differences. Raises ArgumentError if no condition has both measures.
    """
    _require_columns(table, "value", "low", "high", by, "measure")
    x, y, title, note = _texts(x=x, y=y, title=title, note=note)
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
    axes.set_xlabel(x, fontsize=9, **_PLAIN)
    axes.set_ylabel(y, fontsize=9, **_PLAIN)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    for text in figure.legend(loc="outside right center", fontsize=7.5, frameon=False).get_texts():
        text.set(**_PLAIN)
    seaborn.despine(figure)
    _head_and_note(figure, title, note)
    return _finish(figure, f"{y} against {x}, a point for each of {', '.join(map(str, names))}")


def _require_columns(table: Any, *needed: str) -> None:
    missing = [name for name in needed if name not in getattr(table, "columns", ())]
    if missing:
        raise ArgumentError(f"the table has no column {', '.join(map(str, missing))}: give a DataFrame that has it")
    if not len(table):
        raise ArgumentError("the table is empty: there is nothing to draw")


def _numbers(name: str, given: Any, dimensions: int) -> np.ndarray:
    """An array of numbers that is not empty."""
    try:
        found = np.asarray(given.detach().cpu().float() if hasattr(given, "detach") else given, float)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} is {checks.shown(given)}: give an array of numbers") from error
    if found.ndim != dimensions or not found.size:
        raise ArgumentError(f"{name} has shape {found.shape}: give {dimensions} dimensions")
    return found


def _table(values: Any, rows: Sequence[str], columns: Sequence[str] | None = None) -> np.ndarray:
    """Numbers (rows, columns) that match their labels."""
    found = _numbers("values", values, 2)
    if len(found) != len(rows) or (columns is not None and found.shape[1] != len(columns)):
        named = f"{len(rows)} rows" + ("" if columns is None else f" and {len(columns)} columns")
        raise ArgumentError(f"values have shape {found.shape}, but {named} are named: name each of them")
    return found


def heatmap(
    values: np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    title: str = "",
    x_label: str = "",
    annotate: bool = True,
    form: str = ".2g",
) -> Figure:
    """Draw a table of numbers as a heat map; values (rows, columns), NaN left blank; `label` names the unit."""
    rows, columns = _labels("rows", rows), _labels("columns", columns)
    label, title, x_label = _texts(label=label, title=title, x_label=x_label)
    values = _table(values, rows, columns)
    figure = Figure(figsize=(0.75 * len(columns) + 2.2, 0.34 * len(rows) + 1.2))
    axes = figure.subplots()
    seaborn.heatmap(
        np.asarray(values, float),
        ax=axes,
        cmap=MAP,
        annot=annotate,
        fmt=form,
        xticklabels=_without_formulas(columns),
        yticklabels=_without_formulas(rows),
        cbar_kws={"label": label},
        annot_kws={"fontsize": 7},
        mask=np.isnan(np.asarray(values, float)),
    )
    axes.set_yticklabels(axes.get_yticklabels(), rotation=0)
    axes.set_xlabel(x_label)
    axes.set_title(title, fontsize=10, **_PLAIN)
    return _finish(figure, f"Heat map of {label}: {len(rows)} rows ({rows[0]} …) by {len(columns)} columns")


def profile_map(
    shares: Mapping[str, Mapping[str, float]],
    *,
    groups: Mapping[str, Sequence[str]],
    verdicts: Mapping[str, str],
    found: Mapping[str, Iterable[str]],
    title: str = "",
) -> Figure:
    """Draw which probes find a concept after each method: a row for each, a square for each probe, its verdict beside.

    shares: method -> probe -> share of pictures that show the concept; groups: name -> probes, side by side under that
    name; found: method -> probes that find it by the rule, which have a frame: what is dark and has none is within
    the margin. Probes that a method lacks are left blank.
    """
    checks.mapping("shares", shares)
    names = [checks.text("one of methods", name) for name in shares]
    columns = {name: checks.texts(f"groups[{name!r}]", own) for name, own in checks.mapping("groups", groups).items()}
    checks.mapping("verdicts", verdicts)
    checks.mapping("found", found)
    if missing := [name for name in names if name not in verdicts or name not in found]:
        raise ArgumentError(f"{missing[0]!r} has no verdict, or no probes that find it: give both for each method")
    probes = [probe for own in columns.values() for probe in own]
    values = np.array([[shares[name].get(probe, np.nan) for probe in probes] for name in names], float)
    gaps = np.cumsum([0.0] + [0.0 if probe in own[1:] else 0.5 for own in columns.values() for probe in own])[1:] - 0.5
    places = np.arange(len(probes)) + gaps
    wide = 0.42
    figure = Figure(figsize=(wide * places[-1] + 5.0, 0.34 * len(names) + 2.6))
    axes = figure.subplots()
    found_by = {name: set(found[name]) for name in names}
    for row, name in enumerate(names):
        for column, probe in enumerate(probes):
            if np.isfinite(values[row, column]):
                colour = colormaps[MAP](1 - values[row, column])
                corner = (places[column] - 0.46, row - 0.46)
                axes.add_patch(Rectangle(corner, 0.92, 0.92, facecolor=colour, edgecolor="none"))
                ink = "black" if values[row, column] < 0.5 else "white"
                number = f"{values[row, column]:.2f}"
                axes.text(places[column], row, number, ha="center", va="center", fontsize=6.5, color=ink)
                if probe in found_by[name]:
                    axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=PALETTE[3], linewidth=2.0))
        axes.text(places[-1] + 0.8, row, verdicts[name], va="center", fontsize=8.5, fontweight="bold", **_PLAIN)
    first = 0
    for name, own in columns.items():
        middle = places[first : first + len(own)].mean()
        label = textwrap.fill(name, max(10, int(len(own) * wide * 12)))
        axes.text(middle, -0.75, label, ha="center", va="bottom", fontsize=8, fontweight="bold", **_PLAIN)
        first += len(own)
    axes.set_xlim(-0.6, places[-1] + 0.6)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xticks(places, probes, rotation=45, ha="right", fontsize=7.5, **_PLAIN)
    axes.set_yticks(range(len(names)), names, fontsize=8.5, **_PLAIN)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.suptitle(title, fontsize=10, y=1.02, **_PLAIN)
    said = "; ".join(f"{name}: {verdicts[name]}" for name in names)
    return _finish(figure, f"Shares of pictures that show the concept, by method and probe. {said}")


def pictures_and_map(
    pictures: Sequence[Image.Image | np.ndarray],
    values: np.ndarray,
    *,
    rows: Sequence[str],
    label: str,
    x_label: str = "",
    title: str = "",
    size: float = 1.5,
) -> Figure:
    """Draw pictures in a row, and below them a heat map of values (rows, columns) with a name for each row."""
    pictures, rows = as_pictures(pictures), _labels("rows", rows)
    label, title, x_label = _texts(label=label, title=title, x_label=x_label)
    values, size = _table(values, rows), checks.number("size", size, "(0, 100]")
    figure = Figure(figsize=(size * len(pictures), size + 0.19 * len(rows) + 0.8), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[size, 0.19 * len(rows) + 0.5])
    above, below = halves
    for axes, picture in zip(above.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True):
        _grey_frame(axes)
        axes.imshow(np.asarray(picture), interpolation="nearest")
    axes = below.subplots()
    seaborn.heatmap(
        np.asarray(values, float),
        ax=axes,
        cmap=MAP,
        vmin=0,
        xticklabels=False,
        yticklabels=_without_formulas(rows),
        cbar_kws={"label": label},
    )
    axes.collections[0].colorbar.ax.tick_params(labelsize=7)
    axes.tick_params(labelsize=7)
    axes.set_xlabel(x_label, fontsize=8)
    figure.suptitle(title, fontsize=10, **_PLAIN)
    return _finish(figure, f"{title}: {len(pictures)} pictures, and a heat map of {label} in {len(rows)} rows")


def attention_overlay(
    pictures: Sequence[Image.Image | np.ndarray],
    maps: Sequence[np.ndarray],
    *,
    labels: Sequence[str] = (),
    title: str = "",
    size: float = 1.3,
) -> Figure:
    """Overlay attention maps on pictures: one column each, the picture above, the overlay below.

    pictures: (height, width, 3) each; maps: (h, w) each, any size, stretched over the picture and scaled to its own
    minimum and maximum. Raises ArgumentError for other shapes, or unless there is a map for each picture.
    """
    pictures, labels = as_pictures(pictures), _labels("labels", labels)
    size, (title,) = checks.number("size", size, "(0, 100]"), _texts(title=title)
    maps = [_numbers("one of maps", one, 2) for one in checks.items("maps", maps)]
    if len(maps) != len(pictures):
        raise ArgumentError(f"got {len(pictures)} pictures and {len(maps)} maps: give one map for each picture")
    figure = Figure(figsize=(size * len(pictures), 2 * size + 0.3))
    grid = figure.subplots(2, len(pictures), squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for i, (picture, weights) in enumerate(zip(pictures, maps, strict=True)):
        pixels = np.asarray(picture)
        height, width = pixels.shape[:2]
        for axes in grid[:, i]:
            _grey_frame(axes)
            axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
        grid[1][i].imshow(
            np.asarray(weights, float), extent=(0, width, height, 0), cmap=MAP, alpha=0.75, interpolation="bilinear"
        )
        if i < len(labels):
            grid[0][i].set_title(labels[i], fontsize=8, **_PLAIN)
    figure.suptitle(title, fontsize=10, y=1.0, va="bottom", **_PLAIN)
    return _finish(figure, f"Pictures with attention maps over them: {', '.join(labels) or title}")


def trace_map(table: pandas.DataFrame, *, pictures: Images | None = None, title: str = "") -> Figure:
    """Draw what `measure.trace_activations` gives: effects as a heat map, sites in their order by bands of steps.

    pictures: two to set beside it, one of the run that was changed and one of the source.
    """
    _require_columns(table, "site", "band", "first_step", "last_step", "effect")
    shown = None if pictures is None else as_pictures(pictures)
    if shown is not None and len(shown) != 2:
        raise ArgumentError(f"got {len(shown)} pictures: give two, of the run that was changed and of the source")
    source, into = (checks.shown(table.attrs.get(name, name)) for name in ("source", "into"))
    (title,) = _texts(title=title)
    title = title or f"{source} put into the run of {into}"
    values = table.pivot(index="site", columns="band", values="effect").loc[list(dict.fromkeys(table["site"]))]
    bands = table.drop_duplicates("band").set_index("band").loc[values.columns]
    steps = [f"{a}" if a == b else f"{a}–{b}" for a, b in zip(bands.first_step, bands.last_step, strict=True)]
    height = 0.32 * len(values) + 0.5
    figure = Figure(figsize=(0.62 * len(steps) + 3.6 + (1.5 if shown else 0), max(height, 2.6)), layout="constrained")
    if shown is None:
        axes = figure.subplots()
    else:
        halves: Any = figure.subfigures(1, 2, width_ratios=[1.3, 0.62 * len(steps) + 3.6])
        left, right = halves
        axes = right.subplots()
        for small, picture, label in zip(left.subplots(2, 1), shown, (into, source), strict=True):
            _grey_frame(small)
            small.imshow(np.asarray(picture), interpolation="nearest")
            small.set_xlabel(textwrap.fill(label, 20), fontsize=7, **_PLAIN)
    seaborn.heatmap(
        values.to_numpy().round(2) + 0.0,  # no -0.00
        ax=axes,
        cmap=MAP,
        vmin=min(0.0, float(values.min().min())),
        annot=len(steps) <= 12,
        fmt=".2f",
        annot_kws={"fontsize": 6.5},
        xticklabels=steps,
        yticklabels=_without_formulas(list(values.index)),
        cbar_kws={"label": f"effect in {table.attrs.get('measured', 'the picture')} (1: the source's picture)"},
    )
    bar: Any = axes.collections[0].colorbar
    bar.ax.tick_params(labelsize=7)
    bar.ax.yaxis.label.set_fontsize(7.5)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("steps in which the source's activations are put in place", fontsize=8)
    axes.set_ylabel("")
    figure.suptitle(title, fontsize=9, **_PLAIN)
    best = table.loc[table["effect"].idxmax()]
    return _finish(
        figure,
        f"Heat map of the effect of activations of {source} in the run of {into}, {len(values)} sites by {len(steps)} "
        f"bands of steps; the largest is {best.effect:.2f}, at {best.site} in steps {best.first_step} to "
        f"{best.last_step}",
    )


def merit_map(table: pandas.DataFrame, *, word: str = "all", title: str = "") -> Figure:
    """Draw what `measure.attention_merit` gives for a word: one heat map per measure, layers by timesteps.

    Above each stand what chance would give, and what the maps get against other objects, both means over the cells.
    """
    _require_columns(table, "layer", "timestep", "word", "measure", "value", "chance", "elsewhere", "objects")
    word, title = checks.choice("word", word, tuple(dict.fromkeys(table["word"]))), _texts(title=title)[0]
    table = table[table["word"] == word]
    layers, times = list(dict.fromkeys(table["layer"])), list(dict.fromkeys(table["timestep"]))
    measures = list(dict.fromkeys(table["measure"]))
    figure = Figure(figsize=((0.55 * len(times) + 1.6) * len(measures) + 0.8, 0.3 * len(layers) + 1.3))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(grid, measures, strict=True):
        part = table[table["measure"] == measure]
        values = part.pivot(index="layer", columns="timestep", values="value").loc[layers, times]
        seaborn.heatmap(
            values.to_numpy(),
            ax=axes,
            cmap=MAP,
            vmin=0,
            annot=True,
            fmt=".2f",
            annot_kws={"fontsize": 6.5},
            xticklabels=times,
            yticklabels=_without_formulas(layers),
        )
        axes.collections[0].colorbar.ax.tick_params(labelsize=7)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("timestep (1000: all noise)", fontsize=8)
        chance, elsewhere = part["chance"].mean(), part["elsewhere"].mean()
        axes.set_title(f"{measure}\nchance {chance:.2f}, other objects {elsewhere:.2f}", fontsize=8)
    objects = int(table["objects"].max())
    what = f"{objects} objects" if word == "all" else f"{objects} objects called {word}"
    figure.suptitle(title or f"Attention maps against true masks, {what}", fontsize=9, **_PLAIN)
    return _finish(figure, f"Heat maps of {' and '.join(measures)} of attention maps, {len(layers)} layers, {what}")
