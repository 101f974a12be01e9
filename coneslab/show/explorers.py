"""Thin ipywidgets around functions that draw: controls above, a picture below, built from core widgets only.

`explorer` is all that a notebook needs: it makes controls from plain values, draws when one of them is released, says
when it is busy, and shows an error as text instead of losing it in a log. A still picture is displayed first, so
that a notebook read without a kernel shows something. `widgets.py` re-exports it and builds on it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import io
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ipywidgets
import numpy as np
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image
from traitlets import TraitError

from .. import checks
from ..errors import ArgumentError, ConeslabError
from ..pictures import as_pictures
from . import plots

Picture = Figure | Image.Image | np.ndarray
_SMALL = 256  # pixels; pictures of a smaller height are enlarged, without smoothing
KEPT = 64  # pictures cached by the values of their controls
_SETTLE = 0.12  # seconds without a change before drawing: a held arrow key is one request, not ten
_PAUSE = 0.02  # seconds between two pictures of a drawing, for the kernel to handle what was sent meanwhile
_START = "Move a control to draw."
_NO_KERNEL = "(Sliders and their picture appear here when this cell is run; the still picture above is an example.)"


def slider(
    low: float, high: float, value: float | None = None, *, step: float | None = None, label: str = ""
) -> ipywidgets.IntSlider | ipywidgets.FloatSlider:
    """A slider over [low, high], of integers if all arguments are; it reports when released, not while moving.

    value: where it starts, default the middle. step: default 1, or a twentieth of the range.

    >>> slider(0, 999).value, slider(0, 1, 0.25).step
    (499, 0.05)
    """
    given = [low, high, *(number for number in (value, step) if number is not None)]
    for number in given:
        checks.number("one of a slider's numbers", number)
    if step is not None:
        checks.number("step", step, "(0, inf)")
    checks.text("label", label, blank=True)
    if not low < high or (value is not None and not low <= value <= high):
        raise ConeslabError(f"got a slider from {low} to {high} at {value}: expected low < high and a value in between")
    if step is not None and not step > 0:
        raise ConeslabError(f"got a slider with steps of {step}: expected a positive number")
    whole = all(isinstance(number, int) for number in given)
    if value is None:
        value = (low + high) // 2 if whole else (low + high) / 2
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return kind(
        value=value,
        min=low,
        max=high,
        step=(1 if whole else (high - low) / 20) if step is None else step,
        description=label,
        continuous_update=False,
    )


def control(given: Any, label: str) -> ipywidgets.Widget:
    """Make a control from a plain value; a widget is used as it is, and gets the label if it has none.

    bool: a checkbox; str: a line of text; range: a slider of integers; any other sequence: a menu, starting at
    its first entry. Raises ConeslabError for anything else, such as a bare number (its range is not known).
    """
    made: ipywidgets.Widget
    checks.text("label", label, blank=True)
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
        made.continuous_update = False  # draw when the slider is released, not while it moves
    made.style.description_width = "initial"
    made.layout.width = "auto" if isinstance(made, ipywidgets.Checkbox) else "24em"
    return made


def png(picture: Picture) -> tuple[bytes, str]:
    """The bytes of a PNG file and the alt text of whatever a render function returned.

    picture: a matplotlib Figure, a PIL picture, or a uint8 array (height, width, 3).
    """
    if isinstance(picture, Figure):
        return plots.to_png(picture), str(picture.get_label())
    if isinstance(picture, np.ndarray | Image.Image):
        picture = as_pictures(picture)[0]
    else:
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


class Overtaken(Exception):
    """Newer values than those being drawn are waiting; `Explorer.check` raises it to abandon the drawing."""


class Explorer:
    """Controls, a status line and a picture; made by `explorer`.

    controls: name -> widget; image: the live picture, empty until a control is moved; png: its bytes; status: what is
    going on; box: all of them, to put inside another widget. As the last line of a cell it displays itself: the
    still picture first, then the box.

    In a notebook a change only requests a drawing. The kernel's main loop draws it a moment later, between cells,
    because JupyterLab may report changes in a separate thread: drawn there, an edit would be on the pipeline while a
    cell is using it. Controls stay enabled meanwhile (a disabled one loses keyboard focus), and only the newest values
    are drawn. Without a running loop, in a script, a change is drawn at once.
    """

    def __init__(
        self,
        render: Callable[..., Picture | Iterator[Picture]],
        controls: dict[str, Any],
        still: Picture | None,
        strip: tuple[str, list[Any]] | None = None,
    ) -> None:
        self.render, self.controls, self.still, self.strip = render, controls, still, strip
        # not an Image: that one has no alt text, and its view breaks on a tooltip (ipywidgets 8.1)
        self.image = ipywidgets.HTML(layout=ipywidgets.Layout(display="none", max_width="100%"))
        self.png = b""
        self.status = ipywidgets.HTML()
        rows = ipywidgets.HBox(
            list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap", grid_gap="0 1.2em")
        )
        self.box = ipywidgets.VBox([rows, self.status, self.image])
        self.loop = running_loop()
        self._asked = 0  # requests so far: a drawing whose number is lower has been overtaken
        self._drawn = 0  # the request that is being drawn, or was drawn last
        self._under_way: Iterator[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._kept: dict[tuple, tuple[bytes, str]] = {}
        self._say(_START)
        for widget in controls.values():
            widget.observe(lambda change: self.ask(), names="value")

    @property
    def values(self) -> dict[str, Any]:
        """The current values of the controls: name -> value, the arguments of the next call to `render`."""
        return {name: widget.value for name, widget in self.controls.items()}

    def check(self) -> None:
        """Raise Overtaken if the controls have moved on: call it now and then inside a long `render`."""
        if self._drawn != self._asked:
            raise Overtaken

    def draw(self) -> bool:
        """Draw the current values in full. Returns whether it worked; if not, `status` says why."""
        self._asked += 1
        for _ in self._drawing():
            pass
        return not self._failed

    # --- asking, and being overtaken ---

    def ask(self) -> None:
        """Request a drawing, as moving a control does; in a notebook it begins when the cell has ended."""
        if self.loop is None:
            self.draw()
            return
        self._asked += 1
        self._say("drawing …", busy=True)
        self.loop.call_soon_threadsafe(self._go_on_in, _SETTLE)

    def _go_on_in(self, seconds: float) -> None:
        assert self.loop is not None
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        """Advance the drawing by one picture; start again if it was overtaken."""
        if self._under_way is None or self._drawn != self._asked:
            self._under_way = self._drawing()
        try:
            with _interruptible():
                next(self._under_way)
        except (StopIteration, KeyboardInterrupt):  # the latter would end the kernel's loop; the status line reports it
            self._under_way = None
        else:
            self._go_on_in(_PAUSE)

    # --- drawing ---

    def _drawing(self) -> Iterator[None]:
        """Draw the newest values; pauses after each picture, so that newer ones can come in."""
        self._drawn, self._failed = self._asked, False
        self._say("drawing …", busy=True)
        try:
            for picture, final in self._pictures(self.values):
                self.png, self.image.value = picture[0], _img(*picture)
                self.image.layout.display = ""
                if not final:
                    self._say("a quick preview; drawing it in full …", busy=True)
                yield
            self._say("")
        except Overtaken:
            self._failed = True
        except Exception as error:  # a notebook must show any error, and the controls must stay usable
            self._failed = True
            self.image.layout.display = "none"  # the old picture would belong to other values
            self._tell(error)
        except KeyboardInterrupt:
            self._failed = True
            self._say("Interrupted; move a control to draw again.")
            raise

    def _pictures(self, values: dict[str, Any]) -> Iterator[tuple[tuple[bytes, str], bool]]:
        """What `render` draws, as PNG and alt text, and whether no better picture can follow."""
        key: tuple | None = tuple(values.items())
        try:
            known = self._kept.get(key)  # type: ignore[arg-type]
        except TypeError:  # a value that cannot be hashed, such as a list: draw every time
            key = known = None
        if known is None:
            made = self.render(**values)
            if isinstance(made, Iterator):
                for picture in made:
                    known = png(picture)
                    yield known, False
                if known is None:
                    raise ConeslabError("the render function yielded no picture: expected some, the best one last")
                self._keep(key, known)
                return
            known = png(made)
            self._keep(key, known)
        yield known, True

    def _keep(self, key: tuple | None, picture: tuple[bytes, str]) -> None:
        if key is None:
            return
        while len(self._kept) >= KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = picture

    def _tell(self, error: Exception) -> None:
        kind = "" if isinstance(error, ConeslabError) else f"{type(error).__name__}: "
        self._say(f"{kind}{error}", error=True)

    def _say(self, text: str, *, busy: bool = False, error: bool = False) -> None:
        style = "font-style:italic" if busy else "color:#b00020" if error else ""
        role = "alert" if error else "status"  # read aloud by screen readers, an error immediately
        self.status.value = f'<span role="{role}" style="{style}">{html.escape(text)}</span>' if text else ""

    # --- being displayed ---

    def _ipython_display_(self) -> None:
        if self.strip is not None:
            try:
                display(HTML(self._drawn_strip(*self.strip)))
            except Exception as error:  # as in a drawing
                self._tell(error)
        elif self.still is not None:
            display(HTML(_img(*png(self.still))))
        else:
            self._asked += 1
            place = None
            for _ in self._drawing():
                picture = HTML(self.image.value)
                if place is None:
                    place = display(picture, display_id=True)
                else:
                    place.update(picture)
            if not self._failed:  # saved notebooks hold the picture once
                self.png, self.image.value, self.image.layout.display = b"", "", "none"
                self._say(_START)
        display({**_view(self.box), "text/plain": _NO_KERNEL}, raw=True)

    def _drawn_strip(self, name: str, chosen: list[Any]) -> str:
        """Draw a control's chosen values, the others as they are, for a reader without a kernel."""
        drawn = {}
        for value in chosen:
            for picture, _ in self._pictures(self.values | {name: value}):
                drawn[_label(value)] = picture
        return stepped(drawn, str(self.controls[name].description or name), _label(self.values[name]))


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def stepped(pictures: Mapping[str, tuple[bytes, str]], name: str, start: str = "") -> str:
    """HTML that steps through pictures with radio buttons, without a kernel or a script.

    pictures: label -> PNG and alt text; name: what the labels are values of; start: the label shown first, default the
    last. Where a page drops styles, as GitHub does, all pictures are seen, one below the other.
    """
    group = "strip-" + hashlib.sha256(b"".join(data for data, _ in pictures.values())).hexdigest()[:10]
    labels = list(pictures)
    first = labels.index(start) if start in labels else len(labels) - 1
    buttons, shown, rules = [], [], [f".{group} figure{{display:none;margin:0}}"]
    for i, (label, (data, alt)) in enumerate(pictures.items()):
        checked = " checked" if i == first else ""
        buttons.append(
            f'<input type="radio" name="{group}" id="{group}-{i}"{checked}>'
            f'<label for="{group}-{i}" style="margin:0 0.9em 0 0.2em">{html.escape(label)}</label>'
        )
        told = f"{name} {label}: {alt}"
        shown.append(f"<figure>{_img(data, told)}</figure>")
        rules.append(f"#{group}-{i}:checked~div>figure:nth-child({i + 1}){{display:block}}")
    return (
        f"<style>{''.join(rules)}</style>"
        f'<fieldset class="{group}" style="border:0;padding:0;margin:0"><legend>{html.escape(name)}</legend>'
        f"{''.join(buttons)}<div>{''.join(shown)}</div></fieldset>"
    )


def _view(box: ipywidgets.Widget) -> dict[str, Any]:
    """What a page needs to show a widget, by MIME type."""
    if hasattr(box, "_repr_mimebundle_"):
        return dict(box._repr_mimebundle_() or {})
    shown = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}  # ipywidgets 7, which is Colab's
    return {"application/vnd.jupyter.widget-view+json": shown}


def _img(data: bytes, alt: str) -> str:
    """A picture in HTML; its size is given, or the page would jump at every new one."""
    width, height = Image.open(io.BytesIO(data)).size
    source = base64.b64encode(data).decode()
    return (
        f'<img alt="{html.escape(alt)}" width="{width}" height="{height}" style="max-width:100%;height:auto" '
        f'src="data:image/png;base64,{source}">'
    )


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs the current cell, or None in a script."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let the stop button interrupt what runs between cells, when kernels ignore it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def explorer(
    render: Callable[..., Picture | Iterator[Picture]],
    *,
    still: Picture | None = None,
    strip: Mapping[str, Sequence[Any]] | None = None,
    **controls: Any,
) -> Explorer:
    """Let a reader call `render` with sliders, checkboxes and menus, and see what it draws.

    render: called with one keyword argument per control; returns a Figure, a PIL picture or a uint8 array, or yields
    several, each better than the one before (a quick preview first). It is called when a control is released, and not
    again for values it has drawn before. Between two pictures of a generator the kernel may run something else, so do
    not yield inside `with edit.applied(pipe)`. controls: name -> what `control` takes.
    still: the picture displayed above the controls, and the only one seen without a kernel; default: what `render`
    draws for the initial values. strip: the main control and a few of its values, which are drawn beforehand in place
    of the still picture; a reader without a kernel steps through them.
    Raises ConeslabError for a control that cannot be made, or a strip of another control or of values it cannot take.

        widgets.explorer(lambda dose, seed: draw(dose, seed), dose=widgets.slider(0.0, 1.0, 1.0), seed=range(8))

    >>> view = explorer(lambda grey: np.full((4, 4, 3), grey, np.uint8), grey=slider(0, 255, 0))
    >>> view.controls["grey"].value = 128
    >>> view.png[:4]
    b'\\x89PNG'
    """
    if render is None:
        raise ArgumentError("render is None: give a function that draws")
    checks.function("render", render)
    if not controls:
        raise ConeslabError("an explorer needs a control: give at least one, such as seed=range(8)")
    made = {name: control(given, name.replace("_", " ")) for name, given in controls.items()}
    return Explorer(render, made, still, None if strip is None else _strip(strip, made))


def _strip(given: Mapping[str, Sequence[Any]], controls: Mapping[str, ipywidgets.Widget]) -> tuple[str, list[Any]]:
    """The control and the values of a strip. Raises ConeslabError unless it is one of `controls`, and takes them."""
    if not isinstance(given, Mapping) or len(given) != 1 or next(iter(given)) not in controls:
        raise ConeslabError(f"the strip is {given!r}: give one of {', '.join(controls)} with some of its values")
    ((name, values),) = given.items()
    chosen, before = checks.items(f"values of {name}", values), controls[name].value
    try:
        for value in chosen:
            controls[name].value = value
            if controls[name].value != value:
                raise ConeslabError(f"the strip has {name} = {value!r}, which its control cannot be")
    except TraitError as error:
        raise ConeslabError(f"the strip has {name} = {value!r}, which its control cannot be: {error}") from error
    finally:
        controls[name].value = before
    return name, chosen
