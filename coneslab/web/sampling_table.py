"""A pipeline's sampler as a table of numbers.

Every sampler without fresh noise that diffusers has (DDIM, DPM-Solver++, UniPC, PNDM) computes the next latents as a
sum of what came before: the start noise and the network's outputs so far, each times a number that depends on the
schedule alone. The numbers are read off the pipeline's own scheduler, by letting it step through unit vectors. Whoever
has them samples as Python does, whichever scheduler that was.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..diffusion.checks import require_pipeline
from ..diffusion.loss import alpha_and_sigma
from ..diffusion.pipelines import Pipeline
from ..diffusion.sampling import require_steps
from ..errors import ConeslabError


def sampling_table(pipe: Pipeline, sampler_steps: int) -> dict[str, Any]:
    """How a pipeline samples in so many steps, as numbers that JSON can hold.

    "start": what the start noise is multiplied by. "timesteps": of each step. "rows": for each step i, its i + 2
    coefficients: x_{i+1} = row[0] x_0 + sum_j row[1 + j] out_j, x_0 being the start noise so multiplied and out_j the
    guided output of the network at step j. "clean": for each step, (a, b) such that a x_i + b out_i is the predicted
    clean latent; empty where that is not defined (an ε-prediction at pure noise).
    Raises ConeslabError for a scheduler that adds noise, is not linear, or scales what the network is given.
    """
    require_pipeline(pipe)
    steps = require_steps(pipe, sampler_steps)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    times = [float(t) for t in scheduler.timesteps]
    units = torch.eye(len(times) + 1, dtype=torch.float64)
    rows = [row.tolist() for row in _stepped(pipe, steps, units)]
    random = torch.randn(len(times) + 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for number, found in enumerate(_stepped(pipe, steps, random)):
        if not torch.allclose(found, torch.tensor(rows[number], dtype=torch.float64) @ random, atol=1e-4, rtol=1e-4):
            raise ConeslabError(
                f"the scheduler is a {type(scheduler).__name__}, whose steps are not sums of what came before (it adds "
                "noise, clips or thresholds): give the pipeline another one, such as diffusers.DDIMScheduler"
            )
    return {
        "start": float(scheduler.init_noise_sigma),
        "timesteps": times,
        "rows": [[_short(value) for value in row[: number + 2]] for number, row in enumerate(rows)],
        "clean": [_clean(pipe, time) for time in times],
    }


def _stepped(pipe: Pipeline, steps: int, given: Tensor) -> list[Tensor]:
    """The latents after each step from given[0], the network's outputs being given[1], given[2], ...: (n,) each."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    x, *outputs = given[:, None, :, None, None].unbind(0)  # (1, n, 1, 1) each
    found = []
    for time, out in zip(scheduler.timesteps, outputs, strict=True):
        if not torch.equal(scheduler.scale_model_input(x, time), x):
            raise ConeslabError(
                f"the scheduler is a {type(scheduler).__name__}, which scales what the network is given: give the "
                "pipeline another one, such as diffusers.DDIMScheduler"
            )
        x = scheduler.step(out, time, x).prev_sample
        found.append(x.flatten())
    return found


def _short(value: float) -> float:
    """A number as JSON needs it for float32."""
    return float(f"{value:.9g}")


def _clean(pipe: Pipeline, time: float) -> list[float]:
    alpha, sigma = (
        float(part) for part in alpha_and_sigma(pipe.scheduler, torch.zeros(1, 1, 1, 1), torch.tensor([int(time)]))
    )
    kind = pipe.scheduler.config.prediction_type
    if kind == "sample":
        return [0.0, 1.0]
    if kind == "v_prediction":
        return [_short(alpha), _short(-sigma)]
    return [_short(1 / alpha), _short(-sigma / alpha)] if alpha > 1e-3 else []
