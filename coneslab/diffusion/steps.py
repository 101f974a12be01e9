"""Where a run is: how far the noise has gone, which step it is, which rows of a batch have the prompt.

Everything that acts on a part of the sampling, or remembers by step, asks here. All it needs is what the U-Net is
called with, so that it holds for every sampler, for `generate` and for plain calls of any pipeline.

The *share of the schedule* that lies behind a timestep t of T is 1 - (t + 1) / T: 0 is all noise, 1 is clean. It says
how much noise there is and not how many steps were taken, so it means the same with every number of steps and every
spacing; a run that starts from a picture at strength 0.4 begins at a share of 0.6.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import ConeslabError
from .checks import require_pipeline
from .encoding import encode_prompts
from .pipelines import Pipeline

Half: TypeAlias = Literal["text", "empty"]
HALVES: tuple[Half, ...] = get_args(Half)
Steps: TypeAlias = int | Iterable[int] | tuple[float, float] | None


def share_of(scheduler: Any, timestep: Any) -> Tensor:
    """The share of a scheduler's schedule that lies behind one or more timesteps, (n,) float64 in [0, 1)."""
    times = torch.as_tensor(timestep).detach().to("cpu", torch.float64).flatten()
    return (1 - (times + 1) / scheduler.config.num_train_timesteps).clamp(min=0.0)


def within(share: Tensor, first: float, last: float) -> Tensor:
    """Whether shares lie from `first` to before `last`, (n,) bool: each in one of (0, 0.3) and (0.3, 1)."""
    return (share >= first) & (share < last)


@dataclass(frozen=True)
class ChosenSteps:
    """Some of the steps of every run: those with these numbers, or those within two shares of the schedule."""

    numbers: frozenset[int] | None = None
    shares: tuple[float, float] = (0.0, 1.0)

    def has(self, step: int, share: float) -> bool:
        return step in self.numbers if self.numbers is not None else self.shares[0] <= share < self.shares[1]

    def require(self, steps: int) -> None:
        """Raise ConeslabError for numbers that a schedule of so many steps does not have (0: it is not known)."""
        if self.numbers is not None and 0 < steps <= max(self.numbers):
            raise ConeslabError(
                f"step {max(self.numbers)} was asked for, and the schedule has {steps}, numbered from 0: choose among "
                "them, or give shares of the schedule such as (0.0, 0.3)"
            )


def chosen_steps(steps: Steps) -> ChosenSteps:
    """The steps that are meant: one number or several, from 0; a pair with a float, shares of the schedule; None, all.

    Raises ArgumentError for anything else.
    """
    if steps is None:
        return ChosenSteps()
    if not isinstance(steps, Iterable) or getattr(steps, "ndim", 1) == 0:
        return ChosenSteps(frozenset([checks.count("steps", steps, least=0)]))
    given = checks.items("steps", steps)
    if any(isinstance(one, float) for one in given):
        return ChosenSteps(shares=checks.interval("share of the schedule (steps)", given))
    return ChosenSteps(frozenset(checks.count("one of steps", one, least=0) for one in given))


def chosen_halves(half: str) -> tuple[Half, ...]:
    """The halves that "text", "empty" or "both" means. Raises ArgumentError for anything else."""
    found = checks.choice("half", half, (*HALVES, "both"))
    return HALVES if found == "both" else (found,)  # type: ignore[return-value]


# --- one pass through the network -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One call of the U-Net.

    run: the trajectory it belongs to, from 0; step: its place among the scheduler's timesteps; share: of the schedule
    that lies behind it; halves: of the batch, in order; pictures: rows of each half; first: the number of the first of
    these pictures, over all runs; steps: how many the schedule has, 0 if it is not known.
    """

    run: int
    step: int
    timestep: float
    share: float
    halves: tuple[Half, ...]
    pictures: int
    first: int
    steps: int

    def rows(self, half: Half, n: int) -> slice | None:
        """The rows of a half among the `n` rows of an activation, None if they are not computed.

        Where guidance is off for some steps (`guided_between`) the U-Net computes the prompt's half alone.
        """
        halves = self.halves
        if n == self.pictures < self.pictures * len(halves):
            halves = ("text",)
        if half not in halves or n != self.pictures * len(halves):
            return None
        start = halves.index(half) * self.pictures
        return slice(start, start + self.pictures)


@dataclass
class _Run:
    """One trajectory: the texts that it is drawn with, by identity, and where it is."""

    number: int
    times: list[float]
    first: int
    pictures: int
    step: int
    timestep: float
    texts: list[Tensor] = field(default_factory=list)
    seen: set[Half] = field(default_factory=set)  # halves computed at this step


class Clock:
    """Follows the runs of a pipeline, as the hook that it puts on the U-Net sees them; `now` is the current pass.

    guided: whether the first half of each batch is the unconditional one; default: recognised by its latents being
    those of the second half, and by its texts being the empty prompt or the pipeline's last guidance scale above 1.
    """

    def __init__(self, pipe: Pipeline, guided: bool | None = None) -> None:
        require_pipeline(pipe)
        self._pipe, self._guided = pipe, guided
        self._runs: list[_Run] = []
        self._empty: Tensor | None = None
        self.now: Pass | None = None

    def later(self) -> list[tuple[int, float]]:
        """Number and share of the steps that the schedule has after the current one."""
        assert self.now is not None
        times = list(enumerate(self._runs[self.now.run].times))[self.now.step + 1 :]
        return [(step, float(share_of(self._pipe.scheduler, time))) for step, time in times]

    def before(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the U-Net: find out which pass this is."""
        call = inspect.signature(unet.forward).bind_partial(*args, **kwargs).arguments
        sample, text = call["sample"], call["encoder_hidden_states"]
        timestep = float(torch.as_tensor(call["timestep"]).max())
        halves = self._halves(sample, text)
        run = self._continued(text, timestep, halves, len(sample) // len(halves)) or self._begun(
            timestep, len(sample) // len(halves)
        )
        if not _among(text, run.texts):
            run.texts.append(text)
        run.seen.update(halves)
        share = float(share_of(self._pipe.scheduler, timestep))
        self.now = Pass(run.number, run.step, timestep, share, halves, run.pictures, run.first, steps=len(run.times))

    def _halves(self, sample: Tensor, text: Tensor) -> tuple[Half, ...]:
        half = len(sample) // 2
        guided = self._guided
        if guided is None:
            scale = getattr(self._pipe, "_guidance_scale", None)
            twice = len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:])
            guided = twice and (scale is None or scale > 1 or self._is_empty(text[:half]))
        if guided:
            return "empty", "text"
        return ("empty",) if self._is_empty(text) else ("text",)

    def _is_empty(self, text: Tensor) -> bool:
        """Whether all rows are the empty prompt's, but for the rounding of another batch."""
        if self._empty is None:
            with torch.no_grad():
                self._empty = encode_prompts(self._pipe, "")[0]
        empty = self._empty.to(text)
        return empty.shape == text.shape[1:] and bool(
            ((text - empty).flatten(1).norm(dim=1) < 1e-3 * empty.norm()).all()
        )

    def _continued(self, text: Tensor, timestep: float, halves: tuple[Half, ...], pictures: int) -> _Run | None:
        """The run that goes on with this pass: with this text, or with the other half of it at the same timestep."""
        for run in reversed(self._runs):
            other_half = timestep == run.timestep and not run.seen & {*halves}
            if pictures != run.pictures or not (other_half or _among(text, run.texts)):
                continue
            if other_half:
                return run
            if run.times[run.step + 1 : run.step + 2] == [timestep]:
                run.step += 1  # a sampler that calls the network twice at one timestep counts both
            elif timestep < run.timestep:
                later = [at for at in range(run.step + 1, len(run.times)) if run.times[at] == timestep]
                run.step = later[0] if later else run.step + 1
            else:
                continue
            run.timestep, run.seen = timestep, set()
            return run
        return None

    def _begun(self, timestep: float, pictures: int) -> _Run:
        scheduler = self._pipe.scheduler
        given = getattr(scheduler, "timesteps", None)
        times = [] if given is None else [float(one) for one in given]
        if timestep not in times:
            times = []  # a loop of its own
        at = getattr(scheduler, "step_index", None)
        at = getattr(scheduler, "begin_index", None) if at is None else at
        if at is None or times[at : at + 1] != [timestep]:
            later = [i for i, one in enumerate(times) if one == timestep]
            at = later[-1] if later and later[0] > 0 else 0  # one that comes twice is begun at in the middle
        first = sum(run.pictures for run in self._runs)
        run = _Run(len(self._runs), times, first, pictures, at, timestep)
        self._runs.append(run)
        return run


def _among(text: Tensor, texts: list[Tensor]) -> bool:
    return any(one is text or torch.equal(one, text) for one in texts)


# --- which words a text has -----------------------------------------------------------------------------

_REMEMBERED = 4096  # embeddings whose words are known


class KnownTexts:
    """Remembers which token ids gave which embedding, so that the U-Net's text can be told by its bytes.

    What was encoded last is remembered longest, however often it was encoded before; never less than a whole batch.
    """

    def __init__(self) -> None:
        self._ids: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()

    def after_text(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Forward hook of the text encoder; the U-Net may get an embedding in another precision."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            return
        heard = {}
        for row, embedding in zip(ids.tolist(), output[0].detach(), strict=True):
            for dtype in {embedding.dtype, torch.float32, torch.bfloat16, torch.float16}:
                heard[self.key(embedding.to(dtype))] = tuple(row)
        for key, words in heard.items():
            self._ids[key] = words
            self._ids.move_to_end(key)
        while len(self._ids) > max(_REMEMBERED, len(heard)):
            self._ids.popitem(last=False)

    def ids(self, embedding: Tensor) -> tuple[int, ...] | None:
        """The token ids of an embedding (tokens, width); None if it was not encoded meanwhile."""
        return self._ids.get(self.key(embedding))

    @staticmethod
    def key(embedding: Tensor) -> bytes:
        """A digest of an embedding's type and bytes: of a large text encoder it has hundreds of kilobytes."""
        embedding = embedding.detach()
        held = embedding.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        return hashlib.sha256(repr(embedding.dtype).encode() + held).digest()
