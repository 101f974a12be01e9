"""One loop for everything that is tuned on a concept: steps, histories, checkpoints, bars.

What differs between methods (which weights, which loss) is a function that sets gradients. Training the shipped
models from nothing is another matter: `pretraining/loop.py`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion.kvspace import unet_of
from ..diffusion.loss import denoising_loss
from ..diffusion.pipelines import Pipeline
from ..diffusion.precision import fast_dtype, is_plain, mixed_precision, speed_up_backward
from ..errors import ConeslabError
from .checkpoints import _Checkpoint
from .samples import Draw, Pairs, total_loss

Step = Callable[[int], dict[str, float]]
TuningCallback = Callable[[int, dict[str, Any]], object]


def tune(
    weights: Mapping[str, Tensor],
    step: Step,
    *,
    steps: int,
    learning_rate: float | Mapping[str, float],
    title: str,
    weight_decay: float = 0.0,
    progress: bool = True,
    callback: TuningCallback | None = None,
    resume: str | Path | None = None,
    identity: str = "",
    checkpoint_every: float = 30.0,
) -> dict[str, list[float]]:
    """Minimise with AdamW, betas (0.9, 0.999); returns the history, name -> one number a step.

    weights: name -> leaf tensors, changed in place. step(number) sets their `.grad` and returns numbers to keep, with
    "loss" among them. learning_rate: one for all, or one for each name. callback(number, {the numbers, "weights"}).
    resume: a file in which state is kept every `checkpoint_every` seconds and at the end, and from which a later call
    with the same settings and `identity` goes on; step must then depend on its number alone.
    Raises ConeslabError if steps or a rate are not positive, or the loss is no longer finite; MismatchError if the
    file is of other settings, FileFormatError if it is damaged.
    """
    rates = learning_rate if isinstance(learning_rate, Mapping) else dict.fromkeys(weights, learning_rate)
    if steps < 1 or not all(rate > 0 for rate in rates.values()):
        raise ConeslabError(f"steps is {steps}, learning_rate {learning_rate}: all must be positive")
    groups = [{"params": [weight], "lr": rates[name]} for name, weight in weights.items()]
    optimiser = torch.optim.AdamW(groups, weight_decay=weight_decay)
    state = _Checkpoint(resume, weights, optimiser, f"{identity} {dict(rates)} {weight_decay}")
    first, history = state.load()
    bar = tqdm(range(first, steps), desc=title, initial=first, total=steps, disable=not progress)
    saved = time.monotonic()
    for number in bar:
        figures = step(number)
        if not math.isfinite(figures["loss"]):
            raise ConeslabError(
                f"the loss became {figures['loss']} at step {number}: choose a learning rate below {learning_rate}"
            )
        optimiser.step()
        optimiser.zero_grad()
        for name, value in figures.items():
            history.setdefault(name, []).append(value)
        bar.set_postfix(loss=f"{figures['loss']:.4f}")
        if callback is not None:
            callback(number, {**figures, "weights": {k: w.detach().clone() for k, w in weights.items()}})
        if time.monotonic() - saved > checkpoint_every:
            state.save(number + 1, history)
            saved = time.monotonic()
    if first < steps:
        state.save(steps, history)
    return history


def figures(pairs: Sequence[Pairs], losses: Sequence[float]) -> dict[str, float]:
    """The weighted sum that is minimised, and the plain mean of every pair."""
    return {"loss": total_loss(pairs, losses)} | {f"loss {number}": float(loss) for number, loss in enumerate(losses)}


def tune_unet(
    pipe: Pipeline,
    pairs: Sequence[Pairs],
    draw_at: Callable[[int, Any], Draw],
    *,
    only: Callable[[str], bool] = lambda name: True,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Minimise the pairs' weighted losses in weights of the U-Net itself; returns their change, and the history.

    Trains a copy in float32, its passes in bfloat16 where that is faster. draw_at(step, the copy) -> the samples;
    only(name): whether a weight is trained; dtype: of the passes, float32 or bfloat16; options: of `tune`.
    Raises ConeslabError for another dtype.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ConeslabError(f"dtype is {dtype}: passes run in torch.float32 or torch.bfloat16")
    unet = copy.deepcopy(unet_of(pipe)).float().requires_grad_(False).train()
    dtype = dtype or fast_dtype(unet)
    if dtype == torch.bfloat16 and is_plain(unet):
        speed_up_backward(unet)
    weights = {name: weight.requires_grad_(True) for name, weight in unet.named_parameters() if only(name)}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    stand_in: Any = SimpleNamespace(unet=unet, scheduler=pipe.scheduler)
    text = torch.cat([pair.text.expand(pair.batch, -1, -1) for pair in pairs]).float()
    shares = torch.cat([text.new_full((pair.batch,), pair.weight / pair.batch) for pair in pairs])

    def step(number: int) -> dict[str, float]:
        draw = draw_at(number, unet)
        with mixed_precision(unet.device, dtype):
            each = denoising_loss(
                stand_in, draw.latents.float(), text, noise=draw.noise.float(), timesteps=draw.timesteps,
                mask=draw.mask, wanted=draw.wanted, reduction="none",
            )  # fmt: skip
        (each * shares).sum().backward()
        return figures(pairs, [float(part.mean()) for part in each.detach().split([pair.batch for pair in pairs])])

    history = tune(weights, step, **options)
    return {name: weight.detach() - before[name] for name, weight in weights.items()}, history
