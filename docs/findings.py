"""What this world shows: claims, each with a verdict that is computed from a table, never written by hand.

Every number in a sentence comes from `data/results`; a verdict changes when its table does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import claims_of_concepts as concepts
import claims_of_masks as masks
import claims_of_methods as methods
from claims import Finding
from result_tables import markdown_table, read

NO_BREAK = "\N{NO-BREAK SPACE}"  # a verdict stands on one line
METHODS = "compare"  # a command of its own; all other tables are experiments
TESTED: dict[str, Callable[[Any], Iterator[Finding]]] = {  # experiment -> what its table says
    "controls": masks.of_controls,
    "precision": masks.of_precision,
    "damage": masks.of_damage,
    "storage": masks.of_storage,
    "density": masks.of_density,
    "parts": masks.of_parts,
    "sharing": masks.of_sharing,
    "references": masks.of_references,
    "finders": masks.of_finders,
    "agreement": masks.of_agreement,
    "together": masks.of_together,
    "doses": masks.of_doses,
    METHODS: methods.of_methods,
    "conceptor": concepts.of_conceptor,
    "ablation": concepts.of_ablation,
    "many-concepts": concepts.of_many_concepts,
}


def table_of(experiment: str, folder: Path) -> Path:
    from coneslab.experiments import EXPERIMENTS

    return folder / ("methods.csv" if experiment == METHODS else EXPERIMENTS[experiment].table)


def findings(folder: Path) -> Iterator[tuple[str, Finding]]:
    """Every finding of the tables that are there, after the name of its experiment."""
    for experiment, said in TESTED.items():
        if (path := table_of(experiment, folder)).exists():
            yield from ((experiment, finding) for finding in said(read(path)))


def page(folder: Path) -> str:
    """The findings as a table and, below it, the numbers behind each."""
    rows, parts = [], []
    for number, (experiment, one) in enumerate(findings(folder), 1):
        command = experiment if experiment == METHODS else f"experiment {experiment}"
        rows.append([str(number), one.claim, one.source, f"**{one.verdict.replace(' ', NO_BREAK)}**"])
        parts.append(f"**{number}. {one.claim}** {one.because} `coneslab {command}`")
    return "\n\n".join([markdown_table(["", "claim", "whose", "here"], rows), *parts])
