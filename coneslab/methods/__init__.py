"""The methods that concept neurons are compared with, and those for other ends, each under its paper's name.

Personalisation here; `ablation` makes a model forget, `conceptor` says what a concept is made of. Builds on `neurons`,
`finetuning`, `edits` and `measure`.
"""

from __future__ import annotations

from .ablation import (
    AblationPairs,
    CopyDetector,
    ablate,
    ablating_neurons,
    ablation_pairs,
    attacks,
    closed_form_edit,
    erase,
    evaluate_ablation,
    near_and_far,
    prune_feed_forward,
)
from .conceptor import (
    Decomposition,
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
from .merging import merge, merge_matrices
from .personalization import custom_diffusion, dreambooth, scaled_pairs, textual_inversion

__all__ = [
    "AblationPairs",
    "CopyDetector",
    "Decomposition",
    "ImageDecomposition",
    "Vocabulary",
    "ablate",
    "ablating_neurons",
    "ablation_pairs",
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
    "merge",
    "merge_matrices",
    "near_and_far",
    "prune_feed_forward",
    "rebalance",
    "scaled_pairs",
    "textual_inversion",
]
