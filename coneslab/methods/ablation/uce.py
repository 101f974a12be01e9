"""Forgetting in closed form: UCE (Gandikota et al. 2024, arXiv 2308.14761)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import checks
from ...diffusion.encoding import encode_prompts, require_read
from ...diffusion.kvspace import KVSpace
from ...diffusion.pipelines import Pipeline
from ...edits.weights import WeightDelta, model_fingerprint
from ...settings import Settings, takes
from .prompts import Prompts, paired


@dataclass(frozen=True, kw_only=True)
class UCESettings(Settings):
    """Settings of `closed_form_edit`.

    templates: captions with {} for the target, each an equation; erase_weight, preserve_weight: of a target's
    equations, and of those of a caption to preserve; ridge: how strongly every matrix is held to what it was.
    """

    method: ClassVar[str] = "UCE"

    templates: Sequence[str] = ("{}",)
    erase_weight: float = 1.0
    preserve_weight: float = 0.1
    ridge: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.templates, "templates")
        self._check(checks.number, "erase_weight", "ridge", interval="(0, inf)")
        self._check(checks.number, "preserve_weight", interval="[0, inf)")


@takes(UCESettings)
def closed_form_edit(
    pipe: Pipeline,
    target: Prompts,
    anchor: Prompts,
    settings: UCESettings | Mapping[str, Any] | None = None,
    *,
    preserve: str | Iterable[str] = (),
    **changes: Any,
) -> WeightDelta:
    """UCE: the keys and values of the target become those of the anchor, by one linear solve (arXiv 2308.14761, Eq. 7).

    W = (ridge W0 + sum v* c^T)(ridge I + sum c c^T)^-1 for every K and V matrix: over targets with v* = W0 c_anchor and
    `erase_weight`, over the captions `preserve` with v* = W0 c and `preserve_weight`. c: the text embedding at the last
    word of a caption, and at the positions after it. Nothing is drawn and nothing trained. settings, changes: see
    `UCESettings`.

    >>> pipe = coneslab.load("tiny")
    >>> edit = closed_form_edit(pipe, "a cat", "a dog", preserve=["a car", "a house"])
    >>> edit
    WeightDelta('a cat': ... weights in ... layers, model ...)
    >>> edit.deltas.keys() == KVSpace(pipe).parameters.keys()
    True
    """
    settings = UCESettings.chosen(settings, changes)
    targets, anchors = paired(target, anchor)
    preserve = checks.texts("preserve", preserve, least=0)
    sources, values, weights = [], [], []
    for own, other in zip(targets, anchors, strict=True):
        for template in settings.templates:
            first, second = _last_words(pipe, template.format(own)), _last_words(pipe, template.format(other))
            rows = min(len(first), len(second))
            sources.append(first[:rows])
            values.append(second[:rows])
            weights.append(torch.full((rows,), settings.erase_weight / rows))
    for caption in preserve:
        kept = _last_words(pipe, caption)
        sources.append(kept)
        values.append(kept)
        weights.append(torch.full((len(kept),), settings.preserve_weight / len(kept)))
    c, v, w = (torch.cat(parts).double() for parts in (sources, values, weights))
    gram = settings.ridge * torch.eye(c.shape[1], dtype=torch.float64) + (w[:, None] * c).T @ c
    deltas = {}
    for name, parameter in KVSpace(pipe).parameters.items():
        base = parameter.detach().double().cpu()
        right = settings.ridge * base + ((w[:, None] * v) @ base.T).T @ c
        deltas[name] = (torch.linalg.solve(gram, right.T).T - base).float()
    record = {**settings.record(), "target": targets, "anchor": anchors, "preserve": preserve}
    return WeightDelta(deltas, model_fingerprint(pipe), subject=", ".join(targets), settings=record)


def _last_words(pipe: Pipeline, caption: str) -> Tensor:
    """Text embeddings from the last word of a caption on, (rows, width), on the CPU.

    Raises ArgumentError if the text encoder does not read that word.
    """
    require_read(pipe, caption)
    ids = pipe.tokenizer(caption).input_ids
    return encode_prompts(pipe, [caption]).detach().float().cpu()[0, len(ids) - 2 :]
