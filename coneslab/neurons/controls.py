"""What must stand beside a neuron search: random masks, the reversed sign, naive readings, full fine-tuning.

Apart from `search.py` so that the method and what it is compared with are each one reading.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion.kvspace import KVSpace
from ..diffusion.pipelines import Pipeline
from ..edits.weights import WeightDelta, model_fingerprint
from ..errors import ConeslabError, MismatchError
from ..finetuning.kv_gradient import KVGradient
from ..finetuning.loop import TuningCallback, tune
from ..finetuning.samples import ConceptSubject, concept_pairs, draws, total_loss
from .mask import ConceptNeurons
from .search import find_concept_neurons

Criterion = Literal["gradient", "gradient_times_weight", "weight"]


def random_neurons(found: ConceptNeurons, *, seed: int = 0) -> ConceptNeurons:
    """As many neurons as `found` has, at the same scales, but at random places inside the same layers.

    When to use it: to see what any mask of this density does, whatever its neurons. Take several seeds.
    """
    generator = torch.Generator().manual_seed(seed)
    indices, scales = [], []
    for layer in found.layout:
        first, last = np.searchsorted(found.indices, [layer.start, layer.start + layer.size])
        places = torch.randperm(layer.size, generator=generator)[: last - first].numpy() + layer.start
        order = np.argsort(places)
        indices.append(places[order])
        scales.append(found.scales[first:last][order])
    settings = {**found.settings, "control": "random", "control_seed": seed}
    return ConceptNeurons(
        found.layout,
        np.concatenate(indices),
        np.concatenate(scales),
        found.fingerprint,
        subject=f"random, as {found.subject}",
        cut=found.cut,
        settings=settings,
    )


def reversed_neurons(pipe: Pipeline, subject: ConceptSubject, **options: Any) -> ConceptNeurons:
    """The search with the criterion's sign reversed: −θ_j ∂L_con/∂θ_j > τ. Options as in `find_concept_neurons`.

    When to use it: shutting these should raise the concept's loss, if the criterion says what it claims to.
    """
    return find_concept_neurons(pipe, subject, sign=-1, **options)


def top_k_neurons(
    pipe: Pipeline,
    subject: ConceptSubject,
    *,
    criterion: Criterion = "gradient_times_weight",
    density: float | None = None,
    like: ConceptNeurons | None = None,
    per_layer: bool = True,
    rounds: int = 60,
    seed: int = 0,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    **pairs_options: Any,
) -> ConceptNeurons:
    """Shut the k neurons with the largest |∂L_con/∂θ|, |θ · ∂L_con/∂θ| or |θ| of the untouched model: binary.

    The first two are readings of Cones that summaries give, without the sign and without the adaptive scale; the
    third is magnitude alone. density: share of neurons to shut, in every layer, or over all if not `per_layer`;
    like: take the density, layer by layer or overall, from this mask instead. rounds: over how many rounds of samples
    the gradient is averaged. pairs_options: of `concept_pairs` (batches, prior).
    Raises ConeslabError unless exactly one of density and like is given, or for an unknown criterion.
    """
    if (density is None) == (like is None):
        raise ConeslabError("give either density, a share of the neurons, or like, a mask whose density to copy")
    if criterion not in ("gradient", "gradient_times_weight", "weight"):
        raise ConeslabError(f"criterion is {criterion!r}: choose gradient, gradient_times_weight or weight")
    if density is not None and not 0 <= density <= 1:
        raise ConeslabError(f"density is {density}: give a share in [0, 1]")
    space = KVSpace(pipe)
    if like is not None and like.layout != space.layout:
        raise MismatchError(f"like covers {like.n:,} neurons, this pipeline has {space.n:,}: give a mask of its own")
    theta = space.gather().float()
    score = theta.abs()
    if criterion != "weight":
        mean = mean_gradient(
            pipe, subject, rounds=rounds, seed=seed, progress=progress, dtype=dtype, chunk=chunk, **pairs_options
        ).to(score)
        score = mean.abs() if criterion == "gradient" else (theta * mean).abs()
    parts = [layer.slice for layer in space.layers] if per_layer else [slice(0, space.n)]
    if like is None:
        counts = [math.floor(float(density) * (part.stop - part.start) + 0.5) for part in parts]  # type: ignore[arg-type]
    else:
        counts = like.counts().tolist() if per_layer else [len(like.shut())]
    scale = torch.ones_like(score)
    for part, count in zip(parts, counts, strict=True):
        scale[part.start + score[part].topk(count).indices] = 0
    settings = {"control": f"top-k {criterion}", "per_layer": per_layer, "rounds": rounds, "seed": seed}
    return ConceptNeurons.from_scale(
        scale, space.layout, model_fingerprint(pipe), subject=f"top-k {criterion}, {subject.name}", settings=settings
    )


def mean_gradient(
    pipe: Pipeline,
    subject: ConceptSubject,
    *,
    rounds: int = 60,
    seed: int = 0,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    **pairs_options: Any,
) -> Tensor:
    """∂L_con/∂θ of the untouched model, (n,), averaged over `rounds` rounds of samples."""
    if rounds < 1:
        raise ConeslabError(f"rounds is {rounds}: give a positive number of rounds")
    pairs = concept_pairs(pipe, subject, seed=seed, progress=progress, **pairs_options)
    gradient = KVGradient(pipe, pairs, dtype=dtype, chunk=chunk)
    theta, samples = gradient.theta(), draws(pipe, pairs, seed=seed)
    total = torch.zeros_like(theta)
    for _ in tqdm(range(rounds), desc=f"gradient of {subject.name}", disable=not progress):
        total += gradient(theta, next(samples))[1]
    return total / rounds


def finetune_kv(
    pipe: Pipeline,
    subject: ConceptSubject,
    *,
    steps: int = 200,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: bool = True,
    callback: TuningCallback | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    **pairs_options: Any,
) -> WeightDelta:
    """Fine-tune all keys and values of cross-attention on L_con, with prior preservation: the ceiling of a mask.

    This is Custom Diffusion's choice of weights (arXiv 2212.04488, Sec. 3.1) without its new token. AdamW with
    betas (0.9, 0.999), its weights in float32 whatever the precision of the passes. pairs_options: of `concept_pairs`
    (batches, prior_weight, prior pictures). callback: see `finetuning.tune`.
    The pipeline is not changed; history has the loss of every step. Raises ConeslabError if steps or rate are not
    positive, or the loss diverges.
    """
    pairs = concept_pairs(pipe, subject, seed=seed, progress=progress, **pairs_options)
    gradient = KVGradient(pipe, pairs, dtype=dtype, chunk=chunk)
    theta, samples = gradient.theta(), draws(pipe, pairs, seed=seed)

    def step(number: int) -> dict[str, float]:
        losses, theta.grad = gradient(theta, next(samples))
        named = zip(("subject_loss", "prior_loss"), losses, strict=False)
        return {"loss": total_loss(pairs, losses), **dict(named)}

    title = f"fine-tuning on {subject.name}"
    history = tune(
        {"theta": theta}, step, steps=steps, learning_rate=learning_rate, weight_decay=weight_decay, title=title,
        progress=progress, callback=callback,
    )  # fmt: skip
    return WeightDelta(
        gradient.deltas(theta),
        model_fingerprint(pipe),
        subject=subject.name,
        settings={"steps": steps, "learning_rate": learning_rate, "weight_decay": weight_decay, "seed": seed},
        history=history,
    )
