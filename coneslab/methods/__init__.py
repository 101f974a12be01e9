"""The methods that concept neurons are compared with, and methods for other ends, each under its paper's name.

`personalization` teaches a model subjects, `ablation` makes it forget, `conceptor` says what a concept is made of.
Builds on `neurons`, `finetuning`, `edits` and `measure`.
"""

from __future__ import annotations

from .ablation import (
    AblationData,
    AblationSettings,
    ConceptPruneSettings,
    CopyDetector,
    ESDSettings,
    UCESettings,
    ablate,
    ablating_neurons,
    ablation_data,
    attacks,
    closed_form_edit,
    erase,
    evaluate_ablation,
    near_and_far,
    prune_feed_forward,
)
from .conceptor import (
    Decomposition,
    DecompositionSettings,
    ImageDecomposition,
    Vocabulary,
    bias,
    choose_dictionary,
    decompose,
    decompose_image,
    encode_vocabulary,
    group_shares,
    rebalance,
)
from .personalization.custom_diffusion import CustomDiffusionSettings, custom_diffusion, scaled_latents
from .personalization.dreambooth import DreamBoothSettings, dreambooth
from .personalization.lora import LoRASettings, lora
from .personalization.merging import merge, merge_matrices
from .personalization.textual_inversion import TextualInversionSettings, textual_inversion

__all__ = [
    "AblationData",
    "AblationSettings",
    "ConceptPruneSettings",
    "CopyDetector",
    "CustomDiffusionSettings",
    "Decomposition",
    "DecompositionSettings",
    "DreamBoothSettings",
    "ESDSettings",
    "ImageDecomposition",
    "LoRASettings",
    "TextualInversionSettings",
    "UCESettings",
    "Vocabulary",
    "ablate",
    "ablating_neurons",
    "ablation_data",
    "attacks",
    "bias",
    "choose_dictionary",
    "closed_form_edit",
    "custom_diffusion",
    "decompose",
    "decompose_image",
    "dreambooth",
    "encode_vocabulary",
    "erase",
    "evaluate_ablation",
    "group_shares",
    "lora",
    "merge",
    "merge_matrices",
    "near_and_far",
    "prune_feed_forward",
    "rebalance",
    "scaled_latents",
    "textual_inversion",
]
