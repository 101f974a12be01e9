"""Every way to personalise, by name: what `coneslab compare` goes through, and where your own method joins.

A method is a function (pipe, subjects, seed, settings) -> edit; one or several subjects alike. `METHODS` names those
that ship, with the settings chosen for them on tuning subjects (see `data/results/settings.json`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .concatenation import concatenate, finetune_together
from .edits import Edit
from .errors import ConeslabError
from .merging import merge
from .neurons import ConceptNeurons
from .paths import data_folder
from .personalize import custom_diffusion, dreambooth, textual_inversion
from .search import find_concept_neurons
from .subjects import Subject

Make = Callable[..., Edit]


@dataclass(frozen=True)
class Method:
    """make(pipe, subjects, seed=..., **settings) -> edit; choices: what `tune_methods` may choose from, by setting."""

    make: Make
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def _masks(pipe: Any, subjects: Sequence[Subject], seed: int, **settings: Any) -> list[ConceptNeurons]:
    return [find_concept_neurons(pipe, about, seed=seed, progress=False, **settings) for about in subjects]


def cones_float(pipe: Any, subjects: Sequence[Subject], *, seed: int = 0, **settings: Any) -> Edit:
    """Concept neurons of each subject, graded, joined."""
    return concatenate(*_masks(pipe, subjects, seed, **settings))


def cones_binary(pipe: Any, subjects: Sequence[Subject], *, seed: int = 0, **settings: Any) -> Edit:
    """Concept neurons of each subject, shut, joined."""
    return concatenate(*[mask.binary() for mask in _masks(pipe, subjects, seed, **settings)])


def cones_tuned(
    pipe: Any, subjects: Sequence[Subject], *, seed: int = 0, tuning_steps: int = 40,
    tuning_rate: float = 1e-3, **settings: Any,
) -> Edit:  # fmt: skip
    """The union, tuned for a few steps on the joint loss."""
    union = concatenate(*[mask.binary() for mask in _masks(pipe, subjects, seed, **settings)])
    return finetune_together(
        pipe, union, subjects, steps=tuning_steps, learning_rate=tuning_rate, seed=seed, progress=False
    )


def custom_diffusion_joint(pipe: Any, subjects: Sequence[Subject], *, seed: int = 0, **settings: Any) -> Edit:
    """Custom Diffusion, all subjects at once."""
    return custom_diffusion(pipe, subjects, seed=seed, progress=False, **settings)


def custom_diffusion_merged(pipe: Any, subjects: Sequence[Subject], *, seed: int = 0, **settings: Any) -> Edit:
    """Custom Diffusion of each subject, merged in closed form."""
    edits = [custom_diffusion(pipe, about, seed=seed, progress=False, **settings) for about in subjects]
    return merge(pipe, edits, subjects) if len(edits) > 1 else edits[0]


def _joint(train: Callable[..., Edit]) -> Make:
    def make(pipe: Any, subjects: Sequence[Subject], *, seed: int = 0, **settings: Any) -> Edit:
        return train(pipe, subjects, seed=seed, progress=False, **settings)

    return make


RATES = (3e-4, 1e-3, 3e-3)
METHODS: dict[str, Method] = {
    "Cones, float": Method(cones_float, {"threshold_quantile": (0.99, 0.995, 0.998)}),
    "Cones, binary": Method(cones_binary, {"threshold_quantile": (0.99, 0.995, 0.998)}),
    "Cones + collaborative tuning": Method(cones_tuned, {"tuning_rate": RATES}),
    "Textual Inversion": Method(_joint(textual_inversion), {"learning_rate": (3e-3, 1e-2, 3e-2)}),
    "DreamBooth": Method(_joint(dreambooth), {"learning_rate": (3e-5, 1e-4, 3e-4)}),
    "Custom Diffusion, joint": Method(custom_diffusion_joint, {"learning_rate": RATES}),
    "Custom Diffusion, merged": Method(custom_diffusion_merged, {"learning_rate": RATES}),
}


def chosen_settings(name: str) -> dict[str, Any]:
    """The settings a method was given on tuning subjects; none where nothing was chosen yet."""
    file = data_folder() / "results" / "settings.json"
    if not file.is_file():
        return {}
    return dict(json.loads(file.read_text(encoding="utf-8")).get(name, {}))


def make_edit(name: str, pipe: Any, subjects: Sequence[Subject], *, seed: int = 0, **settings: Any) -> Edit:
    """The edit of a method by name, with its chosen settings and those given. Raises ConeslabError for another name."""
    if name not in METHODS:
        raise ConeslabError(f"{name!r} is no method: choose one of {', '.join(METHODS)}, or pass an edit of your own")
    return METHODS[name].make(pipe, list(subjects), seed=seed, **{**chosen_settings(name), **settings})
