"""Figures: each function takes results and returns a matplotlib Figure with an alt text.

Colours are seaborn's colour-blind palette and cividis. `show(figure)` displays a figure in a notebook as a picture
with its alt text, which plain inline display would drop. `charts` has points, lines and pictures in rows, `maps` has
tables as colours; `frame` is what they share. Builds on numbers and pictures alone.
"""

from __future__ import annotations

from .charts import curves, intervals, picture_grid, plane
from .frame import MAP, PALETTE, show, to_png
from .maps import attention_overlay, heatmap, merit_map, pictures_and_map, profile_map, trace_map

__all__ = [
    "MAP",
    "PALETTE",
    "attention_overlay",
    "curves",
    "heatmap",
    "intervals",
    "merit_map",
    "picture_grid",
    "pictures_and_map",
    "plane",
    "profile_map",
    "show",
    "to_png",
    "trace_map",
]
