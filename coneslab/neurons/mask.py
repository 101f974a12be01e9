"""Concept neurons: a mask on the K-V weights, to store, apply and combine (Cones, arXiv 2303.05125).

No code was ever published for Cones; this is an independent reimplementation. Where the paper leaves a choice open, the
docstring says "a reading". The search that finds them is in `search.py`, the format of mask files in `encoding.py`.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..blocks import Block
from ..diffusion.checks import require_pipeline
from ..diffusion.kvspace import KVLayer, KVLayout, KVSpace
from ..diffusion.pipelines import Pipeline
from ..edits.base import Edit
from ..edits.timed import ALL_PARTS, UNET, in_steps
from ..edits.weights import Change, require_model, swapped
from ..errors import ConeslabError, FileFormatError, MismatchError
from ..files import read_whole, write_whole
from . import encoding
from .scope import Scope, ScopedChange, at_words, word_ids

Update: TypeAlias = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Overlap:
    """How far two sets of shut neurons overlap, and how far they would by chance.

    Chance: two random sets with as many neurons in each layer (as in the random control).
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
class ConceptNeurons(Edit):
    """The neurons of a concept: a sparse, immutable mask on the K-V weights, and an edit.

    layout: the K-V space, n neurons; indices: (k,) sorted, read-only, the neurons whose scale is not 1; scales: (k,)
    float32 in [0, 1], read-only; fingerprint: of the model's K-V weights; cut: a neuron whose scale is below it is shut
    in the binary mask; settings: of the search; history: name -> array with one row per round; scope: the words of a
    prompt at which the mask acts, a rare token and its class word, or () for all words, as in the paper.
    Raises ConeslabError for indices that are out of range, unsorted or repeated, and for scales outside [0, 1].
    """

    layout: KVLayout
    indices: np.ndarray
    scales: np.ndarray
    fingerprint: str
    subject: str = ""
    cut: float = 0.5
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, np.ndarray] = field(default_factory=dict)
    scope: Scope = ()

    def __post_init__(self) -> None:
        checks.of_kind("layout", self.layout, KVLayout)
        checks.text("fingerprint", self.fingerprint)
        checks.text("subject", self.subject, blank=True)
        checks.mapping("settings", self.settings, least=0)
        checks.mapping("history", self.history, least=0)
        indices, scales = np.array(self.indices), encoding.numbers("scales", self.scales)
        if indices.ndim != 1 or scales.shape != indices.shape:
            raise ConeslabError(
                f"got indices {indices.shape} and scales {scales.shape}: give two vectors of equal length"
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
        object.__setattr__(self, "cut", checks.number("cut", self.cut, "(0, 1]", kind="scale"))
        history = {name: _read_only(np.array(rows)) for name, rows in self.history.items()}
        small = np.int32 if self.n <= np.iinfo(np.int32).max else np.int64
        for name, value in (
            ("indices", _read_only(indices.astype(small))),
            ("scales", _read_only(scales)),
            ("settings", MappingProxyType(dict(self.settings))),
            ("history", MappingProxyType(history)),
            ("scope", tuple(checks.texts("scope", self.scope, least=0))),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def from_scale(cls, scale: Tensor, layout: KVLayout, fingerprint: str, **facts: Any) -> ConceptNeurons:
        """Make a mask from the scale of every neuron, (n,); `facts` are arguments of the constructor."""
        checks.of_kind("layout", layout, KVLayout).require_length(scale)
        dense = scale.detach().to("cpu", torch.float32).numpy()
        indices = np.flatnonzero(dense != 1)
        return cls(layout, indices, dense[indices], fingerprint, **facts)

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
        below = self.cut if cut is None else checks.number("cut", cut, checks.SHARE, kind="scale")
        return self.indices[self.scales < below]

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
        """A table with one row per layer: label, block, kind, resolution, neurons, shut, density."""
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
        checks.of_kind("other", other, ConceptNeurons)
        if self.layout != other.layout:
            raise MismatchError(
                f"these masks belong to K-V spaces of {self.n:,} and {other.n:,} neurons: compare masks of one model"
            )
        both = len(np.intersect1d(self.shut(), other.shut(), assume_unique=True))
        sizes = np.array([layer.size for layer in self.layout])
        chance = float((self.counts() * (other.counts() / sizes)).sum())
        return Overlap(both, len(self.shut()) + len(other.shut()) - both, chance)

    def to(self, precision: str) -> ConceptNeurons:
        """The mask with its scales rounded to "float32", "float16", "quaternary" or "binary" (`encoding.quantised`).

        Raises ConeslabError for another precision.
        """
        scales = encoding.quantised(self.scales, precision, cut=self.cut)
        left = scales != 1
        settings = dict(self.settings) | {"precision": precision}
        return replace(self, indices=self.indices[left], scales=scales[left], settings=settings)

    def binary(self, cut: float | None = None) -> ConceptNeurons:
        """The mask with its shut neurons at 0 and all others at 1: `to("binary")`, at another cut if given."""
        return (self if cut is None else replace(self, cut=cut)).to("binary")

    def within(self, *, kind: str | None = None, level: int | None = None, block: str | None = None) -> ConceptNeurons:
        """The mask in the layers that match (see `KVLayout.where`); elsewhere the model stays as it is.

        Warns if it has no neuron there.
        """
        kept = self.layout.where(kind=kind, level=level, block=block).numpy()[self.indices]
        if len(kept) and not kept.any():
            checks.warn(f"the mask of {self.subject!r} has no neuron in the layers asked for: nothing is left of it")
        return replace(self, indices=self.indices[kept], scales=self.scales[kept])

    def at(self, *words: str) -> ConceptNeurons:
        """The mask at some words only, a rare token and the class word after it; at all words again if none is given.

        >>> space = KVSpace(coneslab.load("tiny"))
        >>> ConceptNeurons(space.layout, [0], [0.0], space.fingerprint(), subject="cat").at("sks", "cat")
        ConceptNeurons('cat': 1 of ... neurons shut (0.00%), 1 scaled, model ..., at 'sks cat' only)
        """
        return replace(self, scope=words)

    def __len__(self) -> int:
        """Number of neurons whose scale is not 1."""
        return len(self.indices)

    def __eq__(self, other: object) -> bool:
        """Same neurons at the same scales, found on the same model."""
        return isinstance(other, ConceptNeurons) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> str:
        digest = hashlib.sha256(f"{self.fingerprint} {self.layout} {self.scope} ".encode())
        digest.update(self.indices.tobytes() + self.scales.tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return (
            f"ConceptNeurons({self.subject!r}: {len(self.shut()):,} of {self.n:,} neurons shut ({self.density:.2%}), "
            f"{len(self):,} scaled, model {self.fingerprint[:8]}{self._where})"
        )

    @property
    def _where(self) -> str:
        return f", at {' '.join(self.scope)!r} only" if self.scope else ""

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(row['layer'])}</td><td>{row['resolution']}×{row['resolution']}</td><td>{row['neurons']:,}</td>"
            f"<td>{row['shut']:,}</td><td>{row['density']:.2%}</td></tr>"
            for row in self.per_layer()
        )
        head = "<tr><th>layer</th><th>grid</th><th>neurons</th><th>shut</th><th>density</th></tr>"
        return (
            f"<p>Concept neurons of <b>{html.escape(self.subject)}</b>: {len(self.shut()):,} of {self.n:,} shut "
            f"({self.density:.2%})</p><details><summary>layer by layer</summary><table>{head}{rows}</table></details>"
        )

    # --- what it does ---

    @property
    def nbytes(self) -> int:
        """Bytes of indices and scales; a binary mask stores indices alone."""
        return self.indices.nbytes + (self.scales.nbytes if self.scales.any() else 0)

    @property
    def acts_on(self) -> frozenset[str]:
        return ALL_PARTS if self.scope else frozenset((UNET,))

    @property
    def in_weights(self) -> bool:
        return not self.scope

    @in_steps
    def applied(
        self, pipe: Pipeline, dose: float = 1.0, *, check_model: bool = True
    ) -> AbstractContextManager[Pipeline]:
        """Scale the pipeline's K-V weights inside a `with` block, which gives the pipeline (Cones, Sec. 3.1).

        dose: 0 leaves the weights as they are, 1 is the whole mask; a scale s acts as 1 − dose · (1 − s).
        Masks nest: their scales multiply. check_model=False allows a mask on another model of the same shape.
        With a scope, the weights stay as they are, and only project the words of the scope when scaled: see
        `scope.at_words`.
        Raises MismatchError, with the pipeline untouched, for a mask of another model or shape.

        >>> pipe = coneslab.load("tiny")
        >>> space = KVSpace(pipe)
        >>> found = ConceptNeurons(space.layout, [0, 1], [0.0, 0.5], space.fingerprint())
        >>> before = space.gather()
        >>> with found.applied(pipe):
        ...     (space.gather() / before)[:3].tolist()
        [0.0, 0.5, 1.0]
        >>> with found.applied(pipe, dose=0.5):
        ...     (space.gather() / before)[:3].tolist()
        [0.5, 0.75, 1.0]
        >>> torch.equal(space.gather(), before)
        True
        """
        scales = torch.tensor(self.scales)

        def scaled(old: Tensor, part: slice) -> Tensor:
            return old * (1 - dose * (1 - scales[part].to(old)))

        return self.updated(pipe, scaled, dose=dose, check_model=check_model)

    def updated(self, pipe: Pipeline, update: Update, *, dose: float = 1.0, check_model: bool = True) -> Block:
        """A block with the mask's neurons updated, for all words or for those of its scope. update: see `changes`.

        dose: at 0 the words of a scope are projected with all others, so that pictures stay the same to the last bit.
        """
        if not self.scope:
            return swapped(lambda: self.changes(pipe, update, check_model=check_model), pipe=pipe)

        def masks() -> list[ScopedChange]:
            word_ids(pipe.tokenizer, self.scope)
            self._require_fit(KVSpace(pipe), pipe, check_model)
            layers = [layer for layer in self.layout if dose and self._part(layer) is not None]
            filled = {layer.name: partial(self._fill, layer=layer, update=update) for layer in layers}
            return [ScopedChange(self.scope, filled)]

        return at_words(pipe, masks)

    def changes(self, pipe: Pipeline, update: Update, *, check_model: bool = True) -> Iterator[Change]:
        """What `edits.swapped` needs to change this mask's neurons, layer by layer.

        update(old, part) -> new weights, (neurons of the mask in the layer,); part: their slice of `indices`.
        Raises MismatchError for a pipeline of another model or shape.
        """
        space = KVSpace(pipe)
        self._require_fit(space, pipe, check_model)
        for layer in self.layout:
            if self._part(layer) is not None:
                weight = space.parameters[layer.name]
                exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).clone()
                yield weight, self._fill(exact, layer, update)

    def _require_fit(self, space: KVSpace, pipe: Pipeline, check_model: bool) -> None:
        """Raise MismatchError for a pipeline of another shape, or of another model if that is to be checked."""
        if space.layout != self.layout:
            raise MismatchError(
                f"the mask of {self.subject!r} covers {self.n:,} neurons in {len(self.layout)} layers, this "
                f"pipeline has {space.n:,} in {len(space.layers)}: load the model it was found on, or find "
                "neurons again"
            )
        if check_model:
            require_model(self.fingerprint, pipe, f"the mask of {self.subject!r}")

    def _part(self, layer: KVLayer) -> slice | None:
        """The slice of `indices` in a layer; None if it has none."""
        first, last = np.searchsorted(self.indices, [layer.start, layer.start + layer.size])
        return slice(int(first), int(last)) if first < last else None

    def _fill(self, matrix: Tensor, layer: KVLayer, update: Update) -> Tensor:
        """A layer's matrix with its neurons of the mask updated, in place."""
        part = self._part(layer)
        assert part is not None
        flat = matrix.flatten()
        where = torch.tensor(self.indices[part] - layer.start, dtype=torch.long, device=flat.device)
        flat[where] = update(flat[where], part)
        return flat.view(layer.shape)

    def to_bytes(self) -> bytes:
        """The mask in the smallest precision that keeps it exactly, close to the entropy bound (`encoding.encode`).

        It holds fingerprint, subject, cut and scope, but no settings, history or table of layers: a reader takes the
        layers from the model. `save` keeps everything.
        """
        sizes = [layer.size for layer in self.layout]
        facts: dict[str, Any] = {"fingerprint": self.fingerprint, "subject": self.subject, "cut": self.cut}
        return encoding.encode(self.indices, self.scales, sizes, scope=self.scope, **facts)

    @classmethod
    def from_bytes(cls, data: bytes, pipe: Pipeline) -> ConceptNeurons:
        """Read `to_bytes` back, for the pipeline the mask was found on or another of its shape.

        Raises FileFormatError if the data are damaged, or for a model of another shape.
        """
        layout = KVSpace(pipe).layout
        found = encoding.decode(data, [layer.size for layer in layout])
        facts: dict[str, Any] = {"subject": found.subject, "cut": found.cut, "scope": found.scope}
        settings = {"precision": found.precision}
        return cls(layout, found.indices, found.scales, found.fingerprint, settings=settings, **facts)

    def save_mask(self, path: str | Path) -> Path:
        """Write `to_bytes` to a file, a small fraction of the size of what `save` writes."""
        return write_whole(path, self.to_bytes())

    @classmethod
    def load_mask(cls, path: str | Path, pipe: Pipeline) -> ConceptNeurons:
        """Read `save_mask` back: see `from_bytes`. Raises MissingFileError if there is no such file."""
        require_pipeline(pipe)
        data = read_whole(path)
        try:
            return cls.from_bytes(data, pipe)
        except FileFormatError as error:
            raise FileFormatError(f"{path}: {error}") from error

    @property
    def entropy_bound(self) -> float:
        """Least number of bytes for a binary or quaternary mask, given layer densities (`encoding.entropy_bound`)."""
        return encoding.entropy_bound(self.indices, self.scales, [layer.size for layer in self.layout])

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"indices": torch.tensor(self.indices)}
        if self.scales.any():
            tensors["scales"] = torch.tensor(self.scales)
        tensors |= {f"history.{name}": torch.tensor(rows) for name, rows in self.history.items()}
        description: dict[str, Any] = {"fingerprint": self.fingerprint, "subject": self.subject, "cut": self.cut}
        description |= {"scope": list(self.scope)} if self.scope else {}
        return tensors, {**description, "settings": dict(self.settings), "layers": self.layout.as_json()}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> ConceptNeurons:
        layout = KVLayout.from_json(description.pop("layers"))
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        indices = arrays.pop("indices")
        scales = arrays.pop("scales", np.zeros(len(indices), np.float32))
        history = {name.removeprefix("history."): rows for name, rows in arrays.items()}
        return cls(layout, indices, scales, history=history, **description)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
