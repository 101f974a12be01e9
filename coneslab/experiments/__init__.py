"""Tables made cell by cell: what is measured, on which subjects and seeds, and how it is summarised.

One file per family of tables, and the comparison of all methods. Builds on the methods and on `measure`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .ablation import OUTCOME as OUTCOME
    from .ablation import outcome as outcome
    from .ablation import profiles as profiles
    from .cluster import dask_client as dask_client
    from .comparison import compare_methods as compare_methods
    from .comparison import paper_table as paper_table
    from .comparison import require_comparison as require_comparison
    from .comparison import tune_methods as tune_methods
    from .methods import METHODS as METHODS
    from .methods import Method as Method
    from .methods import chosen_settings as chosen_settings
    from .methods import make_edit as make_edit
    from .registry import COMBINATION_NAMES as COMBINATION_NAMES
    from .registry import EXPERIMENTS as EXPERIMENTS
    from .registry import Experiment as Experiment
    from .registry import require_experiment as require_experiment
    from .registry import run_experiment as run_experiment
    from .setting import MEASURES as MEASURES
    from .setting import Setting as Setting
    from .setting import measure as measure
    from .setting import stored_bytes as stored_bytes
    from .table import Row as Row
    from .table import equivalence as equivalence
    from .table import run_cells as run_cells
    from .table import summarise as summarise

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ablation": (
            "OUTCOME",
            "outcome",
            "profiles",
        ),
        "cluster": ("dask_client",),
        "comparison": (
            "compare_methods",
            "paper_table",
            "require_comparison",
            "tune_methods",
        ),
        "methods": (
            "METHODS",
            "Method",
            "chosen_settings",
            "make_edit",
        ),
        "registry": (
            "COMBINATION_NAMES",
            "EXPERIMENTS",
            "Experiment",
            "require_experiment",
            "run_experiment",
        ),
        "setting": (
            "MEASURES",
            "Setting",
            "measure",
            "stored_bytes",
        ),
        "table": (
            "Row",
            "equivalence",
            "run_cells",
            "summarise",
        ),
    },
)
