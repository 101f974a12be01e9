"""Edits that are on during a part of the sampling only: when does a concept enter, and until when can it be stopped?

Each time the U-Net is called, its timestep says whether an edit is on (`diffusion.steps`): then the edit is put on for
that one call. Between calls the pipeline is as it would be without it, so that nothing has to know where one run ends
and the next begins.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial, update_wrapper
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import checks
from ..blocks import Block, Made, Nested, Place, attribute
from ..diffusion.checks import require_pipeline
from ..diffusion.encoding import encode_ids
from ..diffusion.kvspace import unet_of
from ..diffusion.pipelines import Pipeline
from ..diffusion.precision import without_compiling
from ..diffusion.steps import KnownTexts, share_of, within
from ..errors import ConeslabError

TEXT, UNET = "text encoder", "U-Net"
ALL_PARTS = frozenset((TEXT, UNET))

Apply: TypeAlias = Callable[..., AbstractContextManager[Pipeline]]


def require_dose(dose: float) -> float:
    """A dose, see `checks.dose`. Raises ArgumentError for any other number."""
    return checks.dose("dose", dose)


def in_steps(applied: Apply) -> Apply:
    """Give an edit's `applied(pipe, dose, check_model=...)` the option `steps`, and check what all of them take."""

    def in_some(
        self: Any,
        pipe: Pipeline,
        dose: float = 1.0,
        *,
        steps: tuple[float, float] | None = None,
        check_model: bool = True,
    ) -> AbstractContextManager[Pipeline]:
        if steps is None:
            require_pipeline(pipe)
            require_dose(dose)
            return applied(self, pipe, dose, check_model=check_model)
        return applied_in(partial(applied, self), self, pipe, dose, steps, check_model=check_model)

    update_wrapper(in_some, applied)
    del in_some.__wrapped__  # type: ignore[attr-defined]  # its signature has no steps
    return in_some


def applied_in(
    apply: Apply,
    edit: Any,
    pipe: Pipeline,
    dose: float,
    steps: tuple[float, float],
    *,
    check_model: bool = True,
) -> AbstractContextManager[Pipeline]:
    """An edit that is on from one share of the schedule to before another. apply: puts it on a pipeline at a dose."""
    require_pipeline(pipe)
    require_dose(dose)
    shares = checks.interval("share of the schedule (steps)", steps)
    knows = "check_model" in inspect.signature(apply).parameters
    own = partial(apply, pipe, check_model=check_model) if knows else partial(apply, pipe)
    if shares == (0.0, 1.0):
        return own(dose)
    again = partial(apply, pipe, check_model=False) if knows else own
    return _Timed(_Timing(pipe, own, again, dose, shares, getattr(edit, "acts_on", ALL_PARTS)))


class _Timed(Block):
    """Puts an edit on at each call of the U-Net whose timestep lies in its share of the schedule."""

    def __init__(self, timing: _Timing) -> None:
        super().__init__(partial(_forwards, timing), pipe=timing.pipe)
        self._timing = timing

    def open(self, made: Made) -> Any:
        timing, pipe = self._timing, self._pipe
        with Nested(lambda: [timing.first(timing.dose)]):  # raises what the edit raises, before anything is done
            pass
        made.enter(without_compiling(pipe))
        if TEXT in timing.acts_on:
            # its tokens are known all the time, as what they started from
            made.enter(Nested(lambda: [timing.first(0.0)]))
            timing.texts = KnownTexts()
            made.hook(pipe.text_encoder, "forward_hook", timing.texts.after_text)
        made.undo(timing.stop)
        timing.stopped = False
        return super().open(made)


def _forwards(timing: _Timing) -> Iterator[tuple[Place, Any]]:
    unet = unet_of(timing.pipe)
    yield attribute(unet, "forward"), _Forward(timing, unet.forward)


class _Timing:
    """An edit with the share of the schedule in which it is on."""

    def __init__(
        self,
        pipe: Pipeline,
        first: Callable[[float], AbstractContextManager],
        again: Callable[[float], AbstractContextManager],
        dose: float,
        shares: tuple[float, float],
        acts_on: frozenset[str],
    ) -> None:
        self.pipe, self.first, self.again = pipe, first, again
        self.dose, self.shares, self.acts_on = dose, shares, acts_on
        self.texts = KnownTexts()
        self.stopped = True  # one that was left before another that was entered later is still asked

    def stop(self) -> None:
        self.stopped = True

    def is_on(self, timestep: Any) -> bool:
        """Whether the edit is on at a timestep. Raises ConeslabError for several on both sides."""
        if self.stopped:
            return False
        inside = within(share_of(self.pipe.scheduler, timestep), *self.shares)
        if inside.any() != inside.all():
            raise ConeslabError(
                f"an edit is on in the share {self.shares} of the schedule, and the timesteps of one batch lie within "
                "and without: call the U-Net with one timestep at a time, or apply the edit without steps"
            )
        return bool(inside.all())

    def block(self) -> AbstractContextManager:
        return self.again(self.dose)


class _Forward:
    """The `forward` of a U-Net under a timed edit. Those of several are a chain, whose last one does the work."""

    def __init__(self, timing: _Timing, own: Callable[..., Any]) -> None:
        self._timing, self._own = timing, own
        self._spoken: OrderedDict[tuple, Tensor] = OrderedDict()  # text under the edits that are on

    def __call__(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        chain: tuple[_Timing, ...] = (self._timing, *kwargs.pop(_INNER, ()))
        if isinstance(self._own, _Forward):
            return self._own(sample, timestep, encoder_hidden_states, *args, **{_INNER: chain}, **kwargs)
        on = [one for one in chain if one.is_on(timestep)]
        text = self._text(encoder_hidden_states, [one for one in on if TEXT in one.acts_on])
        with Nested(lambda: (one.block() for one in on if UNET in one.acts_on)):
            return self._own(sample, timestep, text, *args, **kwargs)

    @torch.no_grad()
    def _text(self, text: Tensor, on: list[_Timing]) -> Tensor:
        """A batch of texts (n, tokens, width) as the text encoder gives them under the edits that are on."""
        if not on:
            return text
        pipe, known = on[0].pipe, on[0].texts
        keys = [(KnownTexts.key(row), *on) for row in text]  # themselves, not their ids, which others get after them
        new = {key: known.ids(row) for key, row in zip(keys, text, strict=True) if key not in self._spoken}
        if None in new.values():
            raise ConeslabError(
                "an edit that acts on words is on in a part of the steps, and the words of this text are not known: "
                "give prompts as text, inside the block, and no embeddings that were computed before or changed since"
            )
        if new:
            with Nested(lambda: (one.block() for one in on)):
                spoken = encode_ids(pipe, torch.tensor(list(new.values()), device=pipe.text_encoder.device))
            self._spoken |= zip(new, spoken, strict=True)
        found = torch.stack([self._spoken[key] for key in keys]).to(text)
        while len(self._spoken) > _REMEMBERED:
            self._spoken.popitem(last=False)
        return found


_INNER = "_timed_edits_entered_later"
_REMEMBERED = 256
