"""Controls for a neuron search: random masks, the reversed sign, naive readings, full fine-tuning.

Separate from `search.py`, so that the method and its controls can be read on their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import checks
from ..callback import Callback
from ..diffusion.checks import require_editable
from ..diffusion.kvspace import KVSpace
from ..diffusion.pipelines import Pipeline
from ..edits.weights import WeightDelta, model_fingerprint
from ..errors import ConeslabError, MismatchError
from ..finetuning.checkpoints import resumable
from ..finetuning.kv_gradient import KVGradient, require_passes
from ..finetuning.loop import Point, TuningSettings, tune_kv
from ..finetuning.samples import (
    ConceptSettings,
    ConceptSubject,
    concept_latents,
    numbered_batches,
    require_subject,
    sample_batches,
)
from ..pictures import Images, as_pictures
from ..settings import takes
from .mask import ConceptNeurons
from .search import find_concept_neurons

Criterion = Literal["gradient", "gradient_times_weight", "weight"]


def random_neurons(found: ConceptNeurons, *, seed: int = 0) -> ConceptNeurons:
    """As many neurons as `found` has, at the same scales, at random places in the same layers.

    When to use it: to see what any mask of this density does, whichever neurons it shuts. Use several seeds.

    >>> space = KVSpace(coneslab.load("tiny"))
    >>> found = ConceptNeurons(space.layout, range(100), [0.0] * 100, space.fingerprint(), subject="cat")
    >>> control = random_neurons(found, seed=1)
    >>> control.subject, len(control), control.counts().tolist() == found.counts().tolist(), control == found
    ('random, as cat', 100, True, False)
    """
    checks.of_kind("found", found, ConceptNeurons)
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    indices, scales = [], []
    for layer in found.layout:
        first, last = np.searchsorted(found.indices, [layer.start, layer.start + layer.size])
        places = torch.randperm(layer.size, generator=generator)[: last - first].numpy() + layer.start
        order = np.argsort(places)
        indices.append(places[order])
        scales.append(found.scales[first:last][order])
    settings = {**found.settings, "control": "random", "control_seed": seed}
    moved: dict[str, Any] = {"indices": np.concatenate(indices), "scales": np.concatenate(scales)}
    return replace(found, **moved, subject=f"random, as {found.subject}", settings=settings, history={})


def reversed_neurons(pipe: Pipeline, subject: ConceptSubject, **options: Any) -> ConceptNeurons:
    """The search with the criterion's sign reversed: −θ_j ∂L_con/∂θ_j > τ. Options as in `find_concept_neurons`.

    When to use it: shutting these should raise the concept's loss, if the criterion measures what it claims to.
    """
    return find_concept_neurons(pipe, subject, sign=-1, **options)


@dataclass(frozen=True, kw_only=True)
class TopKSettings(ConceptSettings):
    """Settings of `top_k_neurons`: those of `ConceptSettings`, and

    criterion: what neurons are ranked by, |∂L_con/∂θ|, |θ · ∂L_con/∂θ| or |θ|. density: share of neurons to shut, in
    each layer, or overall if not `per_layer`; None to copy another mask's density. rounds: number of batches over which
    the gradient is averaged.
    """

    method: ClassVar[str] = "top-k neurons"

    criterion: Criterion = "gradient_times_weight"
    density: float | None = None
    per_layer: bool = True
    rounds: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.choice, "criterion", among=get_args(Criterion))
        self._check(checks.number, "density", interval=checks.SHARE, kind="share", optional=True)
        self._check(checks.flag, "per_layer")
        self._check(checks.count, "rounds")


@takes(TopKSettings)
def top_k_neurons(
    pipe: Pipeline,
    subject: ConceptSubject,
    settings: TopKSettings | Mapping[str, Any] | None = None,
    *,
    like: ConceptNeurons | None = None,
    prior: Images | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    **changes: Any,
) -> ConceptNeurons:
    """Shut the k neurons with the largest |∂L_con/∂θ|, |θ · ∂L_con/∂θ| or |θ| of the untouched model: binary.

    The first two are Cones as summaries describe it, without the sign and the adaptive scale; the third is magnitude
    alone. like: take the density, layer by layer or overall, from this mask instead of from the settings. settings,
    changes: see `TopKSettings`; prior: see `concept_latents`; dtype, chunk: see `KVGradient`.
    Raises ConeslabError unless exactly one of density and like is given, or for an unknown criterion.
    """
    require_editable(pipe)
    settings = TopKSettings.chosen(settings, changes)
    require_passes(dtype, chunk)
    require_subject(subject)
    prior = None if prior is None else as_pictures(prior, name="prior pictures")
    if like is not None:
        checks.of_kind("like", like, ConceptNeurons)
    if (settings.density is None) == (like is None):
        raise ConeslabError("give either density (a share of the neurons) or like (a mask whose density to copy)")
    space = KVSpace(pipe)
    if like is not None and like.layout != space.layout:
        raise MismatchError(f"like covers {like.n:,} neurons, this pipeline has {space.n:,}: give a mask found on it")
    theta = space.gather().float()
    score = theta.abs()
    if settings.criterion != "weight":
        mean = mean_gradient(
            pipe,
            subject,
            settings,
            rounds=settings.rounds,
            prior=prior,
            dtype=dtype,
            chunk=chunk,
            progress=progress,
        ).to(score)
        score = mean.abs() if settings.criterion == "gradient" else (theta * mean).abs()
    per_layer = settings.per_layer
    parts = [layer.slice for layer in space.layers] if per_layer else [slice(0, space.n)]
    if like is not None:
        counts = like.counts().tolist() if per_layer else [len(like.shut())]
    else:
        assert settings.density is not None
        density = settings.density
        counts = [math.floor(density * (part.stop - part.start) + 0.5) for part in parts]
    scale = torch.ones_like(score)
    for part, k in zip(parts, counts, strict=True):
        scale[part.start + score[part].topk(k).indices] = 0
    record = {**settings.record(), "control": f"top-k {settings.criterion}"}
    name = f"top-k {settings.criterion}, {subject.name}"
    return ConceptNeurons.from_scale(scale, space.layout, model_fingerprint(pipe), subject=name, settings=record)


@takes(ConceptSettings)
def mean_gradient(
    pipe: Pipeline,
    subject: ConceptSubject,
    settings: ConceptSettings | Mapping[str, Any] | None = None,
    *,
    rounds: int = 60,
    prior: Images | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    **changes: Any,
) -> Tensor:
    """∂L_con/∂θ of the untouched model, (n,), averaged over `rounds` batches."""
    require_editable(pipe)
    rounds, settings = checks.count("rounds", rounds), ConceptSettings.chosen(settings, changes)
    require_passes(dtype, chunk)
    data = concept_latents(pipe, subject, settings, prior=prior, progress=progress)
    gradient = KVGradient(pipe, data, dtype=dtype, chunk=chunk)
    theta, batches = gradient.theta(), sample_batches(pipe, data, seed=settings.seed)
    total = torch.zeros_like(theta)
    for _ in tqdm(range(rounds), desc=f"gradient of {subject.name}", disable=not progress):
        total += gradient(theta, next(batches))[1]
    return total / rounds


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TuningSettings, ConceptSettings):
    """Settings of `finetune_kv`: those of `TuningSettings` and `ConceptSettings`."""

    method: ClassVar[str] = "K-V fine-tuning"


@resumable
@takes(FinetuneSettings)
def finetune_kv(
    pipe: Pipeline,
    subject: ConceptSubject,
    settings: FinetuneSettings | Mapping[str, Any] | None = None,
    *,
    prior: Images | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    resume: str | Path | None = None,
    **changes: Any,
) -> WeightDelta:
    """Fine-tune all keys and values of cross-attention on L_con, with prior preservation: the ceiling for any mask.

    This is Custom Diffusion's choice of weights (arXiv 2212.04488, Sec. 3.1) without its new token. The weights stay in
    float32, whatever precision the passes use. settings, changes: see `FinetuneSettings`; prior: see `concept_latents`;
    dtype, chunk: see `KVGradient`; progress, callback, resume: see `RunOptions`.
    The pipeline is not changed; `history` holds the losses of every step. Raises ConeslabError for settings out of
    range, or if the loss diverges.
    """
    require_editable(pipe)
    settings = FinetuneSettings.chosen(settings, changes)
    require_passes(dtype, chunk, callback)
    data = concept_latents(pipe, subject, settings, prior=prior, progress=progress)
    gradient, model = KVGradient(pipe, data, dtype=dtype, chunk=chunk), model_fingerprint(pipe)
    theta, batch_at = gradient.theta().requires_grad_(), numbered_batches(pipe, data, settings.seed)
    history = tune_kv(
        gradient,
        {"theta": theta},
        lambda number: Point(batch_at(number), theta=theta),
        settings,
        title=f"fine-tuning on {subject.name}",
        identity={"model": model},
        progress=progress,
        callback=callback,
        resume=resume,
    )
    deltas = gradient.deltas(theta)
    return WeightDelta(deltas, model, subject=subject.name, settings=settings.record(), history=history)
