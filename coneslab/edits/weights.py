"""Weights changed inside a `with` block, and the dense weight change.

`swapped` restores every weight bit for bit, whatever ends the block; fingerprints say which model an edit belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..blocks import Block, Made, Place, before_blocks
from ..diffusion.checks import fuse_again, require_own_projections, require_pipeline
from ..diffusion.kvspace import KVSpace, unet_of
from ..diffusion.pipelines import Pipeline
from ..diffusion.pipelines import fingerprint as fingerprint_of
from ..errors import ConeslabError, MismatchError
from .base import Edit
from .timed import UNET, in_steps

Change = tuple[Tensor, Tensor]


def weight(parameter: Tensor) -> Place:
    """The values of a parameter, written in place, so that optimisers, aliases and compiled modules see them."""
    return Place(parameter, "values", lambda: parameter.detach().clone(), lambda new: parameter.detach().copy_(new))


class swapped(Block):
    """Give parameters other values inside a `with` block, and restore the old ones bit for bit.

    changes: pairs of a parameter and its new values of the same shape, or a function that returns them, called on
    entry. value: what `with ... as` gives; pipe: the pipeline they belong to; if its projections are fused inside the
    block, they are fused again from the restored weights. See `Block`.
    Raises MismatchError for a shape that does not fit.
    """

    def __init__(
        self,
        changes: Iterable[Change] | Callable[[], Iterable[Change]],
        value: Any = None,
        *,
        pipe: Pipeline | None = None,
    ) -> None:
        if pipe is not None:
            require_pipeline(pipe)

        def places() -> Iterator[tuple[Place, Tensor]]:
            for parameter, new in changes() if callable(changes) else changes:
                if parameter.shape != new.shape:
                    raise MismatchError(
                        f"a parameter of shape {tuple(parameter.shape)} cannot take values of shape {tuple(new.shape)}"
                    )
                yield weight(parameter), new

        super().__init__(places, value, pipe=pipe)

    def open(self, made: Made) -> Any:
        if self._pipe is not None:
            made.undo(partial(fuse_again, unet_of(self._pipe)))  # undone last
        return super().open(made)


def untouched(parameter: Tensor) -> Tensor:
    """The values a parameter had before any open block changed it (the parameter itself if none did)."""
    return before_blocks(replace(weight(parameter), get=lambda: parameter))


def model_fingerprint(pipe: Pipeline) -> str:
    """Fingerprint of a pipeline's K-V weights without the edits now applied: says which model an edit belongs to."""
    require_pipeline(pipe)
    return fingerprint_of({name: untouched(weight) for name, weight in KVSpace(pipe).parameters.items()})


def require_model(expected: str, pipe: Pipeline, what: str) -> None:
    """Raise MismatchError unless `expected` is the fingerprint of the pipeline's model, ignoring edits."""
    given = model_fingerprint(pipe)
    if given != expected:
        raise MismatchError(
            f"{what} belongs to model {expected[:8]}…, this pipeline is {given[:8]}…: load the model it was found on, "
            "or find it again on this one (fingerprints cover the exact K-V weights, so their precision too)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class WeightDelta(Edit):
    """A dense change of some of the U-Net's weights: W + dose · ΔW, as fine-tuning makes it.

    deltas: name of a weight inside the U-Net -> its change, float32, of the same shape; fingerprint: of the K-V
    weights of the model it was made for; settings and history: how it was made.
    Raises ConeslabError if a delta is not finite.
    """

    deltas: Mapping[str, Tensor]
    fingerprint: str
    subject: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = checks.mapping("deltas", self.deltas, least=0)
        for name, delta in given.items():
            checks.of_kind(f"the delta of {name}", delta, Tensor)
        checks.text("fingerprint", self.fingerprint)
        checks.text("subject", self.subject, blank=True)
        deltas = {name: delta.detach().to("cpu", torch.float32) for name, delta in given.items()}
        for name, delta in deltas.items():
            if not delta.isfinite().all():
                raise ConeslabError(f"the delta of {name} contains NaN or infinity: tune with a lower learning rate")
        object.__setattr__(self, "deltas", deltas)

    @property
    def nbytes(self) -> int:
        return sum(delta.nbytes for delta in self.deltas.values())

    def __repr__(self) -> str:
        count = sum(delta.numel() for delta in self.deltas.values())
        where = f"{count:,} weights in {len(self.deltas)} layers, model {self.fingerprint[:8]}"
        return f"WeightDelta({self.subject!r}: {where})"

    @property
    def acts_on(self) -> frozenset[str]:
        return frozenset((UNET,))

    @in_steps
    def applied(
        self, pipe: Pipeline, dose: float = 1.0, *, check_model: bool = True
    ) -> AbstractContextManager[Pipeline]:
        """Add dose · ΔW to the weights inside a block (`with delta.applied(pipe): ...`).

        check_model=False allows another model of the same shapes.
        Raises MismatchError, with the pipeline untouched, if model or shapes differ.
        """

        def changes() -> Iterator[Change]:
            require_own_projections(unet_of(pipe))
            if check_model:
                require_model(self.fingerprint, pipe, "this weight delta")
            weights = dict(unet_of(pipe).named_parameters())
            for name, delta in self.deltas.items():
                if name not in weights:
                    raise MismatchError(f"the U-Net has no weight {name}: this delta was made for another one")
                weight = weights[name].detach()
                if weight.shape != delta.shape:
                    raise MismatchError(f"{name} is {tuple(weight.shape)}, the delta is {tuple(delta.shape)}")
                precision = torch.promote_types(weight.dtype, torch.float32)
                yield weights[name], weight.to(precision) + dose * delta.to(weight.device, precision)

        return swapped(changes, pipe=pipe)

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        description = {"fingerprint": self.fingerprint, "subject": self.subject}
        history = {key: list(values) for key, values in self.history.items()}
        return dict(self.deltas), {**description, "settings": dict(self.settings), "history": history}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> WeightDelta:
        return cls(tensors, **description)
