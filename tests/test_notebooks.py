"""The saved notebooks: run, small, free of traces of the machine. That they still run is `pytest --nbmake`'s part."""

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
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
    assert "colab" in code[0].source.lower()
    assert "parameters" in code[1].metadata.get("tags", [])


def test_shows_no_warnings_and_no_paths_of_the_machine_it_ran_on(code):
    for output in outputs(code):
        assert not re.search(r"(/work|/root|/home|/Users|/tmp)/|site-packages|Warning:", words(output)), words(output)
        assert output.get("name") != "stderr" or "it/s" in words(output) or "s/it" in words(output), words(output)


def test_has_something_to_move_exercises_and_references(path, code):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    kinds = {kind for output in outputs(code) for kind in output.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" in kinds, "no widget"
    listed = re.split(r"(?m)^#+ .*Exercises.*$", text)[-1]
    assert len(re.findall(r"(?i)\bexercise\b", text)) >= 2 or len(re.findall(r"(?m)^\d\. ", listed)) >= 2
    assert re.search(r"(?im)^#+ .*(references|reading|read on)", text)
    pictures = [kind for kind in kinds if kind.startswith("image/")]
    pictures += [1 for output in outputs(code) if "<img " in words(output)]
    assert pictures, "no static figure for where no kernel runs"
