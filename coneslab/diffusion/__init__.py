"""Work with any pipeline: load it, encode, add noise, denoise, sample; its keys and values, its activations; precision.

Nothing here knows about concepts, edits or the picture world. Builds on errors and files only.
"""

from __future__ import annotations

from .activations import Activations, patch, watch
from .checks import require_editable, require_finite, require_pipeline, uncompiled
from .encoding import decode_latents, encode_ids, encode_images, encode_prompts, latent_shape, tokenize
from .kvspace import KVLayer, KVLayout, KVSpace, cross_attentions, short_name, unet_of
from .loss import Denoiser, add_noise, alphas_cumprod, denoising_loss, snr, stratified_timesteps, target
from .pipelines import fingerprint, load, model_folder, usable_device, verify, write_sums
from .precision import bfloat16_pays, drawing, fast_dtype, flushing_denormals, frozen_copy, is_plain, mixed_precision
from .sampling import clean_and_noise, ddim_sample, ddpm_sample, generate, guided, guided_between, start_noise
from .unet_sites import sites

__all__ = [
    "Activations",
    "Denoiser",
    "KVLayer",
    "KVLayout",
    "KVSpace",
    "add_noise",
    "alphas_cumprod",
    "bfloat16_pays",
    "clean_and_noise",
    "cross_attentions",
    "ddim_sample",
    "ddpm_sample",
    "decode_latents",
    "denoising_loss",
    "drawing",
    "encode_ids",
    "encode_images",
    "encode_prompts",
    "fast_dtype",
    "fingerprint",
    "flushing_denormals",
    "frozen_copy",
    "generate",
    "guided",
    "guided_between",
    "is_plain",
    "latent_shape",
    "load",
    "mixed_precision",
    "model_folder",
    "patch",
    "require_editable",
    "require_finite",
    "require_pipeline",
    "short_name",
    "sites",
    "snr",
    "start_noise",
    "stratified_timesteps",
    "target",
    "tokenize",
    "uncompiled",
    "unet_of",
    "usable_device",
    "verify",
    "watch",
    "write_sums",
]
