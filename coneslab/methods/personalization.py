"""Personalisation as others do it: Textual Inversion, DreamBooth, Custom Diffusion.

The baselines that concept neurons are compared with, under the same interface: each takes a pipeline and one or more
subjects and returns an edit; the pipeline is not changed. Latents and prior pictures are encoded once, text once
where it does not depend on what is trained, and only what is trained gets a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..diffusion.encoding import encode_images, encode_prompts
from ..diffusion.pipelines import Pipeline
from ..edits.base import Combined
from ..edits.tokens import LearnedText, TokenEdit, start_vector, vocabulary_fingerprint
from ..edits.weights import WeightDelta, model_fingerprint
from ..errors import ConeslabError
from ..finetuning.kv_gradient import KVGradient
from ..finetuning.loop import TuningCallback, figures, tune, tune_unet
from ..finetuning.samples import ConceptSubject, Pairs, concept_pairs, joint_pairs, rounds
from ..world.pictures import with_article

SMALL_WORDS, LARGE_WORDS = ("very small", "far away"), ("zoomed in", "close up")  # as in Custom Diffusion's code


def _all(subjects: ConceptSubject | Sequence[ConceptSubject]) -> list[Any]:
    several = list(subjects) if isinstance(subjects, Sequence) else [subjects]
    if not several:
        raise ConeslabError("there is no subject: give one, or a list of them")
    return several


# --- Textual Inversion ----------------------------------------------------------------------------------


def textual_inversion(
    pipe: Pipeline,
    subjects: ConceptSubject | Sequence[ConceptSubject],
    *,
    steps: int = 300,
    learning_rate: float = 1e-2,
    batch: int = 16,
    initial: str | Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    resume: str | Any | None = None,
    progress: bool = True,
    callback: TuningCallback | None = None,
) -> TokenEdit:
    """Learn a vector for each subject's token, everything else frozen (Gal et al. 2022, arXiv 2208.01618, Sec. 4).

    Captions are the subjects' own prompts, class word included, so that all methods here are asked with the same
    prompts (a reading; the paper's have the token alone). initial: the word, or words, that the tokens start from,
    default the class words. batch: samples a subject and step. resume, callback: see `finetuning.tune`.
    Raises ConeslabError if a caption lacks its token, or settings are out of range.
    """
    people = _all(subjects)
    tokens = [about.token for about in people]
    words = [about.class_word for about in people] if initial is None else initial
    words = [words] * len(people) if isinstance(words, str) else list(words)
    pairs = [concept_pairs(pipe, about, subject_batch=batch, prior_batch=0)[0] for about in people]
    text = LearnedText(pipe, [about.prompt for about in people], tokens)
    vectors = torch.stack([start_vector(pipe, word) for word in words]).requires_grad_()
    gradient = KVGradient(pipe, pairs, dtype=dtype, chunk=chunk)
    theta, at = gradient.theta(), rounds(pipe, pairs, seed)

    def step(number: int) -> dict[str, float]:
        embedded = text(vectors)
        losses, slope = gradient.text_gradient(theta, embedded.detach(), at(number))
        (vectors.grad,) = torch.autograd.grad(embedded, vectors, slope.to(embedded))
        return figures(pairs, losses)

    options: dict[str, Any] = {"progress": progress, "callback": callback, "resume": resume}
    title = f"Textual Inversion of {', '.join(tokens)}"
    identity = f"textual inversion {tokens} {words} {batch} {seed} {vocabulary_fingerprint(pipe)}"
    history = tune(
        {"vectors": vectors}, step, steps=steps, learning_rate=learning_rate, title=title, identity=identity, **options
    )
    about = {"steps": steps, "learning_rate": learning_rate, "batch": batch, "seed": seed}
    return TokenEdit(
        tuple(tokens), vectors, vocabulary_fingerprint(pipe), initial=tuple(words),
        settings={"method": "Textual Inversion", **about}, history=history,
    )  # fmt: skip


# --- DreamBooth -----------------------------------------------------------------------------------------


def dreambooth(
    pipe: Pipeline,
    subjects: ConceptSubject | Sequence[ConceptSubject],
    *,
    steps: int = 200,
    learning_rate: float = 1e-4,
    batch: int = 8,
    prior_batch: int = 8,
    prior_weight: float = 1.0,
    weight_decay: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    resume: str | Any | None = None,
    progress: bool = True,
    callback: TuningCallback | None = None,
) -> WeightDelta:
    """Tune the whole U-Net on the subjects, with prior preservation (Ruiz et al. 2023, arXiv 2208.12242, Eq. 2).

    The text encoder stays as it is. batch, prior_batch: samples a subject and step; prior_weight: λ.
    Trains a copy of the U-Net in float32, its passes in `dtype`: float32 or bfloat16, default bfloat16 where that is
    faster.
    """
    people = _all(subjects)
    pairs = joint_pairs(
        pipe, people, subject_batch=batch, prior_batch=prior_batch, prior_weight=prior_weight, seed=seed
    )
    at = rounds(pipe, pairs, seed)
    names = ", ".join(about.name for about in people)
    facts = [names, batch, prior_batch, prior_weight, seed, model_fingerprint(pipe)]
    deltas, history = tune_unet(
        pipe, pairs, lambda number, unet: at(number), steps=steps, learning_rate=learning_rate,
        weight_decay=weight_decay, title=f"DreamBooth of {names}", identity=f"dreambooth {facts}", progress=progress,
        callback=callback, resume=resume, dtype=dtype,
    )  # fmt: skip
    settings = {"method": "DreamBooth", "steps": steps, "learning_rate": learning_rate, "prior_weight": prior_weight}
    return WeightDelta(deltas, model_fingerprint(pipe), subject=names, settings=settings, history=history)


# --- Custom Diffusion -----------------------------------------------------------------------------------


def custom_diffusion(
    pipe: Pipeline,
    subjects: ConceptSubject | Sequence[ConceptSubject],
    *,
    steps: int = 200,
    learning_rate: float = 1e-3,
    token_learning_rate: float | None = None,
    batch: int = 16,
    prior_batch: int = 8,
    prior_weight: float = 1.0,
    weight_decay: float = 0.0,
    augment: bool = False,
    small_words: Sequence[str] = SMALL_WORDS,
    large_words: Sequence[str] = LARGE_WORDS,
    initial: str | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    resume: str | Any | None = None,
    progress: bool = True,
    callback: TuningCallback | None = None,
) -> Combined:
    """Tune keys and values of cross-attention and the subjects' tokens (Kumari et al. 2023, arXiv 2212.04488, 3.2).

    Jointly for several subjects. batch, prior_batch: samples a subject and step; prior_weight: λ. augment: also show
    the subject smaller and larger, with `small_words` and `large_words` in the caption and the loss on the pasted
    picture alone (`scaled_pairs`). initial: the word that tokens start from, default the token's own row where the
    tokenizer has it, as with a rare word. token_learning_rate: default `learning_rate`.
    Returns the tokens' vectors and the weights' change as one edit.
    """
    people = _all(subjects)
    tokens, pairs, captions = [about.token for about in people], [], []
    for about in people:
        own = concept_pairs(
            pipe, about, subject_batch=batch, prior_batch=prior_batch, prior_weight=prior_weight, seed=seed
        )
        named = [about.prompt, about.prior_prompt][: len(own)]
        if augment:
            versions = scaled_pairs(pipe, about, batch=batch, seed=seed, small=small_words, large=large_words)
            named = [*versions, *named[1:]]
            own = [*versions.values(), *own[1:]]
        pairs += own
        captions += named
    text = LearnedText(pipe, captions, tokens)
    vectors = torch.stack([start_vector(pipe, initial or about.token) for about in people]).requires_grad_()
    gradient = KVGradient(pipe, pairs, dtype=dtype, chunk=chunk)
    theta, at = gradient.theta(), rounds(pipe, pairs, seed)

    def step(number: int) -> dict[str, float]:
        embedded = text(vectors)
        losses, theta.grad, slope = gradient.with_text(theta.detach(), embedded.detach(), at(number))
        (vectors.grad,) = torch.autograd.grad(embedded, vectors, slope.to(embedded))
        return figures(pairs, losses)

    rates = {"theta": learning_rate, "vectors": token_learning_rate or learning_rate}
    options: dict[str, Any] = {"progress": progress, "callback": callback, "resume": resume}
    names = ", ".join(about.name for about in people)
    facts = [names, captions, batch, prior_batch, prior_weight, seed, model_fingerprint(pipe)]
    identity = f"custom diffusion {facts}"
    history = tune(
        {"theta": theta, "vectors": vectors}, step, steps=steps, learning_rate=rates, weight_decay=weight_decay,
        title=f"Custom Diffusion of {names}", identity=identity, **options,
    )  # fmt: skip
    settings = {
        "method": "Custom Diffusion", "steps": steps, "learning_rate": learning_rate, "prior_weight": prior_weight,
        "augment": augment, "seed": seed,
    }  # fmt: skip
    return Combined((
        TokenEdit(tuple(tokens), vectors, vocabulary_fingerprint(pipe), initial=tuple(tokens), settings=settings),
        WeightDelta(
            gradient.deltas(theta), model_fingerprint(pipe), subject=names, settings=settings, history=history
        ),
    ))  # fmt: skip


def scaled_pairs(
    pipe: Pipeline,
    subject: Any,
    *,
    batch: int,
    versions: int = 8,
    seed: int = 0,
    small: Sequence[str] = SMALL_WORDS,
    large: Sequence[str] = LARGE_WORDS,
) -> dict[str, Pairs]:
    """Caption -> pictures of the subject in other sizes (Custom Diffusion, Sec. 3.2 and its released code).

    Two thirds of the samples are scaled to between 1/3 and 1 of their size and put somewhere on a grey ground, under
    a caption with one of the `small` words below 0.6; one third is enlarged 1.2 to 1.4 times and cut, with one of the
    `large` words. The mask leaves the ground out of the loss. `versions` of each picture are made and encoded once.
    """
    generator = np.random.default_rng(seed)
    groups: dict[str, list[tuple[Image.Image, np.ndarray]]] = {}
    for picture in subject.images:
        for version in range(versions):
            place = (version + generator.random()) / versions  # every third of the range is met
            scale = 1 / 3 + place if place < 2 / 3 else 1.2 + 0.6 * (place - 2 / 3)
            sized = _rescaled(picture, scale, generator)
            words = small if scale < 0.6 else large if scale > 1 else ()
            word = words[version % len(words)] if words else ""
            caption = with_article(f"{word} {subject.token} {subject.class_word}") if word else subject.prompt
            groups.setdefault(caption, []).append(sized)
    total, left = sum(map(len, groups.values())), batch
    texts = encode_prompts(pipe, list(groups)).detach()
    pairs = {}
    for number, (caption, made) in enumerate(groups.items()):
        rest = len(groups) - number - 1
        share = max(1, min(left - rest, round(batch * len(made) / total))) if rest else max(1, left)
        left -= share
        latents = encode_images(pipe, [picture for picture, _ in made]).detach()
        mask = torch.from_numpy(np.stack([mask for _, mask in made]))[:, None].to(latents)
        mask = torch.nn.functional.adaptive_avg_pool2d(mask, (latents.shape[-2], latents.shape[-1]))
        # each group's mean loss counts by its share of the samples, so that together they are one mean
        pairs[caption] = Pairs(latents, texts[number], share, weight=share / batch, mask=(mask > 0.999).to(latents))
    return pairs


def _rescaled(picture: Image.Image, scale: float, generator: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """The picture at another scale in a frame of its old size, and where it is: (height, width) float32."""
    width, height = picture.size
    size = max(1, round(width * scale)), max(1, round(height * scale))
    scaled = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    if scale > 1:
        left, top = (int(generator.integers(0, big - own + 1)) for big, own in zip(size, (width, height), strict=True))
        return scaled.crop((left, top, left + width, top + height)), np.ones((height, width), np.float32)
    left, top = (int(generator.integers(0, own - new + 1)) for new, own in zip(size, (width, height), strict=True))
    frame, mask = Image.new("RGB", (width, height), (127, 127, 127)), np.zeros((height, width), np.float32)
    frame.paste(scaled, (left, top))
    mask[top : top + size[1], left : left + size[0]] = 1
    return frame, mask
