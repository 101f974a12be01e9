"""The saved notebooks: run, small, free of traces of the machine. `pytest --nbmake` tests that they still run.

Their short copies: all cells are there, and a broken cell fails.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from short_notebooks import NOTEBOOKS, shortened, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
from saved import STATE, without_bars  # noqa: E402

from notebooks import BAR, WIDGET  # noqa: E402

MEGABYTE = 1_000_000


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def code(path) -> list:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(code) -> list:
    return [output for cell in code for output in cell.outputs]


def words(output) -> str:
    """What an output shows as text, without pictures."""
    data = output.get("data", {})
    shown = [data.get(kind, "") for kind in ("text/plain", "text/html", "text/markdown")]
    return " ".join(["".join(output.get("text", "")), *map("".join, shown)])


def test_small_enough_to_open_and_clone(path):
    assert path.stat().st_size <= 1.5 * MEGABYTE


def test_saved_after_one_run_from_top_to_bottom(code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run: make notebooks"
    assert not [output for output in outputs(code) if output.output_type == "error"]
    assert outputs(code)


def test_first_sets_up_on_colab_too_then_parameters(code):
    assert "google.colab" in code[0].source and "device = coneslab.set_up_notebook(" in code[0].source
    assert "parameters" in code[1].metadata.get("tags", [])


def test_shows_no_warnings_and_no_paths_of_the_machine_it_ran_on(code):
    for output in outputs(code):
        assert not re.search(r"(/work|/root|/home|/Users|/tmp)/|site-packages|Warning:", words(output)), words(output)
        assert output.get("name") != "stderr", words(output)


def test_shows_no_bar_that_stands_half_finished(code):
    assert not [words(output) for output in outputs(code) if BAR.search(words(output))], "run: make notebooks"


def test_bars_are_not_saved_nor_what_only_they_are_made_of():
    def shown(name: str, text: str) -> nbformat.NotebookNode:
        view = {"model_id": name, "version_major": 2, "version_minor": 0}
        return nbformat.v4.new_output("display_data", data={"text/plain": text, WIDGET: view})

    bar, slider = shown("bar", "cells:   0%|          | 0/3"), shown("box", "VBox(children=())")
    printed = nbformat.v4.new_output("stream", name="stdout", text="kept: 40%| of all\n")
    heard = nbformat.v4.new_output("stream", name="stderr", text="cells:  33%|###       | 1/3 [00:01<00:02, 1.0it/s]")
    cell = nbformat.v4.new_code_cell("explore()", outputs=[bar, printed, heard, slider])
    parts = {"bar": "IPY_MODEL_line", "line": "", "box": "IPY_MODEL_dose", "dose": "IPY_MODEL_style", "style": ""}
    state = {name: {"model_name": "M", "state": {"children": [part]}} for name, part in parts.items()}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {STATE: {"state": state}}})
    saved = without_bars(notebook)
    assert saved.cells[0].outputs == [printed, slider]
    assert set(saved.metadata.widgets[STATE].state) == {"box", "dose", "style"}


def test_has_something_to_move_exercises_and_references(path, code):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    kinds = {kind for output in outputs(code) for kind in output.get("data", {})}
    assert WIDGET in kinds, "no widget"
    listed = re.split(r"(?m)^#+ .*Exercises.*$", text)[-1]
    assert len(re.findall(r"(?i)\bexercise\b", text)) >= 2 or len(re.findall(r"(?m)^\d\. ", listed)) >= 2
    assert re.search(r"(?im)^#+ .*(references|reading|read on)", text)
    pictures = [kind for kind in kinds if kind.startswith("image/")]
    pictures += [1 for output in outputs(code) if "<img " in words(output)]
    assert pictures, "no static figure for where no kernel runs"


# --- short copies ---------------------------------------------------------------------------------------


def test_a_short_copy_has_every_cell_and_no_outputs(path):
    whole = nbformat.read(path, as_version=4)
    short = shortened(whole)
    nbformat.validate(short)
    assert [(cell.id, cell.cell_type) for cell in short.cells] == [(cell.id, cell.cell_type) for cell in whole.cells]
    assert not [cell for cell in short.cells if cell.get("outputs") or cell.get("execution_count")]
    assert not [
        cell for cell in short.cells if {"raises-exception", "skip-execution"} & {*cell.metadata.get("tags", ())}
    ]
    assert whole == nbformat.read(path, as_version=4), "the notebook itself stays as it is"


TINY = {"text": {"ROUNDS = 60": "ROUNDS = 2"}, "defaults": {"json.dumps": {"indent": 1}}}


def tiny_notebook(folder: Path, *more: str, short: object = TINY) -> Path:
    """Two cells, of which the second tells in a file what it saw, and more."""
    told = 'import json\nfrom pathlib import Path\n\nPath("told.txt").write_text(f"{ROUNDS} {json.dumps([1])}")'
    cells = [nbformat.v4.new_code_cell(source) for source in ("ROUNDS = 60  # of the search", told, *more)]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"short": short} if short else {})
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "tiny.ipynb")
    return folder / "tiny.ipynb"


def run(path: Path) -> subprocess.CompletedProcess:
    """As `make test` runs the short copies."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "last_lines", "--nbmake", path.name]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "150"}
    return subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_short_copy_runs_every_cell_as_the_metadata_say(tmp_path):
    done = run(write(tiny_notebook(tmp_path), tmp_path / "short"))
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "short" / "told.txt").read_text() == "2 [\n 1\n]"


@pytest.mark.slow
def test_a_short_copy_fails_where_a_cell_is_broken_and_the_last_lines_say_so(tmp_path):
    done = run(write(tiny_notebook(tmp_path, "1 / 0"), tmp_path / "short"))
    assert done.returncode == 1 and (tmp_path / "short" / "told.txt").exists()
    *_, name, why, alone = done.stdout.rstrip().splitlines()
    assert name.startswith("tiny.ipynb") and "ZeroDivisionError" in why
    assert alone.split("alone:")[1].endswith("-m pytest --nbmake tiny.ipynb")


@pytest.mark.parametrize(
    ("short", "told"),
    [
        (None, "does not say how it is shortened"),
        ({"text": {"STEPS = 60": "STEPS = 2"}}, "no code cell has 'STEPS = 60'"),
        ({"texts": {}}, r"have \['texts'\]"),
    ],
)
def test_a_notebook_that_cannot_be_shortened_is_refused(tmp_path, short, told):
    with pytest.raises(ValueError, match=f"tiny.ipynb: .*{told}"):
        write(tiny_notebook(tmp_path, short=short), tmp_path / "short")
