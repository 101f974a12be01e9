"""Forgetting by concept neurons: those of Cones, found with the target's caption on pictures of the anchor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ... import checks
from ...callback import Callback
from ...diffusion.checks import require_editable
from ...diffusion.pipelines import Pipeline
from ...finetuning.kv_gradient import require_passes
from ...finetuning.samples import generate_once
from ...neurons.mask import ConceptNeurons
from ...neurons.search import SearchSettings, find_concept_neurons
from ...settings import takes
from .prompts import one_pair


@dataclass(frozen=True)
class AblationSubject:
    """A subject for `find_concept_neurons`, to ablate: pictures of the anchor, captioned as the target."""

    name: str
    images: tuple[Image.Image, ...]
    prompt: str
    prior_prompt: str


@takes(SearchSettings)
def ablating_neurons(
    pipe: Pipeline,
    target: str,
    anchor: str,
    settings: SearchSettings | Mapping[str, Any] | None = None,
    *,
    pictures: int = 32,
    start: ConceptNeurons | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    **changes: Any,
) -> ConceptNeurons:
    """The neurons that, once shut, make the target's caption draw the anchor: Cones' search on the noise-based loss.

    L_con(θ) = L(anchor's pictures, target) + λ L(anchor's pictures, anchor). pictures: of the anchor, drawn beforehand.
    settings, changes: see `SearchSettings`; the others: see `find_concept_neurons`.
    Raises ConeslabError if the model cannot tell target and anchor apart, and what the search raises.
    """
    require_editable(pipe)
    settings = SearchSettings.chosen(settings, changes)
    require_passes(dtype, chunk, callback)
    target, anchor = one_pair(pipe, target, anchor)
    drawn = generate_once(pipe, [anchor] * checks.count("pictures", pictures), **settings.sampler)
    subject = AblationSubject(f"{target} → {anchor}", drawn, target, anchor)
    return find_concept_neurons(
        pipe,
        subject,
        settings,
        prior=drawn if settings.has_prior else None,
        start=start,
        dtype=dtype,
        chunk=chunk,
        progress=progress,
        callback=callback,
    )
