"""Forgetting in closed form: UCE (Gandikota et al. 2024, arXiv 2308.14761)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...diffusion.encoding import encode_prompts
from ...diffusion.kvspace import KVSpace
from ...diffusion.pipelines import Pipeline
from ...edits.weights import WeightDelta, model_fingerprint
from ...errors import ConeslabError
from .prompts import Prompts, paired


def closed_form_edit(
    pipe: Pipeline,
    target: Prompts,
    anchor: Prompts,
    *,
    preserve: Sequence[str] = (),
    templates: Sequence[str] = ("{}",),
    erase_weight: float = 1.0,
    preserve_weight: float = 0.1,
    ridge: float = 0.1,
) -> WeightDelta:
    """UCE: the keys and values of the target become those of the anchor, by one linear solve (arXiv 2308.14761, Eq. 7).

    W = (ridge W0 + sum v* c^T)(ridge I + sum c c^T)^-1 for every K and V matrix: over targets with v* = W0 c_anchor
    and `erase_weight`, over `preserve` with v* = W0 c and `preserve_weight`. c: the text embedding at the last word of
    a caption, and at the places after it. Nothing is drawn and nothing trained.
    """
    targets, anchors = paired(target, anchor)
    if not ridge > 0 or erase_weight <= 0 or preserve_weight < 0:
        given = f"ridge={ridge}, erase_weight={erase_weight}, preserve_weight={preserve_weight}"
        raise ConeslabError(f"{given}: give positive numbers (preserve_weight may be 0)")
    sources, wanted, weights = [], [], []
    for own, other in zip(targets, anchors, strict=True):
        for template in templates:
            first, second = _last_words(pipe, template.format(own)), _last_words(pipe, template.format(other))
            rows = min(len(first), len(second))
            sources.append(first[:rows])
            wanted.append(second[:rows])
            weights.append(torch.full((rows,), erase_weight / rows))
    for caption in preserve:
        kept = _last_words(pipe, caption)
        sources.append(kept)
        wanted.append(kept)
        weights.append(torch.full((len(kept),), preserve_weight / len(kept)))
    c, v, w = (torch.cat(parts).double() for parts in (sources, wanted, weights))
    gram = ridge * torch.eye(c.shape[1], dtype=torch.float64) + (w[:, None] * c).T @ c
    deltas = {}
    for name, parameter in KVSpace(pipe).parameters.items():
        base = parameter.detach().double().cpu()
        right = ridge * base + ((w[:, None] * v) @ base.T).T @ c
        deltas[name] = (torch.linalg.solve(gram, right.T).T - base).float()
    settings = {"method": "UCE", "target": targets, "anchor": anchors, "ridge": ridge, "preserve": list(preserve)}
    return WeightDelta(deltas, model_fingerprint(pipe), subject=", ".join(targets), settings=settings)


def _last_words(pipe: Pipeline, caption: str) -> Tensor:
    """Text embeddings from the last word of a caption on, (rows, width), on the CPU."""
    ids = pipe.tokenizer(caption).input_ids
    return encode_prompts(pipe, [caption]).detach().float().cpu()[0, len(ids) - 2 :]
