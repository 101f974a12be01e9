"""Noise schedules, the one denoising loss, and samplers small enough to read.

Notation: x_0 a clean latent, e noise, abar_t the cumulative product of the schedule, and
x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e  (Ho et al. 2020, Eq. 4). The scheduler's config says what the network
predicts (`prediction_type`), and the same code serves all three kinds. Latents are always scaled by the
autoencoder's `scaling_factor`, so they are what the U-Net sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ConeslabError
from .precision import drawing

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Pipe: TypeAlias = "StableDiffusionPipeline"
Callback = Callable[[int, int, Tensor], None]


# --- into and out of the pipeline's spaces --------------------------------------------------------------


def latent_shape(pipe: Pipe) -> tuple[int, int, int]:
    """(channels, height, width) of one latent at the pipeline's own resolution."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipe.unet.config.in_channels, height, width


def _pixels(pipe: Pipe, images: Sequence[Image.Image] | np.ndarray) -> Tensor:
    """Pictures as float (n, 3, h, w) in [-1, 1], PIL pictures resized to the pipeline's resolution."""
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ConeslabError(
                f"images are {images.dtype} {images.shape}, expected uint8 (n, height, width, 3) or PIL pictures"
            )
        array = images
    else:
        _, height, width = latent_shape(pipe)
        size = (width * pipe.vae_scale_factor, height * pipe.vae_scale_factor)
        pictures = [image.convert("RGB") for image in images]
        if not pictures:
            raise ConeslabError("no images were given, expected at least one")
        resized = [p if p.size == size else p.resize(size, Image.Resampling.LANCZOS) for p in pictures]
        array = np.stack([np.asarray(picture) for picture in resized])
    return torch.from_numpy(array.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1.0


@torch.no_grad()
def encode_images(
    pipe: Pipe,
    images: Sequence[Image.Image] | np.ndarray,
    *,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents (n, channels, h, w) of pictures, scaled: the posterior's mode, or a draw from it with `generator`.

    images: PIL pictures (resized as needed) or a uint8 array (n, height, width, 3).
    Raises ConeslabError for another kind of array or no pictures.
    """
    vae, parts = pipe.vae, []
    for pixels in _pixels(pipe, images).split(batch_size):
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        parts.append(posterior.mode() if generator is None else posterior.sample(generator))
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipe: Pipe, latents: Tensor, *, batch_size: int = 64) -> list[Image.Image]:
    """Pictures of scaled latents (n, channels, h, w)."""
    vae, pictures = pipe.vae, []
    for part in latents.split(batch_size):
        pixels = vae.decode(part.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample
        array = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pictures += [Image.fromarray(picture) for picture in array]
    return pictures


def tokenize(pipe: Pipe, prompts: str | Sequence[str]) -> Tensor:
    """Token ids (n, tokens), padded and cut to the tokenizer's length, on the text encoder's device.

    A token of several vectors (Textual Inversion) is written out as diffusers does it.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if hasattr(pipe, "maybe_convert_prompt"):
        texts = pipe.maybe_convert_prompt(texts, pipe.tokenizer)
    encoded = pipe.tokenizer(
        texts,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids.to(pipe.text_encoder.device)


def encode_prompts(pipe: Pipe, prompts: str | Sequence[str]) -> Tensor:
    """Text embeddings (n, tokens, width) as the pipeline itself computes them.

    Carries gradients exactly if a weight of the text encoder asks for them.
    """
    wanted = torch.is_grad_enabled() and any(weight.requires_grad for weight in pipe.text_encoder.parameters())
    with torch.set_grad_enabled(wanted):
        return encode_ids(pipe, tokenize(pipe, prompts))


def encode_ids(pipe: Pipe, ids: Tensor) -> Tensor:
    """Text embeddings (n, tokens, width) of token ids (n, tokens)."""
    mask = None
    if getattr(pipe.text_encoder.config, "use_attention_mask", False):  # as StableDiffusionPipeline.encode_prompt does
        mask = (ids != pipe.tokenizer.pad_token_id).long()
    return pipe.text_encoder(ids, attention_mask=mask)[0]


# --- noise ----------------------------------------------------------------------------------------------


def alphas_cumprod(pipe: Pipe) -> Tensor:
    """abar_t for every training timestep, (T,) float32 on the U-Net's device; abar falls from near 1 towards 0."""
    return pipe.scheduler.alphas_cumprod.to(pipe.unet.device, torch.float32)


def snr(pipe: Pipe, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio abar_t / (1 - abar_t) at integer timesteps (Kingma et al. 2021, Eq. 2)."""
    abar = alphas_cumprod(pipe)[timesteps.to(pipe.unet.device)]
    return abar / (1.0 - abar)


def _alpha_sigma(scheduler: Any, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply a batch of latents."""
    abar = scheduler.alphas_cumprod.to(like.device, torch.float32)[timesteps.to(like.device)]
    abar = abar.view(-1, *[1] * (like.ndim - 1))
    return abar.sqrt().to(like.dtype), (1.0 - abar).sqrt().to(like.dtype)


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e  (Ho et al. 2020, Eq. 4). timesteps: (n,) integers."""
    alpha, sigma = _alpha_sigma(scheduler, latents, timesteps)
    return alpha * latents + sigma * noise


def target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network has to predict for x_t, by the scheduler's `prediction_type`.

    epsilon: the noise (Ho et al. 2020, Eq. 14). sample: the clean latent. v_prediction:
    sqrt(abar_t) e - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022, Sec. 4). Raises ConeslabError for another type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return latents
    if kind == "v_prediction":
        alpha, sigma = _alpha_sigma(scheduler, latents, timesteps)
        return alpha * noise - sigma * latents
    raise ConeslabError(
        f"the scheduler's prediction_type is {kind!r}, expected 'epsilon', 'v_prediction' or 'sample': "
        "load the model with its own scheduler config"
    )


def stratified_timesteps(n: int, total: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `n` equal parts of a schedule of `total`, in random order: (n,) integers.

    Unbiased, and less noisy in the mean than independent draws: the low-discrepancy idea of Kingma et al. (2021, VDM).
    """
    device = generator.device
    place = torch.randperm(n, generator=generator, device=device)
    inside = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    return ((place + inside) / n * total).long().clamp(max=total - 1)


def denoising_loss(
    pipe: Pipe,
    latents: Tensor,
    text_embeddings: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    timesteps: Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    wanted: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """L = || y - f(x_t, t, c) ||^2, mean over elements (Ho et al. 2020, Eq. 14; y by prediction type).

    The one loss of this package: pretraining, neuron search and fine-tuning all minimise it.
    latents: (n, channels, h, w), scaled. text_embeddings: (n, tokens, width), or (1, ...) for one prompt for all.
    noise, timesteps: given, or drawn from `generator` (timesteps uniformly). weights: (n,) factors on each
    picture's loss, not renormalised. mask: (n, 1, h, w), how much each place counts in the mean over a picture's
    elements; all channels of a place count alike, so a mask of ones changes nothing. wanted: (as latents), what the
    network has to predict, in place of y. reduction "none" returns (n,), each a mean over one picture's elements.
    Raises ConeslabError if shapes do not fit together.
    """
    n = latents.shape[0]
    if text_embeddings.shape[0] == 1 and n > 1:
        text_embeddings = text_embeddings.expand(n, -1, -1)
    if text_embeddings.shape[0] != n:
        raise ConeslabError(
            f"{n} latents and {text_embeddings.shape[0]} text embeddings were given: give one embedding for each "
            "latent, or a single one for all"
        )
    device = latents.device
    if noise is None:
        source = generator.device if generator is not None else device
        noise = torch.randn(latents.shape, generator=generator, device=source, dtype=latents.dtype).to(device)
    if timesteps is None:
        steps = pipe.scheduler.config.num_train_timesteps
        source = generator.device if generator is not None else device
        timesteps = torch.randint(0, steps, (n,), generator=generator, device=source).to(device)
    if noise.shape != latents.shape or timesteps.shape != (n,):
        raise ConeslabError(
            f"noise {tuple(noise.shape)} and timesteps {tuple(timesteps.shape)} do not fit latents "
            f"{tuple(latents.shape)}: expected {tuple(latents.shape)} and ({n},)"
        )
    noisy = add_noise(pipe.scheduler, latents, noise, timesteps)
    predicted = pipe.unet(noisy, timesteps, encoder_hidden_states=text_embeddings).sample
    if wanted is None:
        wanted = target(pipe.scheduler, latents, noise, timesteps)
    error = (predicted.float() - wanted.float()).square()
    if mask is None:
        loss = error.flatten(1).mean(1)  # (n,)
    else:
        places = mask.float().expand_as(error).flatten(1)
        loss = (error.flatten(1) * places).sum(1) / places.sum(1).clamp_min(1e-8)
    if weights is not None:
        loss = loss * weights
    return loss.mean() if reduction == "mean" else loss


# --- samplers to read -----------------------------------------------------------------------------------


def clean_and_noise(scheduler: Any, noisy: Tensor, predicted: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
    """Split x_t into the clean latent and the noise that the network's output stands for.

    Solves Eq. 4 of Ho et al. (2020) together with the definition of the prediction type (see `target`).
    """
    alpha, sigma = _alpha_sigma(scheduler, noisy, torch.tensor([timestep]))
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (noisy - sigma * predicted) / alpha, predicted
    if kind == "sample":
        return predicted, (noisy - alpha * predicted) / sigma
    if kind == "v_prediction":
        return alpha * noisy - sigma * predicted, alpha * predicted + sigma * noisy
    raise ConeslabError(f"the scheduler's prediction_type is {kind!r}, expected 'epsilon', 'v_prediction' or 'sample'")


def guided(
    pipe: Pipe, noisy: Tensor, timestep: int, text: Tensor, empty: Tensor | None, guidance_scale: float
) -> Tensor:
    """The network's output, pushed away from the empty prompt: e_0 + s (e_c - e_0)  (Ho & Salimans 2022, Eq. 6).

    The scale is written as diffusers writes it: 1 means no guidance (their w + 1).
    """
    t = torch.full((noisy.shape[0],), timestep, device=noisy.device)
    conditional = pipe.unet(noisy, t, encoder_hidden_states=text).sample
    if guidance_scale == 1.0 or empty is None:
        return conditional
    unconditional = pipe.unet(noisy, t, encoder_hidden_states=empty.expand_as(text)).sample
    return unconditional + guidance_scale * (conditional - unconditional)


def _schedule(pipe: Pipe, steps: int) -> list[tuple[int, int]]:
    """(timestep, the one after it) from most to least noise, spaced as the scheduler is configured; -1 is clean."""
    pipe.scheduler.set_timesteps(steps)
    times = [int(t) for t in pipe.scheduler.timesteps]
    return list(zip(times, [*times[1:], -1], strict=True))


def _abar(pipe: Pipe, timestep: int) -> Tensor:
    """abar at a timestep, and behind the last one what the scheduler says the clean end is."""
    if timestep >= 0:
        return alphas_cumprod(pipe)[timestep]
    final = getattr(pipe.scheduler, "final_alpha_cumprod", torch.tensor(1.0))
    return final.to(pipe.unet.device, torch.float32)


@torch.no_grad()
def ddim_sample(
    pipe: Pipe,
    text_embeddings: Tensor,
    noise: Tensor,
    *,
    empty_embeddings: Tensor | None = None,
    steps: int = 25,
    guidance_scale: float = 3.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample latents without fresh noise: Eq. 12 of Song et al. (2021, DDIM) with sigma = 0.

    text_embeddings: (n, tokens, width). noise: (n, channels, h, w), the start. empty_embeddings: (1, tokens, width)
    for guidance. callback(step, timestep, predicted clean latents) after each step. Returns scaled latents.
    """
    x = noise
    for i, (t, after) in enumerate(_schedule(pipe, steps)):
        out = guided(pipe, x, t, text_embeddings, empty_embeddings, guidance_scale)
        clean, error = clean_and_noise(pipe.scheduler, x, out, t)
        abar = _abar(pipe, after)
        x = abar.sqrt() * clean + (1.0 - abar).sqrt() * error
        if callback is not None:
            callback(i, t, clean)
    return x


@torch.no_grad()
def ddpm_sample(
    pipe: Pipe,
    text_embeddings: Tensor,
    noise: Tensor,
    *,
    generator: torch.Generator | None = None,
    empty_embeddings: Tensor | None = None,
    steps: int = 100,
    guidance_scale: float = 3.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample latents by the ancestral chain: Eq. 7 of Ho et al. (2020), on any subset of the timesteps.

    With abar_s the next level, alpha = abar_t / abar_s and beta = 1 - alpha; the step's noise has the posterior
    variance (1 - abar_s) / (1 - abar_t) beta. Arguments as in `ddim_sample`; `generator` draws the fresh noise.
    """
    x = noise
    for i, (t, after) in enumerate(_schedule(pipe, steps)):
        out = guided(pipe, x, t, text_embeddings, empty_embeddings, guidance_scale)
        clean, _ = clean_and_noise(pipe.scheduler, x, out, t)
        abar_t = _abar(pipe, t)
        abar_s = _abar(pipe, after) if after >= 0 else torch.ones_like(abar_t)
        alpha = abar_t / abar_s
        mean = (abar_s.sqrt() * (1 - alpha) * clean + alpha.sqrt() * (1 - abar_s) * x) / (1 - abar_t)
        x = mean
        if after >= 0:
            variance = (1 - abar_s) / (1 - abar_t) * (1 - alpha)
            source = generator.device if generator is not None else x.device
            fresh = torch.randn(x.shape, generator=generator, device=source, dtype=x.dtype).to(x.device)
            x = mean + variance.sqrt() * fresh
        if callback is not None:
            callback(i, t, clean)
    return x


# --- pictures -------------------------------------------------------------------------------------------


def start_noise(pipe: Pipe, seeds: Sequence[int]) -> Tensor:
    """Start noise (n, channels, h, w), each picture's from its own seed; the same on every device."""
    shape = latent_shape(pipe)
    draws = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(int(seed))) for seed in seeds]
    return torch.stack(draws).to(pipe.unet.device, pipe.unet.dtype)


@contextmanager
def guided_between(pipe: Pipe, first: float, last: float) -> Iterator[Callable[[], int]]:
    """Guide only between two shares of the schedule for the length of a block; yields a counter of network passes.

    0 is all noise, 1 is clean, measured by the timestep (Kynkäänniemi et al. 2024, Applying Guidance in a Limited
    Interval). Outside, the half of a batch that has the empty prompt is not computed: it gets the other half's output,
    so that u + s (c - u) is c. A pass is one picture through the network once.
    """
    unet = pipe.unet
    own, total, passes = unet.forward, pipe.scheduler.config.num_train_timesteps, 0

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        share = 1 - (float(torch.as_tensor(timestep).flatten()[0]) + 1) / total
        if first <= share <= last or len(sample) % 2:
            passes += len(sample)
            return own(sample, timestep, encoder_hidden_states, *args, **kwargs)
        half = len(sample) // 2
        passes += half
        out = own(sample[half:], timestep, encoder_hidden_states[half:], *args, **kwargs)
        if isinstance(out, tuple):
            return (torch.cat([out[0], out[0]]), *out[1:])
        return type(out)(sample=torch.cat([out.sample, out.sample]))

    before = unet.__dict__.get("forward")
    unet.forward = forward
    try:
        yield lambda: passes
    finally:
        if before is None:
            del unet.forward
        else:
            unet.forward = before


def generate(
    pipe: Pipe,
    prompts: str | Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    steps: int = 25,
    guidance_scale: float = 3.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 16,
    negative_prompt: str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    on_calls: Callable[[int], Any] | None = None,
) -> list[Image.Image]:
    """Pictures for prompts, by the pipeline's own call and scheduler.

    Picture i starts from noise made from `seed + i` alone, or from its own if there is one seed a picture, so it does
    not depend on the batch size or on what else is asked for. dtype: precision of the U-Net, default the fastest
    (`precision.drawing`); give `pipe.unet.dtype` for pictures that are those of `pipe(...)` to the last bit.
    guidance_interval: shares of the schedule between which guidance is on (`guided_between`), default all of it.
    callback(step, timestep, latents) after each step of each batch; on_calls(number of network passes) at the end.
    Raises ConeslabError without prompts, with another number of seeds, with less than one step, or for an interval
    that is none.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ConeslabError("no prompts were given, expected at least one")
    if steps < 1 or batch_size < 1:
        raise ConeslabError(f"steps={steps}, batch_size={batch_size}: both must be positive")
    first, last = guidance_interval
    if not 0 <= first < last <= 1:
        raise ConeslabError(f"guidance_interval is {guidance_interval}: give two shares in order, such as (0.0, 0.8)")
    pictures: list[Image.Image] = []

    def step_end(_: Pipe, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if callback is not None:
            callback(step, int(timestep), tensors["latents"])
        return tensors

    starts = tqdm(range(0, len(texts), batch_size), disable=not progress, desc="pictures", unit="batch")
    seeds = list(range(seed, seed + len(texts)) if isinstance(seed, int) else seed)
    if len(seeds) != len(texts):
        raise ConeslabError(f"got {len(texts)} prompts and {len(seeds)} seeds: give one seed, or one for each prompt")
    noises = start_noise(pipe, seeds)
    untouched = guidance_interval == (0.0, 1.0) and on_calls is None
    with drawing(pipe, dtype), nullcontext() if untouched else guided_between(pipe, first, last) as passes:
        for start in starts:
            part = slice(start, start + batch_size)
            made = pipe(
                texts[part],
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(texts[part]),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                latents=noises[part],
                generator=[torch.Generator("cpu").manual_seed(s) for s in seeds[part]],  # for schedulers that add noise
                callback_on_step_end=step_end,
            )
            pictures += made.images
        if on_calls is not None and passes is not None:
            on_calls(passes())
    return pictures
