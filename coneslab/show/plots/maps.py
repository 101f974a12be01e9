"""Tables as colours, and pictures beside or beneath them: heat maps, profiles, attention, traces."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import seaborn
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ... import checks
from ...errors import ArgumentError
from ...pictures import Images, as_pictures
from .frame import MAP, PALETTE, PLAIN, as_labels, as_texts, finish, grey_frame, require_columns, without_formulas

if TYPE_CHECKING:
    import pandas


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
    rows, columns = as_labels("rows", rows), as_labels("columns", columns)
    label, title, x_label = as_texts(label=label, title=title, x_label=x_label)
    values = _table(values, rows, columns)
    figure = Figure(figsize=(0.75 * len(columns) + 2.2, 0.34 * len(rows) + 1.2))
    axes = figure.subplots()
    seaborn.heatmap(
        np.asarray(values, float),
        ax=axes,
        cmap=MAP,
        annot=annotate,
        fmt=form,
        xticklabels=without_formulas(columns),
        yticklabels=without_formulas(rows),
        cbar_kws={"label": label},
        annot_kws={"fontsize": 7},
        mask=np.isnan(np.asarray(values, float)),
    )
    axes.set_yticklabels(axes.get_yticklabels(), rotation=0)
    axes.set_xlabel(x_label)
    axes.set_title(title, fontsize=10, **PLAIN)
    return finish(figure, f"Heat map of {label}: {len(rows)} rows ({rows[0]} …) by {len(columns)} columns")


def profile_map(profiles: Mapping[str, Any], *, title: str = "") -> Figure:
    """Draw which probes find a concept after each method: a row for each, a square for each probe, its verdict beside.

    profiles: a `methods.Profile` of each method, as `Profile.of` or `experiments.profiles` gives them. A square is the
    share of pictures that show the concept, and has a frame where the probe finds it by the profile's rule: what is
    dark and has none is within the margin. Probes are side by side by their kind; those that a method lacks are left
    blank.
    """
    checks.mapping("profiles", profiles)
    (title,) = as_texts(title=title)
    names = [checks.text("one of methods", name) for name in profiles]
    columns: dict[str, dict[str, None]] = {}
    for name, profile in profiles.items():
        profile = checks.having(f"profiles[{name!r}]", profile, "a Profile", "findings", "verdict", "found_by")
        for one in profile.findings:
            columns.setdefault(one.kind, {})[one.probe] = None
    shares = {name: {one.probe: one.share for one in profile.findings} for name, profile in profiles.items()}
    verdicts = {name: profile.verdict for name, profile in profiles.items()}
    probes = [probe for own in columns.values() for probe in own]
    values = np.array([[shares[name].get(probe, np.nan) for probe in probes] for name in names], float)
    gaps = np.cumsum([0.5 * (place == 0) for own in columns.values() for place in range(len(own))]) - 0.5
    places = np.arange(len(probes)) + gaps
    wide = 0.42
    figure = Figure(figsize=(wide * places[-1] + 5.0, 0.34 * len(names) + 2.6))
    axes = figure.subplots()
    found_by = {name: set(profile.found_by) for name, profile in profiles.items()}
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
        axes.text(places[-1] + 0.8, row, verdicts[name], va="center", fontsize=8.5, fontweight="bold", **PLAIN)
    first, lines = 0, 1
    for name, own in columns.items():
        middle = places[first : first + len(own)].mean()
        label = textwrap.fill(name, max(10, int(len(own) * wide * 12)))
        axes.text(middle, -0.75, label, ha="center", va="bottom", fontsize=8, fontweight="bold", **PLAIN)
        first, lines = first + len(own), max(lines, label.count("\n") + 1)
    axes.set_xlim(-0.6, places[-1] + 0.6)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xticks(places, probes, rotation=45, ha="right", fontsize=7.5, **PLAIN)
    axes.set_yticks(range(len(names)), names, fontsize=8.5, **PLAIN)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    points_of_a_row = 72 * axes.bbox.height / figure.dpi / len(names)
    axes.set_title(title, fontsize=10, pad=0.2 * points_of_a_row + 11 * lines + 8, **PLAIN)  # above the columns' names
    said = "; ".join(f"{name}: {verdicts[name]}" for name in names)
    return finish(figure, f"Shares of pictures that show the concept, by method and probe. {said}")


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
    pictures, rows = as_pictures(pictures), as_labels("rows", rows)
    label, title, x_label = as_texts(label=label, title=title, x_label=x_label)
    values, size = _table(values, rows), checks.number("size", size, "(0, 100]")
    figure = Figure(figsize=(size * len(pictures), size + 0.19 * len(rows) + 0.8), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[size, 0.19 * len(rows) + 0.5])
    above, below = halves
    for axes, picture in zip(above.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True):
        grey_frame(axes)
        axes.imshow(np.asarray(picture), interpolation="nearest")
    axes = below.subplots()
    seaborn.heatmap(
        np.asarray(values, float),
        ax=axes,
        cmap=MAP,
        vmin=0,
        xticklabels=False,
        yticklabels=without_formulas(rows),
        cbar_kws={"label": label},
    )
    axes.collections[0].colorbar.ax.tick_params(labelsize=7)
    axes.tick_params(labelsize=7)
    axes.set_xlabel(x_label, fontsize=8)
    figure.suptitle(title, fontsize=10, **PLAIN)
    return finish(figure, f"{title}: {len(pictures)} pictures, and a heat map of {label} in {len(rows)} rows")


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
    pictures, labels = as_pictures(pictures), as_labels("labels", labels)
    size, (title,) = checks.number("size", size, "(0, 100]"), as_texts(title=title)
    maps = [_numbers("one of maps", one, 2) for one in checks.items("maps", maps)]
    if len(maps) != len(pictures):
        raise ArgumentError(f"got {len(pictures)} pictures and {len(maps)} maps: give one map for each picture")
    figure = Figure(figsize=(size * len(pictures), 2 * size + 0.3))
    grid = figure.subplots(2, len(pictures), squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for i, (picture, weights) in enumerate(zip(pictures, maps, strict=True)):
        pixels = np.asarray(picture)
        height, width = pixels.shape[:2]
        for axes in grid[:, i]:
            grey_frame(axes)
            axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
        grid[1][i].imshow(
            np.asarray(weights, float), extent=(0, width, height, 0), cmap=MAP, alpha=0.75, interpolation="bilinear"
        )
        if i < len(labels):
            grid[0][i].set_title(labels[i], fontsize=8, **PLAIN)
    figure.suptitle(title, fontsize=10, y=1.0, va="bottom", **PLAIN)
    return finish(figure, f"Pictures with attention maps over them: {', '.join(labels) or title}")


def trace_map(table: pandas.DataFrame, *, pictures: Images | None = None, title: str = "") -> Figure:
    """Draw what `measure.trace_activations` gives: effects as a heat map, sites in their order by bands of steps.

    pictures: two to set beside it, one of the run that was changed and one of the source.
    """
    require_columns(table, "site", "band", "first_step", "last_step", "effect")
    shown = None if pictures is None else as_pictures(pictures)
    if shown is not None and len(shown) != 2:
        raise ArgumentError(f"got {len(shown)} pictures: give two, of the run that was changed and of the source")
    source, into = (checks.shown(table.attrs.get(name, name)) for name in ("source", "into"))
    (title,) = as_texts(title=title)
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
            grey_frame(small)
            small.imshow(np.asarray(picture), interpolation="nearest")
            small.set_xlabel(textwrap.fill(label, 20), fontsize=7, **PLAIN)
    seaborn.heatmap(
        values.to_numpy().round(2) + 0.0,  # no -0.00
        ax=axes,
        cmap=MAP,
        vmin=min(0.0, float(values.min().min())),
        annot=len(steps) <= 12,
        fmt=".2f",
        annot_kws={"fontsize": 6.5},
        xticklabels=steps,
        yticklabels=without_formulas(list(values.index)),
        cbar_kws={"label": f"effect in {table.attrs.get('measured', 'the picture')} (1: the source's picture)"},
    )
    bar: Any = axes.collections[0].colorbar
    bar.ax.tick_params(labelsize=7)
    bar.ax.yaxis.label.set_fontsize(7.5)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("steps in which the source's activations are put in place", fontsize=8)
    axes.set_ylabel("")
    figure.suptitle(title, fontsize=9, **PLAIN)
    best = table.loc[table["effect"].idxmax()]
    return finish(
        figure,
        f"Heat map of the effect of activations of {source} in the run of {into}, {len(values)} sites by {len(steps)} "
        f"bands of steps; the largest is {best.effect:.2f}, at {best.site} in steps {best.first_step} to "
        f"{best.last_step}",
    )


def merit_map(table: pandas.DataFrame, *, word: str = "all", title: str = "") -> Figure:
    """Draw what `measure.attention_merit` gives for a word: one heat map per measure, layers by timesteps.

    Above each stand what chance would give, and what the maps get against other objects, both means over the cells.
    """
    require_columns(table, "layer", "timestep", "word", "measure", "value", "chance", "elsewhere", "objects")
    word, title = checks.choice("word", word, tuple(dict.fromkeys(table["word"]))), as_texts(title=title)[0]
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
            yticklabels=without_formulas(layers),
        )
        axes.collections[0].colorbar.ax.tick_params(labelsize=7)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("timestep (1000: all noise)", fontsize=8)
        chance, elsewhere = part["chance"].mean(), part["elsewhere"].mean()
        axes.set_title(f"{measure}\nchance {chance:.2f}, other objects {elsewhere:.2f}", fontsize=8)
    objects = int(table["objects"].max())
    what = f"{objects} objects" if word == "all" else f"{objects} objects called {word}"
    figure.suptitle(title or f"Attention maps against true masks, {what}", fontsize=9, **PLAIN)
    return finish(figure, f"Heat maps of {' and '.join(measures)} of attention maps, {len(layers)} layers, {what}")
