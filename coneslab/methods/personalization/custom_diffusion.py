"""Custom Diffusion: keys, values and new words (Kumari et al. 2023, arXiv 2212.04488)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from ... import checks
from ...callback import Callback
from ...diffusion.checks import require_editable, require_pipeline
from ...diffusion.encoding import encode_images, encode_prompts, require_read
from ...diffusion.pipelines import Pipeline
from ...edits.base import Combined
from ...edits.tokens import LearnedText, TokenEdit, start_vector, vocabulary_fingerprint
from ...edits.weights import WeightDelta, model_fingerprint
from ...finetuning.checkpoints import resumable
from ...finetuning.kv_gradient import KVGradient, require_passes
from ...finetuning.loop import Point, TuningSettings, tune_kv
from ...finetuning.samples import (
    CaptionedLatents,
    ConceptSettings,
    TokenSubject,
    concept_latents,
    names_of,
    numbered_batches,
    require_subject,
    several,
)
from ...pictures import as_pictures
from ...settings import takes
from ...world import with_article

SMALL_WORDS, LARGE_WORDS = ("very small", "far away"), ("zoomed in", "close up")  # as in Custom Diffusion's code


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionSettings(TuningSettings, ConceptSettings):
    """Settings of `custom_diffusion`: those of `TuningSettings` and `ConceptSettings`, and

    token_learning_rate: of the tokens' vectors, default `learning_rate`. augment: also show the subject smaller and
    larger, with `small_words` and `large_words` in the caption and the loss restricted to the pasted picture
    (`scaled_latents`). initial: the word that tokens start from, by default the token's own row if the tokenizer has
    it, as for a rare word.
    """

    method: ClassVar[str] = "Custom Diffusion"

    token_learning_rate: float | None = None
    batch_size: int = 16
    prior_batch_size: int = 8
    augment: bool = False
    small_words: Sequence[str] = SMALL_WORDS
    large_words: Sequence[str] = LARGE_WORDS
    initial: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.number, "token_learning_rate", interval="(0, inf)", optional=True)
        self._check(checks.flag, "augment")
        self._check(checks.texts, "small_words", "large_words", least=0)
        self._check(checks.text, "initial", optional=True, blank=True)


@resumable
@takes(CustomDiffusionSettings)
def custom_diffusion(
    pipe: Pipeline,
    subjects: TokenSubject | Iterable[TokenSubject],
    settings: CustomDiffusionSettings | Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    resume: str | Path | None = None,
    **changes: Any,
) -> Combined:
    """Tune keys and values of cross-attention and the subjects' tokens, jointly for several (Kumari et al., Sec. 3.2).

    settings, changes: see `CustomDiffusionSettings`; dtype, chunk: see `KVGradient`; progress, callback, resume: see
    `RunOptions`. Returns the tokens' vectors and the weights' change as one edit.

    >>> pipe, cat = coneslab.load("tiny"), coneslab.subject("cat")
    >>> edit = coneslab.custom_diffusion(pipe, cat, steps=2, batch_size=4, prior_batch_size=0)
    >>> word, weights = edit.edits
    >>> word.tokens, sorted({name.split(".")[-2] for name in weights.deltas})
    (('sks',), ['to_k', 'to_v'])
    """
    require_editable(pipe)
    settings = CustomDiffusionSettings.chosen(settings, changes)
    require_passes(dtype, chunk, callback)
    taught = several(subjects, with_token=True)
    tokens = [subject.token for subject in taught]
    data: list[CaptionedLatents] = []
    captions: list[str] = []
    for subject in taught:
        own = concept_latents(pipe, subject, settings)
        named = [subject.prompt, subject.prior_prompt][: len(own)]
        if settings.augment:
            versions = scaled_latents(
                pipe,
                subject,
                batch_size=settings.batch_size,
                seed=settings.seed,
                small=settings.small_words,
                large=settings.large_words,
            )
            named = [*versions, *named[1:]]
            own = [*versions.values(), *own[1:]]
        data += own
        captions += named
    text = LearnedText(pipe, captions, tokens)
    words = tokens if settings.initial is None else [settings.initial] * len(tokens)
    vectors = torch.stack([start_vector(pipe, word) for word in words]).requires_grad_()
    gradient = KVGradient(pipe, data, dtype=dtype, chunk=chunk)
    theta, batch_at = gradient.theta().requires_grad_(), numbered_batches(pipe, data, settings.seed)
    names, model = names_of(taught), model_fingerprint(pipe)
    history = tune_kv(
        gradient,
        {"theta": theta, "vectors": vectors},
        lambda number: Point(batch_at(number), theta=theta, text=text(vectors)),
        settings,
        title=f"Custom Diffusion of {names}",
        identity={"model": model},
        rates={"vectors": settings.rate if settings.token_learning_rate is None else settings.token_learning_rate},
        progress=progress,
        callback=callback,
        resume=resume,
    )
    record = settings.record()
    table = vocabulary_fingerprint(pipe)
    learned = TokenEdit(tuple(tokens), vectors, table, initial=tuple(words), settings=record)
    weights = WeightDelta(gradient.deltas(theta), model, subject=names, settings=record, history=history)
    return Combined((learned, weights))


def scaled_latents(
    pipe: Pipeline,
    subject: TokenSubject,
    *,
    batch_size: int,
    versions: int = 8,
    seed: int = 0,
    small: Sequence[str] = SMALL_WORDS,
    large: Sequence[str] = LARGE_WORDS,
) -> dict[str, CaptionedLatents]:
    """Caption -> pictures of the subject in other sizes (Custom Diffusion, Sec. 3.2 and its released code).

    Two thirds of the samples are scaled to between 1/3 and 1 of their size and placed at random on a grey background,
    with one of the `small` words in the caption below 0.6; one third is enlarged 1.2 to 1.4 times and cropped, with one
    of the `large` words. The mask leaves the background out of the loss. `versions` of each picture are made and
    encoded once.
    """
    require_pipeline(pipe)
    require_subject(subject, with_token=True)
    checks.text("class_word", subject.class_word)
    batch_size, versions = checks.count("batch_size", batch_size), checks.count("versions", versions)
    small, large = checks.texts("small", small, least=0), checks.texts("large", large, least=0)
    generator = np.random.default_rng(checks.seed("seed", seed))
    groups: dict[str, list[tuple[Image.Image, np.ndarray]]] = {}
    for picture in as_pictures(subject.images):
        for version in range(versions):
            place = (version + generator.random()) / versions  # covers every third of the range
            scale = 1 / 3 + place if place < 2 / 3 else 1.2 + 0.6 * (place - 2 / 3)
            sized = _rescaled(picture, scale, generator)
            words = small if scale < 0.6 else large if scale > 1 else ()
            word = words[version % len(words)] if words else ""
            caption = with_article(f"{word} {subject.token} {subject.class_word}") if word else subject.prompt
            groups.setdefault(caption, []).append(sized)
    total, left = sum(map(len, groups.values())), batch_size
    require_read(pipe, *groups)
    texts = encode_prompts(pipe, list(groups)).detach()
    data = {}
    for number, (caption, made) in enumerate(groups.items()):
        rest = len(groups) - number - 1
        share = max(1, min(left - rest, round(batch_size * len(made) / total))) if rest else max(1, left)
        left -= share
        latents = encode_images(pipe, [picture for picture, _ in made]).detach()
        mask = torch.from_numpy(np.stack([mask for _, mask in made]))[:, None].to(latents)
        mask = torch.nn.functional.adaptive_avg_pool2d(mask, (latents.shape[-2], latents.shape[-1]))
        # each group's mean loss is weighted by its share of the samples, so that together they are one mean
        data[caption] = CaptionedLatents(
            latents, texts[number], share, weight=share / batch_size, mask=(mask > 0.999).to(latents)
        )
    return data


def _rescaled(picture: Image.Image, scale: float, generator: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """The picture at another scale in a frame of its old size, and a mask of where it is: (height, width) float32."""
    width, height = picture.size
    size = max(1, round(width * scale)), max(1, round(height * scale))
    scaled = picture.resize(size, Image.Resampling.LANCZOS)
    if scale > 1:
        left, top = (int(generator.integers(0, big - own + 1)) for big, own in zip(size, (width, height), strict=True))
        return scaled.crop((left, top, left + width, top + height)), np.ones((height, width), np.float32)
    left, top = (int(generator.integers(0, own - new + 1)) for new, own in zip(size, (width, height), strict=True))
    frame, mask = Image.new("RGB", (width, height), (127, 127, 127)), np.zeros((height, width), np.float32)
    frame.paste(scaled, (left, top))
    mask[top : top + size[1], left : left + size[0]] = 1
    return frame, mask
