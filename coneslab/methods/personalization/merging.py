"""Custom Diffusion edits of single subjects, merged in closed form (Kumari et al. 2023, Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...diffusion.checks import require_editable
from ...diffusion.encoding import encode_prompts, require_read
from ...diffusion.kvspace import KVSpace
from ...diffusion.pipelines import Pipeline
from ...edits.base import Combined
from ...edits.interchange import custom_diffusion_parts
from ...edits.tokens import TokenEdit
from ...edits.weights import WeightDelta, model_fingerprint, require_model
from ...errors import ConeslabError
from ...finetuning.samples import several
from ...world import sample


def merge(
    pipe: Pipeline,
    edits: Iterable[Combined],
    subjects: Iterable[Any],
    *,
    templates: str | Iterable[str] = ("a {}", "a photo of a {}", "a picture of a {}"),
    captions: str | Iterable[str] | None = None,
    ridge: float | None = None,
) -> Combined:
    """Merge Custom Diffusion edits of single subjects in closed form (Kumari et al. 2023, Sec. 3.3, Eq. 5 and 6).

    For each K or V matrix: minimise ||W C_reg^T − W0 C_reg^T||_F subject to W C^T = V^T, where the rows of C are the
    text features of each subject's words in `templates`, V = C W_i^T their values under that subject's own weights, and
    those of C_reg the features of `captions` (default: 200 of the sticker world; with only a few, what they do not span
    may change freely, and pictures fall apart) and of the class words in the templates. C_reg has every position that
    the U-Net reads except the start token (a reading), C the words alone: the end token is nearly the same for all
    captions and would carry each subject into every picture. Duplicate rows are left out, and from C those that several
    subjects share (the words before their tokens), which would require different values at once.
    With G = C_reg^T C_reg and D = C G^-1, W = W0 + (V^T − W0 C^T)(D C^T)^-1 D.
    ridge: added to G's diagonal, relative to its mean; by default none if G has full rank, else 1e-6; the result's
    settings record it. subjects: in any order; each belongs to the edit that taught its token.
    Raises ConeslabError unless there are two or more edits, of one token each, and a subject for each, or for a
    template without {} or no captions.

    >>> pipe, subjects = coneslab.load("tiny"), [coneslab.subject("cat"), coneslab.subject("dog")]
    >>> options = {"steps": 2, "batch_size": 4, "prior_batch_size": 0}
    >>> alone = [coneslab.custom_diffusion(pipe, subject, **options) for subject in subjects]
    >>> words, weights = coneslab.merge(pipe, alone, subjects).edits
    >>> words.tokens, weights.subject
    (('sks', 'zwx'), 'cat, dog')
    """
    require_editable(pipe)
    edits, subjects = checks.items("edits", edits), several(subjects, with_token=True)
    templates = checks.templates("templates", templates)
    captions = captions if captions is None else checks.texts("captions", captions)
    if ridge is not None:
        ridge = checks.number("ridge", ridge, "[0, inf)")
    if len(edits) != len(subjects) or len(edits) < 2:
        raise ConeslabError(f"got {len(edits)} edits and {len(subjects)} subjects: give two or more of each, in pairs")
    space, model = KVSpace(pipe), model_fingerprint(pipe)
    parts = [custom_diffusion_parts(edit) for edit in edits]
    tokens = [token for own, _ in parts for token in own.tokens]
    if len(set(tokens)) != len(tokens):
        raise ConeslabError(f"the edits use the tokens {', '.join(tokens)}: train each with a token of its own")
    subjects = _in_order(tokens, subjects)
    vectors = torch.cat([own.vectors for own, _ in parts])
    initial = tuple(word for own, _ in parts for word in own.initial)
    table = TokenEdit(tuple(tokens), vectors, parts[0][0].fingerprint, initial=initial)
    for _, delta in parts:
        require_model(delta.fingerprint, pipe, "one of the edits")
    with table.applied(pipe):
        phrases = [f"{subject.token} {checks.text('class_word', subject.class_word)}" for subject in subjects]
        named = [[template.format(phrase) for template in templates] for phrase in phrases]
        require_read(pipe, *(caption for own in named for caption in own))
        rows = [_features(pipe, own, words=True) for own in named]
    rows = _own_rows(rows)
    classes = [template.format(subject.class_word) for subject in subjects for template in templates]
    captions = _ordinary_captions() if captions is None else captions
    regularised = _features(pipe, [*captions, *classes], words=False)
    deltas: dict[str, Tensor] = {}
    ridges: list[float] = []
    for layer in space.layers:
        base = space.parameters[layer.name].detach().double().cpu()
        values = [
            own @ (base + delta.deltas.get(layer.name, torch.zeros_like(base)).double()).T
            for own, (_, delta) in zip(rows, parts, strict=True)
        ]
        merged, used = merge_matrices(base, regularised, torch.cat(rows), torch.cat(values), ridge=ridge)
        deltas[layer.name] = (merged - base).float()
        ridges.append(used)
    settings = {"method": "Custom Diffusion, merged", "templates": list(templates), "ridge": max(ridges)}
    names = ", ".join(subject.name for subject in subjects)
    return Combined((table, WeightDelta(deltas, model, subject=names, settings=settings)))


def _in_order(tokens: Sequence[str], subjects: Sequence[Any]) -> list[Any]:
    """The subjects in the order of the edits, which have one token each."""
    by_token = {subject.token: subject for subject in subjects}
    if len(tokens) != len(subjects) or by_token.keys() != {*tokens}:
        raise ConeslabError(
            f"the edits teach {', '.join(tokens)}, the subjects have {', '.join(one.token for one in subjects)}: give "
            "edits of single subjects, and those subjects"
        )
    return [by_token[token] for token in tokens]


@cache
def _ordinary_captions() -> Sequence[str]:
    """Captions of the sticker world; its pictures have to be drawn for them, so this is done once per process."""
    return tuple(sample(200, seed=0).captions)


def merge_matrices(
    base: Tensor, regularised: Tensor, rows: Tensor, values: Tensor, *, ridge: float | None = None
) -> tuple[Tensor, float]:
    """The closed form of `merge` for one matrix: base W0 (out, in), regularised C_reg (m, in), rows C (k, in),
    values V (k, out), all float64. Returns W (out, in) and the ridge that was used."""
    gram = regularised.T @ regularised
    if ridge is None:
        ridge = 0.0 if torch.linalg.matrix_rank(gram, hermitian=True) == len(gram) else 1e-6
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    directions = torch.linalg.solve(gram, rows.T).T  # D = C G^-1, (k, in)
    missing = values.T - base @ rows.T  # (out, k)
    # rows that say the same make D C^T singular: the least-squares solution keeps what they agree on
    weights = torch.linalg.lstsq(directions @ rows.T, missing.T, driver="gelsd").solution.T
    return base + weights @ directions, ridge


def _features(pipe: Pipeline, captions: Sequence[str], *, words: bool) -> Tensor:
    """Text features of captions, (rows, width) float64, without start tokens and duplicates.

    words: only of the words, without end token and padding.
    """
    own = pipe.tokenizer(list(captions)).input_ids
    text = encode_prompts(pipe, list(captions)).detach().double().cpu()
    rows = torch.cat([text[number, 1 : len(ids) - 1 if words else None] for number, ids in enumerate(own)])
    return torch.unique(rows, dim=0)


def _own_rows(rows: Sequence[Tensor]) -> list[Tensor]:
    """The rows of each (k, width) that no other has."""
    every = torch.cat(list(rows))
    _, where, counts = torch.unique(every, dim=0, return_inverse=True, return_counts=True)
    alone = (counts[where] == 1).split([len(own) for own in rows])
    return [own[keep] for own, keep in zip(rows, alone, strict=True)]
