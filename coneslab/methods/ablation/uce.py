"""Forgetting in closed form: UCE (Gandikota et al. 2024, arXiv 2308.14761)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import checks
from ...diffusion.checks import require_editable
from ...diffusion.encoding import encode_prompts, require_read, tokenize
from ...diffusion.kvspace import KVSpace
from ...diffusion.pipelines import Pipeline
from ...edits.weights import WeightDelta, model_fingerprint
from ...errors import ConeslabError
from ...settings import Settings, takes
from .prompts import Prompts, captioned, paired


@dataclass(frozen=True, kw_only=True)
class UCESettings(Settings):
    """Settings of `closed_form_edit`.

    templates: captions with {} for the target; erase_weight, preserve_weight: of each equation of a target, and of a
    caption to preserve; ridge: how strongly every matrix is held to what it was. The defaults are those of the authors'
    code.
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

    W = (ridge W0 + sum w v* c^T)(ridge I + sum w c c^T)^-1 for every K and V matrix. As in the authors' code, each
    position of a caption is an equation: c is the text embedding there, over targets from the last word on (what comes
    after it has read it), with v* = W0 c_anchor and w = `erase_weight`; over the captions `preserve`, or the empty one
    if there are none, at all positions, with v* = W0 c and w = `preserve_weight`. Nothing is drawn and nothing trained.
    settings, changes: see `UCESettings`.
    Raises ConeslabError if the model cannot tell target and anchor apart, or a target is to be preserved.

    >>> pipe = coneslab.load("tiny")
    >>> edit = closed_form_edit(pipe, "a cat", "a dog", preserve=["a car", "a house"])
    >>> edit
    WeightDelta('a cat': ... weights in ... layers, model ...)
    >>> edit.deltas.keys() == KVSpace(pipe).parameters.keys()
    True
    """
    require_editable(pipe)
    settings = UCESettings.chosen(settings, changes)
    targets, anchors = paired(target, anchor)
    captions, others = captioned(pipe, targets, anchors, settings.templates)
    preserve = checks.texts("preserve", preserve, least=0)
    require_read(pipe, *preserve)
    _require_others(pipe, captions, preserve)
    sources, values, weights = [], [], []
    for own, other in zip(captions, others, strict=True):
        first, second = (_embeddings(pipe, text)[_last_word(pipe, text) :] for text in (own, other))
        rows = min(len(first), len(second))
        sources.append(first[:rows])
        values.append(second[:rows])
        weights.append(torch.full((rows,), settings.erase_weight))
    for caption in preserve or [""]:
        kept = _embeddings(pipe, caption)
        sources.append(kept)
        values.append(kept)
        weights.append(torch.full((len(kept),), settings.preserve_weight))
    c, v, w = (torch.cat(parts).double() for parts in (sources, values, weights))
    gram = settings.ridge * torch.eye(c.shape[1], dtype=torch.float64) + (w[:, None] * c).T @ c
    deltas = {}
    for name, parameter in KVSpace(pipe).parameters.items():
        base = parameter.detach().double().cpu()
        right = settings.ridge * base + ((w[:, None] * v) @ base.T).T @ c
        deltas[name] = (torch.linalg.solve(gram, right.T).T - base).float()
    record = {**settings.record(), "target": targets, "anchor": anchors, "preserve": preserve}
    return WeightDelta(deltas, model_fingerprint(pipe), subject=", ".join(targets), settings=record)


def _require_others(pipe: Pipeline, captions: Sequence[str], preserve: Sequence[str]) -> None:
    rows = tokenize(pipe, [*captions, *preserve])
    erased = rows[: len(captions)]
    both = [text for text, row in zip(preserve, rows[len(captions) :], strict=True) if (erased == row).all(1).any()]
    if both:
        raise ConeslabError(f"{', '.join(map(repr, both))}: both a target and to be preserved; choose one of the two")


def _embeddings(pipe: Pipeline, caption: str) -> Tensor:
    """Text embeddings of a caption, (positions, width), on the CPU."""
    return encode_prompts(pipe, [caption]).detach().float().cpu()[0]


def _last_word(pipe: Pipeline, caption: str) -> int:
    """The position of a caption's last word."""
    return len(pipe.tokenizer(caption).input_ids) - 2
