"""Captions of targets, paired with those of their anchors."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ConeslabError

Prompts = str | Sequence[str]


def paired(target: Prompts, anchor: Prompts) -> tuple[list[str], list[str]]:
    """Targets and as many anchors; one anchor serves all targets. Raises ConeslabError if the numbers differ."""
    targets, anchors = ([given] if isinstance(given, str) else list(given) for given in (target, anchor))
    anchors = anchors * len(targets) if len(anchors) == 1 else anchors
    if not targets or len(targets) != len(anchors):
        raise ConeslabError(f"got {len(targets)} targets and {len(anchors)} anchors: give one, or one per target")
    return targets, anchors
