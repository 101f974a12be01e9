"""Captions of targets, paired with those of their anchors."""

from __future__ import annotations

from collections.abc import Iterable

from ... import checks
from ...errors import ConeslabError

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
