"""The page for a class, without a browser: searches once per subject, keeps what it found, survives errors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from coneslab import load_edit
from coneslab.errors import ConeslabError
from coneslab.show import app


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch, pictured: Any) -> list[str]:
    """The subjects that were searched; each has pictures of the small pipeline's size."""
    names: list[str] = []
    real = app.find_concept_neurons

    def search(pipe: Any, about: Any, **settings: Any) -> Any:
        names.append(about.name)
        return real(pipe, pictured, **settings, prior_images=2, sampler_steps=1)

    monkeypatch.setattr(app, "find_concept_neurons", search)
    return names


def make(v_pipe: Any, folder: Path | None) -> app.Page:
    page = app.page(v_pipe, folder, limits=app.Limits(pictures=1, steps=1), rounds=2)
    page.playground._generate = lambda asked: []  # type: ignore[method-assign]
    page.playground.ask = lambda: None  # type: ignore[method-assign]
    return page


def test_finds_once_and_keeps_it_for_the_next_visitor(v_pipe: Any, searches: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "edits"
    first, second = make(v_pipe, folder), make(v_pipe, folder)
    assert [value for _, value in first.playground.controls["edit"].options] == [""]
    first.choice.value = second.choice.value = "dog"
    first.button.click()
    assert searches == ["dog"] and "found: dog" in first.progress.value
    assert first.playground.controls["edit"].value == "dog"
    assert first.playground.controls["prompt"].value == app.subject_named("dog").prompts[0]
    assert load_edit(folder / "dog.safetensors") == first.playground.edits["dog"]
    second.button.click()
    first.button.click()
    assert searches == ["dog"] and second.playground.controls["edit"].value == "dog"
    third = make(v_pipe, folder)
    assert third.playground.controls["edit"].value == "dog"


def test_a_page_is_served_with_its_first_picture(v_pipe: Any) -> None:
    async def served() -> app.Page:  # as in a notebook, where changes are drawn after the cell
        return app.page(v_pipe, limits=app.Limits(pictures=1, steps=1))

    playground = asyncio.run(served()).playground
    assert playground.png and "drawing" not in playground.status.value


def test_without_a_folder_what_it_finds_stays_with_the_page(
    v_pipe: Any, searches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(app.EDITS, raising=False)
    page = make(v_pipe, None)
    page.button.click()
    page.button.click()
    assert searches == [page.choice.value] and not page.button.disabled


def test_the_folder_may_come_from_the_environment(v_pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(app.EDITS, str(tmp_path / "own"))
    assert make(v_pipe, None).folder == tmp_path / "own"


def test_progress_is_said_round_by_round(v_pipe: Any, searches: list[str], tmp_path: Path) -> None:
    page, said = make(v_pipe, tmp_path), []
    page.progress.observe(lambda change: said.append(change["new"]), names="value")
    page.button.click()
    assert any("round 1 of 2" in text for text in said) and any("round 2 of 2" in text for text in said)


def test_an_error_is_shown_and_the_button_works_again(
    v_pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ConeslabError("no <room> left: empty the folder")

    monkeypatch.setattr(app, "find_concept_neurons", fails)
    page = make(v_pipe, tmp_path)
    page.button.click()
    assert "no &lt;room&gt; left" in page.progress.value and not page.button.disabled
    page.button.click()  # tried again
    assert "no &lt;room&gt; left" in page.progress.value


def test_clicks_that_are_sent_while_it_waits_its_turn_do_not_queue_up(
    v_pipe: Any, searches: list[str], tmp_path: Path
) -> None:
    page, waiting = make(v_pipe, tmp_path), []

    class Loop:
        def call_soon_threadsafe(self, job: Any) -> None:
            waiting.append(job)

    page.playground.loop = Loop()  # type: ignore[assignment]
    for _ in range(3):
        page.button.click()
    assert len(waiting) == 1 and searches == []
    waiting[0]()
    assert len(searches) == 1
