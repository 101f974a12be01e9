"""Training of small edits: captioned pictures as latents, batches of noise, gradients of keys and values, the loop.

Every method that learns by gradient steps does it with these. Builds on `diffusion` and `edits`.
"""

from __future__ import annotations

from .checkpoints import load_checkpoint, save_checkpoint
from .kv_gradient import KVGradient
from .loop import Step, TuningCallback, figures, tune, tune_unet
from .samples import (
    ConceptSubject,
    Draw,
    Pairs,
    concept_pairs,
    drawn_latents,
    drawn_once,
    draws,
    joint_pairs,
    prior_pictures,
    rounds,
    total_loss,
)

__all__ = [
    "ConceptSubject",
    "Draw",
    "KVGradient",
    "Pairs",
    "Step",
    "TuningCallback",
    "concept_pairs",
    "drawn_latents",
    "drawn_once",
    "draws",
    "figures",
    "joint_pairs",
    "load_checkpoint",
    "prior_pictures",
    "rounds",
    "save_checkpoint",
    "total_loss",
    "tune",
    "tune_unet",
]
