"""Widgets without a browser: set a control's value, then check the picture and the status line."""

from __future__ import annotations

import asyncio
import base64
import html
import io
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from coneslab import ConceptNeurons, find_concept_neurons, generate, record_attention
from coneslab.diffusion.kvspace import KVSpace
from coneslab.edits.base import Edit
from coneslab.edits.weights import model_fingerprint, swapped
from coneslab.errors import ConeslabError
from coneslab.show import explorers, widgets
from coneslab.show.widgets import control, explorer, playground, slider


def grey(level: int) -> np.ndarray:
    return np.full((4, 4, 3), level, np.uint8)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that was displayed, in order."""
    outputs: list[Any] = []

    def display(thing: Any, raw: bool = False, display_id: bool = False) -> Any:
        place = len(outputs)
        outputs.append(thing)
        return SimpleNamespace(update=lambda new: outputs.__setitem__(place, new)) if display_id else None

    monkeypatch.setattr(explorers, "display", display)
    return outputs


class Loop:
    """An event loop with a clock of its own: `run` does what is due, until nothing is left or the time is up."""

    def __init__(self) -> None:
        self.now, self.waiting = 0.0, []

    def call_soon_threadsafe(self, job: Any, *arguments: Any) -> None:
        self.waiting.append(SimpleNamespace(due=self.now, job=lambda: job(*arguments)))

    def call_later(self, seconds: float, job: Any) -> Any:
        timer = SimpleNamespace(due=self.now + seconds, job=job)
        timer.cancel = lambda: timer in self.waiting and self.waiting.remove(timer)
        self.waiting.append(timer)
        return timer

    def run(self, seconds: float = 60.0) -> None:
        end = self.now + seconds
        while due := [timer for timer in self.waiting if timer.due <= end]:
            first = min(due, key=lambda timer: timer.due)
            self.waiting.remove(first)
            self.now = max(self.now, first.due)
            first.job()
        self.now = end


def in_a_notebook(view: Any) -> Loop:
    """Let the view draw as in a notebook: later, between cells."""
    view.loop = Loop()
    return view.loop


def test_moving_a_control_draws_for_its_value() -> None:
    view = explorer(grey, level=slider(0, 255, 0))
    for level in (200, 10):
        view.controls["level"].value = level
        assert (pixels(view.png) == level).all()
    assert view.image.layout.display != "none"
    assert view.status.value == ""
    assert 'alt="A picture, 256 by 256 pixels"' in view.image.value
    assert base64.b64encode(view.png).decode() in view.image.value


def test_small_pictures_are_enlarged_without_smoothing() -> None:
    checks = np.uint8(np.indices((4, 4)).sum(0) % 2 * 255)[..., None].repeat(3, -1)
    data, _ = explorers.png(checks)
    assert pixels(data).shape == (256, 256, 3)
    assert set(np.unique(pixels(data))) == {0, 255}


def test_every_kind_of_picture_is_taken() -> None:
    figure = Figure(figsize=(1, 1))
    figure.set_label("what it shows")
    assert explorers.png(figure)[1] == "what it shows"
    assert pixels(explorers.png(Image.fromarray(grey(7)))[0])[0, 0, 0] == 7
    with pytest.raises(ConeslabError, match="returned list"):
        explorers.png([1, 2])  # type: ignore[arg-type]


def test_an_error_shows_as_text_and_the_next_value_draws_again() -> None:
    def render(level: int) -> np.ndarray:
        if level == 1:
            raise ValueError("<b>no</b> such level")
        return grey(level)

    view = explorer(render, level=range(4))
    view.controls["level"].value = 1
    assert "ValueError: &lt;b&gt;no&lt;/b&gt; such level" in view.status.value
    assert view.image.layout.display == "none"
    assert not view.controls["level"].disabled
    view.controls["level"].value = 2
    assert (pixels(view.png) == 2).all()
    assert view.status.value == "" and view.image.layout.display != "none"


def test_it_says_that_it_is_busy_and_leaves_the_controls_enabled() -> None:
    seen: list[tuple[bool, str]] = []

    def render(level: int, sure: bool) -> np.ndarray:
        seen.append((view.controls["level"].disabled or view.controls["sure"].disabled, view.status.value))
        return grey(level)

    view = explorer(render, level=range(4), sure=False)
    view.controls["level"].value = 3
    ((disabled, said),) = seen
    assert not disabled, "a disabled control loses the keyboard"
    assert "drawing" in said and 'role="status"' in said
    assert view.status.value == ""


def test_in_a_notebook_only_the_values_where_it_settles_are_drawn() -> None:
    calls: list[int] = []
    view = explorer(lambda level: calls.append(level) or grey(level), level=range(200))
    loop = in_a_notebook(view)
    for level in range(10, 20):
        view.controls["level"].value = level
        loop.run(0.05)
    assert calls == [] and "drawing" in view.status.value
    loop.run()
    assert calls == [19] and (pixels(view.png) == 19).all() and view.status.value == ""


def test_a_preview_is_shown_first_and_then_refined() -> None:
    def render(level: int) -> Any:
        yield grey(level)
        yield grey(level + 1)

    view = explorer(render, level=range(0, 200, 10))
    loop = in_a_notebook(view)
    view.controls["level"].value = 50
    loop.run(0.13)
    assert (pixels(view.png) == 50).all() and "preview" in view.status.value
    loop.run()
    assert (pixels(view.png) == 51).all() and view.status.value == ""
    view.controls["level"].value = 60
    loop.run()
    view.controls["level"].value = 50
    loop.run(0.121)
    assert (pixels(view.png) == 51).all(), "what is known in full needs no preview"


def test_newer_values_overtake_a_drawing_between_its_pictures() -> None:
    finished: list[int] = []

    def render(level: int) -> Any:
        yield grey(level)
        finished.append(level)
        yield grey(level + 1)

    view = explorer(render, level=range(0, 200, 10))
    loop = in_a_notebook(view)
    view.controls["level"].value = 50
    loop.run(0.121)  # the preview is there, the rest is not
    view.controls["level"].value = 60
    loop.run()
    assert finished == [60] and (pixels(view.png) == 61).all()
    view.controls["level"].value = 50  # given up, so not taken for drawn
    loop.run()
    assert finished == [60, 50] and (pixels(view.png) == 51).all()


def test_a_long_render_can_ask_whether_it_was_overtaken() -> None:
    log: list[str] = []

    def render(level: int) -> np.ndarray:
        log.append(f"begin {level}")
        if level == 1:
            view.controls["level"].value = 2  # as another thread may report it, in the middle of the drawing
        view.check()
        log.append(f"end {level}")
        return grey(level)

    view = explorer(render, level=range(4))
    loop = in_a_notebook(view)
    view.controls["level"].value = 1
    loop.run()
    assert log == ["begin 1", "begin 2", "end 2"]
    assert (pixels(view.png) == 2).all() and view.status.value == ""


def test_an_interrupt_between_cells_is_said_and_does_not_end_the_loop() -> None:
    def render(level: int) -> np.ndarray:
        if level == 1:
            signal.raise_signal(signal.SIGINT)
        return grey(level)

    view = explorer(render, level=range(4))
    loop = in_a_notebook(view)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # so a kernel waits for its next message
    try:
        view.controls["level"].value = 1
        loop.run()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Interrupted" in view.status.value
    view.controls["level"].value = 2
    loop.run()
    assert (pixels(view.png) == 2).all()


def test_a_change_reported_by_another_thread_is_drawn_by_the_loop_that_made_the_view() -> None:
    threads: list[str] = []

    def render(level: int) -> np.ndarray:
        threads.append(threading.current_thread().name)
        return grey(level)

    async def notebook() -> None:
        view = explorer(render, level=range(4))
        other = threading.Thread(target=lambda: setattr(view.controls["level"], "value", 3))
        other.start()
        other.join()
        assert not threads
        while not view.image.value:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(notebook(), 30))
    assert threads == [threading.main_thread().name]


def test_a_generator_without_pictures_is_an_error() -> None:
    view = explorer(lambda level: iter(()), level=range(4))
    view.controls["level"].value = 2
    assert "yielded no picture" in view.status.value


def test_an_interrupt_is_passed_on_and_leaves_the_controls_usable() -> None:
    def render(level: int) -> np.ndarray:
        raise KeyboardInterrupt

    view = explorer(render, level=range(4))
    with pytest.raises(KeyboardInterrupt):
        view.controls["level"].value = 2
    assert not view.controls["level"].disabled and "Interrupted" in view.status.value


def test_values_drawn_before_are_not_drawn_again() -> None:
    calls: list[int] = []
    view = explorer(lambda level: calls.append(level) or grey(level), level=range(200))
    for level in (1, 2, 1, 2):
        view.controls["level"].value = level
    assert calls == [1, 2]
    assert (pixels(view.png) == 2).all()
    for level in range(3, 100):
        view.controls["level"].value = level
    view.controls["level"].value = 1  # long ago: forgotten, so that memory stays bounded
    assert calls[-1] == 1


def test_values_that_cannot_be_hashed_are_drawn() -> None:
    several = ipywidgets.SelectMultiple(options=["a", "b"], value=["a"])
    view = explorer(lambda names, more: grey(len(names)), names=several, more=ipywidgets.FloatRangeSlider())
    several.value = ["a", "b"]
    assert (pixels(view.png) == 2).all()


def test_controls_are_made_from_plain_values() -> None:
    view = explorer(lambda **values: grey(0), sure=True, text="a cat", seed=range(2, 11, 2), scene=("sea", "snow"))
    kinds = {name: type(widget).__name__ for name, widget in view.controls.items()}
    assert kinds == {"sure": "Checkbox", "text": "Text", "seed": "IntSlider", "scene": "Dropdown"}
    assert view.values == {"sure": True, "text": "a cat", "seed": 2, "scene": "sea"}
    assert view.controls["seed"].max == 10 and view.controls["seed"].step == 2
    assert view.controls["text"].continuous_update is False


def test_sliders_report_when_let_go_and_keep_their_kind() -> None:
    assert isinstance(slider(0, 10), ipywidgets.IntSlider)
    assert isinstance(slider(0.0, 10), ipywidgets.FloatSlider)
    assert isinstance(slider(0, 10, step=0.5), ipywidgets.FloatSlider)
    own = ipywidgets.IntSlider(description="mine")
    assert own.continuous_update is True
    assert control(own, "theirs").continuous_update is False
    assert own.description == "mine"
    assert control(slider(0, 3), "guidance scale").description == "guidance scale"


@pytest.mark.parametrize("given", [3, None, (), object(), ipywidgets.HBox()])
def test_what_cannot_become_a_control_is_refused(given: Any) -> None:
    with pytest.raises(ConeslabError, match="'dose'"):
        explorer(lambda dose: grey(0), dose=given)


def test_refuses_an_empty_range_and_no_controls() -> None:
    with pytest.raises(ConeslabError, match="low < high"):
        slider(3, 3)
    with pytest.raises(ConeslabError, match="between"):
        slider(0, 1, 2)
    with pytest.raises(ConeslabError, match="needs a control"):
        explorer(lambda: grey(0))


def test_a_still_picture_is_displayed_before_the_controls_and_costs_no_drawing(shown: list[Any]) -> None:
    calls: list[int] = []
    still = Figure(figsize=(1, 1))
    still.set_label('a "still" picture')
    view = explorer(lambda level: calls.append(level) or grey(level), still=still, level=range(4))
    view._ipython_display_()
    picture, box = shown
    assert 'alt="a &quot;still&quot; picture"' in picture.data
    assert base64.b64encode(b"\x89PNG\r\n").decode() in picture.data
    assert "application/vnd.jupyter.widget-view+json" in box
    assert "VBox" not in box["text/plain"]  # what a reader without a kernel may see
    assert calls == []


def test_controls_are_shown_in_the_same_way_by_ipywidgets_7() -> None:
    box = ipywidgets.VBox([])
    old = explorers._view(SimpleNamespace(model_id=box.model_id))  # has no _repr_mimebundle_
    kind = "application/vnd.jupyter.widget-view+json"
    assert old[kind] == explorers._view(box)[kind]


def test_without_a_still_picture_the_first_drawing_is_displayed_once(shown: list[Any]) -> None:
    view = explorer(grey, level=slider(0, 255, 9))
    view._ipython_display_()
    data = base64.b64decode(shown[0].data.split("base64,")[1].split('"')[0])
    assert (pixels(data) == 9).all()
    assert view.image.value == "" and view.image.layout.display == "none"  # saved notebooks hold it once
    view.controls["level"].value = 100
    assert (pixels(view.png) == 100).all()


def test_a_strip_is_drawn_beforehand_once_per_value_and_shown_without_a_script(shown: list[Any]) -> None:
    calls: list[tuple[int, int]] = []

    def render(level: int, seed: int) -> Iterator[np.ndarray]:
        calls.append((level, seed))
        yield grey(0)  # a preview, which the strip leaves out
        yield grey(level + seed)

    view = explorer(render, strip={"level": [0, 100, 200]}, level=slider(0, 255, 100), seed=range(5))
    assert view.controls["level"].value == 100 and not calls
    view._ipython_display_()
    strip = shown[0].data
    made = [base64.b64decode(part.split('"')[0]) for part in strip.split("base64,")[1:]]
    assert [int(pixels(data).mean()) for data in made] == [0, 100, 200] and calls == [(0, 0), (100, 0), (200, 0)]
    assert strip.count(" checked>") == 1 and strip.index(" checked>") > strip.index("-1")  # at the slider's value
    assert "<script" not in strip and "level 200: A picture" in strip and "<legend>level</legend>" in strip
    view.controls["level"].value = 200
    assert (pixels(view.png) == 200).all() and len(calls) == 3  # known already


@pytest.mark.parametrize(("level", "values"), [(slider(0, 9, 3), [0, 3, 9]), (slider(0.0, 2.0, 1.0), [0.0, 1.0, 2.0])])
def test_a_strip_first_shows_the_value_of_its_control(shown: list[Any], level: Any, values: list[float]) -> None:
    explorer(lambda level: grey(int(level)), strip={"level": values}, level=level)._ipython_display_()
    assert [" checked>" in button for button in shown[0].data.split("<input")[1:]] == [False, True, False]


@pytest.mark.parametrize("strip", [{}, {"dose": [1]}, {"level": []}, {"level": [1, 300]}, {"level": ["x"]}, "level", 3])
def test_a_strip_of_what_cannot_be_drawn_is_refused_and_the_control_is_as_it_was(strip: Any) -> None:
    level = slider(0, 255, 7)
    with pytest.raises(ConeslabError, match="strip|level"):
        explorer(grey, strip=strip, level=level)
    assert level.value == 7


def test_an_error_in_a_strip_leaves_the_controls(shown: list[Any]) -> None:
    def render(level: int) -> np.ndarray:
        raise ConeslabError("no model here: load one")

    view = explorer(render, strip={"level": [1]}, level=range(4))
    view._ipython_display_()
    assert len(shown) == 1 and "application/vnd.jupyter.widget-view+json" in shown[0]
    assert "no model here: load one" in view.status.value


def test_an_error_in_the_first_drawing_leaves_the_controls(shown: list[Any]) -> None:
    def render(level: int) -> np.ndarray:
        raise ConeslabError("no model here: load one")

    view = explorer(render, level=range(4))
    view._ipython_display_()
    assert len(shown) == 1 and "application/vnd.jupyter.widget-view+json" in shown[0]
    assert "no model here: load one" in view.status.value


def test_the_first_drawing_is_displayed_in_one_place_as_it_gets_better(shown: list[Any]) -> None:
    def render(level: int) -> Any:
        yield grey(level)
        assert len(shown) == 1
        yield grey(level + 1)

    explorer(render, level=range(4))._ipython_display_()
    picture, _ = shown
    assert (pixels(base64.b64decode(picture.data.split("base64,")[1].split('"')[0])) == 1).all()


# --- views of one thing, and the playground -------------------------------------------------------------


@dataclass(frozen=True)
class Stretch(Edit):
    """An edit that one can see: it stretches every weight that reads the text.

    (To add a number to them all would change nothing: behind its layer norm a text embedding sums to 0.)
    """

    by: float
    settings: dict = field(default_factory=dict)

    nbytes = 8

    def applied(self, pipe: Any, dose: float = 1.0, *, check_model: bool = True) -> Any:
        weights = list(KVSpace(pipe).parameters.values())
        return swapped(lambda: [(weight, weight.detach() * (1 + dose * self.by)) for weight in weights], pipe)

    def _pack(self) -> Any:
        return {}, {"by": self.by, "settings": self.settings}

    @classmethod
    def _unpack(cls, tensors: Any, description: Any) -> Stretch:
        return cls(**description)


def rows_of(monkeypatch: pytest.MonkeyPatch) -> list[list[list[np.ndarray]]]:
    """The pictures of every figure from now on, row by row."""
    seen: list[list[list[np.ndarray]]] = []
    real = widgets.plots.picture_grid

    def picture_grid(pictures: Any, **options: Any) -> Figure:
        seen.append([[np.asarray(picture) for picture in row] for row in pictures])
        return real(pictures, **options)

    monkeypatch.setattr(widgets.plots, "picture_grid", picture_grid)
    return seen


def same(ours: list[np.ndarray], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all((a == np.asarray(b)).all() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_a_sketch_comes_before_the_picture_and_the_edit_is_off_between_them(v_pipe: Any) -> None:
    edit, prompts = Stretch(4.0), ["a cat", "a car"]
    plain = generate(v_pipe, prompts, sampler_steps=2)
    drawing = widgets.sketched(v_pipe, prompts, edit=edit, dose=0.5, sampler_steps=4, preview_steps=2)
    for made, steps in zip(drawing, (2, 4), strict=True):
        assert same([np.asarray(one) for one in generate(v_pipe, prompts, sampler_steps=2)], plain)
        with edit.applied(v_pipe, 0.5):
            assert same([np.asarray(one) for one in made], generate(v_pipe, prompts, sampler_steps=steps))
    assert len(list(widgets.sketched(v_pipe, prompts, sampler_steps=2, preview_steps=6))) == 1


@pytest.mark.slow
def test_neurons_are_explored_by_threshold_and_place(v_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = KVSpace(v_pipe).layout
    scale = torch.where(torch.arange(layout.n) % 3 == 0, 0.3, 1.0)
    scale[::6] = 0.0
    neurons = ConceptNeurons.from_scale(scale, layout, model_fingerprint(v_pipe))
    seen: list[tuple[list[Any], np.ndarray, list[str], str]] = []
    real = widgets.plots.pictures_and_map

    def board(pictures: Any, values: Any, *, rows: Any, title: str, **options: Any) -> Figure:
        seen.append((list(pictures), values, list(rows), title))
        return real(pictures, values, rows=rows, title=title, **options)

    monkeypatch.setattr(widgets.plots, "pictures_and_map", board)
    masks = {"found": neurons, "fewer": neurons.within(level=0)}
    view = widgets.neuron_explorer(v_pipe, masks, ["a cat"], pictures=1, sampler_steps=3, preview_steps=2)
    assert view.draw() and f"{len(range(0, layout.n, 3)):,} of {layout.n:,}" in seen[-1][3]
    view.controls["cut"].value = 0.2
    view.controls["kind"].value = "values"
    pictures, shut, rows, title = seen[-1]
    only = neurons.binary(0.2).within(kind="V")
    assert len(only) and f"{len(only):,} of" in title
    for row, values in zip(rows, shut, strict=True):
        assert values.mean() == pytest.approx(100 / 6 if row.endswith("V") else 0, abs=1)
    with only.applied(v_pipe):
        assert same([np.asarray(one) for one in pictures], generate(v_pipe, ["a cat"], sampler_steps=3))
    view.controls["block"].value = "mid"
    assert {row for row, values in zip(rows, seen[-1][1], strict=True) if values.any()} == {
        row for row in rows if row.startswith("mid") and row.endswith("V")
    }
    view.controls["block"].value, view.controls["mask"].value = "all blocks", "fewer"
    assert seen[-1][3].startswith(f"fewer: {len(masks['fewer'].binary(0.2).within(kind='V')):,} of")
    with pytest.raises(ConeslabError, match="no masks"):
        widgets.neuron_explorer(v_pipe, {}, ["a cat"])
    strip = {"dose": [0.0, 0.5]}
    assert widgets.neuron_explorer(v_pipe, masks, ["a cat"], strip=strip).strip == ("dose", [0.0, 0.5])


@pytest.mark.slow
def test_attention_is_browsed_without_drawing_again(v_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    maps: list[list[np.ndarray]] = []
    monkeypatch.setattr(widgets, "generate", lambda *a, **k: (drawn.append(a), generate(*a, **k))[1])
    real = widgets.plots.attention_overlay
    monkeypatch.setattr(widgets.plots, "attention_overlay", lambda p, m, **k: (maps.append(m), real(p, m, **k))[1])
    view = widgets.attention_browser(v_pipe, "a cat and a car", sampler_steps=3)
    assert view.draw() and len(drawn) == 1 and len(maps[-1]) == 5
    view.controls["layer"].value = view.controls["layer"].options[1]
    view.controls["stage"].value = "last third"
    assert len(drawn) == 1 and not np.allclose(maps[0][1], maps[-1][1])
    with record_attention(v_pipe) as recorded:
        generate(v_pipe, "a cat and a car", sampler_steps=3)
    own = recorded.token("cat", layers=[recorded.layers[0]], steps=[2])
    assert np.allclose(maps[-1][1], own.numpy(), atol=1e-5)
    view.controls["prompt"].value = " "
    assert "prompt is empty" in view.status.value and len(drawn) == 1
    view.controls["prompt"].value = "a car"
    assert view.status.value == "" and len(drawn) == 2


SMALL = {"pictures": 2, "sampler_steps": 4, "preview_steps": 2}


@pytest.mark.slow
def test_the_playground_draws_the_edit_beside_the_untouched_model(v_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, seen = Stretch(8.0), rows_of(monkeypatch)
    view = playground(v_pipe, {"stretch": edit}, prompt="a cat", seed=5, **SMALL)
    view.controls["dose"].value = 0.5
    plain = {steps: generate(v_pipe, ["a cat"] * 2, seed=5, sampler_steps=steps) for steps in (2, 4)}
    with edit.applied(v_pipe, 0.5):
        edited = {steps: generate(v_pipe, ["a cat"] * 2, seed=5, sampler_steps=steps) for steps in (2, 4)}
    assert not same([np.asarray(picture) for picture in edited[4]], plain[4])
    grey = [np.full((*picture.size, 3), 238, np.uint8) for picture in plain[2]]
    stages = [(edited[2], grey), (edited[2], plain[2]), (edited[4], plain[2]), (edited[4], plain[4])]
    assert len(seen) == 4
    for got, (above, below) in zip(seen, stages, strict=True):
        assert same(got[0], above) and same(got[1], below)
    assert view.image.value and view.status.value == ""
    view.controls["edit"].value = ""
    assert len(seen[-1]) == 1 and same(seen[-1][0], plain[4])


@pytest.mark.slow
def test_a_change_of_dose_does_not_draw_the_untouched_model_again(v_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = widgets.generate
    monkeypatch.setattr(widgets, "generate", lambda *a, **k: calls.append(k["sampler_steps"]) or real(*a, **k))
    view = playground(v_pipe, {"stretch": Stretch(8.0)}, prompt="a cat", **SMALL)
    view.controls["dose"].value = 0.5
    assert calls == [2, 2, 4, 4]
    calls.clear()
    view.controls["dose"].value = 0.75
    assert calls == [2, 4]


@pytest.mark.slow
def test_an_overtaken_playground_stops_between_steps_with_the_weights_back(v_pipe: Any) -> None:
    view = playground(v_pipe, {"stretch": Stretch(8.0)}, prompt="a cat", **SMALL)
    loop, steps = in_a_notebook(view), []
    check = view.check

    def counting() -> None:
        steps.append(view.controls["dose"].value)
        if len(steps) == 1:
            view.controls["dose"].value = 0.25
        check()

    view.check = counting  # type: ignore[method-assign]
    view.controls["dose"].value = 0.5
    loop.run()
    assert steps.count(0.5) == 1 and view.image.value and view.status.value == ""


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("steps", 500, "steps is 500: give a number from 1 to 50"),
        ("pictures", 0, "pictures is 0"),
        ("prompt", " ", "the prompt is empty"),
        ("prompt", "cat" * 100, "300 characters: give at most 200"),
        ("dose", float("nan"), "dose is nan"),
        ("guidance", 1e9, "guidance is 1e+09"),
        ("seed", -1, "seed is -1"),
    ],
)
def test_limits_hold_for_whatever_is_sent(v_pipe: Any, name: str, value: Any, said: str) -> None:
    view = playground(v_pipe, prompt="a cat", **SMALL)
    control = view.controls[name]
    for end in ("min", "max"):  # a visitor of a web page can move the ends of a slider, too
        if hasattr(control, end):
            setattr(control, end, {"min": -(10**10), "max": 10**10}[end])
    if value != value:
        view.values_sent = {**view.values, name: value}
        with pytest.raises(ConeslabError, match=said):
            view.limits.require(**{key: given for key, given in view.values_sent.items() if key != "edit"})
        return
    control.value = value
    assert said in html.unescape(view.status.value) and 'role="alert"' in view.status.value
    assert view.image.layout.display == "none"


def test_the_menu_says_at_which_words_an_edit_acts(v_pipe: Any) -> None:
    space = KVSpace(v_pipe)
    mask = ConceptNeurons(space.layout, np.arange(9), np.zeros(9), space.fingerprint(), subject="cat")
    view = playground(v_pipe, {"everywhere": mask, "there": mask.at("sks", "cat")}, **SMALL)
    labels = [label for label, _ in view.controls["edit"].options]
    assert labels == ["no edit", "everywhere", "there (acts at “sks cat” alone)"]


@pytest.mark.slow
def test_a_folder_of_edits_is_a_menu_and_a_damaged_file_says_so_when_it_is_chosen(
    v_pipe: Any, pictured: Any, tmp_path: Path
) -> None:
    found = find_concept_neurons(v_pipe, pictured, rounds=1, prior_images=2, sampler_steps=1, progress=False)
    found.save(tmp_path / "cat.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    view = playground(v_pipe, tmp_path, **SMALL)
    labels = [label for label, _ in view.controls["edit"].options]
    assert labels == ["no edit", "broken", "cat (“a sks cat”)"]
    assert view.controls["edit"].value == "broken" and view.controls["prompt"].value == "a cat on the beach"
    view.draw()
    assert "broken.safetensors is not a complete safetensors file" in view.status.value
    view.controls["edit"].value = "cat"
    assert view.controls["prompt"].value == "a sks cat on the beach"
    assert view.image.value and view.status.value == ""
    view.controls["prompt"].value = "a dog"
    view.controls["edit"].value = ""
    assert view.controls["prompt"].value == "a dog", "what the reader wrote stays"
    with pytest.raises(ConeslabError, match="not a folder"):
        playground(v_pipe, tmp_path / "none")


@pytest.mark.slow
def test_an_edit_of_another_model_is_refused_in_words(v_pipe: Any, epsilon_pipe: Any, pictured: Any) -> None:
    found = find_concept_neurons(epsilon_pipe, pictured, rounds=1, prior_images=2, sampler_steps=1, progress=False)
    view = playground(v_pipe, {"cat": found}, prompt="a cat", **SMALL)
    assert not view.draw()
    assert "load the model it was found on" in view.status.value


@pytest.mark.slow
def test_an_edit_added_later_is_chosen_and_replaces_one_of_its_name(
    v_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = playground(v_pipe, prompt="a cat", **SMALL)
    loop, seen = in_a_notebook(view), rows_of(monkeypatch)
    view.add("stretch", Stretch(8.0))
    loop.run()
    view.add("stretch", Stretch(16.0))
    loop.run()
    with Stretch(16.0).applied(v_pipe):
        assert same(seen[-1][0], generate(v_pipe, ["a cat"] * 2, sampler_steps=4))
    assert view.controls["edit"].value == "stretch"


def test_a_prompt_with_dollars_is_not_read_as_a_formula(v_pipe: Any) -> None:
    view = playground(v_pipe, prompt=r"a $\frac cat$ on the beach", **SMALL)
    assert view.draw(), view.status.value


def test_a_start_outside_the_limits_is_refused(v_pipe: Any) -> None:
    with pytest.raises(ConeslabError, match="steps is 100"):
        playground(v_pipe, sampler_steps=100)
    with pytest.raises(ConeslabError, match="prompt is empty"):
        playground(v_pipe, prompt="")


def test_a_folder_may_hold_what_is_no_file_and_names_that_are_no_text(v_pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to("nothing")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "\udcff$x$.safetensors").write_bytes(b"x")
    view = playground(v_pipe, tmp_path, **SMALL)
    assert [value for _, value in view.controls["edit"].options] == ["", "folder", "link", "�$x$"]
    for name, said in (
        ("link", "a link to nothing"),
        ("folder", "is a folder"),
        ("�$x$", "not a complete"),
    ):
        view.controls["edit"].value = name
        view.draw()
        assert said in html.unescape(view.status.value)
        view.status.value.encode()  # as it is sent to the browser


@pytest.mark.slow
def test_names_of_edits_are_no_formulas_and_long_words_no_prompt(v_pipe: Any) -> None:
    edit = Stretch(8.0)
    object.__setattr__(edit, "settings", {"prompt": "word " * 1000})
    view = playground(v_pipe, {r"$\frac <cat*>$": edit}, **SMALL)
    assert view.draw(), view.status.value
    assert view.controls["prompt"].value == "a cat on the beach"
    assert all(len(label) < 100 for label, _ in view.controls["edit"].options)
