"""Figures, interactive controls for notebooks, and the playground page.

`plots` draws, `explorers` and `widgets` respond to sliders, `app` is the page, `notebook` sets up a notebook. Builds on
what it shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .app import Page as Page
    from .app import page as page
    from .explorers import Explorer as Explorer
    from .explorers import control as control
    from .explorers import explorer as explorer
    from .explorers import slider as slider
    from .notebook import set_up_notebook as set_up_notebook
    from .plots import attention_overlay as attention_overlay
    from .plots import curves as curves
    from .plots import heatmap as heatmap
    from .plots import intervals as intervals
    from .plots import merit_map as merit_map
    from .plots import picture_grid as picture_grid
    from .plots import pictures_and_map as pictures_and_map
    from .plots import plane as plane
    from .plots import profile_map as profile_map
    from .plots import show as show
    from .plots import trace_map as trace_map
    from .widgets import Limits as Limits
    from .widgets import Playground as Playground
    from .widgets import attention_browser as attention_browser
    from .widgets import neuron_explorer as neuron_explorer
    from .widgets import playground as playground
    from .widgets import sketched as sketched

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "app": (
            "Page",
            "page",
        ),
        "explorers": (
            "Explorer",
            "control",
            "explorer",
            "slider",
        ),
        "notebook": ("set_up_notebook",),
        "plots": (
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
            "trace_map",
        ),
        "widgets": (
            "Limits",
            "Playground",
            "attention_browser",
            "neuron_explorer",
            "playground",
            "sketched",
        ),
    },
)
