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
    """A subject for `find_concept_neurons`, to ablate: pictures of the anchor, captioned as the target.

    token, class_word: the words that the target has and the anchor lacks, at which a mask with a scope acts.
    """

    name: str
    images: tuple[Image.Image, ...]
    prompt: str
    prior_prompt: str
    token: str = ""
    class_word: str = ""


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
    With scope="subject", the mask acts at the first two words alone that the target has and the anchor lacks, and every
    prompt without them draws what it drew.
    settings, changes: see `SearchSettings`; the others: see `find_concept_neurons`.
    Raises ConeslabError if the model cannot tell target and anchor apart, for a scope of no word, and what the search
    raises.
    """
    require_editable(pipe)
    settings = SearchSettings.chosen(settings, changes)
    require_passes(dtype, chunk, callback)
    target, anchor = one_pair(pipe, target, anchor)
    drawn = generate_once(pipe, [anchor] * checks.count("pictures", pictures), **settings.sampler)
    own = [word for word in target.split() if word.lower() not in anchor.lower().split()]
    words = dict(zip(("token", "class_word"), own, strict=False))
    subject = AblationSubject(f"{target} → {anchor}", drawn, target, anchor, **words)
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
