"""A weight change in compact form: each matrix as its largest singular directions (Custom Diffusion, Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..diffusion.pipelines import Pipeline, require_float
from ..errors import ConeslabError
from .base import Edit
from .timed import UNET, in_steps
from .weights import WeightDelta


@dataclass(frozen=True, eq=False, repr=False)
class LowRankDelta(Edit):
    """A weight change as products of thin matrices: name -> (left (out, rank), right (rank, in)); an edit.

    history: name -> numbers, one per step, of what was trained in this form.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    fingerprint: str
    subject: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(left.nbytes + right.nbytes for left, right in self.factors.values())

    @property
    def ranks(self) -> dict[str, int]:
        return {name: left.shape[1] for name, (left, _) in self.factors.items()}

    def __repr__(self) -> str:
        ranks = list(self.ranks.values())
        size = f"{len(ranks)} layers, ranks {min(ranks)} to {max(ranks)}, {self.nbytes:,} bytes"
        return f"LowRankDelta({self.subject!r}: {size})"

    def dense(self) -> WeightDelta:
        """The product: a `WeightDelta`."""
        deltas = {name: left.float() @ right.float() for name, (left, right) in self.factors.items()}
        facts: dict[str, Any] = {"subject": self.subject, "settings": self.settings, "history": self.history}
        return WeightDelta(deltas, self.fingerprint, **facts)

    @property
    def acts_on(self) -> frozenset[str]:
        return frozenset((UNET,))

    @in_steps
    def applied(
        self, pipe: Pipeline, dose: float = 1.0, *, check_model: bool = True
    ) -> AbstractContextManager[Pipeline]:
        """See `WeightDelta.applied`."""
        return self.dense().applied(pipe, dose, check_model=check_model)

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for name, (left, right) in self.factors.items():
            tensors |= {f"left:{name}": left, f"right:{name}": right}
        facts: dict[str, Any] = {"fingerprint": self.fingerprint, "subject": self.subject}
        history = {key: list(values) for key, values in self.history.items()}
        return tensors, {**facts, "settings": dict(self.settings), "history": history}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> LowRankDelta:
        names = [name.removeprefix("left:") for name in tensors if name.startswith("left:")]
        return cls({name: (tensors[f"left:{name}"], tensors[f"right:{name}"]) for name in names}, **description)


def compress(edit: WeightDelta, *, energy: float = 0.6, dtype: torch.dtype = torch.float32) -> LowRankDelta:
    """Keep the leading singular values of every ΔW up to a share of their energy (Custom Diffusion, Sec. 4.3).

    energy: share of the sum of squared singular values, in (0, 1]. dtype: of the stored factors.
    Raises ConeslabError for an energy out of range, or a delta of weights that are not matrices.
    """
    checks.of_kind("edit", edit, WeightDelta)
    energy, dtype = checks.number("energy", energy, "(0, 1]", kind="share"), require_float(dtype)
    factors = {}
    for name, delta in edit.deltas.items():
        if delta.ndim != 2:
            raise ConeslabError(f"{name} is {tuple(delta.shape)}: only matrices have a rank; compress a K-V delta")
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        kept = (values.square().cumsum(0) / values.square().sum().clamp_min(1e-300)).clamp(max=1.0)
        rank = int((kept < energy - 1e-12).sum()) + 1 if values.any() else 1
        root = values[:rank].sqrt()
        thin = left[:, :rank] * root, root[:, None] * right[:rank]
        factors[name] = (thin[0].to(dtype).contiguous(), thin[1].to(dtype).contiguous())
    return LowRankDelta(factors, edit.fingerprint, edit.subject, {**edit.settings, "energy": energy}, edit.history)
