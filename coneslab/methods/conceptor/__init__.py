"""What a concept is made of: Conceptor (Chefer et al. 2023), for a concept or for one picture, and bias.

A decomposition is an edit. Builds on `finetuning`, `edits` and `measure`.
"""

from __future__ import annotations

from .biases import bias, group_shares, rebalance
from .decomposition import Decomposition
from .image import ImageDecomposition, decompose_image
from .learning import DecompositionSettings, choose_dictionary, decompose
from .vocabulary import Vocabulary, encode_vocabulary, whole_words

__all__ = [
    "Decomposition",
    "DecompositionSettings",
    "ImageDecomposition",
    "Vocabulary",
    "bias",
    "choose_dictionary",
    "decompose",
    "decompose_image",
    "encode_vocabulary",
    "group_shares",
    "rebalance",
    "whole_words",
]
