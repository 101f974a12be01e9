"""What the losses are taken on: pictures with their captions, latents and embeddings computed once, noises by seed.

The prior pictures of Cones (arXiv 2303.05125, Sec. 3.1) are drawn by the pipeline itself, once a process. Every loss
and every method takes its samples from here, so that equal seeds mean equal noises.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..diffusion.encoding import encode_images, encode_prompts
from ..diffusion.loss import stratified_timesteps
from ..diffusion.pipelines import Pipeline, fingerprint
from ..diffusion.sampling import generate
from ..errors import ConeslabError

_DRAWN: OrderedDict[tuple, tuple[Image.Image, ...]] = OrderedDict()  # the sets drawn last, see `drawn_once`
_DRAWN_SETS = 64


class ConceptSubject(Protocol):
    """What a concept is learnt from; `coneslab.subject(...)` is one, any object with these will do."""

    @property
    def name(self) -> str: ...
    @property
    def images(self) -> Sequence[Image.Image]: ...
    @property
    def prompt(self) -> str: ...
    @property
    def prior_prompt(self) -> str: ...


@dataclass(frozen=True)
class Pairs:
    """Latents that share one caption, and their part in a loss: weight · mean loss over `batch` of them a round.

    latents: (pictures, channels, height, width); text: (tokens, width); mask: (pictures, 1, height, width), where a
    picture counts, or None for everywhere.
    """

    latents: Tensor
    text: Tensor
    batch: int
    weight: float = 1.0
    mask: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """One round's samples, the pairs' batches end to end: latents, noise (samples, c, h, w); timesteps (samples,).

    mask: (samples, 1, h, w), or None if everything counts everywhere. wanted: what to predict (as latents), or None
    for what the scheduler's prediction type says.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    mask: Tensor | None = None
    wanted: Tensor | None = None


def prior_pictures(
    pipe: Pipeline,
    subject: ConceptSubject,
    *,
    n: int = 16,
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float = 3.0,
    progress: bool = False,
) -> tuple[Image.Image, ...]:
    """Pictures of the subject's class ("a cat") as the pipeline draws them: what the prior loss must preserve.

    The sets drawn last are kept for the life of the process, by model, prompt and settings, so that several subjects
    of one class, or several searches, share them. Call it on the untouched model, outside any `applied` block.
    """
    prompts = [subject.prior_prompt] * n
    return drawn_once(pipe, prompts, seed=seed, steps=steps, guidance_scale=guidance_scale, progress=progress)


def drawn_once(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    steps: int = 25,
    guidance_scale: float = 3.0,
    progress: bool = False,
) -> tuple[Image.Image, ...]:
    """Pictures for prompts as the pipeline draws them; the sets drawn last are kept for the life of the process."""
    model = (fingerprint(module) for module in (pipe.unet, pipe.text_encoder, pipe.vae))
    seeds = seed if isinstance(seed, int) else tuple(seed)
    key = (*model, str(pipe.scheduler.config), tuple(prompts), seeds, steps, guidance_scale)
    if key not in _DRAWN:
        options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "progress": progress}
        _DRAWN[key] = tuple(generate(pipe, prompts, seed=seed, **options))
        while len(_DRAWN) > _DRAWN_SETS:
            _DRAWN.popitem(last=False)
    _DRAWN.move_to_end(key)
    return _DRAWN[key]


def drawn_latents(pipe: Pipeline, prompts: Sequence[str], **options: Any) -> Tensor:
    """Latents of pictures drawn for prompts, (pictures, channels, height, width). options: of `drawn_once`."""
    return encode_images(pipe, list(drawn_once(pipe, prompts, **options))).detach()


def concept_pairs(
    pipe: Pipeline,
    subject: ConceptSubject,
    *,
    subject_batch: int = 32,
    prior_batch: int = 16,
    prior_weight: float = 1.0,
    prior: Sequence[Image.Image] | None = None,
    prior_images: int = 16,
    seed: int = 0,
    prior_steps: int = 25,
    guidance_scale: float = 3.0,
    progress: bool = False,
) -> list[Pairs]:
    """Everything of L_con that does not depend on θ: the subject's pairs, then the prior's (unless its weight is 0).

    prior: pictures of the class; if not given the pipeline draws `prior_images` of them in `prior_steps` steps
    (`prior_pictures`).
    Raises ConeslabError if the subject has no pictures or a batch is not positive.
    """
    if not subject.images or subject_batch < 1 or prior_batch < 0 or prior_weight < 0:
        raise ConeslabError(
            f"got {len(subject.images)} pictures, subject_batch={subject_batch}, prior_batch={prior_batch}, "
            f"prior_weight={prior_weight}: a subject needs pictures, and batches and weights must not be negative"
        )
    text = encode_prompts(pipe, [subject.prompt, subject.prior_prompt]).detach()
    pairs = [Pairs(encode_images(pipe, list(subject.images)).detach(), text[0], subject_batch)]
    if prior_weight and prior_batch:
        if prior is None:
            prior = prior_pictures(
                pipe,
                subject,
                n=prior_images,
                seed=seed,
                steps=prior_steps,
                guidance_scale=guidance_scale,
                progress=progress,
            )
        pairs.append(Pairs(encode_images(pipe, list(prior)).detach(), text[1], prior_batch, prior_weight))
    return pairs


def joint_pairs(pipe: Pipeline, subjects: Sequence[ConceptSubject], **options: Any) -> list[Pairs]:
    """The pairs of several subjects' losses, to be minimised together. options: of `concept_pairs`."""
    return [pair for about in subjects for pair in concept_pairs(pipe, about, **options)]


def total_loss(pairs: Sequence[Pairs], losses: Sequence[float]) -> float:
    """The weighted sum of the pairs' mean losses."""
    return sum(pair.weight * loss for pair, loss in zip(pairs, losses, strict=True))


def draws(pipe: Pipeline, pairs: Sequence[Pairs], *, seed: int, bands: int = 1) -> Iterator[Draw]:
    """Endless rounds of pictures, noises and timesteps, all from one generator.

    Every picture of a pair occurs equally often, up to one. Timesteps are stratified: one in each of `batch` equal
    runs of the schedule (a reading; unbiased, and less noisy than independent ones). bands: rounds take turns in
    that many equal parts of the schedule, from little noise to much.
    """
    generator = torch.Generator().manual_seed(seed)
    last = pipe.scheduler.config.num_train_timesteps
    edges = [last * band // bands for band in range(bands + 1)]
    for low, high in cycle(pairwise(edges)):
        latents, timesteps, masks = [], [], []
        for pair in pairs:
            count = len(pair.latents)
            turns = [torch.randperm(count, generator=generator) for _ in range(-(-pair.batch // count))]
            chosen = torch.cat(turns)[: pair.batch].to(pair.latents.device)
            latents.append(pair.latents[chosen])
            timesteps.append(low + stratified_timesteps(pair.batch, high - low, generator))
            masks.append(torch.ones_like(latents[-1][:, :1]) if pair.mask is None else pair.mask[chosen])
        clean = torch.cat(latents)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        mask = None if all(pair.mask is None for pair in pairs) else torch.cat(masks)
        yield Draw(clean, noise, torch.cat(timesteps).to(clean.device), mask)


def rounds(pipe: Pipeline, pairs: Sequence[Pairs], seed: int) -> Callable[[int], Draw]:
    """The draw of a step by its number, so that a resumed run sees what it would have seen; steps must not go back."""
    source, state = draws(pipe, pairs, seed=seed), {"next": 0}

    def at(number: int) -> Draw:
        while True:
            draw = next(source)
            state["next"] += 1
            if state["next"] > number:
                return draw

    return at
