"""Concept neurons: find them, keep them, shut them (Cones, arXiv 2303.05125).

No code was ever published for Cones; this is an independent reimplementation. Where the paper leaves room, the
docstring says "a reading". The controls that belong beside a search are in `controls.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .concept_loss import ConceptSubject, KVGradient, concept_pairs, draws
from .edits import Change, StoredEdit, model_fingerprint, require_dose, require_model, swapped
from .errors import ConeslabError, MismatchError
from .kvspace import KVLayout, KVSpace


@dataclass(frozen=True)
class Overlap:
    """How far two sets of shut neurons coincide, beside what chance would give.

    Chance: two random sets with the same number of neurons in every layer as these (the random control's chance).
    """

    intersection: int
    union: int
    expected_intersection: float

    @property
    def jaccard(self) -> float:
        """Intersection over union, in [0, 1]; 0 for two empty sets."""
        return self.intersection / self.union if self.union else 0.0

    @property
    def expected_jaccard(self) -> float:
        """Jaccard index at the intersection expected by chance."""
        union = self.union + self.intersection - self.expected_intersection
        return self.expected_intersection / union if union else 0.0

    def __repr__(self) -> str:
        return (
            f"Overlap({self.intersection:,} of {self.union:,} neurons: Jaccard {self.jaccard:.3f}, "
            f"{self.expected_jaccard:.3f} by chance)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class ConceptNeurons(StoredEdit):
    """The neurons of a concept: a sparse, immutable mask on the K-V weights, and an edit.

    layout: the K-V space, n neurons; indices: (k,) sorted, read-only, the neurons whose scale is not 1; scales: (k,)
    float32 in [0, 1], read-only; fingerprint: of the model's K-V weights; cut: a neuron whose scale lies below it is
    shut in the binary mask; settings: of the search; history: name -> array with one row a round.
    Raises ConeslabError for indices that are out of range, unsorted or repeated, and scales that are not in [0, 1].

        found = find_concept_neurons(pipe, cat)
        with found.binary().applied(pipe):
            images = pipe(cat.prompts[0]).images
    """

    layout: KVLayout
    indices: np.ndarray
    scales: np.ndarray
    fingerprint: str
    subject: str = ""
    cut: float = 0.5
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        indices, scales = np.array(self.indices), np.array(self.scales, dtype=np.float32)
        if indices.ndim != 1 or scales.shape != indices.shape:
            raise ConeslabError(
                f"got indices {indices.shape} and scales {scales.shape}: give two vectors of one length"
            )
        if len(indices) and not np.issubdtype(indices.dtype, np.integer):
            raise ConeslabError(f"indices are {indices.dtype}, expected integers")
        if len(indices) and (indices[0] < 0 or indices[-1] >= self.n or (np.diff(indices) <= 0).any()):
            raise ConeslabError(
                f"indices run from {indices.min()} to {indices.max()}: expected them in [0, {self.n}), ascending, "
                "each once"
            )
        if not ((scales >= 0) & (scales <= 1)).all():  # NaN fails both
            raise ConeslabError("scales must be numbers in [0, 1]: 1 leaves a neuron as it is, 0 shuts it")
        if not 0 < self.cut <= 1:
            raise ConeslabError(f"cut is {self.cut}: give a scale in (0, 1], below which a neuron counts as shut")
        history = {name: _read_only(np.array(rows)) for name, rows in self.history.items()}
        small = np.int32 if self.n <= np.iinfo(np.int32).max else np.int64
        for name, value in (
            ("indices", _read_only(indices.astype(small))),
            ("scales", _read_only(scales)),
            ("settings", MappingProxyType(dict(self.settings))),
            ("history", MappingProxyType(history)),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def from_scale(cls, scale: Tensor, layout: KVLayout, fingerprint: str, **about: Any) -> ConceptNeurons:
        """Make neurons from a scale for every neuron of the space, (n,); `about` as in the constructor."""
        layout.require_length(scale)
        dense = scale.detach().to("cpu", torch.float32).numpy()
        indices = np.flatnonzero(dense != 1)
        return cls(layout, indices, dense[indices], fingerprint, **about)

    # --- what it is ---

    @property
    def n(self) -> int:
        """Neurons in the K-V space."""
        return self.layout.n

    def scale(self) -> Tensor:
        """The scale of every neuron, (n,) float32, a new tensor."""
        dense = torch.ones(self.n)
        dense[torch.tensor(self.indices, dtype=torch.long)] = torch.tensor(self.scales)
        return dense

    def shut(self, cut: float | None = None) -> np.ndarray:
        """Indices of the shut neurons, whose scale is below `cut` (default: the mask's own), ascending."""
        return self.indices[self.scales < (self.cut if cut is None else cut)]

    def mask(self, cut: float | None = None) -> Tensor:
        """Bool (n,): which neurons are shut."""
        dense = torch.zeros(self.n, dtype=torch.bool)
        dense[torch.tensor(self.shut(cut), dtype=torch.long)] = True
        return dense

    @property
    def density(self) -> float:
        """Share of the K-V weights that are shut."""
        return len(self.shut()) / self.n

    def counts(self, cut: float | None = None) -> np.ndarray:
        """Number of shut neurons in every layer, (layers,), in the order of `layout`."""
        edges = [layer.start for layer in self.layout] + [self.n]
        return np.diff(np.searchsorted(self.shut(cut), edges))

    def per_layer(self) -> list[dict[str, Any]]:
        """A table with one row a layer: label, block, kind, resolution, neurons, shut, density."""
        return [
            {
                "layer": layer.label,
                "block": layer.block,
                "kind": layer.kind,
                "resolution": layer.resolution,
                "neurons": layer.size,
                "shut": int(count),
                "density": count / layer.size,
            }
            for layer, count in zip(self.layout, self.counts(), strict=True)
        ]

    def overlap(self, other: ConceptNeurons) -> Overlap:
        """Compare the shut neurons of two masks. Raises MismatchError if their K-V spaces differ."""
        if self.layout != other.layout:
            raise MismatchError(
                f"these masks are of K-V spaces with {self.n:,} and {other.n:,} neurons: not comparable"
            )
        both = len(np.intersect1d(self.shut(), other.shut(), assume_unique=True))
        sizes = np.array([layer.size for layer in self.layout])
        chance = float((self.counts() * (other.counts() / sizes)).sum())
        return Overlap(both, len(self.shut()) + len(other.shut()) - both, chance)

    def binary(self, cut: float | None = None) -> ConceptNeurons:
        """The mask with its shut neurons at 0 and all others at 1."""
        shut = self.shut(cut)
        return replace(
            self,
            indices=shut,
            scales=np.zeros(len(shut), np.float32),
            cut=self.cut if cut is None else cut,
            settings=dict(self.settings) | {"precision": "binary"},
        )

    def __len__(self) -> int:
        """Number of neurons whose scale is not 1."""
        return len(self.indices)

    def __eq__(self, other: object) -> bool:
        """Same neurons at the same scales, found on the same model."""
        return isinstance(other, ConceptNeurons) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> str:
        digest = hashlib.sha256(f"{self.fingerprint} {self.layout} ".encode())
        digest.update(self.indices.tobytes() + self.scales.tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return (
            f"ConceptNeurons({self.subject!r}: {len(self.shut()):,} of {self.n:,} neurons shut ({self.density:.2%}), "
            f"{len(self):,} scaled, model {self.fingerprint[:8]})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{row['layer']}</td><td>{row['resolution']}×{row['resolution']}</td><td>{row['neurons']:,}</td>"
            f"<td>{row['shut']:,}</td><td>{row['density']:.2%}</td></tr>"
            for row in self.per_layer()
        )
        head = "<tr><th>layer</th><th>grid</th><th>neurons</th><th>shut</th><th>density</th></tr>"
        return (
            f"<p>Concept neurons of <b>{self.subject}</b>: {len(self.shut()):,} of {self.n:,} shut "
            f"({self.density:.2%})</p><details><summary>layer by layer</summary><table>{head}{rows}</table></details>"
        )

    # --- what it does ---

    @property
    def nbytes(self) -> int:
        """Bytes of indices and scales; a binary mask stores indices alone."""
        return self.indices.nbytes + (self.scales.nbytes if self.scales.any() else 0)

    def applied(self, pipe: Any, dose: float = 1.0, *, check_model: bool = True) -> AbstractContextManager[Any]:
        """Scale the pipeline's K-V weights for the length of a block (Cones, Sec. 3.1); gives the pipeline.

        dose: 0 leaves the weights as they are, 1 is the whole mask; a scale s acts as 1 − dose · (1 − s).
        Masks nest: their scales multiply. check_model=False tries a mask on another model of the same shape.
        Raises MismatchError, with the pipeline untouched, for a mask of another model or shape.
        """
        require_dose(dose)

        def changes() -> Iterator[Change]:
            space = KVSpace(pipe)
            if space.layout != self.layout:
                raise MismatchError(
                    f"the mask of {self.subject!r} covers {self.n:,} neurons in {len(self.layout)} layers, this "
                    f"pipeline has {space.n:,} in {len(space.layers)}: load the model it was found on, or find "
                    "neurons again"
                )
            if check_model:
                require_model(self.fingerprint, pipe, f"the mask of {self.subject!r}")
            for layer in self.layout:
                first, last = np.searchsorted(self.indices, [layer.start, layer.start + layer.size])
                if first == last:
                    continue
                weight = space.parameters[layer.name]
                new = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).flatten().clone()
                where = torch.tensor(self.indices[first:last] - layer.start, dtype=torch.long, device=new.device)
                scale = torch.tensor(self.scales[first:last]).to(new)
                new[where] *= 1 - dose * (1 - scale)
                yield weight, new.view(layer.shape)

        return swapped(changes, pipe)

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"indices": torch.tensor(self.indices)}
        if self.scales.any():
            tensors["scales"] = torch.tensor(self.scales)
        tensors |= {f"history.{name}": torch.tensor(rows) for name, rows in self.history.items()}
        description = {"fingerprint": self.fingerprint, "subject": self.subject, "cut": self.cut}
        return tensors, {**description, "settings": dict(self.settings), "layers": self.layout.as_json()}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> ConceptNeurons:
        layout = KVLayout.from_json(description.pop("layers"))
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        indices = arrays.pop("indices")
        scales = arrays.pop("scales", np.zeros(len(indices), np.float32))
        history = {name.removeprefix("history."): rows for name, rows in arrays.items()}
        return cls(layout, indices, scales, history=history, **description)


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
    pipe: Any,
    subject: ConceptSubject,
    *,
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
    _require(sign in (1, -1), f"sign is {sign}", "1, or -1 for the reversed control")
    settings: dict[str, Any] = {
        name: value
        for name, value in locals().items()
        if isinstance(value, int | float | None) and name not in ("chunk", "progress", "start", "callback", "dtype")
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
    average, history = torch.zeros_like(theta), _History(layout, len(pairs))
    samples = draws(pipe, pairs, seed=seed)
    for _ in range(len(start.history.get("loss", ())) if start is not None else 0):
        next(samples)
    bar = tqdm(range(rounds), desc=f"neurons of {subject.name}", disable=not progress)
    for number in bar:
        losses, now = gradient(scale * theta, next(samples))
        average.mul_(momentum).add_(now, alpha=1 - momentum)
        unbiased = average / (1 - momentum ** (number + 1))
        criterion = sign * scale * theta * unbiased
        if threshold is None:
            tau = quantiles(criterion, layout, threshold_quantile, per_layer=per_layer).clamp_(min=0)
        else:
            tau = torch.full((len(layout),), threshold, dtype=theta.dtype, device=theta.device)
        hits = criterion > history.spread(tau)
        scale = torch.where(hits, scale * (1 - rate), scale)
        loss = sum(pair.weight * part for pair, part in zip(pairs, losses, strict=True))
        density = history.add(loss, losses, hits, tau, scale < cut)
        bar.set_postfix(loss=f"{loss:.4f}", shut=f"{density:.2%}")
        if callback is not None:
            copies = (x.detach().clone().cpu() for x in (scale, unbiased, hits))
            callback(number, SearchState(number, rounds, loss, density, *copies))
    about = {"subject": subject.name, "cut": cut, "settings": settings}
    return ConceptNeurons.from_scale(scale, layout, model, history=history.arrays(start), **about)


def quantiles(values: Tensor, layout: KVLayout, share: float, *, per_layer: bool = True) -> Tensor:
    """The value that a `share` of the neurons do not exceed, in every layer: (layers,).

    values: (n,). Without `per_layer`, the value of all layers together, repeated.
    """

    def quantile(part: Tensor) -> Tensor:
        return part.kthvalue(min(len(part), max(1, math.ceil(share * len(part))))).values

    if not per_layer:
        return quantile(values).expand(len(layout)).clone()
    return torch.stack([quantile(values[layer.slice]) for layer in layout])


class _History:
    """Losses, hits, thresholds and densities, round by round and layer by layer."""

    def __init__(self, layout: KVLayout, pairs: int) -> None:
        self.layout, self.sizes = layout, torch.tensor([layer.size for layer in layout])
        self.names = ("subject_loss", "prior_loss")[:pairs]
        self.rows: dict[str, list] = {}

    def spread(self, per_layer: Tensor) -> Tensor:
        """(layers,) -> (n,): every neuron gets its layer's value."""
        return per_layer.repeat_interleave(self.sizes.to(per_layer.device))

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


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _require(ok: bool, given: str, wanted: str) -> None:
    if not ok:
        raise ConeslabError(f"{given}: give {wanted}")
