"""Thin ipywidgets around functions that draw: controls above, a picture below, built from core widgets only.

`explorer` is all that a notebook needs: it makes controls from plain values, draws when one of them is let go, says
when it is busy, and shows an error as text instead of losing it in a log. A still picture is displayed first, so
that a notebook read without a kernel shows something.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import numpy as np
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image

from . import plots
from .errors import ConeslabError

Picture = Figure | Image.Image | np.ndarray
_SMALL = 256  # pixels; pictures lower than this are enlarged, without smoothing
_KEPT = 64  # pictures remembered by the values of their controls
_NO_KERNEL = "(Sliders and their picture appear here when this cell is run; the still picture above is an example.)"


def slider(
    low: float, high: float, value: float | None = None, *, step: float | None = None, label: str = ""
) -> ipywidgets.IntSlider | ipywidgets.FloatSlider:
    """A slider over [low, high], of whole numbers if all given are whole; it reports when let go, not on the way.

    value: where it starts, default the middle. step: default 1, or a twentieth of the range.

    >>> slider(0, 999).value, slider(0, 1, 0.25).step
    (499, 0.05)
    """
    given = [number for number in (low, high, value, step) if number is not None]
    if not low < high or (value is not None and not low <= value <= high):
        raise ConeslabError(f"got a slider from {low} to {high} at {value}: expected low < high and a value between")
    whole = all(isinstance(number, int) for number in given)
    if value is None:
        value = (low + high) // 2 if whole else (low + high) / 2
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return kind(
        value=value,
        min=low,
        max=high,
        step=step or (1 if whole else (high - low) / 20),
        description=label,
        continuous_update=False,
    )


def control(given: Any, label: str) -> ipywidgets.Widget:
    """Make a control from a plain value; a widget is taken as it is, and gets the label if it has none.

    bool: a checkbox; str: a line of text; range: a slider of whole numbers; any other sequence: a menu, starting at
    its first entry. Raises ConeslabError for anything else, such as a bare number (its range is not known).
    """
    made: ipywidgets.Widget
    if isinstance(given, ipywidgets.Widget):
        made = given
    elif isinstance(given, bool):
        made = ipywidgets.Checkbox(value=given, indent=False)
    elif isinstance(given, str):
        made = ipywidgets.Text(value=given)
    elif isinstance(given, range) and len(given) > 1:
        made = slider(given[0], given[-1], given[0], step=given.step)
    elif isinstance(given, Sequence) and len(given) > 0:
        made = ipywidgets.Dropdown(options=list(given))
    else:
        raise ConeslabError(
            f"cannot make a control for {label!r} from {given!r}: give a widget, slider(low, high), a bool, a text, "
            "a range, or a list of choices"
        )
    if not hasattr(made, "value"):
        raise ConeslabError(f"the control {label!r} is a {type(made).__name__}, which has no value to draw from")
    if not getattr(made, "description", label):
        made.description = label
    if made.has_trait("continuous_update"):
        made.continuous_update = False  # draw when the slider is let go, not at every place it passes
    made.style.description_width = "initial"
    made.layout.width = "auto" if isinstance(made, ipywidgets.Checkbox) else "24em"
    return made


def png(picture: Picture) -> tuple[bytes, str]:
    """The bytes of a PNG file and the alt text of whatever a render function returned.

    picture: a matplotlib Figure, a PIL picture, or a uint8 array (height, width, 3).
    """
    if isinstance(picture, Figure):
        return plots.to_png(picture), str(picture.get_label())
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise ConeslabError(
            f"the render function returned {type(picture).__name__}, expected a matplotlib Figure, a PIL picture or a "
            "uint8 array (height, width, 3)"
        )
    times = -(-_SMALL // picture.height)
    if times > 1:
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue(), f"A picture, {picture.width} by {picture.height} pixels"


class Explorer:
    """Controls, a status line and a picture; made by `explorer`.

    controls: name -> widget; image: the live picture, empty until a control is moved; status: what is going on;
    box: all of them, to put inside another widget. As the last line of a cell it displays itself: the still picture
    first, then the box.
    """

    def __init__(
        self, render: Callable[..., Picture], controls: dict[str, ipywidgets.Widget], still: Picture | None
    ) -> None:
        self.render, self.controls, self.still = render, controls, still
        self.image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(display="none", max_width="100%"))
        self.status = ipywidgets.HTML("Move a control to draw.")
        rows = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.box = ipywidgets.VBox([rows, self.status, self.image])
        self._kept: dict[tuple, tuple[bytes, str]] = {}
        for widget in controls.values():
            widget.observe(self._changed, names="value")

    @property
    def values(self) -> dict[str, Any]:
        """What the controls say now: name -> value, the arguments of the next call of `render`."""
        return {name: widget.value for name, widget in self.controls.items()}

    def draw(self) -> bool:
        """Draw for the controls as they are. Returns whether it worked; if not, `status` shows the error."""
        self._busy(True)
        try:
            self.image.value, self.image.tooltip = self._rendered()
            self.image.layout.display = ""
            self.status.value = ""
            return True
        except Exception as error:  # a notebook must show any error, and the controls must stay usable
            self.image.layout.display = "none"  # the old picture would belong to other values
            kind = "" if isinstance(error, ConeslabError) else f"{type(error).__name__}: "
            self.status.value = f'<span style="color:#b00020">{html.escape(f"{kind}{error}")}</span>'
            return False
        except BaseException:
            self.status.value = "Interrupted; move a control to draw again."
            raise
        finally:
            self._busy(False)

    def _changed(self, change: dict[str, Any]) -> None:
        self.draw()

    def _rendered(self) -> tuple[bytes, str]:
        values = self.values
        key = tuple(values.items())
        try:
            known = self._kept.get(key)
        except TypeError:  # a value that cannot be hashed, such as a list: draw every time
            return png(self.render(**values))
        if known is None:
            known = png(self.render(**values))
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = known
        return known

    def _busy(self, busy: bool) -> None:
        if busy:
            self.status.value = "<i>drawing …</i>"
        for widget in self.controls.values():
            if widget.has_trait("disabled"):
                widget.disabled = busy  # what is moved meanwhile would queue up behind this picture

    def _ipython_display_(self) -> None:
        if self.still is not None:
            data, alt = png(self.still)
        elif self.draw():
            data, alt = bytes(self.image.value), str(self.image.tooltip)
            self.image.value, self.image.layout.display = b"", "none"
            self.status.value = "Move a control to draw."
        else:
            data, alt = b"", ""
        if data:
            source = base64.b64encode(data).decode()
            display(HTML(f'<img alt="{html.escape(alt)}" style="max-width:100%" src="data:image/png;base64,{source}">'))
        bundle = dict(self.box._repr_mimebundle_() or {})
        display({**bundle, "text/plain": _NO_KERNEL}, raw=True)


def explorer(render: Callable[..., Picture], *, still: Picture | None = None, **controls: Any) -> Explorer:
    """Let a reader call `render` with sliders, checkboxes and menus, and see what it draws.

    render: called with one keyword argument a control; returns a Figure, a PIL picture or a uint8 array. It is called
    when a control is let go, and not again for values it has drawn before. controls: name -> what `control` takes.
    still: the picture displayed above the controls, and the only one seen without a kernel; default: what `render`
    draws for the controls as they start. Raises ConeslabError for a control that cannot be made.

        widgets.explorer(lambda dose, seed: draw(dose, seed), dose=widgets.slider(0.0, 1.0, 1.0), seed=range(8))

    >>> view = explorer(lambda grey: np.full((4, 4, 3), grey, np.uint8), grey=slider(0, 255, 0))
    >>> view.controls["grey"].value = 128
    >>> bytes(view.image.value[:4])
    b'\\x89PNG'
    """
    if not controls:
        raise ConeslabError("an explorer needs a control: give at least one, such as seed=range(8)")
    made = {name: control(given, name.replace("_", " ")) for name, given in controls.items()}
    return Explorer(render, made, still)
