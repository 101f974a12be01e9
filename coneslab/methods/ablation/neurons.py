"""Forgetting by concept neurons: those of Cones, found with the target's caption on pictures of the anchor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from ...diffusion.pipelines import Pipeline
from ...finetuning.samples import generate_once
from ...neurons.mask import ConceptNeurons
from ...neurons.search import SearchSettings, find_concept_neurons
from .prompts import paired


@dataclass(frozen=True)
class AblationSubject:
    """A subject for `find_concept_neurons`, to ablate: pictures of the anchor, captioned as the target."""

    name: str
    images: tuple[Image.Image, ...]
    prompt: str
    prior_prompt: str


def ablating_neurons(
    pipe: Pipeline,
    target: str,
    anchor: str,
    *,
    pictures: int = 32,
    settings: SearchSettings | Mapping[str, Any] | None = None,
    **changes: Any,
) -> ConceptNeurons:
    """The neurons that, once shut, make the target's caption draw the anchor: Cones' search on the noise-based loss.

    L_con(θ) = L(anchor's pictures, target) + λ L(anchor's pictures, anchor). pictures: of the anchor, drawn beforehand.
    settings, changes: see `SearchSettings`; changes may also be other options of `find_concept_neurons`.
    """
    names = {field.name for field in fields(SearchSettings)}
    settings = SearchSettings.chosen(settings, {name: value for name, value in changes.items() if name in names})
    options = {name: value for name, value in changes.items() if name not in names}
    ((target,), (anchor,)) = paired(target, anchor)
    drawn = generate_once(pipe, [anchor] * pictures, **settings.sampler)
    subject = AblationSubject(f"{target} → {anchor}", drawn, target, anchor)
    return find_concept_neurons(pipe, subject, settings, prior=drawn, **options)
