"""Making a model forget: concept ablation (Kumari et al. 2023), related methods, and how to tell whether it worked.

Each function returns an edit. Builds on `neurons`, `finetuning`, `edits` and `measure`.
"""

from __future__ import annotations

from .concept_ablation import AblationData, AblationSettings, ablate, ablation_data
from .concept_prune import ConceptPruneSettings, prune_feed_forward
from .esd import ESDSettings, erase
from .neurons import AblationSubject, ablating_neurons
from .report import CopyDetector, attacks, evaluate_ablation, misspelled, near_and_far
from .uce import UCESettings, closed_form_edit

__all__ = [
    "AblationData",
    "AblationSettings",
    "AblationSubject",
    "ConceptPruneSettings",
    "CopyDetector",
    "ESDSettings",
    "UCESettings",
    "ablate",
    "ablating_neurons",
    "ablation_data",
    "attacks",
    "closed_form_edit",
    "erase",
    "evaluate_ablation",
    "misspelled",
    "near_and_far",
    "prune_feed_forward",
]
