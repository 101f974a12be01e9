"""One loop for everything that is tuned on a concept: steps, histories, checkpoints, progress bars.

`tune` takes the steps. `tune_kv` and `tune_unet` say what a step is: for keys and values, or text, through frozen
layers, and for weights of the U-Net itself. Training the shipped models from scratch has its own loop:
`pretraining/loop.py`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import checks
from ..callback import Callback
from ..diffusion.checks import require_editable, separated
from ..diffusion.kvspace import unet_of
from ..diffusion.loss import Denoiser, denoising_loss
from ..diffusion.pipelines import Pipeline, fingerprint
from ..diffusion.precision import fast_dtype, is_plain, mixed_precision, speed_up_backward
from ..errors import ConeslabError
from ..settings import Settings
from .checkpoints import TuningCheckpoint
from .kv_gradient import KVGradient, require_passes
from .samples import CaptionedLatents, NoisyBatch, loss_values

Step = Callable[[int], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class TuningSettings(Settings):
    """How long and how fast: `steps` of AdamW with betas (0.9, 0.999), its `learning_rate` and `weight_decay`."""

    method: ClassVar[str] = "fine-tuning"

    steps: int = 200
    learning_rate: float | None = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.count, "steps")
        self._check(checks.number, "learning_rate", interval="(0, inf)", optional=self._chooses_rate())
        self._check(checks.number, "weight_decay", interval="[0, inf)")

    @property
    def rate(self) -> float:
        """The learning rate, whether given or chosen by the method, which then overrides this."""
        return checks.number("learning_rate", self.learning_rate, "(0, inf)")

    @classmethod
    def _chooses_rate(cls) -> bool:
        return cls.rate is not TuningSettings.rate


class RunOptions(TypedDict, total=False):
    """How a run reports progress and resumes after a stop; none of it changes the result.

    progress: show a bar. callback: see `coneslab.callback`; its further keys are what the history keeps, and "weights",
    copies by name. resume: a file to which the state is saved every half minute and at the end, and from which a later
    call with the same settings continues.
    """

    progress: bool
    callback: Callback | None
    resume: str | Path | None


def tune(
    weights: Mapping[str, Tensor],
    step: Step,
    settings: TuningSettings,
    *,
    title: str,
    identity: Mapping[str, Any] | None = None,
    rates: Mapping[str, float] | None = None,
    checkpoint_every: float = 30.0,
    progress: bool = True,
    callback: Callback | None = None,
    resume: str | Path | None = None,
) -> dict[str, list[float]]:
    """Minimise with AdamW; returns the history, name -> one number per step.

    weights: name -> leaf tensors, changed in place. step(number) sets their `.grad` and returns numbers to keep,
    including "loss". rates: learning rates by name, where they differ from that of the settings. identity: what else a
    file to resume from must match, besides the settings and the initial weights; step must then depend on its number
    alone. progress, callback, resume: see `RunOptions`. A file with fewer steps than asked for is continued.
    Raises ConeslabError if the loss is no longer finite; MismatchError if the file belongs to other settings, or holds
    more steps; FileFormatError if it is damaged.
    """
    checks.mapping("weights", weights)
    checks.function("callback", callback)
    learning_rates = dict.fromkeys(weights, settings.rate) | dict(rates or {})
    groups = [{"params": [weight], "lr": learning_rates[name]} for name, weight in weights.items()]
    optimiser = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    steps = settings.steps
    if resume is not None:
        chosen = {name: value for name, value in settings.record().items() if name != "steps"}
        start = {"learning rates": learning_rates, "start": fingerprint(weights)}
        identity = {**chosen, **start, **(identity or {})}
    state = TuningCheckpoint(resume, weights, optimiser, identity or {})
    first, history = state.load(at_most=steps)
    bar = tqdm(range(first, steps), desc=title, initial=first, total=steps, disable=not progress)
    saved = time.monotonic()
    for number in bar:
        values = step(number)
        if not math.isfinite(values["loss"]):
            raise ConeslabError(
                f"the loss became {values['loss']} at step {number}: choose a learning rate below {settings.rate}"
            )
        optimiser.step()
        optimiser.zero_grad()
        for name, value in values.items():
            history.setdefault(name, []).append(value)
        bar.set_postfix(loss=f"{values['loss']:.4f}")
        if callback is not None:
            copies = {name: weight.detach().clone() for name, weight in weights.items()}
            callback({"step": number, "steps": steps, **values, "weights": copies})
        if time.monotonic() - saved > checkpoint_every:
            state.save(number + 1, history)
            saved = time.monotonic()
    if first < steps:
        state.save(steps, history)
    return history


@dataclass(frozen=True)
class Point:
    """Where a step evaluates the loss; each tensor is computed from the tuned weights, or None to leave it as it is.

    theta: keys and values, (n,); text: embeddings of the captions, (captions, tokens, width); penalty: a scalar added
    to the loss, recorded in the history as "penalty".
    """

    batch: NoisyBatch
    theta: Tensor | None = None
    text: Tensor | None = None
    penalty: Tensor | None = None


def tune_kv(
    gradient: KVGradient,
    weights: Mapping[str, Tensor],
    point: Callable[[int], Point],
    settings: TuningSettings,
    *,
    title: str,
    identity: Mapping[str, Any] | None = None,
    rates: Mapping[str, float] | None = None,
    **run: Unpack[RunOptions],
) -> dict[str, list[float]]:
    """Minimise the weighted losses of `gradient.data` in the weights that keys and values, or text, are computed from.

    weights: name -> leaf tensors that require a gradient, changed in place; point(number) computes θ or the text
    from them. Only what it computes gets a gradient. title, identity, rates and run: see `tune`.
    """
    untouched = cache(gradient.theta)
    if run.get("resume") is not None:
        identity = {**(identity or {}), **_facts(gradient.data, gradient.dtype)}

    def step(number: int) -> dict[str, float]:
        at = point(number)
        theta = untouched() if at.theta is None else at.theta
        losses, *slopes = gradient.gradients(
            theta.detach(),
            None if at.text is None else at.text.detach(),
            at.batch,
            of_theta=at.theta is not None,
            of_text=at.text is not None,
        )
        values = loss_values(gradient.data, losses)
        ends = [(end, slope) for end, slope in zip((at.theta, at.text), slopes, strict=True) if end is not None]
        outputs, aims = [end for end, _ in ends], [slope.to(end) for end, slope in ends if slope is not None]
        if at.penalty is not None:
            outputs, aims = [*outputs, at.penalty], [*aims, torch.ones_like(at.penalty)]
            values["penalty"] = float(at.penalty.detach())
        torch.autograd.backward(outputs, aims, inputs=list(weights.values()))
        return values

    return tune(weights, step, settings, title=title, identity=identity, rates=rates, **run)


def require_training_dtype(dtype: torch.dtype | None) -> None:
    """Raise ConeslabError unless `tune_unet` can run its passes in this precision."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.bfloat16)):
        raise ConeslabError(f"dtype is {dtype}: passes run in torch.float32 or torch.bfloat16")


def tune_unet(
    pipe: Pipeline,
    data: Sequence[CaptionedLatents],
    batch_at: Callable[[int, Any], NoisyBatch],
    settings: TuningSettings,
    *,
    title: str,
    identity: Mapping[str, Any] | None = None,
    adapt: Callable[[Any], object] = lambda unet: None,
    only: Callable[[str], bool] = lambda name: True,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    **run: Unpack[RunOptions],
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Minimise the captions' weighted losses in weights of the U-Net itself; returns their change, and the history.

    Trains a copy in float32, with passes in bfloat16 where that is faster. batch_at(step, the copy) -> the samples;
    adapt(the copy): adds weights to it, in place; only(name): whether a weight is trained; dtype: of the passes,
    float32 or bfloat16; chunk: samples at a time, whose gradients are added up, for models that would not fit in memory
    otherwise. title, identity and run: see `tune`.
    Raises ConeslabError for another dtype, or a chunk below 1.
    """
    require_editable(pipe)
    require_passes(dtype, chunk)
    require_training_dtype(dtype)
    unet = separated(copy.deepcopy(unet_of(pipe))).float().train()
    dtype = dtype or fast_dtype(unet)
    if dtype == torch.bfloat16 and is_plain(unet):
        speed_up_backward(unet)
    adapt(unet)
    unet.requires_grad_(False)
    weights = {name: weight.requires_grad_(True) for name, weight in unet.named_parameters() if only(name)}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    denoiser = Denoiser(unet, pipe.scheduler)
    text = torch.cat([part.text.expand(part.batch_size, -1, -1) for part in data]).float()
    counts = [part.batch_size for part in data]
    shares = torch.cat([text.new_full((part.batch_size,), part.weight / part.batch_size) for part in data])

    def step(number: int) -> dict[str, float]:
        batch, losses = batch_at(number, unet), []
        for first in range(0, len(text), chunk or len(text)):
            rows = slice(first, first + (chunk or len(text)))
            part = batch.part(rows)
            with mixed_precision(unet.device, dtype):
                each = denoising_loss(
                    denoiser,
                    part.latents.float(),
                    text[rows],
                    noise=part.noise.float(),
                    timesteps=part.timesteps,
                    mask=part.mask,
                    regression_target=part.regression_target,
                    reduction="none",
                )
            (each * shares[rows]).sum().backward()
            losses.append(each.detach())
        return loss_values(data, [float(own.mean()) for own in torch.cat(losses).split(counts)])

    if run.get("resume") is not None:
        identity = {**(identity or {}), **_facts(data, dtype)}
    history = tune(weights, step, settings, title=title, identity=identity, **run)
    return {name: weight.detach() - before[name] for name, weight in weights.items()}, history


def _facts(data: Sequence[CaptionedLatents], dtype: torch.dtype) -> dict[str, Any]:
    """What a state depends on besides settings and start: samples, their shares, the precision of the passes."""
    parts = enumerate((part.latents, part.text, part.mask) for part in data)
    tensors = {f"{number} {at}": x for number, own in parts for at, x in enumerate(own) if x is not None}
    shares = [[part.batch_size, part.weight] for part in data]
    return {"data": fingerprint(tensors), "shares": shares, "dtype": str(dtype)}
