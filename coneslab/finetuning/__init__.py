"""Training of small edits: captioned pictures as latents, batches of noise, gradients of keys and values, the loop.

Every method that learns by gradient descent uses these. Builds on `diffusion` and `edits`.
"""

from __future__ import annotations

from .checkpoints import load_checkpoint, save_checkpoint
from .kv_gradient import KVGradient
from .loop import Point, RunOptions, Step, TuningSettings, tune, tune_kv, tune_unet
from .samples import (
    CaptionedLatents,
    ConceptSettings,
    ConceptSubject,
    NoisyBatch,
    SamplerSettings,
    TokenSubject,
    concept_latents,
    generate_once,
    generated_latents,
    joint_latents,
    loss_values,
    numbered_batches,
    prior_pictures,
    sample_batches,
    several,
    total_loss,
)

__all__ = [
    "CaptionedLatents",
    "ConceptSettings",
    "ConceptSubject",
    "KVGradient",
    "NoisyBatch",
    "Point",
    "RunOptions",
    "SamplerSettings",
    "Step",
    "TokenSubject",
    "TuningSettings",
    "concept_latents",
    "generate_once",
    "generated_latents",
    "joint_latents",
    "load_checkpoint",
    "loss_values",
    "numbered_batches",
    "prior_pictures",
    "sample_batches",
    "save_checkpoint",
    "several",
    "total_loss",
    "tune",
    "tune_kv",
    "tune_unet",
]
