"""Textual Inversion: a vector for a new word, and nothing else (Gal et al. 2022, arXiv 2208.01618)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ... import checks
from ...callback import Callback
from ...diffusion.checks import require_editable
from ...diffusion.pipelines import Pipeline
from ...edits.tokens import LearnedText, TokenEdit, start_vector, vocabulary_fingerprint
from ...edits.weights import model_fingerprint
from ...errors import ArgumentError
from ...finetuning.checkpoints import resumable
from ...finetuning.kv_gradient import KVGradient, require_passes
from ...finetuning.loop import Point, TuningSettings, tune_kv
from ...finetuning.samples import TokenSubject, concept_latents, numbered_batches, several
from ...settings import takes


@dataclass(frozen=True, kw_only=True)
class TextualInversionSettings(TuningSettings):
    """Settings of `textual_inversion`: those of `TuningSettings`, and

    batch_size: samples per step of each subject; initial: the word that the tokens start from, or one for each subject,
    by default the class words, "" for the mean of all words; seed: of noises and timesteps.
    """

    method: ClassVar[str] = "Textual Inversion"

    steps: int = 300
    learning_rate: float = 1e-2
    batch_size: int = 16
    initial: str | Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.count, "batch_size")
        self._check(checks.seed, "seed")
        check = checks.text if isinstance(self.initial, str) else checks.texts
        self._check(check, "initial", optional=True, blank=True)


@resumable
@takes(TextualInversionSettings)
def textual_inversion(
    pipe: Pipeline,
    subjects: TokenSubject | Iterable[TokenSubject],
    settings: TextualInversionSettings | Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    resume: str | Path | None = None,
    **changes: Any,
) -> TokenEdit:
    """Learn a vector for each subject's token, everything else frozen (Gal et al. 2022, Sec. 4).

    Captions are the subjects' own prompts, class word included, so that all methods here use the same prompts (a
    reading; the paper's have only the token). settings, changes: see `TextualInversionSettings`; dtype, chunk: see
    `KVGradient`; progress, callback, resume: see `RunOptions`.
    Raises ConeslabError if a caption lacks its token, or settings are out of range.

    >>> pipe, cat = coneslab.load("tiny"), coneslab.subject("cat")
    >>> learned = coneslab.textual_inversion(pipe, cat, steps=2, batch_size=4)
    >>> learned
    TokenEdit(sks: ... numbers each)
    >>> learned.initial, len(learned.history["loss"])
    (('cat',), 2)
    >>> with learned.applied(pipe, dose=0.5):  # halfway from "cat" to what was learned
    ...     images = coneslab.generate(pipe, cat.prompt, sampler_steps=2)
    """
    require_editable(pipe)
    settings = TextualInversionSettings.chosen(settings, changes)
    require_passes(dtype, chunk, callback)
    taught = several(subjects, with_token=True)
    tokens = [subject.token for subject in taught]
    initial = settings.initial
    if initial is None:
        initial = [checks.text("class_word", subject.class_word) for subject in taught]
    words = [initial] * len(taught) if isinstance(initial, str) else list(initial)
    if len(words) != len(taught):
        raise ArgumentError(f"got {len(words)} initial words for {len(taught)} subjects: give one, or one for each")
    data = [concept_latents(pipe, subject, batch_size=settings.batch_size, prior_batch_size=0)[0] for subject in taught]
    text = LearnedText(pipe, [subject.prompt for subject in taught], tokens)
    vectors = torch.stack([start_vector(pipe, word) for word in words]).requires_grad_()
    batch_at = numbered_batches(pipe, data, settings.seed)
    history = tune_kv(
        KVGradient(pipe, data, dtype=dtype, chunk=chunk),
        {"vectors": vectors},
        lambda number: Point(batch_at(number), text=text(vectors)),
        settings,
        title=f"Textual Inversion of {', '.join(tokens)}",
        identity={"model": model_fingerprint(pipe)},
        progress=progress,
        callback=callback,
        resume=resume,
    )
    return TokenEdit(
        tuple(tokens),
        vectors,
        vocabulary_fingerprint(pipe),
        initial=tuple(words),
        settings=settings.record(),
        history=history,
    )
