"""The playground as a page for a class: pick a subject, let the page find its concept neurons, draw.

`make app` serves notebooks/app/playground.ipynb with Voilà: every visitor has their own kernel, and what the page has
found is kept as edit files in a folder, so that each subject is searched once, not once per visitor.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets

from .. import checks
from ..diffusion.checks import require_editable
from ..diffusion.pipelines import Pipeline
from ..edits.base import Edit, load_edit
from ..errors import ConeslabError, WriteError
from ..files import require_writable, user_path
from ..neurons.search import find_concept_neurons
from ..world.subjects import SUBJECTS
from ..world.subjects import subject as subject_named
from .widgets import Limits, control, edits_in, playground

EDITS = "CONESLAB_EDITS"  # the environment variable that names the folder of edit files
_ABOUT = """<h1>Concept neurons</h1>
<p>A small diffusion model draws stickers. Some of the weights that read the text are the <b>concept neurons</b> of a
subject: when they are shut, the model draws a thing it has never seen. Choose an edit, move its dose, and compare with
the untouched model, which starts from the same noise.</p>"""
_STEPS = 12  # to begin with, as in the lectures: half the wait of the library's 25, for a whole class
_ASLEEP = "<p><small>After half an hour without a change the page falls asleep; reload it to continue.</small></p>"


class Page:
    """A playground, and a row above it that finds the neurons of further subjects; made by `page`.

    box: everything, to be displayed; playground, choice, button, progress, left_out: its parts.
    """

    def __init__(self, pipe: Pipeline, folder: Path | None, names: Sequence[str], limits: Limits, rounds: int) -> None:
        self.pipe, self.folder, self.rounds = pipe, folder, rounds
        known = edits_in(folder) if folder else {}
        usable = {name: edit for name, edit in known.items() if not isinstance(edit, str)}
        self.playground = playground(pipe, usable, sampler_steps=min(_STEPS, limits.steps), limits=limits)
        self.left_out = ipywidgets.HTML(
            _left_out({name: edit for name, edit in known.items() if isinstance(edit, str)})
        )
        self.choice = control(list(names), "subject")
        self.button = ipywidgets.Button(description="Find its neurons", button_style="primary")
        self.progress = ipywidgets.HTML()
        self.button.on_click(self._clicked)
        line = ipywidgets.HBox(
            [self.choice, self.button, self.progress], layout={"flex_flow": "row wrap", "grid_gap": "0 1.2em"}
        )
        about, asleep = ipywidgets.HTML(_ABOUT), ipywidgets.HTML(_ASLEEP)
        self.box = ipywidgets.VBox([about, line, self.playground.box, self.left_out, asleep])
        self._waiting = False

    def _clicked(self, button: ipywidgets.Button) -> None:
        if self._waiting:
            return  # a second click, or one sent without the button
        self._waiting = True
        self._say("waiting for its turn …")
        if self.playground.loop is None:
            self.find()
        else:  # queued with the drawings: both use the pipeline
            self.playground.loop.call_soon_threadsafe(self.find)

    def find(self) -> None:
        """Find the neurons of the chosen subject, or load them if another visitor found them; then select them."""
        self.button.disabled = True
        try:
            name = str(self.choice.value)
            known, said = self._known(name), ""
            if known is None:
                known, said = self._search(name)
            self.playground.add(name, known)
            self.playground.controls["prompt"].value = subject_named(name).prompts[0]
            self._say(f"found: {name} is in the menu of edits{said}")
        except Exception as error:  # shown, and the page stays usable
            self._say(str(error) if isinstance(error, ConeslabError) else f"{type(error).__name__}: {error}", "#b00020")
        finally:
            self.button.disabled = self._waiting = False

    def _known(self, name: str) -> Edit | None:
        """An edit of the menu or of the folder; None if there is none, or its file cannot be read."""
        if name in self.playground.edits and not isinstance(self.playground.edits[name], str):
            return self.playground.edits[name]  # type: ignore[return-value]
        try:
            return load_edit(self.folder / f"{name}.safetensors") if self.folder else None
        except ConeslabError:
            return None

    def _search(self, name: str) -> tuple[Edit, str]:
        """Find a subject's neurons and keep them; the edit, and what to say if it could not be kept."""
        subject = subject_named(name)
        self._say(f"{name}: drawing ordinary pictures of its kind …")

        def tell(state: Mapping[str, Any]) -> None:
            done, density = state["step"] + 1, state["density"]
            self._say(f"{name}: round {done} of {self.rounds}, {density:.1%} of the weights shut so far")

        found = find_concept_neurons(self.pipe, subject, rounds=self.rounds, progress=False, callback=tell).binary()
        try:
            if self.folder:
                found.save(self.folder / f"{name}.safetensors")
        except WriteError as error:
            return found, f", but is lost with this page: {error}"
        return found, ""

    def _say(self, text: str, colour: str = "inherit") -> None:
        self.progress.value = f'<span role="status" style="color:{colour}">{html.escape(text)}</span>'


def _left_out(wrong: Mapping[str, str]) -> str:
    """What is said about files of the folder that cannot be read."""
    lines = "".join(f"<li>{html.escape(name)}: {html.escape(reason)}</li>" for name, reason in wrong.items())
    return f"<small>Left out of the menu:<ul>{lines}</ul></small>" if lines else ""


def page(
    pipe: Pipeline,
    folder: str | Path | None = None,
    *,
    subjects: Sequence[str] = SUBJECTS,
    limits: Limits | None = None,
    rounds: int = 60,
) -> Page:
    """Make the page and draw its first picture. A search takes about half a minute on two cores, once per subject.

    folder: where edit files are read from and new ones saved, created if missing; default the environment variable
    CONESLAB_EDITS; without either, what a visitor finds is lost with the page. A file that cannot be read is left out,
    and the page says why. limits: see `Limits`; by default lower
    than in a notebook, as many visitors draw at once.
    """
    require_editable(pipe)
    named = folder or os.environ.get(EDITS)
    where = user_path(named) if named else None
    if where is not None and not where.is_dir():
        require_writable(where, folder=True).mkdir(parents=True, exist_ok=True)
    limits = Limits(pictures=6, steps=30) if limits is None else limits
    made = Page(pipe, where, checks.texts("subjects", subjects), limits, checks.count("rounds", rounds))
    if not made.playground.draw():  # now: what changes while the browser connects may never reach it
        made.playground.controls["edit"].value = ""  # the first edit may be of another model
        made.playground.draw()
    return made
