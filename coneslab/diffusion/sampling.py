"""Samplers small enough to read, and `generate`, which calls the pipeline itself. Notation as in `loss.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .. import checks
from ..blocks import Block, attribute
from ..callback import Callback
from ..errors import ArgumentError, ConeslabError
from .checks import require_finite, require_from_text, require_pipeline, text_width
from .encoding import latent_shape, warn_of_unread
from .loss import alpha_and_sigma, alphas_cumprod
from .pipelines import Pipeline
from .precision import drawing
from .steps import share_of

# --- samplers to read -----------------------------------------------------------------------------------


def clean_and_noise(scheduler: Any, noisy: Tensor, predicted: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
    """Split x_t into the clean latent and the noise that the network's output implies.

    Solves Eq. 4 of Ho et al. (2020) together with the definition of the prediction type (see `target`).
    """
    if (
        checks.tensor("noisy", noisy, "n, channels, height, width").shape
        != checks.of_kind("predicted", predicted, Tensor).shape
    ):
        raise ArgumentError(f"predicted is {tuple(predicted.shape)}: give the shape of noisy, {tuple(noisy.shape)}")
    timestep = checks.count("timestep", timestep, least=0, most=len(scheduler.alphas_cumprod) - 1)
    alpha, sigma = alpha_and_sigma(scheduler, noisy, torch.tensor([timestep]))
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (noisy - sigma * predicted) / alpha, predicted
    if kind == "sample":
        return predicted, (noisy - alpha * predicted) / sigma
    return alpha * noisy - sigma * predicted, alpha * predicted + sigma * noisy


def guided(
    pipe: Pipeline, noisy: Tensor, timestep: int, text: Tensor, empty: Tensor | None, guidance_scale: float
) -> Tensor:
    """The network's output with classifier-free guidance: e_0 + s (e_c - e_0)  (Ho & Salimans 2022, Eq. 6).

    The guidance scale s follows diffusers: 1 means no guidance (the paper's w + 1).
    """
    require_pipeline(pipe)
    checks.tensor("noisy", noisy, f"n, {pipe.unet.config.in_channels}, height, width")
    width = text_width(pipe.unet)
    checks.tensor("text", text, f"{len(noisy)}, tokens, {width}")
    if empty is not None and (len(checks.tensor("empty", empty, f"n, {text.shape[1]}, {width}")) not in (1, len(text))):
        raise ArgumentError(f"got {len(empty)} empty embeddings: give one, or one for each text")
    guidance_scale = checks.number("guidance_scale", guidance_scale)
    t = torch.full((noisy.shape[0],), checks.number("timestep", timestep, "[0, inf)"), device=noisy.device)
    conditional = pipe.unet(noisy, t, encoder_hidden_states=text).sample
    if guidance_scale == 1.0 or empty is None:
        return conditional
    unconditional = pipe.unet(noisy, t, encoder_hidden_states=empty.expand_as(text)).sample
    return unconditional + guidance_scale * (conditional - unconditional)


def require_steps(pipe: Pipeline, sampler_steps: int) -> int:
    """Sampler steps, at most as many as the schedule has. Raises ArgumentError for any other number."""
    return checks.count("sampler_steps", sampler_steps, most=pipe.scheduler.config.num_train_timesteps)


def require_guidance(guidance_scale: float) -> float:
    """A guidance scale for the pipeline's own call: 1 for none, or more. Raises ArgumentError for any other number."""
    found = checks.number("guidance_scale", guidance_scale, checks.GUIDANCE)
    if found < 1:
        raise ArgumentError(
            f"guidance_scale is {checks.shown(guidance_scale)}: give 1 for no guidance, or more; the pipelines of "
            "diffusers guide only above 1, and would draw as with 1 (`ddim_sample` guides with any scale)"
        )
    return found


def timestep_pairs(pipe: Pipeline, sampler_steps: int) -> list[tuple[int, int]]:
    """(timestep, next timestep) from most to least noise, spaced as the scheduler's config says; -1 is clean.

    Each timestep comes once, though schedulers list one for each call of the network: Heun and KDPM2 call it twice a
    step (their `order`), PNDM twice at its second timestep. Timesteps that are the same when rounded down are one.
    """
    require_pipeline(pipe)
    pipe.scheduler.set_timesteps(require_steps(pipe, sampler_steps))
    listed = pipe.scheduler.timesteps[:: getattr(pipe.scheduler, "order", 1)]
    times = list(dict.fromkeys(int(t) for t in listed))
    return list(zip(times, [*times[1:], -1], strict=True))


def abar_at(pipe: Pipeline, timestep: int) -> Tensor:
    """abar at a timestep; past the last one, the scheduler's value for the clean end."""
    require_pipeline(pipe)
    if timestep >= 0:
        return alphas_cumprod(pipe)[timestep]
    final = getattr(pipe.scheduler, "final_alpha_cumprod", torch.tensor(1.0))
    return final.to(pipe.unet.device, torch.float32)


@torch.no_grad()
def ddim_sample(
    pipe: Pipeline,
    text_embeddings: Tensor,
    noise: Tensor,
    *,
    empty_embeddings: Tensor | None = None,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample latents without fresh noise: Eq. 12 of Song et al. (2021, DDIM) with sigma = 0.

    text_embeddings: (n, tokens, width). noise: (n, channels, h, w), the start. empty_embeddings: (1, tokens, width)
    for guidance. callback: see `coneslab.callback`; further keys: "timestep", "clean" (predicted latents).
    Returns scaled latents. Raises ArgumentError for shapes that do not fit the pipeline, and for numbers out of range.
    """
    require_pipeline(pipe)
    sampler_steps, guidance_scale = _require_sampling(
        pipe, text_embeddings, noise, empty_embeddings, sampler_steps, guidance_scale, callback
    )
    x = noise
    pairs = timestep_pairs(pipe, sampler_steps)
    for i, (t, after) in enumerate(pairs):
        out = guided(pipe, x, t, text_embeddings, empty_embeddings, guidance_scale)
        clean, error = clean_and_noise(pipe.scheduler, x, out, t)
        abar = abar_at(pipe, after)
        x = abar.sqrt() * clean + (1.0 - abar).sqrt() * error
        if callback is not None:
            callback({"step": i, "steps": len(pairs), "timestep": t, "clean": clean})
    return x


@torch.no_grad()
def ddpm_sample(
    pipe: Pipeline,
    text_embeddings: Tensor,
    noise: Tensor,
    *,
    generator: torch.Generator | None = None,
    empty_embeddings: Tensor | None = None,
    sampler_steps: int = 100,
    guidance_scale: float = 3.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample latents by ancestral sampling: Eq. 7 of Ho et al. (2020), on any subset of the timesteps.

    With abar_s at the next timestep, alpha = abar_t / abar_s and beta = 1 - alpha; the step's noise has the posterior
    variance (1 - abar_s) / (1 - abar_t) beta. Arguments as in `ddim_sample`; `generator` draws the fresh noise: seed it
    otherwise than the start noise, whose numbers it would draw again.
    """
    require_pipeline(pipe)
    sampler_steps, guidance_scale = _require_sampling(
        pipe, text_embeddings, noise, empty_embeddings, sampler_steps, guidance_scale, callback
    )
    x = noise
    pairs = timestep_pairs(pipe, sampler_steps)
    for i, (t, after) in enumerate(pairs):
        out = guided(pipe, x, t, text_embeddings, empty_embeddings, guidance_scale)
        clean, _ = clean_and_noise(pipe.scheduler, x, out, t)
        abar_t = abar_at(pipe, t)
        abar_s = abar_at(pipe, after) if after >= 0 else torch.ones_like(abar_t)
        alpha = abar_t / abar_s
        mean = (abar_s.sqrt() * (1 - alpha) * clean + alpha.sqrt() * (1 - abar_s) * x) / (1 - abar_t)
        x = mean
        if after >= 0:
            variance = (1 - abar_s) / (1 - abar_t) * (1 - alpha)
            source = generator.device if generator is not None else x.device
            fresh = torch.randn(x.shape, generator=generator, device=source, dtype=x.dtype).to(x.device)
            x = mean + variance.sqrt() * fresh
        if callback is not None:
            callback({"step": i, "steps": len(pairs), "timestep": t, "clean": clean})
    return x


def _require_sampling(
    pipe: Pipeline,
    text: Tensor,
    noise: Tensor,
    empty: Tensor | None,
    sampler_steps: int,
    guidance_scale: float,
    callback: Callback | None,
) -> tuple[int, float]:
    """What both samplers check; returns steps and guidance scale."""
    checks.tensor("noise", noise, f"n, {pipe.unet.config.in_channels}, height, width")
    width = text_width(pipe.unet)
    checks.tensor("text_embeddings", text, f"{len(noise)}, tokens, {width}")
    if empty is not None:
        checks.tensor("empty_embeddings", empty, f"1, {text.shape[1]}, {width}")
    checks.function("callback", callback)
    return require_steps(pipe, sampler_steps), checks.number("guidance_scale", guidance_scale, checks.GUIDANCE)


# --- pictures -------------------------------------------------------------------------------------------


def seeds_for(seeds: int | Iterable[int], n: int | None = None) -> list[int]:
    """One seed and those after it, `n` in all, or several."""
    found: Iterable[int]
    if isinstance(seeds, Iterable) and getattr(seeds, "ndim", 1) > 0:
        found = checks.items("seeds", seeds)
    else:
        first = checks.seed("seed", seeds)
        found = range(first, first + (n or 1))
    return [checks.seed("seed", one) for one in found]


def start_noise(pipe: Pipeline, seeds: int | Iterable[int]) -> Tensor:
    """Start noise (n, channels, h, w), each picture's from its own seed; the same on every device."""
    return torch.stack([noise for noise, _ in _first_draws(pipe, seeds)]).to(pipe.unet.device, pipe.unet.dtype)


def generators_after_start(pipe: Pipeline, seeds: int | Iterable[int]) -> list[torch.Generator]:
    """Each picture's generator, which has given its start noise: what it gives next, a sampler may add."""
    return [generator for _, generator in _first_draws(pipe, seeds)]


def _first_draws(pipe: Pipeline, seeds: int | Iterable[int]) -> list[tuple[Tensor, torch.Generator]]:
    """Each picture's start noise and the generator that gave it."""
    shape = latent_shape(pipe)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds_for(seeds)]
    return [(torch.randn(shape, generator=generator), generator) for generator in generators]


def guided_between(pipe: Pipeline, first: float, last: float) -> Block:
    """Guide only between two shares of the schedule for the length of a block, which gives a counter of network passes.

    0 is all noise, 1 is clean, measured by the timestep (Kynkäänniemi et al. 2024, Applying Guidance in a Limited
    Interval). Outside, the half of a batch with the empty prompt is not computed: it gets the other half's output, so
    that u + s (c - u) is c. A pass is one picture going through the network once.
    This is for the pipeline's own call with a guidance scale above 1. Without guidance a batch has no such half and is
    computed whole, wherever it is; so are the batches of `ddim_sample`, which computes the two prompts apart.
    """
    require_pipeline(pipe)
    first, last = checks.interval("guidance interval", (first, last))
    unet = pipe.unet
    own, passes = unet.forward, 0

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        share = float(share_of(pipe.scheduler, timestep)[0])
        if first <= share <= last or not _has_both_halves(pipe, sample):
            passes += len(sample)
            return own(sample, timestep, encoder_hidden_states, *args, **kwargs)
        half = len(sample) // 2
        passes += half
        out = own(sample[half:], timestep, encoder_hidden_states[half:], *args, **kwargs)
        if isinstance(out, tuple):
            return (torch.cat([out[0], out[0]]), *out[1:])
        return type(out)(sample=torch.cat([out.sample, out.sample]))

    return Block([(attribute(unet, "forward"), forward)], lambda: passes)


def _has_both_halves(pipe: Pipeline, sample: Tensor) -> bool:
    """Whether a batch is the pipeline's own for guidance: the same latents twice, with the empty prompt and with texts.

    What the pipeline was called with last says whether it guides, as two pictures of one seed are the same latents too.
    """
    half = len(sample) // 2
    scale = getattr(pipe, "_guidance_scale", None)
    return len(sample) % 2 == 0 and (scale is None or scale > 1) and torch.equal(sample[:half], sample[half:])


def generate(
    pipe: Pipeline,
    prompts: str | Iterable[str],
    *,
    seed: int | Iterable[int] = 0,
    sampler_steps: int = 25,
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

    Picture i starts from noise made from `seed + i` alone, or from its own if there is one per picture, so it does
    not depend on the batch size or on what else is asked for; a scheduler that adds noise has it from the same random
    generator. dtype: precision of the U-Net, default the fastest (`precision.drawing`); give `pipe.unet.dtype` for
    pictures that are those of `pipe(...)` to the last bit.
    guidance_scale: 1 for no guidance. guidance_interval: shares of the schedule between which guidance is on
    (`guided_between`), default all of it. negative_prompt: in place of the empty prompt, for guidance.
    callback: see `coneslab.callback`, after each step of each batch; further keys: "timestep", "latents", "pictures"
    (how many are finished). on_calls(number of network passes) at the end.
    Warns of a prompt that is too long for the text encoder, which reads its beginning alone.
    Raises ConeslabError without prompts, with another number of seeds, for numbers out of range (more steps than the
    schedule has, a guidance scale beyond 1 to 100, an interval that is not two shares in order), for a negative prompt
    without guidance, for a pipeline that cannot be used (`require_pipeline`, `require_finite`), or if the pipeline's
    safety checker makes a picture black.

    >>> pipe = coneslab.load("tiny")
    >>> prompts = ["a cat on the beach", "a dog in the snow"]
    >>> images = coneslab.generate(pipe, prompts, sampler_steps=2)
    >>> [image.size for image in images]
    [(64, 64), (64, 64)]
    >>> coneslab.generate(pipe, prompts, sampler_steps=2) == images  # the same seeds, the same pictures
    True
    >>> coneslab.generate(pipe, prompts, sampler_steps=2, seed=7) == images
    False
    """
    require_from_text(pipe)
    require_finite(pipe)
    texts = checks.texts("prompts", prompts, blank=True)
    negative = [] if negative_prompt is None else [checks.text("negative_prompt", negative_prompt, blank=True)]
    sampler_steps, batch_size = require_steps(pipe, sampler_steps), checks.count("batch_size", batch_size)
    guidance_scale = require_guidance(guidance_scale)
    if negative and guidance_scale == 1:
        raise ArgumentError(
            f"negative_prompt is {checks.shown(negative_prompt)}, but guidance_scale is 1, which is no guidance: give "
            "a scale above 1, or leave the negative prompt out"
        )
    guidance_interval = checks.interval("guidance interval", guidance_interval)
    checks.function("callback", callback)
    checks.function("on_calls", on_calls)
    seeds = seeds_for(seed, len(texts))
    if len(seeds) != len(texts):
        raise ConeslabError(f"got {len(texts)} prompts and {len(seeds)} seeds: give one seed, or one per prompt")
    warn_of_unread(pipe, texts + negative)
    pictures: list[Image.Image] = []

    def step_end(_: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if callback is not None:
            state = {"step": step, "steps": len(pipe.scheduler.timesteps), "pictures": len(pictures)}
            callback({**state, "timestep": int(timestep), "latents": tensors["latents"]})
        return tensors

    starts = tqdm(range(0, len(texts), batch_size), disable=not progress, desc="pictures", unit="batch")
    noises = start_noise(pipe, seeds)
    untouched = guidance_interval == (0.0, 1.0) and on_calls is None
    with drawing(pipe, dtype), nullcontext() if untouched else guided_between(pipe, *guidance_interval) as passes:
        for start in starts:
            part = slice(start, start + batch_size)
            made = pipe(
                texts[part],
                negative_prompt=negative * len(texts[part]) or None,
                num_inference_steps=sampler_steps,
                guidance_scale=guidance_scale,
                latents=noises[part],
                generator=generators_after_start(pipe, seeds[part]),  # for schedulers that add noise
                callback_on_step_end=step_end,
            )
            _require_shown(texts[part], seeds[part], getattr(made, "nsfw_content_detected", None))
            pictures += made.images
        if on_calls is not None and passes is not None:
            on_calls(passes())
    return pictures


def _require_shown(prompts: list[str], seeds: list[int], flagged: list[bool] | None) -> None:
    """Raise ConeslabError for pictures that a safety checker made black: as drawings of a class they would be learned.

    flagged: one for each picture; None without a checker.
    """
    hits = flagged or [False] * len(prompts)
    drawn = zip(prompts, seeds, hits, strict=True)
    black = [f"{checks.shown(prompt)} (seed {seed})" for prompt, seed, hit in drawn if hit]
    if black:
        named = ", ".join(black[:3]) + (", …" if len(black) > 3 else "")
        raise ConeslabError(
            f"the pipeline's safety checker made {len(black)} of {len(prompts)} pictures black: {named}. Set "
            "pipe.safety_checker = None to draw without it, or give other prompts or seeds"
        )
