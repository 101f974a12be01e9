"""Interactive views for notebooks: controls that draw (`explorer`), neurons, attention, a playground for any model.

All are built from core ipywidgets, and each is a thin shell over functions of the package.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from PIL import Image

from .. import checks
from ..diffusion.checks import require_pipeline
from ..diffusion.pipelines import Pipeline
from ..diffusion.sampling import generate, require_steps
from ..edits.base import Edit, applied, load_edit, require_edit
from ..errors import ConeslabError
from ..files import user_path
from ..measure.attention import AttentionMaps
from ..measure.recording import record_attention
from ..neurons.mask import ConceptNeurons
from . import plots
from .explorers import KEPT, Explorer, control, explorer, slider

__all__ = [
    "Limits",
    "Playground",
    "attention_browser",
    "control",
    "explorer",
    "neuron_explorer",
    "playground",
    "sketched",
    "slider",
]

_SEEDS = 2**31 - 1
_PROMPT = "a cat on the beach"


# --- for render functions -------------------------------------------------------------------------------


def sketched(
    pipe: Pipeline,
    prompts: str | Sequence[str],
    *,
    edit: Edit | None = None,
    dose: float = 1.0,
    sampler_steps: int = 25,
    preview_steps: int = 4,
    **options: Any,
) -> Iterator[list[Image.Image]]:
    """Pictures for prompts, first in a few steps and then in full, for a render function that yields both.

    edit: applied at this dose while they are drawn, and removed in between. options: of `generate`.

        def render(dose):
            for made in widgets.sketched(pipe, ["a cat"] * 4, edit=found, dose=dose):
                yield plots.picture_grid(made)
    """
    require_pipeline(pipe)
    sampler_steps, preview_steps = require_steps(pipe, sampler_steps), checks.count("preview_steps", preview_steps)
    require_edit(edit)
    prompts = checks.texts("prompts", prompts, blank=True)

    def drawn() -> Iterator[list[Image.Image]]:
        for number in dict.fromkeys((min(preview_steps, sampler_steps), sampler_steps)):
            with applied(edit, pipe, dose):
                made = generate(pipe, prompts, sampler_steps=number, **options)
            yield made

    return drawn()


# --- views of one thing ---------------------------------------------------------------------------------


def neuron_explorer(
    pipe: Pipeline,
    masks: Mapping[str, ConceptNeurons],
    prompts: Sequence[str],
    *,
    pictures: int = 4,
    bins: int = 32,
    strip: Mapping[str, Sequence[Any]] | None = None,
    **options: Any,
) -> Explorer:
    """Which of these neurons are needed? Pictures, and a heat map of what is shut, by threshold, place and dose.

    masks: by name, such as those found and a random control, all of one model. Controls: the mask; cut, below which a
    scale counts as shut; dose; the block of the U-Net and the kind (keys, values) to which it is confined; a prompt of
    `prompts`. bins: columns of the heat map, each a run of output channels. strip: one of the controls and some of its
    values, drawn beforehand (`explorer`). options: of `sketched`, e.g. seed, sampler_steps.
    """
    require_pipeline(pipe)
    if not checks.mapping("masks", masks, least=0):
        raise ConeslabError("there are no masks to explore: give at least one by name, such as {'found': neurons}")
    for name, one in masks.items():
        checks.of_kind(f"masks[{name!r}]", one, ConceptNeurons)
    prompts, pictures = checks.texts("prompts", prompts), checks.count("pictures", pictures)
    bins = checks.count("bins", bins)
    layout = next(iter(masks.values())).layout
    blocks = {"all blocks": None, **{layer.block: layer.block for layer in layout}}
    kinds = {"keys and values": None, "keys": "K", "values": "V"}
    order = sorted(range(len(layout)), key=lambda row: "dmu".index(layout.layers[row].block[0]))
    names = [layout.layers[row].label for row in order]

    def render(mask: str, cut: float, dose: float, block: str, kind: str, prompt: str) -> Iterator[Figure]:
        chosen = masks[mask].binary(cut).within(block=blocks[block], kind=kinds[kind])
        shut = 100 * layout.heat_map(chosen.mask().float(), bins=bins).numpy()[order]
        title = f"{mask}: {len(chosen):,} of {chosen.n:,} neurons shut, dose {dose:g}\n“{prompt}”"
        for made in sketched(pipe, [prompt] * pictures, edit=chosen, dose=dose, **options):
            yield plots.pictures_and_map(
                made, shut, rows=names, label="% shut", x_label="output channels of the matrix", title=title
            )

    cut = next(iter(masks.values())).cut
    return explorer(
        render,
        strip=strip,
        mask=list(masks),
        cut=slider(0.05, 1.0, cut, step=0.05),
        dose=slider(0.0, 1.25, 1.0, step=0.125),
        block=list(blocks),
        kind=list(kinds),
        prompt=list(prompts),
    )


def attention_browser(
    pipe: Pipeline,
    prompt: str,
    *,
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    edit: Edit | None = None,
) -> Explorer:
    """Where does each word act? The cross-attention map of every word of a prompt, by layer and stage of sampling.

    A picture is drawn once for each prompt and seed, and its maps are kept: layer and stage change what is shown of
    them. edit: applied while it is drawn. Raises ConeslabError, in the status line, for an empty prompt.
    """
    require_pipeline(pipe)
    checks.text("prompt", prompt)
    seed, sampler_steps = checks.count("seed", seed, least=0, most=_SEEDS), require_steps(pipe, sampler_steps)
    require_edit(edit)
    third = max(1, sampler_steps // 3)
    stages = {
        "all steps": slice(None),
        "first third": slice(third),
        "second third": slice(third, -third),
        "last third": slice(-third, None),
    }

    @lru_cache(maxsize=8)
    def record(prompt: str, seed: int) -> tuple[Image.Image, AttentionMaps]:
        with applied(edit, pipe), record_attention(pipe) as maps:
            (picture,) = generate(pipe, prompt, seed=seed, sampler_steps=sampler_steps, guidance_scale=guidance_scale)
        return picture, maps

    def render(prompt: str, seed: int, layer: str, stage: str) -> Figure:
        words = prompt.split()
        if not words:
            raise ConeslabError("the prompt is empty: say what to draw, for example “a cat on the beach”")
        picture, maps = record(prompt, seed)
        layers = None if layer == layers_of[0] else [layer]
        shown = [maps.token(word, layers=layers, steps=stages[stage]).numpy() for word in words]
        return plots.attention_overlay([picture] * len(words), shown, labels=words, title=f"{layer}, {stage}")

    layers_of = ["all layers", *record(prompt, seed)[1].layers]
    return explorer(
        render,
        prompt=prompt,
        seed=ipywidgets.BoundedIntText(value=seed, min=0, max=_SEEDS),
        layer=layers_of,
        stage=list(stages),
    )


# --- the playground -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """The most that a playground draws at once. Enforced in Python: a web visitor can send what no slider allows.

    prompt: characters; dose and guidance: the upper ends of their ranges.
    """

    pictures: int = 8
    steps: int = 50
    prompt: int = 200
    dose: float = 1.5
    guidance: float = 12.0

    def __post_init__(self) -> None:
        for name in ("pictures", "steps", "prompt"):
            object.__setattr__(self, name, checks.count(name, getattr(self, name)))
        object.__setattr__(self, "dose", checks.number("dose", self.dose, "(0, 100]"))
        object.__setattr__(self, "guidance", checks.number("guidance", self.guidance, "(1, 100]"))

    def require(self, *, dose: float, prompt: str, seed: int, pictures: int, steps: int, guidance: float) -> None:
        """Raise ConeslabError for values outside the limits, and for an empty prompt."""
        if not checks.text("prompt", prompt, blank=True).strip():
            raise ConeslabError("the prompt is empty: say what to draw, for example “a cat on the beach”")
        if len(prompt) > self.prompt:
            raise ConeslabError(f"the prompt has {len(prompt)} characters: give at most {self.prompt}")
        checks.number("dose", dose, f"[0, {self.dose:g}]")
        checks.number("guidance", guidance, f"[1, {self.guidance:g}]")
        checks.count("seed", seed, least=0, most=_SEEDS)
        checks.count("pictures", pictures, most=self.pictures)
        checks.count("steps", steps, most=self.steps)


class Playground(Explorer):
    """Any pipeline with any edits applied, beside the untouched model; made by `playground`."""

    def __init__(self, pipe: Pipeline, edits: Mapping[str, Edit | str], limits: Limits, start: dict[str, Any]) -> None:
        self.pipe, self.limits = pipe, limits
        self.edits: dict[str, Edit | str] = dict(edits)
        self.preview_steps = start.pop("preview_steps")
        self._untouched: dict[tuple, list[Image.Image]] = {}
        first = next(iter(self.edits), "")
        made = {
            "edit": ipywidgets.Dropdown(options=self._menu(), value=first),
            "dose": slider(0.0, limits.dose, min(1.0, limits.dose), step=0.05),
            "prompt": start["prompt"] or self._own_prompt(first),
            "seed": ipywidgets.BoundedIntText(value=start["seed"], min=0, max=_SEEDS),
            "pictures": ipywidgets.IntSlider(start["pictures"], 1, limits.pictures),
            "steps": ipywidgets.IntSlider(start["steps"], 1, limits.steps),
            "guidance": slider(1.0, limits.guidance, start["guidance"], step=0.5),
        }
        super().__init__(self._draw_both, {name: control(given, name) for name, given in made.items()}, None)
        self.controls["prompt"].layout.width = "48.5em"
        self.controls["edit"].observe(self._follow, names="value")

    def add(self, name: str, edit: Edit) -> None:
        """Add an edit to the menu, replacing one of the same name, and select it."""
        self.edits[name] = edit
        self._forget(name)
        self.controls["edit"].options = self._menu()
        self.controls["edit"].value = name
        self.ask()  # even if the menu has not changed

    # --- the menu and the prompt ---

    def _forget(self, name: str) -> None:
        """Forget what was drawn with an earlier edit of this name."""
        self._kept = {key: picture for key, picture in self._kept.items() if ("edit", name) not in key}

    def _menu(self) -> list[tuple[str, str]]:
        """The entries, with the words that an edit was made for: without them in the prompt it has little effect."""
        labels = []
        for name, edit in self.edits.items():
            words, scope = _words(edit), getattr(edit, "scope", ())
            where = f"acts at “{' '.join(map(_text, scope)):.60}” alone" if scope else words and f"“{words:.60}”"
            labels.append(f"{name} ({where})" if where else name)
        return [("no edit", ""), *zip(labels, self.edits, strict=True)]

    def _own_prompt(self, name: str) -> str:
        words = _words(self.edits.get(name, ""))
        own = f"{words} on the beach"
        return own if words and len(own) <= self.limits.prompt else _PROMPT

    def _follow(self, change: dict[str, Any]) -> None:
        """Switch to the prompt of the new edit, unless the reader wrote one."""
        if self.controls["prompt"].value in (_PROMPT, self._own_prompt(change["old"])):
            self.controls["prompt"].value = self._own_prompt(change["new"])

    # --- drawing ---

    def _draw_both(self, edit: str, dose: float, **asked: Any) -> Iterator[Figure]:
        """The edit's row in few steps, then the untouched model's, then both in full, in the same order."""
        self.limits.require(dose=dose, **asked)
        chosen = self.edits.get(edit) if edit else None
        if edit and chosen is None:
            raise ConeslabError(f"there is no edit {edit!r} here: choose one from the menu")
        if isinstance(chosen, str):
            raise ConeslabError(chosen)
        quick = min(self.preview_steps, asked["steps"])
        title = textwrap.fill(f"“{asked['prompt']}”", 70)

        def figure(edited: list[Image.Image], untouched: list[Image.Image]) -> Figure:
            rows = [edited, untouched] if edited else [untouched]
            labels = [f"{textwrap.fill(edit, 16)}\ndose {dose:g}", "untouched model"][-len(rows) :]
            return plots.picture_grid(rows, row_labels=labels, title=title)

        def edited(steps: int) -> list[Image.Image]:
            if chosen is None:
                return []
            with chosen.applied(self.pipe, dose):
                return self._generate(asked | {"steps": steps})

        if quick < asked["steps"]:
            sketch = asked | {"steps": quick}
            soon, beside = edited(quick), self._without_edit(asked) or self._without_edit(sketch)
            if soon and not beside:
                yield figure(soon, [Image.new("RGB", picture.size, "#eeeeee") for picture in soon])
            yield figure(soon, beside or self._without_edit(sketch, draw=True))
            if soon and not self._without_edit(asked):
                full = edited(asked["steps"])
                yield figure(full, self._without_edit(sketch, draw=True))
                yield figure(full, self._without_edit(asked, draw=True))
                return
        yield figure(edited(asked["steps"]), self._without_edit(asked, draw=True))

    def _without_edit(self, asked: dict[str, Any], *, draw: bool = False) -> list[Image.Image]:
        """The untouched model's pictures, cached: most controls change only the edit. Empty if not cached."""
        key = tuple(asked.values())
        if key not in self._untouched and draw:
            pictures = self._generate(asked)
            while len(self._untouched) >= KEPT:
                del self._untouched[next(iter(self._untouched))]
            self._untouched[key] = pictures
        return self._untouched.get(key, [])

    def _generate(self, asked: dict[str, Any]) -> list[Image.Image]:
        return generate(
            self.pipe,
            [asked["prompt"]] * asked["pictures"],
            seed=asked["seed"],
            sampler_steps=asked["steps"],
            guidance_scale=asked["guidance"],
            callback=lambda *_: self.check(),
        )


def _words(edit: Edit | str) -> str:
    """The words of the subject that an edit was made for, such as "a qtp robot"; empty if it does not say."""
    settings = getattr(edit, "settings", None)
    return _text(settings.get("prompt", "")) if isinstance(settings, Mapping) else ""


def _text(given: Any) -> str:
    """What a browser can be sent: bytes that are no text, as a file's name may have, become "�"."""
    return str(given).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def edits_in(folder: str | Path) -> dict[str, Edit | str]:
    """The edits in a folder: name -> edit, or what is wrong with a file that cannot be read.

    Raises ConeslabError if there is no such folder.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise ConeslabError(f"{folder} is not a folder: give one with edit files (edit.save), or a mapping of edits")
    found: dict[str, Edit | str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            found[_text(file.stem)] = load_edit(file)
        except ConeslabError as error:
            found[_text(file.stem)] = _text(error)
    return found


def playground(
    pipe: Pipeline,
    edits: Mapping[str, Edit] | str | Path | None = None,
    *,
    prompt: str | None = None,
    seed: int = 0,
    pictures: int | None = None,
    sampler_steps: int | None = None,
    guidance_scale: float = 3.0,
    preview_steps: int = 4,
    limits: Limits | None = None,
) -> Playground:
    """Let a reader draw with any pipeline and any edits, beside the untouched model from the same noise.

    edits: name -> Edit, or a folder of edit files; one that cannot be read says so when it is chosen. A preview of
    `preview_steps` comes first, and is then drawn in full unless a control has moved. prompt: default the words that
    the edit was found for. pictures, sampler_steps: default 4 and 25, or as many as the limits allow. limits:
    the ends of the controls, enforced for whatever is sent.
    Raises ConeslabError if there is no such folder, or the initial values lie outside the limits.

        widgets.playground(pipe, {"cat": found.binary()})
    """
    require_pipeline(pipe)
    checks.count("preview_steps", preview_steps)
    limits = Limits() if limits is None else checks.of_kind("limits", limits, Limits)
    known: Mapping[str, Edit | str]
    if isinstance(edits, str | Path):
        known = edits_in(edits)
    else:
        known = checks.mapping("edits", {} if edits is None else edits, least=0)
        for one in known.values():
            require_edit(one)
    pictures = min(4, limits.pictures) if pictures is None else pictures
    steps = min(25, limits.steps) if sampler_steps is None else sampler_steps
    start = {"seed": seed, "pictures": pictures, "steps": steps, "guidance": guidance_scale}
    preview_steps = checks.count("preview_steps", preview_steps)
    limits.require(dose=0, prompt=_PROMPT if prompt is None else prompt, **start)  # type: ignore[arg-type]
    return Playground(pipe, known, limits, start | {"prompt": prompt, "preview_steps": preview_steps})
