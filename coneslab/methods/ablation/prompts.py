"""Captions of targets, paired with those of their anchors: what the model must be able to tell apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ... import checks
from ...diffusion.checks import require_pipeline
from ...diffusion.encoding import require_read, tokenize
from ...diffusion.pipelines import Pipeline
from ...errors import ArgumentError, ConeslabError

Prompts = str | Iterable[str]


def paired(target: Prompts, anchor: Prompts) -> tuple[list[str], list[str]]:
    """Targets and as many anchors; one anchor serves all targets.

    Raises ConeslabError if the numbers differ, or one is empty.
    """
    targets, anchors = checks.texts("target", target, least=0), checks.texts("anchor", anchor, least=0)
    anchors = anchors * len(targets) if len(anchors) == 1 else anchors
    if not targets or len(targets) != len(anchors):
        raise ConeslabError(f"got {len(targets)} targets and {len(anchors)} anchors: give one, or one per target")
    return targets, anchors


def captioned(
    pipe: Pipeline, target: Prompts, anchor: Prompts, templates: Iterable[str] = ("{}",)
) -> tuple[list[str], list[str]]:
    """The captions of targets and of their anchors: target by target, each in every template.

    Raises ConeslabError if the numbers of targets and anchors differ, a template lacks {}, `require_different` does, or
    a caption is cut off.
    """
    require_pipeline(pipe)
    templates = checks.templates("templates", templates)
    targets, anchors = paired(target, anchor)
    captions, others = ([text.format(one) for one in texts for text in templates] for texts in (targets, anchors))
    require_read(pipe, *captions, *others)
    require_different(pipe, targets, anchors)
    require_different(pipe, captions, others)
    return captions, others


def one_pair(pipe: Pipeline, target: str, anchor: str) -> tuple[str, str]:
    """Target and anchor of a method that takes one of each, as `captioned` checks them."""
    require_pipeline(pipe)
    captions, others = captioned(pipe, checks.text("target", target), checks.text("anchor", anchor))
    return captions[0], others[0]


def require_different(pipe: Pipeline, captions: Sequence[str], others: Sequence[str]) -> None:
    """Raise ConeslabError if the model reads a caption as it reads the other, or one of the two as no text at all.

    It reads tokens, as many as its text encoder takes: "a Cat" is "a cat" to it, and what comes too late is cut off.
    """
    empty, own, against = (tokenize(pipe, texts) for texts in ([""], captions, others))
    for caption, other, row, rival in zip(captions, others, own, against, strict=True):
        if row.equal(empty[0]) or rival.equal(empty[0]) or row.equal(rival):
            raise ArgumentError(
                f"target and anchor are the same or empty for this model, which reads the first {len(row)} tokens of "
                f"a text in its own spelling (got {caption!r:.80} and {other!r:.80}): there is nothing to tell apart; "
                "name different ones"
            )
