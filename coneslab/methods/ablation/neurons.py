"""Forgetting by concept neurons: those of Cones, found with the target's caption on pictures of the anchor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from ...diffusion.pipelines import Pipeline
from ...finetuning.samples import drawn_once
from ...neurons.mask import ConceptNeurons
from ...neurons.search import find_concept_neurons
from .prompts import paired


@dataclass(frozen=True)
class AblationSubject:
    """What `find_concept_neurons` takes as a subject, to ablate: pictures of the anchor, captioned as the target."""

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
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    **options: Any,
) -> ConceptNeurons:
    """The neurons whose shutting makes the target's caption draw the anchor: Cones' search on the noise-based loss.

    L_con(θ) = L(anchor's pictures, target) + λ L(anchor's pictures, anchor). options: of `find_concept_neurons`.
    """
    ((target,), (anchor,)) = paired(target, anchor)
    how: dict[str, Any] = {"steps": sampler_steps, "guidance_scale": guidance_scale}
    drawn = drawn_once(pipe, [anchor] * pictures, seed=seed, **how)
    about = AblationSubject(f"{target} → {anchor}", drawn, target, anchor)
    return find_concept_neurons(pipe, about, prior=drawn, seed=seed, **options)
