"""Neurons that were found before: what ships is what lectures and the page ask for, and what a search finds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pytest

import coneslab
from coneslab.neurons import ConceptNeurons, find_concept_neurons, ready
from coneslab.web import default_shelf

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def asked(monkeypatch) -> list[dict[str, Any]]:
    """What is asked for, call by call; and no search is made."""
    calls: list[dict[str, Any]] = []
    read = ready.ready_neurons  # the lecture imports it from the room

    def noted(pipe: Any, subject: Any, **options: Any) -> ConceptNeurons:
        calls.append({"subject": subject, **options})
        return read(pipe, subject, **options)

    def search(pipe: Any, subject: Any, settings: Any, *, progress: bool) -> ConceptNeurons:
        raise AssertionError(f"{subject.name} was searched for, with {settings}")

    monkeypatch.setattr(ready, "find_concept_neurons", search)
    monkeypatch.setattr("coneslab.neurons.ready_neurons", noted)
    return calls


def in_the_lecture(pipe: Any) -> None:
    """Run the cell of lecture 05 that asks for masks."""
    cells = nbformat.read(ROOT / "notebooks" / "05_concatenating_concepts.ipynb", as_version=4).cells
    (parameters,) = (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    (masks,) = (cell.source for cell in cells if "ready_neurons(" in cell.source and cell.cell_type == "code")
    fakes = {"load": lambda model, device: pipe, "subject": coneslab.subject}
    plots = SimpleNamespace(show=lambda figure: None, picture_grid=lambda *rows, **labels: None)
    names = {"coneslab": SimpleNamespace(**fakes), "device": None, "plots": plots}
    exec(f"{parameters}\n{masks.replace('from coneslab.show import plots', '')}", names)


@pytest.mark.slow
def test_all_that_is_asked_for_was_found_before_and_nothing_else_is_on_the_shelf(tiny, asked, tmp_path):
    default_shelf(tiny, tmp_path, progress=False)
    in_the_lecture(tiny)
    assert len(asked) == 8 and not list(tmp_path.iterdir())
    assert len(list(ready.SHIPPED.glob("*.mask"))) == 3 + len(asked)


@pytest.mark.full
def test_a_search_finds_what_was_found_before(tiny, asked, monkeypatch):
    in_the_lecture(tiny)
    for call in (asked[0], asked[4]):  # at every word, and at its own words
        subject = call.pop("subject")
        kept, found = ready.ready_neurons(tiny, subject, **call), find_concept_neurons(tiny, subject, **call).binary()
        assert kept.scope == found.scope and kept.overlap(found).jaccard > 0.9  # passes are in bfloat16 or in float32


@pytest.mark.slow
def test_it_is_read_for_the_same_question_alone(v_pipe, pictured, tmp_path, monkeypatch):
    made: list[int] = []

    def search(pipe: Any, subject: Any, settings: Any, *, progress: bool) -> ConceptNeurons:
        made.append(settings.rounds)
        return find_concept_neurons(pipe, subject, settings, progress=progress)

    few = {"rounds": 2, "rate": 0.6, "batch_size": 2, "prior_batch_size": 0, "progress": False}
    expected = find_concept_neurons(v_pipe, pictured, **few).binary()
    monkeypatch.setattr(ready, "find_concept_neurons", search)
    for _ in range(2):
        assert ready.ready_neurons(v_pipe, pictured, kept=tmp_path, **few) == expected
    assert made == [2]
    (file,) = tmp_path.iterdir()
    ready.ready_neurons(v_pipe, pictured, kept=tmp_path, **few | {"seed": 1})
    pictured.images = pictured.images[:2]
    ready.ready_neurons(v_pipe, pictured, kept=tmp_path, **few)
    assert len(made) == len(list(tmp_path.iterdir())) == 3
    pictured.prompt = "sks cat"
    ready.ready_neurons(v_pipe, pictured, **few)
    assert len(made) == 4 and len(list(tmp_path.iterdir())) == 3, "without a folder nothing is kept"
    assert np.isfinite(expected.density) and file.suffix == ".mask"
