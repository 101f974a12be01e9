"""Concept neurons (Cones, Liu et al. 2023): masks, the search, unions of several, controls and damage.

Everything in that paper except the training loop, which other methods share. Builds on `finetuning` and `edits`.
"""

from __future__ import annotations

from .controls import (
    FinetuneSettings,
    TopKSettings,
    finetune_kv,
    mean_gradient,
    random_neurons,
    reversed_neurons,
    top_k_neurons,
)
from .damage import DAMAGES, dropped, flipped, moved
from .encoding import LEVELS, PRECISIONS, MaskFile, decode, encode, entropy, entropy_bound, precision_of, quantised
from .loss import ConceptLoss, concept_loss
from .mask import ConceptNeurons, Overlap
from .ready import ready_neurons
from .search import RULES, SearchSettings, find_concept_neurons, quantiles
from .union import (
    Additivity,
    TogetherSettings,
    TunedNeurons,
    additivity,
    concatenate,
    cosines,
    finetune_together,
    joint_prompt,
    output_changes,
    overlap_matrices,
)

__all__ = [
    "Additivity",
    "ConceptLoss",
    "ConceptNeurons",
    "DAMAGES",
    "FinetuneSettings",
    "LEVELS",
    "MaskFile",
    "Overlap",
    "PRECISIONS",
    "RULES",
    "SearchSettings",
    "TogetherSettings",
    "TopKSettings",
    "TunedNeurons",
    "additivity",
    "concatenate",
    "concept_loss",
    "cosines",
    "decode",
    "dropped",
    "encode",
    "entropy",
    "entropy_bound",
    "find_concept_neurons",
    "finetune_kv",
    "finetune_together",
    "flipped",
    "joint_prompt",
    "mean_gradient",
    "moved",
    "output_changes",
    "overlap_matrices",
    "precision_of",
    "quantiles",
    "quantised",
    "random_neurons",
    "ready_neurons",
    "reversed_neurons",
    "top_k_neurons",
]
