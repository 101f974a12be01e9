"""Grids of cells: nothing lost and nothing doubled after a kill, and summaries against direct computation."""

import numpy as np
import pandas
import pytest

from coneslab.compare import run_cells, summarise
from coneslab.errors import ConeslabError

CELLS = [{"subject": name, "seed": seed} for name in ("cat", "dog") for seed in range(3)]


def rows_of(subject: str, seed: int) -> list[dict]:
    value = seed + (10 if subject == "dog" else 0)
    return [
        {"condition": name, "measure": "m", "value": value + extra, "density": 0.1, "seconds": 1.0}
        for name, extra in (("a", 0.0), ("b", 0.5))
    ]


def test_a_killed_run_goes_on_without_losing_or_doubling(tmp_path):
    path, calls = tmp_path / "table.csv", []

    def measure(**cell):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(cell)
        return rows_of(**cell)

    with pytest.raises(KeyboardInterrupt):
        run_cells(CELLS, measure, path, progress=False)
    assert len(pandas.read_csv(path)) == 6
    table = run_cells(CELLS, lambda **cell: calls.append(cell) or rows_of(**cell), path, progress=False)
    assert calls == CELLS  # each cell once, in order
    assert not table.duplicated(["subject", "seed", "condition"]).any() and len(table) == 12
    pandas.testing.assert_frame_equal(table, pandas.read_csv(path), check_dtype=False)


def test_a_foreign_table_is_refused_and_kept(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("x,y\n1,2\n")
    with pytest.raises(ConeslabError, match="x, y"):
        run_cells(CELLS, rows_of, path, progress=False)
    assert path.read_text() == "x,y\n1,2\n"


def test_summaries_are_means_over_subjects_and_paired_differences():
    table = pandas.DataFrame([{**cell, **row} for cell in CELLS for row in rows_of(**cell)])
    summary = summarise(table).set_index("condition")
    assert summary.loc["a", "value"] == pytest.approx(np.mean([1, 11]))
    assert summary.loc["a", "low"] <= 1.0 + 1e-9 and summary.loc["a", "high"] >= 11.0 - 1e-9
    difference = summarise(table, minus="a").set_index("condition")
    assert list(difference.index) == ["b"]
    assert difference.loc["b", ["value", "low", "high"]].tolist() == pytest.approx([0.5, 0.5, 0.5])
