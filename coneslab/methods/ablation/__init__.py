"""Making a model forget: concept ablation (Kumari et al. 2023), related methods, and how to tell whether it worked.

Each function returns an edit. Builds on `neurons`, `finetuning`, `edits` and `measure`.
"""

from __future__ import annotations

from .classifier import ClassifierSettings, LatentClassifier, train_classifier
from .concept_ablation import AblationData, AblationSettings, ablate, ablation_data
from .concept_prune import ConceptPruneSettings, prune_feed_forward
from .esd import ESDSettings, erase
from .neurons import AblationSubject, ablating_neurons
from .probes import ProbeSettings, completions, filled_in, steered, stirred
from .profile import (
    KINDS,
    Finding,
    Probe,
    ProbeBudget,
    Profile,
    asking,
    completing,
    floors_of,
    inpainting,
    inverting,
    misspelled,
    retraining,
    searching,
    steering,
    stirring,
    usual_probes,
)
from .prompt_attack import PromptAttack, PromptAttackSettings, attack_prompt
from .report import CopyDetector, evaluate_ablation, near_and_far
from .uce import UCESettings, closed_form_edit
from .unlearning import UnlearningSettings, unlearn
from .world_probes import (
    class_pictures,
    class_probes,
    class_rivals,
    style_probes,
    style_rivals,
    words_for,
    world_classifier,
)

__all__ = [
    "AblationData",
    "AblationSettings",
    "AblationSubject",
    "ClassifierSettings",
    "ConceptPruneSettings",
    "CopyDetector",
    "ESDSettings",
    "Finding",
    "KINDS",
    "LatentClassifier",
    "Probe",
    "ProbeBudget",
    "ProbeSettings",
    "Profile",
    "PromptAttack",
    "PromptAttackSettings",
    "UCESettings",
    "UnlearningSettings",
    "ablate",
    "ablating_neurons",
    "ablation_data",
    "asking",
    "attack_prompt",
    "class_pictures",
    "class_probes",
    "class_rivals",
    "closed_form_edit",
    "completing",
    "completions",
    "erase",
    "evaluate_ablation",
    "filled_in",
    "floors_of",
    "inpainting",
    "inverting",
    "misspelled",
    "near_and_far",
    "prune_feed_forward",
    "retraining",
    "searching",
    "steered",
    "steering",
    "stirred",
    "stirring",
    "style_probes",
    "style_rivals",
    "train_classifier",
    "usual_probes",
    "unlearn",
    "words_for",
    "world_classifier",
]
