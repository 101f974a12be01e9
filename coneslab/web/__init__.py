"""The model in a reader's browser: its graphs for ONNX Runtime, edits in plain form, and the page that draws with them.

Nothing runs on a server: the folder that `export_web` writes is static files. Builds on `methods`, `neurons`, `edits`,
`diffusion` and `world`.
"""

from __future__ import annotations

from .export import MANIFEST, export_web
from .graphs import Graph, difference, graphs
from .runtime import Runtime, fetch_runtime
from .sampling_table import sampling_table
from .shelf import Shelved, default_shelf, plain, shelf_of

__all__ = [
    "MANIFEST",
    "Graph",
    "Runtime",
    "Shelved",
    "default_shelf",
    "difference",
    "export_web",
    "fetch_runtime",
    "graphs",
    "plain",
    "sampling_table",
    "shelf_of",
]
