"""Conceptor: what is a concept made of? (Chefer et al. 2023, arXiv 2306.00966, ICLR 2024.)

A concept is shown to the model as pictures; a pseudo-token that draws them is learned as a weighted sum of words of
the model's own vocabulary, few of which matter. The words with the largest coefficients are the decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ... import checks
from ...callback import Callback
from ...diffusion.checks import require_editable
from ...diffusion.encoding import encode_images, encode_prompts, require_read
from ...diffusion.pipelines import Pipeline
from ...diffusion.sampling import generate, require_steps
from ...edits.tokens import LearnedText, embedding_of, vocabulary_fingerprint
from ...errors import ArgumentError, ConeslabError
from ...finetuning.kv_gradient import KVGradient, require_passes
from ...finetuning.loop import Point, TuningSettings, tune_kv
from ...finetuning.samples import CaptionedLatents, NoisyBatch, SamplerSettings, generate_once, sample_batches
from ...measure.judge import Judge, require_judge
from ...pictures import Images, as_pictures
from ...seeds import derived, seeded_on_the_cpu
from ...settings import takes
from .decomposition import TEMPLATE, Decomposition, rescaled
from .vocabulary import Vocabulary, encode_vocabulary

Coefficients = Literal["mlp", "direct", "least squares"]
Start = Literal["words", "random"]
_FITTING_STEPS = 200
# How the first words are chosen: by their losses on so many samples or a few more, among so many words nearest to the
# pictures, and in sums of so many.
_TRIED_SAMPLES, _TRIED_WORDS, _TRIED_SUMS = 32, 64, (1, 2, 3, 5, 10)


@dataclass(frozen=True, kw_only=True)
class DecompositionSettings(TuningSettings, SamplerSettings):
    """Settings of `decompose`: those of `TuningSettings` and `SamplerSettings`, and

    pictures: of the concept, drawn if it is a prompt. dictionary: M, by default a tenth of the vocabulary, as the
    paper's 5000 are of Stable Diffusion's; explain: N, by default a hundredth of M, the paper's 50, but at least 10.
    sparsity: weight of 1 − cos(w*_N, w*). batch_size: samples per step. coefficients: α_i = |MLP(w_i)| with one hidden
    layer of `hidden` units ("mlp", the paper's, but on vectors scaled to a standard deviation of 1, without which all
    α_i stay alike), numbers learned directly ("direct"), or a free vector that is then fitted with non-negative
    coefficients ("least squares"). start: what "mlp" begins as, the best sum of a few words that draw the pictures
    best on their own ("words"), or a network at random ("random", the paper's), whose sum of all words may mean nothing
    to the model: then training begins on a plateau that it may not leave.
    include: words that are in the dictionary however far they are from the pictures, such as the groups of a bias.
    exclude: words to leave out; the words of a concept's prompt always are, and so is every word whose embedding is
    nearer than `exclude_similar` to that of the concept's own words (None: keep them).
    template, token: the captions of the pictures, and the pseudo-token in them. Every `validate_every` steps
    `validation_pictures` are drawn, by which the best step is chosen.
    """

    method: ClassVar[str] = "Conceptor"

    steps: int = 500
    pictures: int = 100
    dictionary: int | None = None
    explain: int | None = None
    sparsity: float = 1e-3
    batch_size: int = 6
    hidden: int = 100
    coefficients: Coefficients = "mlp"
    start: Start = "words"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    exclude_similar: float | None = 0.9
    template: str = TEMPLATE
    token: str = "<concept>"
    validate_every: int = 50
    validation_pictures: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.count, "pictures", "batch_size", "hidden", "validate_every", "validation_pictures")
        self._check(checks.count, "dictionary", "explain", optional=True)
        self._check(checks.number, "sparsity", interval="[0, inf)")
        self._check(checks.number, "exclude_similar", interval="[-1, 1]", optional=True)
        self._check(checks.choice, "coefficients", among=get_args(Coefficients))
        self._check(checks.choice, "start", among=get_args(Start))
        self._check(checks.texts, "include", "exclude", least=0)
        self._check(checks.template, "template")
        self._check(checks.word, "token")


@takes(DecompositionSettings)
def decompose(
    pipe: Pipeline,
    concept: str | Images,
    judge: Judge,
    settings: DecompositionSettings | Mapping[str, Any] | None = None,
    *,
    name: str = "",
    vocabulary: Vocabulary | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    **changes: Any,
) -> Decomposition:
    """Decompose a concept into words of the model's vocabulary (Conceptor, Sec. 3.1 and 3.2).

    concept: a prompt, of which the pipeline draws pictures, or pictures of your own (then give a `name`).
    The pseudo-token is w* = sum_i α_i w_i over a dictionary of the M words whose embedding by the judge is nearest to
    the mean embedding of the pictures, rescaled to the mean length of the vocabulary's vectors. Loss: denoising of the
    pictures under the template with the pseudo-token, plus `sparsity` · (1 − cos(w*_N, w*)), w*_N being made of the N
    largest coefficients alone. Every `validate_every` steps w*_N, as it is used later, draws pictures from fixed seeds;
    the coefficients whose pictures are nearest to the concept's are kept.
    settings, changes: see `DecompositionSettings`; vocabulary: see `encode_vocabulary`; dtype, chunk: see `KVGradient`;
    callback: see `RunOptions`, with "coefficients" (M,) as a further key.
    The pipeline is not changed. Raises ConeslabError for settings out of range or an empty dictionary.

    >>> pipe, judge, cat = coneslab.load("tiny"), coneslab.load_judge(), coneslab.subject("cat")
    >>> words = coneslab.encode_vocabulary(pipe, judge, words=["dog", "car", "tree"])
    >>> settings = DecompositionSettings(steps=2, explain=2, validation_pictures=1, sampler_steps=2)
    >>> parts = coneslab.decompose(pipe, cat.images, judge, settings, name="cat", vocabulary=words, dictionary=3)
    >>> sorted(parts.words), round(sum(share for word, share in parts.top(2)), 6)
    (['car', 'dog', 'tree'], 1.0)
    >>> with parts.applied(pipe):
    ...     images = coneslab.generate(pipe, parts.prompt, sampler_steps=2)  # "a photo of a <concept>"
    """
    require_editable(pipe)
    settings = DecompositionSettings.chosen(settings, changes)
    require_passes(dtype, callback=callback)
    require_judge(judge)
    require_steps(pipe, settings.sampler_steps)
    if vocabulary is not None:
        checks.of_kind("vocabulary", vocabulary, Vocabulary)
    name = checks.text("name", name, blank=True)
    shown = _pictures(pipe, concept, settings, progress)
    seen = judge.image_features(shown)
    target = seen.mean(0)
    words = encode_vocabulary(pipe, judge, progress=False) if vocabulary is None else vocabulary
    if settings.token in words.words:
        raise ArgumentError(f"token is {settings.token!r}, a word of the vocabulary: give a new one, such as <concept>")
    size = -(-len(words) // 10) if settings.dictionary is None else settings.dictionary
    explain = max(10, size // 100) if settings.explain is None else settings.explain
    prompt = concept if isinstance(concept, str) else ""
    allowed = choose_dictionary(
        words,
        seen,
        judge,
        size=size,
        prompt=prompt,
        include=settings.include,
        exclude=settings.exclude,
        exclude_similar=settings.exclude_similar,
    )
    norm = float(embedding_of(pipe).weight.detach().float().norm(dim=1).mean())
    text = LearnedText(pipe, [settings.template.format(settings.token)], [settings.token])
    empty = encode_prompts(pipe, [settings.template.format("")]).detach()[0]
    data = [CaptionedLatents(encode_images(pipe, shown).detach(), empty, settings.batch_size)]
    batches = sample_batches(pipe, data, seed=settings.seed)
    gradient = KVGradient(pipe, data, dtype=dtype, chunk=chunk)
    with seeded_on_the_cpu(settings.seed):
        weights = _Weights(allowed.vectors, settings, norm)
    if settings.coefficients == "mlp" and settings.start == "words":
        trials = sample_batches(pipe, data, seed=derived(settings.seed, "start"))  # noises that no training sees
        _begin_with_words(weights, gradient, text, list(islice(trials, -(-_TRIED_SAMPLES // settings.batch_size))))
    validation: dict[int, float] = {}
    best, best_step = weights.coefficients(), 0

    def made(coefficients: np.ndarray) -> Decomposition:
        return Decomposition(
            name or prompt or "pictures",
            allowed.words,
            coefficients,
            min(explain, len(allowed)),
            norm,
            vocabulary_fingerprint(pipe),
            settings.token,
            settings.template,
        )

    def point(number: int) -> Point:
        vector, vector_of_largest = weights(explain)
        spread = 1 - nn.functional.cosine_similarity(vector_of_largest, vector, dim=0)
        return Point(next(batches), text=text(vector[None]), penalty=settings.sparsity * spread)

    def after(state: Mapping[str, Any]) -> None:
        nonlocal best, best_step
        now, done = weights.coefficients(), state["step"] + 1
        if callback is not None:
            callback({**state, "coefficients": now})
        if done % settings.validate_every and done != settings.steps:
            return
        trial = made(now)
        with trial.applied(pipe):
            drawn = generate(pipe, [trial.prompt] * settings.validation_pictures, **settings.validation_sampler)
        validation[done] = float((judge.image_features(drawn) @ target).mean())
        if validation[done] >= max(validation.values()):
            best, best_step = now, done

    history = tune_kv(
        gradient,
        dict(weights.named_parameters()),
        point,
        settings,
        title=f"decomposing {name or prompt}",
        progress=progress,
        callback=after,
    )
    record = {**settings.record(), "dictionary": len(allowed), "pictures": len(shown)}
    return replace(made(best), validation=validation, best_step=best_step, settings=record, history=history)


def _begin_with_words(
    weights: _Weights, gradient: KVGradient, text: LearnedText, batches: Sequence[NoisyBatch]
) -> None:
    """Let "mlp" begin as the best sum of a few words: of those that have the lowest loss each on its own."""
    theta = gradient.theta()

    @torch.no_grad()
    def loss(vector: Tensor) -> float:
        embedded = text(rescaled(vector, weights.norm)[None])
        return sum(gradient.losses(theta, batch, embedded)[0] for batch in batches)

    alone = [loss(vector) for vector in weights.vectors[:_TRIED_WORDS]]
    order = np.argsort(alone, kind="stable").tolist()
    sums = {1: alone[order[0]]}
    for count in sorted({min(count, len(order)) for count in _TRIED_SUMS} - sums.keys()):
        sums[count] = loss(weights.vectors[order[:count]].mean(0))
    weights.begin(order[: min(sums, key=sums.__getitem__)])


def _pictures(
    pipe: Pipeline, concept: str | Images, settings: DecompositionSettings, progress: bool
) -> list[Image.Image]:
    if not isinstance(concept, str):
        return as_pictures(concept)
    if not concept.strip():
        raise ConeslabError("the concept is an empty prompt: name what to decompose, for example 'a photo of a pet'")
    require_read(pipe, concept)
    return list(generate_once(pipe, [concept] * settings.pictures, **settings.sampler, progress=progress))


def choose_dictionary(
    words: Vocabulary,
    seen: Tensor,
    judge: Judge,
    *,
    size: int,
    prompt: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    exclude_similar: float | None = 0.9,
) -> Vocabulary:
    """The `size` words nearest to the mean of the picture features `seen` (n, d), without those excluded.

    Those of `include` replace the farthest. Raises ConeslabError if none is left, or one to include is unknown or
    excluded by name.
    """
    checks.of_kind("words", words, Vocabulary)
    checks.tensor("seen", seen, f"n, {words.features.shape[1]}")
    size, prompt = checks.count("size", size), checks.text("prompt", prompt, blank=True)
    include, exclude = checks.texts("include", include, least=0), checks.texts("exclude", exclude, least=0)
    if exclude_similar is not None:
        exclude_similar = checks.number("exclude_similar", exclude_similar, "[-1, 1]")
    own = [word for word in prompt.lower().split() if word in words.words]
    out = {*own, *exclude}
    keep = np.array([word not in out for word in words.words])
    content = [word for word in own if len(word) > 3]  # "a", "of", "the" are near to everything
    if exclude_similar is not None and content:
        near = (words.features @ words.features[words.rows(content)].T).max(1).values
        keep &= (near <= exclude_similar).numpy()
    if not keep.any():
        raise ConeslabError(
            f"no word is left for the dictionary of {prompt!r}: exclude fewer, or raise exclude_similar "
            f"(now {exclude_similar})"
        )
    wanted = words.rows(include)
    if refused := out.intersection(include):
        raise ConeslabError(f"{', '.join(sorted(refused))}: both included and excluded: choose one of the two")
    closeness = words.features @ seen.mean(0)
    ranked = [row for row in closeness.argsort(descending=True).tolist() if keep[row] and row not in wanted]
    chosen = {*ranked[: max(0, size - len(wanted))], *wanted}
    return words.part(sorted(chosen, key=lambda row: -float(closeness[row])))


class _Weights(nn.Module):
    """Coefficients over the dictionary's vectors (M, width), and the pseudo-token they make."""

    def __init__(self, vectors: Tensor, settings: DecompositionSettings, norm: float) -> None:
        super().__init__()
        self.vectors, self.kind, self.norm = vectors, settings.coefficients, norm
        count, width = vectors.shape
        if self.kind == "mlp":
            self.scaled = vectors / vectors.std()
            self.net = nn.Sequential(nn.Linear(width, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, 1))
        elif self.kind == "direct":
            self.values = nn.Parameter(torch.full((count,), 1.0 / count))
        else:
            self.free = nn.Parameter(vectors.mean(0))

    def begin(self, rows: Sequence[int]) -> None:
        """Fit the network to a coefficient of 1 for these rows and 0 for all others; nothing is drawn for it."""
        wanted = torch.zeros(len(self.vectors)).to(self.vectors)
        wanted[list(rows)] = 1.0
        optimiser = torch.optim.Adam(self.net.parameters(), lr=1e-2)
        with torch.enable_grad():
            for _ in range(_FITTING_STEPS):
                optimiser.zero_grad()
                (self.net(self.scaled)[:, 0] - wanted).square().mean().backward()
                optimiser.step()
        optimiser.zero_grad()

    def _alpha(self) -> Tensor:
        return (self.net(self.scaled)[:, 0] if self.kind == "mlp" else self.values).abs()

    def forward(self, n: int) -> tuple[Tensor, Tensor]:
        """w* (width,), and w*_N of the `n` largest coefficients, which is not rescaled."""
        if self.kind == "least squares":
            return rescaled(self.free, self.norm), self.free
        alpha = self._alpha()
        chosen = alpha.topk(min(n, len(alpha)))
        return rescaled(alpha @ self.vectors, self.norm), chosen.values @ self.vectors[chosen.indices]

    @torch.no_grad()
    def coefficients(self) -> np.ndarray:
        """(M,) float32, non-negative and not all 0."""
        if self.kind == "least squares":
            from scipy.optimize import nnls

            solution, _ = nnls(self.vectors.double().numpy().T, rescaled(self.free, self.norm).double().numpy())
            return solution.astype(np.float32)
        return self._alpha().detach().numpy().astype(np.float32)
