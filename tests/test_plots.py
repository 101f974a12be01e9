"""Figures: they show what was given, have an alt text, and refuse empty input."""

import io
from itertools import pairwise

import numpy as np
import pandas
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from coneslab.errors import ConeslabError
from coneslab.methods import Finding, Profile
from coneslab.show import plots
from coneslab.world import sample


def test_picture_grid_shows_every_picture_in_its_row():
    pictures = [[np.full((8, 8, 3), 10 * r + c, np.uint8) for c in range(3)] for r in range(2)]
    figure = plots.picture_grid(pictures, row_labels=["untouched", "shut"], column_labels=["a", "b", "c"])
    shown = figure.axes[0].images
    assert [int(image.get_array()[0, 0, 0]) for image in shown] == [0, 1, 2, 10, 11, 12]
    places = np.array([image.get_extent() for image in shown]).reshape(2, 3, 4)  # left, right, bottom, top
    assert (places[0, :, 2] < places[1, :, 3]).all() and (places[:, :-1, 1] < places[:, 1:, 0]).all()
    assert "untouched" in figure.get_label() and "6 pictures" in figure.get_label()
    with pytest.raises(ConeslabError, match="no pictures"):
        plots.picture_grid([])


def test_a_picture_of_any_shape_keeps_it_within_its_square():
    figure = plots.picture_grid([np.zeros((8, 8, 3), np.uint8), np.zeros((10, 40, 3), np.uint8)], size=2)
    figure.draw_without_rendering()
    square, wide = (image.get_window_extent() for image in figure.axes[0].images)
    assert square.width == pytest.approx(square.height) and square.width == pytest.approx(wide.width)
    assert wide.width == pytest.approx(4 * wide.height) and wide.y0 > square.y0
    assert (wide.y0 + wide.y1) / 2 == pytest.approx((square.y0 + square.y1) / 2)


def test_intervals_draw_the_numbers_given():
    table = pandas.DataFrame(
        {"condition": ["a", "b"], "measure": ["m", "m"], "value": [1.0, 2.0], "low": [0.5, 1.5], "high": [1.5, 2.5]}
    )
    figure = plots.intervals(table, highlight=["b"], zero=True, note="95 %")
    lines = [line.get_xdata() for line in figure.axes[0].lines]
    assert [0.5, 1.5] in [list(x) for x in lines] and [1.5, 2.5] in [list(x) for x in lines]
    assert figure.axes[0].get_xlabel() == "m"


def test_a_row_without_an_interval_shows_its_points_and_a_hollow_mean():
    rows = [("a", 0.5, 0.4, 0.6, ()), ("b", 0.5, np.nan, np.nan, (0.2, 0.8))]
    table = pandas.DataFrame(rows, columns=["condition", "value", "low", "high", "points"]).assign(measure="m")
    (axes,) = plots.intervals(table).axes
    known, unknown = ([line for line in axes.lines if set(line.get_ydata()) == {place}] for place in (1, 0))
    assert [line.get_markerfacecolor() for line in (known[-1], unknown[-1])] == ["0.45", "white"]
    assert list(unknown[1].get_xdata()) == [0.2, 0.8] and len(known) == 2


def test_a_plane_puts_each_condition_where_its_two_measures_are():
    rows = [("a", "text", 0.1), ("a", "image", 0.7), ("b", "text", 0.2), ("b", "image", 0.9), ("c", "text", 0.3)]
    table = pandas.DataFrame(rows, columns=["condition", "measure", "value"])
    table = table.assign(low=table.value - 0.05, high=table.value + 0.05)
    figure = plots.plane(table, x="text", y="image", highlight=["b"], origin=True, note="95 %")
    (axes,) = figure.axes
    named = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert {name: (*line.get_xdata(), *line.get_ydata()) for name, line in named.items()} == {
        "a": (0.1, 0.7),
        "b": (0.2, 0.9),
    }
    crosses = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert ([0.2, 0.2], pytest.approx([0.85, 0.95])) in crosses and (pytest.approx([0.15, 0.25]), [0.9, 0.9]) in crosses
    assert named["a"].get_markerfacecolor() == "white" != named["b"].get_markerfacecolor()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("text, change", "image, change") and "a, b" in figure.get_label()
    (plain,) = plots.plane(table, x="text", y="image").axes
    assert (plain.get_xlabel(), plain.get_ylabel()) == ("text", "image")
    with pytest.raises(ConeslabError, match="no condition has both 'text' and 'likeness': the measures are"):
        plots.plane(table, x="text", y="likeness")


def test_the_numbers_below_a_plane_are_apart():
    names = {"Cones + collaborative tuning": -0.0168, "Textual Inversion": 0.0027}
    rows = [(name, measure, value) for name, value in names.items() for measure in ("x", "y")]
    table = pandas.DataFrame(rows, columns=["condition", "measure", "value"])
    figure = plots.plane(table.assign(low=table.value, high=table.value), x="x", y="y", origin=True)
    FigureCanvasAgg(figure).draw()
    shown = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.x0)
    assert len(boxes) > 3 and all(left.x1 + 3 < right.x0 for left, right in pairwise(boxes))


def test_a_logarithmic_panel_leaves_out_what_it_cannot_show():
    rows = [("a", "m", 0.0), ("b", "m", 10.0), ("a", "n", 0.0), ("b", "n", 1.0)]
    table = pandas.DataFrame([{"condition": c, "measure": m, "value": v, "low": v, "high": v} for c, m, v in rows])
    first, second = plots.intervals(table, log=["m"]).axes
    assert first.get_xscale() == "log" and second.get_xscale() == "linear"
    assert [len(axes.lines) for axes in (first, second)] == [2, 4]
    assert all(line.get_xdata()[0] == 10 for line in first.lines)


def test_pictures_stand_above_their_map():
    pictures = [np.full((8, 8, 3), shade, np.uint8) for shade in (0, 255)]
    figure = plots.pictures_and_map(pictures, np.eye(3), rows=list("abc"), label="% shut", title="half")
    *above, below, bar = figure.axes
    shown = [axes.images[0].get_array() for axes in above]
    assert len(shown) == 2 and all((a == b).all() for a, b in zip(shown, pictures, strict=True))
    assert [text.get_text() for text in below.get_yticklabels()] == list("abc")
    assert (below.collections[0].get_array().reshape(3, 3) == np.eye(3)).all() and bar.get_ylabel() == "% shut"
    assert "half" in figure.get_label() and "% shut" in figure.get_label()


def test_curves_with_bands_say_what_the_band_is():
    figure = plots.curves({"x": ([0, 1], [1, 2], [0, 1], [2, 3])}, x_label="dose", y_label="loss", baseline={"ref": 1})
    legend = figure.axes[0].get_legend()
    assert "bootstrap" in legend.get_title().get_text()
    assert {text.get_text() for text in legend.get_texts()} == {"x", "ref"}


def test_overlay_and_heatmap_become_pngs_with_alt_texts():
    picture, weights = np.zeros((16, 16, 3), np.uint8), np.eye(4)
    overlay = plots.attention_overlay([picture], [weights], labels=["cat"])
    heat = plots.heatmap(np.eye(3), rows=list("abc"), columns=list("xyz"), label="% shut")
    for figure in (overlay, heat):
        assert figure.get_label()
        assert Image.open(io.BytesIO(plots.to_png(figure))).size[0] > 50


def test_a_large_figure_gets_a_palette_close_to_its_colours():
    figure = plots.picture_grid(list(sample(20, seed=0).images), columns=10)
    full = Image.open(io.BytesIO(plots.to_png(figure, full_colour=10**9))).convert("RGB")
    small = Image.open(io.BytesIO(plots.to_png(figure, full_colour=0)))
    assert small.mode == "P" and small.size == full.size
    white = (np.asarray(full) == 255).all(axis=2)
    assert white.any() and (np.asarray(small.convert("RGB"))[white] == 255).all(), "the page shines through"

    def error(picture):
        return np.abs(np.asarray(picture.convert("RGB"), int) - np.asarray(full, int)).mean()

    assert error(small) < 0.9 * error(full.quantize(256)), "no better than Pillow's own palette"


def test_ticks_of_a_logarithmic_axis_are_plain_numbers():
    figure = plots.curves({"a": ([1.5, 4.4, 20, 73], [1, 2, 3, 4])}, x_label="%", y_label="y", log_x=True)
    figure.draw_without_rendering()
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert {"2", "5", "10", "20", "50"} <= set(shown)
    assert not any(label.get_text() for label in figure.axes[0].get_xticklabels(minor=True))


BAD = r"<cat*> & \"x\" $\frac $"  # no formula, no HTML


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw",
    [
        lambda two: plots.picture_grid(
            [two, two], row_labels=[BAD] * 2, column_labels=[BAD] * 2, captions=[BAD] * 4, title=BAD
        ),
        lambda two: plots.curves({BAD: ([1, 2], [1, 2]), "b": ([1], [1])}, x_label="x", y_label="y", title=BAD),
        lambda two: plots.intervals(
            pandas.DataFrame([{"condition": BAD, "measure": BAD, "value": 1.0, "low": 0.0, "high": 2.0}]), title=BAD
        ),
        lambda two: plots.plane(
            pandas.DataFrame([{"condition": BAD, "measure": BAD, "value": 1.0, "low": 0.0, "high": 2.0}]),
            **dict.fromkeys(("x", "y", "title", "note"), BAD),
        ),
        lambda two: plots.heatmap(np.eye(2), rows=[BAD, "b"], columns=[BAD, "c"], label="x", title=BAD),
        lambda two: plots.pictures_and_map(two, np.eye(2), rows=[BAD, "b"], label="x", title=BAD),
        lambda two: plots.attention_overlay(two, [np.eye(2)] * 2, labels=[BAD] * 2, title=BAD),
    ],
)
def test_names_are_shown_as_they_are(draw, monkeypatch):
    figure = draw([np.zeros((8, 8, 3), np.uint8)] * 2)
    assert Image.open(io.BytesIO(plots.to_png(figure))).size[0] > 50
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda given: shown.append(given.data))
    plots.show(figure)
    assert "<cat*>" not in shown[0] and shown[0].count("<") == 1


def found(probe, kind, share):
    """What a probe found of a target that every picture of the untouched model shows."""
    return Finding(probe, kind, share, max(0.0, share - 0.1), min(1.0, share + 0.1), 1.0, 0.9, 1.0)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_the_title_of_a_profile_map_stands_above_the_names_of_its_columns(count):
    probes = {"asked by its word": ["plain", "misspellings", "img2img"], "found without its word": list("abcdef")}
    profile = Profile(tuple(found(probe, kind, 0.5) for kind, own in probes.items() for probe in own))
    title = "Shares of 8 pictures that show what was asked for; framed: found"
    figure = plots.profile_map({f"method {number}": profile for number in range(count)}, title=title)
    plots.to_png(figure)
    (axes,) = figure.axes
    heads = [text.get_window_extent() for text in axes.texts if "word" in text.get_text()]
    assert len(heads) == 2 and axes.title.get_window_extent().y0 > max(box.y1 for box in heads)


def test_a_profile_map_shows_shares_verdicts_and_what_is_found():
    named, unnamed = "asked by its word", "found without its word"
    untouched = Profile((found("plain", named, 1.0), found("inpainting", unnamed, 0.75)))
    erased = Profile((found("plain", named, 0.04),))
    figure = plots.profile_map({"untouched": untouched, "UCE": erased})
    (axes,) = figure.axes
    written = {text.get_text() for text in axes.texts}
    assert {"1.00", "0.75", "0.04", untouched.verdict, erased.verdict} <= written
    assert {named, unnamed} <= {text.replace("\n", " ") for text in written}
    framed = [patch for patch in axes.patches if not patch.get_fill()]
    assert len(framed) == 2 and all(-0.5 < patch.get_y() < 0 for patch in framed)  # both in the first row
    assert len(axes.patches) == 5  # three shares are known; two are framed
    assert f"UCE: {erased.verdict}" in figure.get_label()
    with pytest.raises(ConeslabError, match="give a Profile"):
        plots.profile_map({"UCE": {"plain": 0.04}})
