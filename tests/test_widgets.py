"""Widgets without a browser: set a control's value, and see what the picture and the status line say."""

from __future__ import annotations

import base64
import io
from typing import Any

import ipywidgets
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from coneslab import widgets
from coneslab.errors import ConeslabError
from coneslab.widgets import control, explorer, slider


def grey(level: int) -> np.ndarray:
    return np.full((4, 4, 3), level, np.uint8)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that was displayed, in order."""
    outputs: list[Any] = []
    monkeypatch.setattr(widgets, "display", lambda thing, raw=False: outputs.append(thing))
    return outputs


def test_moving_a_control_draws_for_its_value() -> None:
    view = explorer(grey, level=slider(0, 255, 0))
    for level in (200, 10):
        view.controls["level"].value = level
        assert (pixels(view.image.value) == level).all()
    assert view.image.layout.display != "none"
    assert view.status.value == ""


def test_small_pictures_are_enlarged_without_smoothing() -> None:
    checks = np.uint8(np.indices((4, 4)).sum(0) % 2 * 255)[..., None].repeat(3, -1)
    data, _ = widgets.png(checks)
    assert pixels(data).shape == (256, 256, 3)
    assert set(np.unique(pixels(data))) == {0, 255}


def test_every_kind_of_picture_is_taken() -> None:
    figure = Figure(figsize=(1, 1))
    figure.set_label("what it shows")
    assert widgets.png(figure)[1] == "what it shows"
    assert pixels(widgets.png(Image.fromarray(grey(7)))[0])[0, 0, 0] == 7
    with pytest.raises(ConeslabError, match="returned list"):
        widgets.png([1, 2])  # type: ignore[arg-type]


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
    assert (pixels(view.image.value) == 2).all()
    assert view.status.value == "" and view.image.layout.display != "none"


def test_controls_are_disabled_while_it_draws_and_not_after() -> None:
    seen: list[tuple[bool, str]] = []

    def render(level: int, sure: bool) -> np.ndarray:
        seen.append((view.controls["level"].disabled and view.controls["sure"].disabled, view.status.value))
        return grey(level)

    view = explorer(render, level=range(4), sure=False)
    view.controls["level"].value = 3
    assert len(seen) == 1 and seen[0][0] and "drawing" in seen[0][1]
    assert not view.controls["level"].disabled and not view.controls["sure"].disabled


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
    assert (pixels(view.image.value) == 2).all()
    for level in range(3, 100):
        view.controls["level"].value = level
    view.controls["level"].value = 1  # long ago: forgotten, so that memory stays bounded
    assert calls[-1] == 1


def test_values_that_cannot_be_hashed_are_drawn() -> None:
    several = ipywidgets.SelectMultiple(options=["a", "b"], value=["a"])
    view = explorer(lambda names, more: grey(len(names)), names=several, more=ipywidgets.FloatRangeSlider())
    several.value = ["a", "b"]
    assert (pixels(view.image.value) == 2).all()


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


def test_without_a_still_picture_the_first_drawing_is_displayed_once(shown: list[Any]) -> None:
    view = explorer(grey, level=slider(0, 255, 9))
    view._ipython_display_()
    data = base64.b64decode(shown[0].data.split("base64,")[1].split('"')[0])
    assert (pixels(data) == 9).all()
    assert view.image.value == b"" and view.image.layout.display == "none"  # saved notebooks hold it once
    view.controls["level"].value = 100
    assert (pixels(view.image.value) == 100).all()


def test_an_error_in_the_first_drawing_leaves_the_controls(shown: list[Any]) -> None:
    def render(level: int) -> np.ndarray:
        raise ConeslabError("no model here: load one")

    view = explorer(render, level=range(4))
    view._ipython_display_()
    assert len(shown) == 1 and "application/vnd.jupyter.widget-view+json" in shown[0]
    assert "no model here: load one" in view.status.value
