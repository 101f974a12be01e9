"""Personalisation methods by name: what `coneslab compare` runs, and where to add your own.

A method makes one edit for one or more subjects. Some train on all subjects at once; others make one edit per subject
and join them, so that a subject's edit serves every combination and every method that builds on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import checks
from ..diffusion.checks import require_pipeline
from ..diffusion.pipelines import Pipeline
from ..edits.base import Combined, Edit
from ..errors import ConeslabError, FileFormatError
from ..files import data_folder, read_json
from ..finetuning.samples import several
from ..methods.personalization.custom_diffusion import CustomDiffusionSettings, custom_diffusion
from ..methods.personalization.dreambooth import DreamBoothSettings, dreambooth
from ..methods.personalization.lora import LoRASettings, lora
from ..methods.personalization.merging import merge
from ..methods.personalization.textual_inversion import TextualInversionSettings, textual_inversion
from ..neurons.mask import ConceptNeurons
from ..neurons.union import concatenate, finetune_together
from ..settings import takes
from ..world.subjects import Subject
from .setting import kept, neurons


@dataclass(frozen=True)
class Method:
    """A personalisation method.

    make(pipe, subjects, seed=..., **settings) -> edit, of all subjects at once. With `single`, a function
    (pipe, subject, seed=..., **settings) -> edit of one subject, it is make(pipe, subjects, edits, seed=..., **those of
    the settings that `own_settings` names); `single` gets the others.
    settings: its defaults. choices: setting -> values from which `comparison.tune_methods` chooses, one at a time;
    for_several: the same for edits of several subjects, if other settings matter then. keep: whether edits are kept in
    the folder that a comparison has for them; one that is as large as the model is not worth it.
    """

    make: Callable[..., Edit]
    single: Callable[..., Any] | None = None
    own_settings: tuple[str, ...] = ()
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    for_several: Mapping[str, Sequence[Any]] | None = None
    keep: bool = True

    def trials(self, subjects: int) -> list[dict[str, Any]]:
        """The settings to choose from for an edit of so many subjects; none if there is nothing to choose."""
        own = self.choices if subjects == 1 or self.for_several is None else self.for_several
        return [{name: value} for name, values in own.items() for value in values]

    def unknown(self, settings: Mapping[str, Any]) -> list[str]:
        """Those of the settings that the method has not by name; none if its function takes any."""
        taken = inspect.signature(self.single or self.make).parameters.values()
        if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken):
            return []
        names = {one.name for one in taken if one.kind is inspect.Parameter.KEYWORD_ONLY} - {"seed"}
        return [name for name in settings if name not in {*names, *self.own_settings}]

    def of_single(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The part of the settings that is for the edit of one subject."""
        return {name: value for name, value in settings.items() if name not in self.own_settings}


@takes(CustomDiffusionSettings)
def _customised(pipe: Pipeline, subjects: Subject | Sequence[Subject], *, seed: int, **settings: Any) -> Edit:
    return custom_diffusion(pipe, subjects, seed=seed, progress=False, **settings)


def _join_graded(pipe: Pipeline, subjects: Sequence[Subject], found: Sequence[ConceptNeurons], *, seed: int) -> Edit:
    return concatenate(*found)


def _join_binary(pipe: Pipeline, subjects: Sequence[Subject], found: Sequence[ConceptNeurons], *, seed: int) -> Edit:
    return concatenate(*[mask.binary() for mask in found])


def _at_their_words(
    pipe: Pipeline, subjects: Sequence[Subject], found: Sequence[ConceptNeurons], *, seed: int, dose: float = 1.0
) -> Edit:
    """Masks at their subjects' words do not meet in the weights. In a picture they do, and a part of each does best."""
    masks = [mask.binary() for mask in found]
    return masks[0] if len(masks) == 1 and dose == 1 else Combined(tuple(masks), dose)


def _join_and_tune(
    pipe: Pipeline,
    subjects: Sequence[Subject],
    found: Sequence[ConceptNeurons],
    *,
    seed: int,
    tuning_steps: int = 40,
    tuning_rate: float = 1e-3,
) -> Edit:
    union = concatenate(*[mask.binary() for mask in found])
    options: dict[str, Any] = {"steps": tuning_steps, "learning_rate": tuning_rate, "seed": seed, "progress": False}
    return finetune_together(pipe, union, subjects, **options)


def _merge(pipe: Pipeline, subjects: Sequence[Subject], edits: Sequence[Any], *, seed: int) -> Edit:
    return merge(pipe, edits, subjects) if len(edits) > 1 else edits[0]


def _nothing(pipe: Pipeline, subjects: Sequence[Subject], *, seed: int) -> Edit:
    """The control: no edit at all."""
    return Combined(())


# Functions of their own, rather than made by one, so that a method can be pickled.
@takes(TextualInversionSettings)
def _invert(pipe: Pipeline, subjects: Sequence[Subject], *, seed: int, **settings: Any) -> Edit:
    return textual_inversion(pipe, subjects, seed=seed, progress=False, **settings)


@takes(DreamBoothSettings)
def _dreambooth(pipe: Pipeline, subjects: Sequence[Subject], *, seed: int, **settings: Any) -> Edit:
    return dreambooth(pipe, subjects, seed=seed, progress=False, **settings)


@takes(LoRASettings)
def _lora(pipe: Pipeline, subjects: Subject | Sequence[Subject], *, seed: int, **settings: Any) -> Edit:
    return lora(pipe, subjects, seed=seed, progress=False, **settings)


def _add(pipe: Pipeline, subjects: Sequence[Subject], edits: Sequence[Edit], *, seed: int) -> Edit:
    """All of them, one after the other: the changes of LoRAs add up, as in diffusers."""
    return edits[0] if len(edits) == 1 else Combined(tuple(edits))


# Four values each: where the best of three was at an edge, one more beyond it, and as many for all.
# No method takes longer for one subject than Cones' search, and losses are flat by these steps (notebook 02).
_STEPS, _STEPS_OF_ALL = {"steps": 80}, {"steps": 40}
_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_TAU: dict[str, Sequence[Any]] = {"threshold_quantile": (0.99, 0.995, 0.998, 0.999)}
METHODS: dict[str, Method] = {
    "untouched model": Method(_nothing, keep=False),
    "Cones, float": Method(_join_graded, neurons, choices=_TAU),
    "Cones, binary": Method(_join_binary, neurons, choices=_TAU),
    "Cones + collaborative tuning": Method(
        _join_and_tune, neurons, ("tuning_steps", "tuning_rate"), {"tuning_rate": (1e-4, 3e-4, 1e-3, 3e-3)}
    ),
    "Cones, token-local": Method(
        _at_their_words,
        neurons,
        ("dose",),
        choices={"threshold_quantile": (0.98, 0.99, 0.995, 0.998)},
        settings={"scope": "subject"},
        for_several={"dose": (0.1, 0.2, 0.4, 0.8)},
    ),
    "Textual Inversion": Method(_invert, choices={"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2)}, settings=_STEPS),
    "DreamBooth": Method(
        _dreambooth, choices={"learning_rate": (3e-5, 1e-4, 3e-4, 1e-3)}, settings=_STEPS_OF_ALL, keep=False
    ),
    "LoRA, joint": Method(_lora, choices={"learning_rate": _RATES}, settings=_STEPS_OF_ALL),
    "LoRA, merged": Method(_add, _lora, choices={"learning_rate": _RATES}, settings=_STEPS_OF_ALL),
    "Custom Diffusion, joint": Method(_customised, choices={"learning_rate": _RATES}, settings=_STEPS),
    "Custom Diffusion, merged": Method(_merge, _customised, choices={"learning_rate": _RATES}, settings=_STEPS),
}


def how_many(subjects: int) -> str:
    """The part of `settings.json` for edits of so many subjects: settings for several are chosen on combinations."""
    return "one subject" if subjects == 1 else "several subjects"


def chosen_settings(name: str, subjects: int = 1) -> dict[str, Any]:
    """The settings chosen for a method on tuning subjects (`data/results/settings.json`), {} if none were.

    subjects: how many the edit is of; for several, settings are chosen on combinations of tuning subjects.
    """
    file = data_folder() / "results" / "settings.json"
    if not file.is_file():
        return {}
    remedy = "restore it, or delete it and tune again"
    part = read_json(file, remedy=remedy).get(how_many(checks.count("subjects", subjects)), {})
    found = part.get(name, {}) if isinstance(part, dict) else part
    if not isinstance(found, dict):
        raise FileFormatError(f"{file} has {found!r} for {name!r}, expected settings by name: {remedy}")
    return found


def make_edit(
    method: str | Method,
    pipe: Pipeline,
    subjects: Sequence[Subject],
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    **settings: Any,
) -> tuple[Edit, float]:
    """The edit that a method makes, and the seconds it takes to make from scratch.

    method: a name in `METHODS`, used with its chosen settings, or a `Method` of your own. settings: override these and
    the method's own. folder: where edits are kept, with their seconds: of single subjects for other combinations and
    methods too, of several subjects for the next call.
    Raises ConeslabError for an unknown name, and whatever the method raises.
    """
    if isinstance(method, str) and method not in METHODS:
        raise ConeslabError(f"{method!r} is not a method: choose one of {', '.join(METHODS)}, or pass a Method")
    require_pipeline(pipe)
    subjects = several(subjects)
    if isinstance(method, str):
        settings = {**chosen_settings(method, len(subjects)), **settings}
        method = METHODS[method]
    seed = checks.seed("seed", seed)
    settings = {**checks.of_kind("method", method, Method).settings, **settings}
    folder = folder if method.keep else None
    if method.single is None:
        return kept(method.make, pipe, list(subjects), seed=seed, folder=folder, **settings)
    own = {name: value for name, value in settings.items() if name in method.own_settings}
    rest = method.of_single(settings)
    made = [kept(method.single, pipe, subject, seed=seed, folder=folder, **rest) for subject in subjects]
    parts = [part for part, _ in made]
    edit, seconds = kept(method.make, pipe, list(subjects), parts, seed=seed, folder=folder, **own)
    return edit, seconds + sum(before for _, before in made)
