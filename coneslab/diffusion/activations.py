"""See and change what a U-Net computes on its way, by readable names of its parts and by the step of the sampling.

`watch` keeps what the parts of a U-Net (`unet_sites`) hand on while pictures are drawn, `patch` puts something else in
its place. All the pipeline's own objects stay as they are: `watch` and `patch` hook on to them, and the hooks are gone
when their block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import checks
from ..blocks import Block, Made
from ..errors import ArgumentError, ConeslabError
from .kvspace import unet_of
from .pipelines import Pipeline, require_float
from .precision import without_compiling
from .steps import HALVES, ChosenSteps, Clock, Half, Pass, Steps, chosen_halves, chosen_steps
from .unet_sites import Tap, chosen_sites, sites_of

Key: TypeAlias = tuple[str, int, Half]

# --- watch ----------------------------------------------------------------------------------------------


class Activations(Mapping[Key, Tensor]):
    """What `watch` has kept: activations by site, step and half of the guidance batch.

    `seen["mid", 3, "text"]` is (pictures, ...), with pictures numbered in the order they were drawn, over all calls in
    the block. Steps are numbered as the scheduler's timesteps are, from 0; `timesteps` says which is which. Left out,
    or a slice, they are stacked: `seen["mid"]` is (steps, pictures, ...). The half left out is the prompt's. Tensors
    are on the CPU.
    Raises ArgumentError for what was not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[Key, list[tuple[int, Tensor]]] = {}  # (run, activation) in the order they were drawn
        self._timesteps: dict[int, dict[int, float]] = {}  # run -> step -> timestep
        self.nbytes = 0

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site for site, _, _ in self._kept))

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of the steps kept."""
        return tuple(sorted({step for _, step, _ in self._kept}))

    @property
    def timesteps(self) -> dict[int, float]:
        """Step -> timestep. Raises ConeslabError if runs have different ones."""
        found: dict[int, float] = {}
        for run, times in self._timesteps.items():
            for step, timestep in times.items():
                if found.setdefault(step, timestep) != timestep:
                    raise ConeslabError(
                        f"step {step} is timestep {found[step]:g} in one run and {timestep:g} in run {run}: watch runs "
                        "of different schedules in blocks of their own"
                    )
        return dict(sorted(found.items()))

    @property
    def halves(self) -> tuple[Half, ...]:
        return tuple(half for half in HALVES if any(half == own for _, _, own in self._kept))

    @property
    def pictures(self) -> int:
        """How many pictures were drawn, from the first site and step kept."""
        return max((sum(len(part) for _, part in parts) for parts in self._kept.values()), default=0)

    def __getitem__(self, key: str | tuple) -> Tensor:
        site, steps, half = self._meant(key)
        if isinstance(steps, int):
            return self._at((site, steps, half))
        return torch.stack([self._at((site, step, half)) for step in steps])

    def _meant(self, key: Any) -> tuple[str, int | list[int], Half]:
        """A whole key from one that may leave out the steps, and the half."""
        self._require_any()
        site, *rest = key if isinstance(key, tuple) else (key,)
        if len(rest) > 2:
            raise ArgumentError(
                f"got {checks.shown(key)}: give a site, a step and a half, as in seen['mid', 3, 'text']"
            )
        checks.choice("site", site, self.sites)
        half = checks.choice(
            "half", rest[1] if len(rest) > 1 else ("text" if "text" in self.halves else "empty"), HALVES
        )
        held = sorted({step for own, step, other in self._kept if (own, other) == (site, half)})
        if not held:
            raise ArgumentError(f"half is {half!r}, which was not kept of {site!r}: there is {', '.join(self.halves)}")
        if not rest or isinstance(rest[0], slice):
            asked = rest[0] if rest else slice(None)
            steps = [step for step in held if step in range(held[-1] + 1)[asked]]
            if not steps:
                raise ArgumentError(f"no step is left of {_ranges(held)} for {asked}: choose fewer conditions")
            return site, steps, half
        step = checks.count("step", rest[0], least=-MOST_STEPS)
        step = held[step] if -len(held) <= step < 0 else step
        return site, checks.choice("step", step, held), half

    def _at(self, key: Key) -> Tensor:
        parts = self._kept[key]
        self.timesteps  # noqa: B018  # raises if runs have different ones
        if len({part.shape[1:] for _, part in parts}) > 1 or len({run for run, _ in parts}) < len(self._timesteps):
            raise ConeslabError(
                f"not every run in the block has step {key[1]} of {key[0]!r} in one shape: watch runs of different "
                "schedules or sizes in blocks of their own"
            )
        return torch.cat([part for _, part in parts])

    def _require_any(self) -> None:
        if not self._kept:
            raise ConeslabError(
                "nothing was kept: was a picture drawn inside the block, with this pipeline's own U-Net, and did the "
                "run come to one of the steps that were asked for?"
            )

    def __contains__(self, key: object) -> bool:
        return key in self._kept or key in self.sites

    def __iter__(self) -> Iterator[Key]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        if not self._kept:
            return "Activations(nothing kept yet)"
        names = ", ".join([*self.sites[:3], *(["…"] if len(self.sites) > 3 else [])])
        return (
            f"Activations({len(self.sites)} sites: {names}; steps {_ranges(self.steps)}; {' and '.join(self.halves)}; "
            f"{self.pictures} pictures; {self.nbytes / 2**20:.1f} MiB)"
        )

    def _keep(self, site: str, now: Pass, half: Half, activation: Tensor) -> None:
        self.nbytes += activation.nbytes
        if self.nbytes > self._max_bytes:
            self._refuse(self.nbytes)
        self._kept.setdefault((site, now.step, half), []).append((now.run, activation))
        self._timesteps.setdefault(now.run, {})[now.step] = now.timestep

    def _refuse(self, nbytes: float, until: str = "so far") -> None:
        raise ConeslabError(
            f"the activations take {nbytes / 2**20:,.1f} MiB {until}, more than max_bytes={self._max_bytes:,}: choose "
            "fewer sites, steps or pictures, one half, dtype=torch.float16, or raise max_bytes"
        )


MOST_STEPS = 10_000


def _ranges(steps: Iterable[int]) -> str:
    """ "0–4, 7" for 0, 1, 2, 3, 4, 7."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


class _Following(Block):
    """A block that acts at sites of a pipeline, at some steps and halves of the batch."""

    def __init__(self, pipe: Pipeline, names: list[str], actor: _Actor, value: Any) -> None:
        super().__init__(value=value, pipe=pipe)
        self._names, self._actor = names, actor

    def open(self, made: Made) -> Any:
        pipe, actor = self._pipe, self._actor
        made.enter(without_compiling(pipe))  # compiled code calls no hooks that come now
        unet = unet_of(pipe)
        found = sites_of(unet)
        actor.clock = Clock(pipe)
        made.hook(unet, "forward_pre_hook", actor.before)
        for name in self._names:
            made.hook(found[name].module, found[name].kind, Tap(found[name].heads, partial(actor.act, name)))
        made.hook(unet, "forward_hook", actor.after)
        return self._value


class _Actor:
    """What the hooks of one block share: which pass it is, and whether it is one of those meant."""

    def __init__(self, steps: ChosenSteps, halves: tuple[Half, ...]) -> None:
        self.clock: Clock | None = None
        self.steps, self.halves = steps, halves
        self.now: Pass | None = None  # None in passes that are not meant

    def before(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        assert self.clock is not None
        self.clock.before(unet, args, kwargs)
        now = self.clock.now
        assert now is not None
        self.steps.require(now.steps)
        self.now = now if self.steps.has(now.step, now.share) else None

    def after(self, unet: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.now = None

    def act(self, name: str, activation: Tensor) -> Tensor | None:
        raise NotImplementedError


class watch(_Following):
    """Keep the activations at some sites while a pipeline draws; `with ... as seen` gives them (`Activations`).

    sites: names or patterns, see `sites` and `chosen_sites`; steps: their numbers, or two shares of the schedule such
    as (0.0, 0.3) (see `coneslab.diffusion.steps`), default all; half: of the guidance batch, "text", "empty" or "both";
    without guidance all is text. dtype: to keep them in, default their own. max_bytes: how much may be kept; after its
    first step a run that would take more is stopped with an error that says how much.
    Pictures are bit for bit those that the U-Net itself draws. (A compiled pipeline computes uncompiled in the block,
    and `generate` without its fast copy.)
    Raises ArgumentError for a site that there is not.

    >>> pipe = coneslab.load("tiny")
    >>> with coneslab.watch(pipe, ["mid", "*cross-attention"], steps=[0, 1]) as seen:
    ...     images = coneslab.generate(pipe, ["a cat", "a dog"], sampler_steps=3)
    >>> seen
    Activations(... sites: down 0 cross-attention, ...; steps 0–1; text and empty; 2 pictures; ... MiB)
    >>> seen["mid", 0, "text"].shape[0], seen["mid"].shape[:2]  # (pictures, ...), (steps, pictures, ...)
    (2, torch.Size([2, 2]))
    """

    def __init__(
        self,
        pipe: Pipeline,
        sites: str | Iterable[str],
        *,
        steps: Steps = None,
        half: str = "both",
        dtype: torch.dtype | None = None,
        max_bytes: int = 2**30,
    ) -> None:
        names = chosen_sites(pipe, sites)
        if dtype is not None:
            require_float(dtype)
        seen = Activations(checks.count("max_bytes", max_bytes, most=2**63))
        super().__init__(pipe, names, _Watcher(chosen_steps(steps), chosen_halves(half), seen, dtype), seen)


class _Watcher(_Actor):
    def __init__(
        self, steps: ChosenSteps, halves: tuple[Half, ...], seen: Activations, dtype: torch.dtype | None
    ) -> None:
        super().__init__(steps, halves)
        self._seen, self._dtype = seen, dtype
        self._before = 0
        self._foreseen: set[int] = set()  # runs whose size has been looked at

    def before(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        super().before(unet, args, kwargs)
        self._before = self._seen.nbytes

    def after(self, unet: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        now, seen = self.now, self._seen
        super().after(unet, args, kwargs, output)
        if now is None or now.run in self._foreseen:
            return
        self._foreseen.add(now.run)
        assert self.clock is not None
        later = sum(self.steps.has(step, share) for step, share in self.clock.later())
        foreseen = seen.nbytes + (seen.nbytes - self._before) * later
        if foreseen > seen._max_bytes:
            seen._refuse(foreseen, "by the end of this run")

    def act(self, name: str, activation: Tensor) -> None:
        for half in self.halves if self.now is not None else ():
            assert self.now is not None
            rows = self.now.rows(half, len(activation))
            if rows is not None:
                kept = activation.detach()[rows].to("cpu", self._dtype or activation.dtype, copy=True).contiguous()
                self._seen._keep(name, self.now, half, kept)


# --- patch ----------------------------------------------------------------------------------------------


class patch(_Following):
    """Change the activations at some sites while a pipeline draws.

    site: a name or pattern, or several. function: takes what the pictures of one half have there, (pictures, ...) (see
    `sites` for the rest), and returns a tensor of the same shape; or `Activations` that were watched, which are put in
    place at the same site, step and half, those of one picture for every picture. steps: as in `watch`; for watched
    activations default those that they hold. half: "text" (all there is without guidance), "empty" or "both", for which
    the function is called once each.
    What several blocks patch goes through their functions in the order they were entered; `watch` sees what the patches
    entered before it have left. Edits and `record_attention` act in the block as elsewhere.
    Raises ArgumentError for a site that there is not; ConeslabError, while drawing, for a result of another shape, and
    for watched activations that do not have the step or as many pictures.

    >>> pipe = coneslab.load("tiny")
    >>> plain = coneslab.generate(pipe, "a cat", sampler_steps=2)
    >>> with coneslab.patch(pipe, "*cross-attention", lambda added: 0 * added):  # deaf to the prompt
    ...     deaf = coneslab.generate(pipe, "a cat", sampler_steps=2)
    >>> deaf == plain, deaf[0].size == plain[0].size
    (False, True)
    """

    def __init__(
        self,
        pipe: Pipeline,
        site: str | Iterable[str],
        function: Callable[[Tensor], Tensor] | Activations,
        *,
        steps: Steps = None,
        half: str = "text",
    ) -> None:
        names, chosen, halves = chosen_sites(pipe, site), chosen_steps(steps), chosen_halves(half)
        if isinstance(function, Activations):
            function._require_any()
            missing = [name for name in names if name not in function.sites]
            if missing:
                raise ArgumentError(
                    f"{', '.join(missing)}: not watched; these activations have {', '.join(function.sites)}"
                )
            chosen = ChosenSteps(frozenset(function.steps)) if steps is None else chosen
        elif not callable(function):
            raise ArgumentError(
                f"function is {checks.shown(function)}: give a function of a tensor, or what was watched"
            )
        super().__init__(pipe, names, _Patcher(chosen, halves, function), pipe)


class _Patcher(_Actor):
    def __init__(self, steps: ChosenSteps, halves: tuple[Half, ...], function: Any) -> None:
        super().__init__(steps, halves)
        self._function = function

    def act(self, name: str, activation: Tensor) -> Tensor | None:
        changed = None
        for half in self.halves if self.now is not None else ():
            assert self.now is not None
            rows = self.now.rows(half, len(activation))
            if rows is not None:
                changed = activation.clone() if changed is None else changed
                changed[rows] = self._new(name, half, activation[rows])
        return changed

    def _new(self, name: str, half: Half, old: Tensor) -> Tensor:
        if isinstance(self._function, Activations):
            return self._watched(name, half, old)
        new = self._function(old)
        if not isinstance(new, Tensor) or new.shape != old.shape:
            raise ConeslabError(
                f"the function that patches {name!r} returned {checks.shown(new)}: return a tensor of the shape it was "
                f"given, {tuple(old.shape)} (pictures first)"
            )
        return new.to(old)

    def _watched(self, name: str, half: Half, old: Tensor) -> Tensor:
        now = self.now
        assert now is not None
        held = self._function[name, now.step, half]
        if len(held) > 1:
            held = held[now.first : now.first + now.pictures]
        if held.shape[1:] != old.shape[1:] or len(held) not in (1, len(old)):
            raise ConeslabError(
                f"the activations that were watched at {name!r} are {tuple(held.shape)} for the pictures from "
                f"{now.first} on, this run has {tuple(old.shape)}: watch one picture, or as many as are drawn here, of "
                "the same size"
            )
        return held.to(old).expand_as(old)
