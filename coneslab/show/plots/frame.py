"""What all figures share: colours, titles, alt texts, and how a figure becomes a picture in a notebook."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import seaborn
from matplotlib.figure import Figure
from PIL import Image

from ... import checks
from ...errors import ArgumentError

PALETTE = seaborn.color_palette("colorblind").as_hex()
MAP = "cividis"
PLAIN: dict[str, Any] = {"parse_math": False}  # for names and prompts: a "$" in them begins no formula


def finish(figure: Figure, alt: str) -> Figure:
    figure.set_label(alt)
    return figure


def head_and_note(figure: Figure, title: str, note: str) -> None:
    """A title above the whole figure and a note below it, where there are any."""
    if title:
        figure.suptitle(title, fontsize=10, **PLAIN)
    if note:
        figure.supxlabel(note, fontsize=7.5, color="0.3", x=0.01, ha="left", **PLAIN)


def grey_frame(axes: Any) -> None:
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


def folded(texts: Sequence[str], inches: float, points: float) -> list[str]:
    """Wrap texts to a width in inches at a font size in points: letters are 0.72 as wide, and 72 points an inch."""
    return [textwrap.fill(text, max(8, int(inches * 100 / points))) for text in texts]


def as_labels(name: str, given: str | Iterable[str]) -> list[str]:
    """Labels from one text or several; any of them may be empty."""
    return checks.texts(name, given, least=0, blank=True)


def as_texts(**given: str) -> list[str]:
    """Titles and the like; any of them may be empty."""
    return [checks.text(name, one, blank=True) for name, one in given.items()]


def without_formulas(names: Sequence[str]) -> list[str]:
    """Names for seaborn, which draws them before they can be told to be plain."""
    return [str(name).replace("$", r"\$") for name in names]


def require_columns(table: Any, *needed: str) -> None:
    missing = [name for name in needed if name not in getattr(table, "columns", ())]
    if missing:
        raise ArgumentError(f"the table has no column {', '.join(map(str, missing))}: give a DataFrame that has it")
    if not len(table):
        raise ArgumentError("the table is empty: there is nothing to draw")
