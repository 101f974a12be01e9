"""The search that finds concept neurons (Cones, arXiv 2303.05125, Sec. 3.1), and rules that try to do better.

Separate from `mask.py`, which says what a mask is and does, however it was made. The controls for a search are in
`controls.py`.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import checks
from ..callback import Callback
from ..diffusion.checks import require_editable
from ..diffusion.kvspace import KVLayout, KVSpace
from ..diffusion.pipelines import Pipeline
from ..edits.weights import model_fingerprint
from ..errors import ConeslabError, MismatchError
from ..finetuning.kv_gradient import KVGradient, require_passes
from ..finetuning.samples import (
    ConceptSettings,
    ConceptSubject,
    concept_latents,
    loss_values,
    require_subject,
    sample_batches,
)
from ..pictures import Images, as_pictures
from ..seeds import derived
from ..settings import takes
from .mask import ConceptNeurons
from .scope import scope_of, where_scope

Rule = Literal["adaptive", "curvature", "bands", "straight-through"]
RULES: tuple[str, ...] = get_args(Rule)
_KINDS = {"all": ("K", "V"), "keys": ("K",), "values": ("V",)}


@dataclass(frozen=True, kw_only=True)
class SearchSettings(ConceptSettings):
    """Settings of `find_concept_neurons`: those of `ConceptSettings`, and

    rule: "adaptive" is the paper's; the others are ours. "curvature" subtracts the second-order term, ½ (s⊙θ)² h, from
    the criterion; "bands" gives each of `bands` parts of the timestep schedule an equal vote, whatever the size of its
    gradients; "straight-through" keeps a share `density` of each layer shut, the neurons with the largest summed
    criterion, and reopens a neuron when others overtake it (threshold and rate are unused).
    rounds: K. threshold: τ as an absolute value; if None, τ is the `threshold_quantile` of the criterion in each layer,
    or over all layers if not `per_layer`, recomputed every round and never below 0 (a reading). momentum: share of the
    running average in the gradient, 0 for none (a reading: averaging over rounds stands in for a larger batch). rate:
    ρ. cut: scale below which a neuron counts as shut. sign: −1 for the reversed control, which shuts what the concept
    relies on. scope: "all" (the paper's) or "subject", for a mask that acts at the subject's token and class word only:
    the gradient goes through these words alone, and there is no prior, because no other prompt can change. kinds: which
    projections may be masked, "all" (the paper's), "keys" or "values".
    """

    method: ClassVar[str] = "concept neurons"

    rule: Rule = "adaptive"
    rounds: int = 60
    threshold: float | None = None
    threshold_quantile: float = 0.995
    per_layer: bool = True
    momentum: float = 0.8
    rate: float = 0.25
    cut: float = 0.5
    density: float = 0.04
    bands: int = 4
    sign: int = 1
    scope: Literal["all", "subject"] = "all"
    kinds: Literal["all", "keys", "values"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.count, "rounds")
        self._check(checks.number, "threshold", optional=True)
        self._check(checks.number, "threshold_quantile", "momentum", interval="[0, 1)", kind="share")
        self._check(checks.number, "rate", interval="(0, 1]", kind="share")
        self._check(checks.number, "cut", interval="(0, 1]", kind="scale")
        self._check(checks.choice, "rule", among=RULES)
        self._check(checks.number, "density", interval="(0, 1)", kind="share")
        self._check(checks.count, "bands", most=1000)
        self._check(checks.flag, "per_layer")
        self._check(checks.choice, "sign", among=(1, -1))
        self._check(checks.choice, "scope", among=("all", "subject"))
        self._check(checks.choice, "kinds", among=tuple(_KINDS))

    @property
    def has_prior(self) -> bool:
        return self.scope == "all" and super().has_prior


@takes(SearchSettings)
def find_concept_neurons(
    pipe: Pipeline,
    subject: ConceptSubject,
    settings: SearchSettings | Mapping[str, Any] | None = None,
    *,
    prior: Images | None = None,
    start: ConceptNeurons | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    **changes: Any,
) -> ConceptNeurons:
    """Find the neurons of a concept by the adaptive search of Cones (arXiv 2303.05125, Sec. 3.1).

    A neuron belongs to the concept if scaling it down lowers L_con: to first order, if θ_j ∂L_con/∂θ_j > τ. Every
    neuron has a scale s, initially 1. Each round averages the gradient g at s⊙θ over a batch and multiplies the scale
    of every neuron with (s⊙θ)⊙g > τ by 1 − ρ. The final s is the float32 mask.

    subject: has pictures, a `prompt` with the rare token and a `prior_prompt` without it, as `coneslab.subject` gives.
    settings, changes: see `SearchSettings`, such as rounds=60. prior: pictures of the class, by default drawn once by
    the pipeline (`prior_pictures`). start: neurons to continue from, with new samples and a new average; its history
    goes on, and where it has none, as in a mask file, the history is that of the new rounds. dtype, chunk:
    see `KVGradient`. callback: see `coneslab.callback`; further keys: "density", and copies on the CPU, (n,) each, of
    "scale", "gradient" (the running mean) and "hits".
    The pipeline is never changed, not even for a moment. Same seed, same neurons.
    Raises ConeslabError for settings out of range or a pipeline that cannot be edited (`require_editable`),
    MismatchError if `start` belongs to another model.

    >>> pipe, cat = coneslab.load("tiny"), coneslab.subject("cat")
    >>> found = coneslab.find_concept_neurons(pipe, cat, rounds=3, batch_size=8, prior_batch_size=0)  # a first look
    >>> found
    ConceptNeurons('cat': ... of ... neurons shut (0...%), ... scaled, model ...)
    >>> found.history["loss"].shape, found.history["density"].shape == (3, len(found.layout))
    ((3,), True)
    >>> with found.applied(pipe):
    ...     images = coneslab.generate(pipe, cat.prompts[0], sampler_steps=2)
    """
    require_editable(pipe)
    settings = SearchSettings.chosen(settings, changes)
    require_passes(dtype, chunk, callback)
    require_subject(subject)
    prior = None if prior is None else as_pictures(prior, name="prior pictures")
    if prior is not None and settings.scope == "subject":
        raise ConeslabError(
            "pictures of the class were given (prior=), which a search at the subject's words does not use"
        )
    if start is not None:
        checks.of_kind("start", start, ConceptNeurons)
    if start is not None and settings.rule == "straight-through":
        raise ConeslabError("the straight-through rule cannot continue a search: leave out start, or take another rule")
    model = model_fingerprint(pipe)
    if start is not None and (start.fingerprint != model or start.layout != KVSpace(pipe).layout):
        raise MismatchError(f"start was found on model {start.fingerprint[:8]}…, this pipeline is {model[:8]}…")
    scope = scope_of(pipe, subject) if settings.scope == "subject" else ()
    if start is not None and start.scope != scope:
        raise MismatchError(f"start acts at {start.scope or 'all words'}, the search is at {scope or 'all words'}")
    data = concept_latents(pipe, subject, settings, prior=prior, progress=progress)
    where = where_scope(pipe, [subject.prompt], scope) if scope else None
    gradient = KVGradient(pipe, data, where=where, dtype=dtype, chunk=chunk)
    layout, theta, rounds = gradient.space.layout, gradient.theta(), settings.rounds
    scale = torch.ones_like(theta) if start is None else start.scale().to(theta)
    kinds = [layer.kind in _KINDS[settings.kinds] for layer in layout]
    maskable = spread(torch.tensor(kinds).to(theta), layout)
    rule = _StraightThrough if settings.rule == "straight-through" else _Adaptive
    scaling: _Scaling = rule(theta, scale, layout, settings)
    history = _History(layout)
    done, continues = _so_far(start)
    # a mask without a history does not say which samples it has seen: its successors take some of their own
    seed = derived(settings.seed, "continued search", continues) if continues else settings.seed
    batches = sample_batches(pipe, data, seed=seed, bands=scaling.parts)
    for _ in range(done):
        next(batches)
    bar = tqdm(range(rounds), desc=f"neurons of {subject.name}", disable=not progress)
    for number in bar:
        losses, now = gradient(scaling.scale * theta, next(batches))
        noise = sum(own.weight * loss / own.batch_size for own, loss in zip(data, losses, strict=True)) / len(data)
        hits, tau = scaling.update(settings.sign * now * maskable, noise / data[0].latents[0].numel())
        values = loss_values(data, losses)
        density = history.add(values, hits, tau, scaling.scale < settings.cut)
        bar.set_postfix(loss=f"{values['loss']:.4f}", shut=f"{density:.2%}")
        if callback is not None:
            tensors = {"scale": scaling.scale, "gradient": settings.sign * scaling.gradient, "hits": hits}
            copies = {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}
            callback({"step": number, "steps": rounds, "loss": values["loss"], "density": density, **copies})
    record = {
        **settings.record(),
        "prompt": subject.prompt,
        "prior_prompt": subject.prior_prompt,
        "prior": "drawn by the model" if prior is None else f"{len(prior)} pictures given",
        "dtype": str(gradient.dtype),
        "precision": "float32",
        **({"continues": continues} if continues else {}),
    }
    return ConceptNeurons.from_scale(
        scaling.scale,
        layout,
        model,
        history=history.arrays(start),
        subject=subject.name,
        cut=settings.cut,
        settings=record,
        scope=scope,
    )


def _so_far(start: ConceptNeurons | None) -> tuple[int, str]:
    """How many rounds a search has behind it, and which mask without a history it began with, as a digest, if any."""
    if start is None:
        return 0, ""
    if "loss" in start.history:
        return len(start.history["loss"]), str(start.settings.get("continues", ""))
    content = start.indices.astype("<i8").tobytes() + start.scales.astype("<f4").tobytes()
    return 0, hashlib.sha256(content).hexdigest()[:16]


def quantiles(values: Tensor, layout: KVLayout, share: float, *, per_layer: bool = True) -> Tensor:
    """The value that a `share` of the neurons in each layer does not exceed: (layers,).

    values: (n,). Without `per_layer`, the value over all layers, repeated.
    """
    checks.of_kind("layout", layout, KVLayout).require_length(values)
    share = checks.number("share", share, checks.SHARE, kind="share")

    def quantile(part: Tensor) -> Tensor:
        return part.kthvalue(min(len(part), max(1, math.ceil(share * len(part))))).values

    if not per_layer:
        return quantile(values).expand(len(layout)).clone()
    return torch.stack([quantile(values[layer.slice]) for layer in layout])


class _Mean:
    """A running mean without the bias towards its start (Kingma and Ba 2015, Adam, Sec. 3)."""

    def __init__(self, like: Tensor, momentum: float) -> None:
        self.total, self.momentum, self.count = torch.zeros_like(like), momentum, 0

    def add(self, value: Tensor) -> Tensor:
        self.total.mul_(self.momentum).add_(value, alpha=1 - self.momentum)
        self.count += 1
        return self.value

    @property
    def value(self) -> Tensor:
        return self.total / (1 - self.momentum**self.count) if self.count else self.total


class _Scaling(ABC):
    """A rule by which scales follow from gradients.

    scale: of each neuron, (n,); parts: of the timestep schedule, which batches take in turn.
    """

    scale: Tensor
    parts: int = 1

    @property
    @abstractmethod
    def gradient(self) -> Tensor:
        """The running mean of the gradients, (n,)."""

    @abstractmethod
    def update(self, gradient: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """Process a round's gradient; return the neurons hit, (n,) bool, and the thresholds, (layers,).

        noise: loss / (samples x elements). For independent residuals of that variance, a batch's gradient has variance
        2 noise h, h being the diagonal of the Gauss-Newton matrix: that gives an estimate of h.
        """


class _Adaptive(_Scaling):
    """Scale down what the criterion picks, a little each round."""

    def __init__(self, theta: Tensor, scale: Tensor, layout: KVLayout, settings: SearchSettings) -> None:
        self.theta, self.scale, self.layout, self.settings = theta, scale, layout, settings
        self.parts = settings.bands if settings.rule == "bands" else 1
        self.means = [_Mean(theta, settings.momentum) for _ in range(self.parts)]
        self.squares = _Mean(theta, 0.95) if settings.rule == "curvature" else None
        self.round = 0

    @property
    def gradient(self) -> Tensor:
        return torch.stack([mean.value for mean in self.means]).mean(0)

    def criterion(self, noise: float) -> Tensor:
        """The expected gain from scaling each neuron down, (n,), up to a factor. noise: see `_Scaling.update`."""
        weights = self.scale * self.theta
        if len(self.means) > 1:  # a root mean square of 1 for every part of the schedule
            votes = [weights * mean.value for mean in self.means if mean.count]
            return torch.stack([vote / vote.square().mean().sqrt().clamp_min(1e-30) for vote in votes]).mean(0)
        mean = self.means[0].value
        if self.squares is None:
            return weights * mean
        variance = (self.squares.value - mean.square()).clamp_min(0)
        return weights * mean - 0.5 * weights.square() * variance / (2 * noise)

    def update(self, gradient: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        self.means[self.round % len(self.means)].add(gradient)
        if self.squares is not None:
            self.squares.add(gradient.square())
        self.round += 1
        criterion = self.criterion(noise)
        settings = self.settings
        if settings.threshold is None:
            share = settings.threshold_quantile
            tau = quantiles(criterion, self.layout, share, per_layer=settings.per_layer).clamp_(min=0)
        else:
            tau = torch.full((len(self.layout),), settings.threshold).to(self.theta)
        hits = criterion > spread(tau, self.layout)
        self.scale = torch.where(hits, self.scale * (1 - settings.rate), self.scale)
        return hits, tau


class _StraightThrough(_Scaling):
    """Optimise the binary mask itself, its gradient taken as if it were graded (Bengio et al. 2013, Sec. 4).

    Every neuron has a latent value: the sum of its criterion so far, each at the mask of its round. In each layer the
    neurons with the largest positive values are shut, as many as the budget allows, which grows over the first half of
    the rounds.
    """

    def __init__(self, theta: Tensor, scale: Tensor, layout: KVLayout, settings: SearchSettings) -> None:
        self.theta, self.scale, self.layout = theta, scale, layout
        self.density, self.ramp, self.round = settings.density, max(1, settings.rounds // 2), 0
        self.mean, self.latent = _Mean(theta, settings.momentum), torch.zeros_like(theta)

    @property
    def gradient(self) -> Tensor:
        return self.mean.value

    def update(self, gradient: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        self.latent += self.theta * self.mean.add(gradient)
        self.round += 1
        share, before, taus = self.density * min(1.0, self.round / self.ramp), self.scale, []
        self.scale = torch.ones_like(before)
        for layer in self.layout:
            best, where = self.latent[layer.slice].topk(max(1, round(share * layer.size)))
            self.scale[layer.start + where[best > 0]] = 0
            taus.append(best[-1].clamp_min(0))
        return (self.scale < 0.5) & (before >= 0.5), torch.stack(taus)


def spread(per_layer: Tensor, layout: KVLayout) -> Tensor:
    """(layers,) -> (n,): every neuron gets its layer's value."""
    return per_layer.repeat_interleave(torch.tensor([layer.size for layer in layout]).to(per_layer.device))


class _History:
    """Losses, hits, thresholds and densities, round by round and layer by layer."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout, self.sizes = layout, torch.tensor([layer.size for layer in layout])
        self.rows: dict[str, list] = {}

    def add(self, values: Mapping[str, float], hits: Tensor, tau: Tensor, shut: Tensor) -> float:
        """Record a round; return the density over all layers."""
        hits, density = hits.cpu(), self.layout.per_layer(shut.cpu())
        row: dict[str, Any] = {**values, "threshold": tau.float().cpu().numpy()}
        row["hits"] = np.array([int(hits[layer.slice].sum()) for layer in self.layout], np.int32)
        row["density"] = density.float().numpy()
        for name, value in row.items():
            self.rows.setdefault(name, []).append(value)
        return float((density * self.sizes).sum() / self.layout.n)

    def arrays(self, start: ConceptNeurons | None) -> dict[str, np.ndarray]:
        """name -> (rounds,) or (rounds, layers), appended to those of the search it continued, if they are known."""
        now = {name: np.array(rows) for name, rows in self.rows.items()}
        now = {name: rows.astype(np.float32) if rows.dtype == float else rows for name, rows in now.items()}
        if start is None or "loss" not in start.history:
            return now
        return {
            name: np.concatenate([start.history[name], rows]) for name, rows in now.items() if name in start.history
        }
