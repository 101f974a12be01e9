"""The search that finds concept neurons (Cones, arXiv 2303.05125, Sec. 3.1), and rules that try to do better.

Apart from `mask.py`, which says what a mask is and does whoever made it. The controls that belong beside a search
are in `controls.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion.kvspace import KVLayout, KVSpace
from ..diffusion.pipelines import Pipeline
from ..edits.weights import model_fingerprint
from ..errors import ConeslabError, MismatchError
from ..finetuning.kv_gradient import KVGradient
from ..finetuning.samples import ConceptSubject, concept_pairs, draws, total_loss
from .mask import ConceptNeurons

Method = Literal["adaptive", "curvature", "bands", "straight-through"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class SearchState:
    """What a search's callback sees after each round; tensors are (n,) copies on the CPU."""

    round: int
    rounds: int
    loss: float
    density: float
    scale: Tensor
    gradient: Tensor
    hits: Tensor


def find_concept_neurons(
    pipe: Pipeline,
    subject: ConceptSubject,
    *,
    method: Method = "adaptive",
    rounds: int = 60,
    subject_batch: int = 32,
    prior_batch: int = 16,
    prior_weight: float = 1.0,
    threshold: float | None = None,
    threshold_quantile: float = 0.995,
    per_layer: bool = True,
    momentum: float = 0.8,
    rate: float = 0.25,
    cut: float = 0.5,
    density: float = 0.04,
    bands: int = 4,
    sign: int = 1,
    seed: int = 0,
    prior: Sequence[Image.Image] | None = None,
    prior_images: int = 16,
    prior_steps: int = 25,
    guidance_scale: float = 3.0,
    start: ConceptNeurons | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callable[[int, SearchState], object] | None = None,
) -> ConceptNeurons:
    """Find the neurons of a concept by the adaptive search of Cones (arXiv 2303.05125, Sec. 3.1).

    A neuron belongs to the concept when scaling it down lowers L_con, to first order when θ_j ∂L_con/∂θ_j > τ. Every
    neuron has a scale s, 1 at first. Each round averages the gradient g at s⊙θ over a batch and multiplies the scale
    of every neuron with (s⊙θ)⊙g > τ by 1 − ρ. The final s is the float32 mask.

    subject: pictures, `prompt` with the rare token, `prior_prompt` without (`coneslab.subject`, or any such object).
    method: "adaptive" is the paper's rule, as above; the others are ours. "curvature" subtracts what the second
    order adds, ½ (s⊙θ)² h, from the criterion; "bands" lets each of `bands` parts of the schedule of timesteps vote
    alike, whatever the size of its gradients; "straight-through" keeps `density` of each layer shut, those whose
    summed criterion is largest, and opens a shut neuron again when others overtake it (threshold and rate unused).
    rounds: K. subject_batch, prior_batch: samples a round; prior_weight: λ. threshold: τ as an absolute value;
    if None, τ is the `threshold_quantile` of the criterion in each layer, or over all layers if not `per_layer`,
    taken anew every round and never below 0 (a reading). momentum: share of the running average in the gradient, 0
    for none (a reading: averaging over rounds stands for a larger batch). rate: ρ. cut: scale below which a neuron
    counts as shut. sign: −1 for the reversed control, which shuts what the concept relies on. prior: pictures of the
    class, else drawn once by the pipeline (`prior_images`, `prior_steps`, `guidance_scale`; see `prior_pictures`).
    start: neurons to go on from, with new samples and a new average. dtype, chunk: see `KVGradient`.
    callback(round, state).
    The pipeline is never changed, not even for a moment. Same seed, same neurons.
    Raises ConeslabError for settings out of range, MismatchError if `start` belongs to another model.
    """
    _require(rounds >= 1, f"rounds is {rounds}", "a positive number of rounds")
    _require(0 <= threshold_quantile < 1, f"threshold_quantile is {threshold_quantile}", "a share in [0, 1)")
    _require(0 <= momentum < 1, f"momentum is {momentum}", "a share in [0, 1)")
    _require(0 < rate <= 1, f"rate is {rate}", "a share in (0, 1]")
    _require(0 < cut <= 1, f"cut is {cut}", "a scale in (0, 1]")
    _require(method in METHODS, f"method is {method!r}", f"one of {', '.join(METHODS)}")
    _require(start is None or method != "straight-through", "start with straight-through", "one or the other")
    _require(0 < density < 1, f"density is {density}", "a share in (0, 1)")
    _require(bands >= 1, f"bands is {bands}", "a positive number of parts")
    _require(sign in (1, -1), f"sign is {sign}", "1, or -1 for the reversed control")
    settings: dict[str, Any] = {
        name: value
        for name, value in locals().items()
        if isinstance(value, int | float | str | None)
        and name not in ("chunk", "progress", "start", "callback", "dtype")
    }
    model = model_fingerprint(pipe)
    if start is not None and (start.fingerprint != model or start.layout != KVSpace(pipe).layout):
        raise MismatchError(f"start was found on model {start.fingerprint[:8]}…, this pipeline is {model[:8]}…")
    pairs = concept_pairs(
        pipe,
        subject,
        subject_batch=subject_batch,
        prior_batch=prior_batch,
        prior_weight=prior_weight,
        prior=prior,
        prior_images=prior_images,
        seed=seed,
        prior_steps=prior_steps,
        guidance_scale=guidance_scale,
        progress=progress,
    )
    gradient = KVGradient(pipe, pairs, dtype=dtype, chunk=chunk)
    settings |= {
        "prompt": subject.prompt,
        "prior_prompt": subject.prior_prompt,
        "prior": "drawn by the model" if prior is None else f"{len(prior)} pictures given",
        "dtype": str(gradient.dtype),
        "precision": "float32",
    }
    layout, theta = gradient.space.layout, gradient.theta()
    scale = torch.ones_like(theta) if start is None else start.scale().to(theta)
    parts = bands if method == "bands" else 1
    rule: _Adaptive | _StraightThrough
    if method == "straight-through":
        rule = _StraightThrough(theta, scale, layout, momentum=momentum, density=density, ramp=max(1, rounds // 2))
    else:
        rule = _Adaptive(
            theta, scale, layout, momentum=momentum, rate=rate, threshold=threshold, quantile=threshold_quantile,
            per_layer=per_layer, parts=parts, curved=method == "curvature",
        )  # fmt: skip
    history = _History(layout, len(pairs))
    samples = draws(pipe, pairs, seed=seed, bands=parts)
    for _ in range(len(start.history.get("loss", ())) if start is not None else 0):
        next(samples)
    bar = tqdm(range(rounds), desc=f"neurons of {subject.name}", disable=not progress)
    for number in bar:
        losses, now = gradient(rule.scale * theta, next(samples))
        noise = sum(pair.weight * part / pair.batch for pair, part in zip(pairs, losses, strict=True)) / len(pairs)
        hits, tau = rule.update(sign * now, noise / pairs[0].latents[0].numel())
        loss = total_loss(pairs, losses)
        shut = history.add(loss, losses, hits, tau, rule.scale < cut)
        bar.set_postfix(loss=f"{loss:.4f}", shut=f"{shut:.2%}")
        if callback is not None:
            copies = (x.detach().clone().cpu() for x in (rule.scale, sign * rule.gradient, hits))
            callback(number, SearchState(number, rounds, loss, shut, *copies))
    about = {"subject": subject.name, "cut": cut, "settings": settings}
    return ConceptNeurons.from_scale(rule.scale, layout, model, history=history.arrays(start), **about)


def quantiles(values: Tensor, layout: KVLayout, share: float, *, per_layer: bool = True) -> Tensor:
    """The value that a `share` of the neurons do not exceed, in every layer: (layers,).

    values: (n,). Without `per_layer`, the value of all layers together, repeated.
    """

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


class _Adaptive:
    """Scale down what the criterion picks, a little each round. `gradient` is the running mean, (n,)."""

    def __init__(
        self, theta: Tensor, scale: Tensor, layout: KVLayout, *, momentum: float, rate: float,
        threshold: float | None, quantile: float, per_layer: bool, parts: int, curved: bool,
    ) -> None:  # fmt: skip
        self.theta, self.scale, self.layout = theta, scale, layout
        self.rate, self.threshold, self.quantile, self.per_layer = rate, threshold, quantile, per_layer
        self.means = [_Mean(theta, momentum) for _ in range(parts)]
        self.squares = _Mean(theta, 0.95) if curved else None
        self.round = 0

    @property
    def gradient(self) -> Tensor:
        return torch.stack([mean.value for mean in self.means]).mean(0)

    def criterion(self, noise: float) -> Tensor:
        """What scaling down is expected to bring, (n,), up to a factor. noise: see `update`."""
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
        """Take in a round's gradient; return the neurons hit, (n,) bool, and the thresholds, (layers,).

        noise: loss / (samples x elements). For residuals of that variance, independent of each other, the variance of
        a batch's gradient is 2 noise h, where h is the diagonal of the Gauss-Newton matrix: that estimates h.
        """
        self.means[self.round % len(self.means)].add(gradient)
        if self.squares is not None:
            self.squares.add(gradient.square())
        self.round += 1
        criterion = self.criterion(noise)
        if self.threshold is None:
            tau = quantiles(criterion, self.layout, self.quantile, per_layer=self.per_layer).clamp_(min=0)
        else:
            tau = torch.full((len(self.layout),), self.threshold).to(self.theta)
        hits = criterion > spread(tau, self.layout)
        self.scale = torch.where(hits, self.scale * (1 - self.rate), self.scale)
        return hits, tau


class _StraightThrough:
    """Optimise the binary mask itself, its gradient taken as if it were graded (Bengio et al. 2013, Sec. 4).

    Every neuron has a latent value, the sum of its criterion so far at the mask as it then was; in each layer the
    largest positive ones are shut, as many as the budget allows, which grows over the first `ramp` rounds.
    """

    def __init__(
        self, theta: Tensor, scale: Tensor, layout: KVLayout, *, momentum: float, density: float, ramp: int
    ) -> None:
        self.theta, self.scale, self.layout = theta, scale, layout
        self.density, self.ramp, self.round = density, ramp, 0
        self.mean, self.latent = _Mean(theta, momentum), torch.zeros_like(theta)

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

    def __init__(self, layout: KVLayout, pairs: int) -> None:
        self.layout, self.sizes = layout, torch.tensor([layer.size for layer in layout])
        self.names = ("subject_loss", "prior_loss")[:pairs]
        self.rows: dict[str, list] = {}

    def add(self, loss: float, losses: list[float], hits: Tensor, tau: Tensor, shut: Tensor) -> float:
        """Note a round; return the density over all layers."""
        hits, density = hits.cpu(), self.layout.per_layer(shut.cpu())
        row = {"loss": loss, **dict(zip(self.names, losses, strict=True)), "threshold": tau.float().cpu().numpy()}
        row["hits"] = np.array([int(hits[layer.slice].sum()) for layer in self.layout], np.int32)
        row["density"] = density.float().numpy()
        for name, value in row.items():
            self.rows.setdefault(name, []).append(value)
        return float((density * self.sizes).sum() / self.layout.n)

    def arrays(self, start: ConceptNeurons | None) -> dict[str, np.ndarray]:
        """name -> (rounds,) or (rounds, layers), after those of the search it went on from."""
        now = {name: np.array(rows) for name, rows in self.rows.items()}
        now = {name: rows.astype(np.float32) if rows.dtype == float else rows for name, rows in now.items()}
        if start is None:
            return now
        return {
            name: np.concatenate([start.history[name], rows]) for name, rows in now.items() if name in start.history
        }


def _require(ok: bool, given: str, wanted: str) -> None:
    if not ok:
        raise ConeslabError(f"{given}: give {wanted}")
