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
from ..diffusion.pipelines import Pipeline
from ..edits.base import load_edit
from ..errors import ConeslabError
from ..neurons.search import find_concept_neurons
from ..world.subjects import SUBJECTS
from ..world.subjects import subject as subject_named
from .widgets import Limits, control, playground

EDITS = "CONESLAB_EDITS"  # the environment variable that names the folder of edit files
_ABOUT = """<h1>Concept neurons</h1>
<p>A small diffusion model draws stickers. Some of the weights that read the text are the <b>concept neurons</b> of a
subject: when they are shut, the model draws a thing it has never seen. Choose an edit, move its dose, and compare with
the untouched model, which starts from the same noise.</p>"""
_ASLEEP = "<p><small>After half an hour without a change the page falls asleep; reload it to continue.</small></p>"


class Page:
    """A playground, and a row above it that finds the neurons of further subjects; made by `page`.

    box: everything, to be displayed; playground, choice, button, progress: its parts.
    """

    def __init__(self, pipe: Pipeline, folder: Path | None, names: Sequence[str], limits: Limits, rounds: int) -> None:
        self.pipe, self.folder, self.rounds = pipe, folder, rounds
        self.playground = playground(pipe, folder, limits=limits)
        self.choice = control(list(names), "subject")
        self.button = ipywidgets.Button(description="Find its neurons", button_style="primary")
        self.progress = ipywidgets.HTML()
        self.button.on_click(self._clicked)
        line = ipywidgets.HBox(
            [self.choice, self.button, self.progress], layout={"flex_flow": "row wrap", "grid_gap": "0 1.2em"}
        )
        self.box = ipywidgets.VBox([ipywidgets.HTML(_ABOUT), line, self.playground.box, ipywidgets.HTML(_ASLEEP)])
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
            known = self._known(name)
            self.playground.add(name, self._search(name) if known is None else known)
            self.playground.controls["prompt"].value = subject_named(name).prompts[0]
            self._say(f"found: {name} is in the menu of edits")
        except Exception as error:  # shown, and the page stays usable
            self._say(str(error) if isinstance(error, ConeslabError) else f"{type(error).__name__}: {error}", "#b00020")
        finally:
            self.button.disabled = self._waiting = False

    def _known(self, name: str) -> Any:
        if name in self.playground.edits and not isinstance(self.playground.edits[name], str):
            return self.playground.edits[name]
        file = self.folder / f"{name}.safetensors" if self.folder else None
        return load_edit(file) if file and file.exists() else None

    def _search(self, name: str) -> Any:
        subject = subject_named(name)
        self._say(f"{name}: drawing ordinary pictures of its kind …")

        def tell(state: Mapping[str, Any]) -> None:
            done, density = state["step"] + 1, state["density"]
            self._say(f"{name}: round {done} of {self.rounds}, {density:.1%} of the weights shut so far")

        found = find_concept_neurons(self.pipe, subject, rounds=self.rounds, progress=False, callback=tell).binary()
        if self.folder:
            found.save(self.folder / f"{name}.safetensors")
        return found

    def _say(self, text: str, colour: str = "inherit") -> None:
        self.progress.value = f'<span role="status" style="color:{colour}">{html.escape(text)}</span>'


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
    CONESLAB_EDITS; without either, what a visitor finds is lost with the page. limits: see `Limits`; by default lower
    than in a notebook, as many visitors draw at once.
    """
    named = folder or os.environ.get(EDITS)
    where = Path(named) if named else None
    if where is not None:
        where.mkdir(parents=True, exist_ok=True)
    limits = Limits(pictures=6, steps=30) if limits is None else limits
    made = Page(pipe, where, checks.texts("subjects", subjects), limits, checks.count("rounds", rounds))
    made.playground.draw()  # now: what changes while the browser connects may never reach it
    return made
