"""Noise schedules, and the one denoising loss.

Notation: x_0 a clean latent, e noise, abar_t the cumulative product of the schedule, and
x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e  (Ho et al. 2020, Eq. 4). The scheduler's config says what the network
predicts (`prediction_type`), and the same code serves all three kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .. import checks
from ..errors import ArgumentError, ConeslabError
from .checks import require_pipeline, require_schedule, text_width
from .pipelines import Pipeline

Reduction: TypeAlias = Literal["mean", "none"]


def alphas_cumprod(pipe: Pipeline) -> Tensor:
    """abar_t for every training timestep, (T,) float32 on the U-Net's device; abar falls from near 1 towards 0."""
    require_pipeline(pipe)
    return pipe.scheduler.alphas_cumprod.to(pipe.unet.device, torch.float32)


def snr(pipe: Pipeline, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio abar_t / (1 - abar_t) at integer timesteps (Kingma et al. 2021, Eq. 2)."""
    require_pipeline(pipe)
    require_timesteps(pipe.scheduler, timesteps)
    abar = alphas_cumprod(pipe)[timesteps.to(pipe.unet.device)]
    return abar / (1.0 - abar)


def require_timesteps(scheduler: Any, timesteps: Tensor, n: int | None = None) -> None:
    """Raise ArgumentError unless these are timesteps of the schedule, (n,) integers.

    Their range is checked on a CPU alone: a GPU would have to be waited for.
    """
    checks.tensor("timesteps", timesteps, "n" if n is None else str(n), floating=False)
    last = len(scheduler.alphas_cumprod) - 1
    if timesteps.device.type == "cpu" and not (0 <= int(timesteps.min()) and int(timesteps.max()) <= last):
        raise ArgumentError(f"timesteps run from {int(timesteps.min())} to {int(timesteps.max())}: give 0 to {last}")


def _require_latents(latents: Tensor, **others: Tensor) -> None:
    """Raise ArgumentError unless these are latents, and the others of their shape."""
    checks.tensor("latents", latents, "n, channels, height, width")
    for name, other in others.items():
        if checks.of_kind(name, other, Tensor).shape != latents.shape:
            raise ArgumentError(f"{name} {tuple(other.shape)} does not match latents: expected {tuple(latents.shape)}")


def alpha_and_sigma(scheduler: Any, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply a batch of latents."""
    require_schedule(scheduler)
    abar = scheduler.alphas_cumprod.to(like.device, torch.float32)[timesteps.to(like.device)]
    abar = abar.view(-1, *[1] * (like.ndim - 1))
    return abar.sqrt().to(like.dtype), (1.0 - abar).sqrt().to(like.dtype)


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e  (Ho et al. 2020, Eq. 4). timesteps: (n,) integers."""
    _require_latents(latents, noise=noise)
    require_timesteps(scheduler, timesteps, len(latents))
    alpha, sigma = alpha_and_sigma(scheduler, latents, timesteps)
    return alpha * latents + sigma * noise


def target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network should predict for x_t, by the scheduler's `prediction_type`.

    epsilon: the noise (Ho et al. 2020, Eq. 14). sample: the clean latent. v_prediction:
    sqrt(abar_t) e - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022, Sec. 4). Raises ConeslabError for another type.
    """
    require_schedule(scheduler)
    _require_latents(latents, noise=noise)
    require_timesteps(scheduler, timesteps, len(latents))
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return latents
    alpha, sigma = alpha_and_sigma(scheduler, latents, timesteps)
    return alpha * noise - sigma * latents


def stratified_timesteps(n: int, total: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `n` equal parts of a schedule of `total`, in random order: (n,) integers.

    Unbiased, with less variance than independent samples: the low-discrepancy sampler of Kingma et al. (2021, VDM).
    """
    n, total = checks.count("n", n), checks.count("total", total)
    device = checks.of_kind("generator", generator, torch.Generator).device
    place = torch.randperm(n, generator=generator, device=device)
    inside = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    return ((place + inside) / n * total).long().clamp(max=total - 1)


@dataclass(frozen=True)
class Denoiser:
    """What the loss needs of a pipeline: its U-Net, or a copy of it, and its scheduler."""

    unet: Any
    scheduler: Any


def denoising_loss(
    pipe: Pipeline | Denoiser,
    latents: Tensor,
    text_embeddings: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    timesteps: Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    regression_target: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """L = || y - f(x_t, t, c) ||^2, mean over elements (Ho et al. 2020, Eq. 14; y by prediction type).

    The one loss of this package: pretraining, neuron search and fine-tuning all minimise it.
    pipe: a pipeline, or a `Denoiser` for a copy of its U-Net.
    latents: (n, channels, h, w), scaled. text_embeddings: (n, tokens, width), or (1, ...) for one prompt for all.
    noise, timesteps: given, or drawn from `generator` (timesteps uniformly). weights: (n,) factors on each
    picture's loss, not renormalised. mask: (n, 1, h, w), how much each place counts in the mean over a picture's
    elements; all channels of a place count alike, so a mask of ones changes nothing. regression_target: (as latents),
    what the network has to predict, instead of y. reduction "none" returns (n,), each a mean over one picture's
    elements.
    Raises ConeslabError if shapes do not fit together.

    >>> from coneslab.diffusion import encode_images, encode_prompts
    >>> pipe, cat = coneslab.load("tiny"), coneslab.subject("cat")
    >>> latents, text = encode_images(pipe, cat.images), encode_prompts(pipe, "a cat")
    >>> each = denoising_loss(pipe, latents, text, generator=torch.Generator().manual_seed(0), reduction="none")
    >>> mean = denoising_loss(pipe, latents, text, generator=torch.Generator().manual_seed(0))
    >>> each.shape, torch.allclose(each.mean(), mean)  # one number per picture
    (torch.Size([5]), True)
    """
    if not isinstance(pipe, Denoiser):
        require_pipeline(pipe)
    checks.choice("reduction", reduction, get_args(Reduction))
    _require_latents(latents)
    checks.tensor("text_embeddings", text_embeddings, f"n, tokens, {text_width(pipe.unet)}")
    n = latents.shape[0]
    if text_embeddings.shape[0] == 1 and n > 1:
        text_embeddings = text_embeddings.expand(n, -1, -1)
    if text_embeddings.shape[0] != n:
        raise ConeslabError(
            f"got {n} latents and {text_embeddings.shape[0]} text embeddings: give one embedding per latent, or one "
            "for all"
        )
    device = latents.device
    if mask is not None:
        checks.tensor("mask", mask, f"{n}, 1, {latents.shape[2]}, {latents.shape[3]}")
    if weights is not None:
        checks.tensor("weights", weights, str(n))
    if regression_target is not None:
        _require_latents(latents, regression_target=regression_target)
    if noise is None:
        source = generator.device if generator is not None else device
        noise = torch.randn(latents.shape, generator=generator, device=source, dtype=latents.dtype).to(device)
    if timesteps is None:
        steps = pipe.scheduler.config.num_train_timesteps
        source = generator.device if generator is not None else device
        timesteps = torch.randint(0, steps, (n,), generator=generator, device=source).to(device)
    noisy = add_noise(pipe.scheduler, latents, noise, timesteps)
    predicted = pipe.unet(noisy, timesteps, encoder_hidden_states=text_embeddings).sample
    if regression_target is None:
        regression_target = target(pipe.scheduler, latents, noise, timesteps)
    error = (predicted.float() - regression_target.float()).square()
    if mask is None:
        loss = error.flatten(1).mean(1)  # (n,)
    else:
        places = mask.float().expand_as(error).flatten(1)
        loss = (error.flatten(1) * places).sum(1) / places.sum(1).clamp_min(1e-8)
    if weights is not None:
        loss = loss * weights
    return loss.mean() if reduction == "mean" else loss
