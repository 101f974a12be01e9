"""Erasure by guidance: ESD (Gandikota et al. 2023, arXiv 2303.07345)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...diffusion.encoding import encode_prompts
from ...diffusion.pipelines import Pipeline
from ...edits.weights import WeightDelta, model_fingerprint
from ...errors import ConeslabError
from ...finetuning.kv_gradient import KVGradient
from ...finetuning.loop import TuningCallback, figures, tune
from ...finetuning.samples import Pairs, drawn_latents, rounds


def erase(
    pipe: Pipeline,
    target: str,
    *,
    eta: float = 1.0,
    pictures: int = 64,
    steps: int = 100,
    learning_rate: float = 3e-4,
    batch: int = 16,
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    resume: Any | None = None,
    progress: bool = True,
    callback: TuningCallback | None = None,
) -> WeightDelta:
    """ESD-x: keys and values learn to predict, under the target's caption, the opposite of its guidance.

    The aim is f(x_t, t, ∅) − η (f(x_t, t, c) − f(x_t, t, ∅)) by the untouched model (arXiv 2303.07345, Eq. 7), on
    noised pictures of the target drawn beforehand (a reading: the paper's are half-denoised by the model in training).
    """
    if not target.strip() or eta < 0:
        raise ConeslabError(f"target is {target!r}, eta {eta}: name a concept, and give a number of 0 or more")
    options: dict[str, Any] = {"steps": sampler_steps, "guidance_scale": guidance_scale, "progress": progress}
    latents = drawn_latents(pipe, [target] * pictures, seed=seed, **options)
    text = encode_prompts(pipe, [target, ""]).detach()
    pairs = [Pairs(latents, text[0], batch)]
    gradient = KVGradient(pipe, pairs, dtype=dtype, chunk=chunk)
    before, at = gradient.theta(), rounds(pipe, pairs, seed)
    theta = before.clone()

    def step(number: int) -> dict[str, float]:
        draw = at(number)
        with_target, without = (gradient.outputs(before, own[None], draw) for own in text)
        aimed = replace(draw, wanted=without - eta * (with_target - without))
        losses, theta.grad = gradient(theta, aimed)
        return figures(pairs, losses)

    history = tune(
        {"theta": theta}, step, steps=steps, learning_rate=learning_rate, title=f"erasing {target}", resume=resume,
        progress=progress, callback=callback, identity=f"esd {target} {eta} {batch} {seed} {model_fingerprint(pipe)}",
    )  # fmt: skip
    settings = {"method": "ESD-x", "target": target, "eta": eta, "steps": steps, "learning_rate": learning_rate}
    return WeightDelta(
        gradient.deltas(theta), model_fingerprint(pipe), subject=target, settings=settings, history=history
    )
