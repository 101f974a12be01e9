"""Erasure by guidance: ESD (Gandikota et al. 2023, arXiv 2303.07345)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from ... import checks
from ...callback import Callback
from ...diffusion.checks import require_editable
from ...diffusion.encoding import encode_prompts, require_read, tokenize
from ...diffusion.pipelines import Pipeline
from ...edits.weights import WeightDelta, model_fingerprint
from ...errors import ConeslabError
from ...finetuning.checkpoints import resumable
from ...finetuning.kv_gradient import KVGradient, require_passes
from ...finetuning.loop import Point, TuningSettings, tune_kv
from ...finetuning.samples import CaptionedLatents, SamplerSettings, generated_latents, numbered_batches
from ...settings import takes


@dataclass(frozen=True, kw_only=True)
class ESDSettings(TuningSettings, SamplerSettings):
    """Settings of `erase`: those of `TuningSettings` and `SamplerSettings`, and

    eta: η, how far beyond the unguided prediction; pictures: of the target, drawn beforehand; batch_size: samples per
    step.
    """

    method: ClassVar[str] = "ESD-x"

    steps: int = 100
    learning_rate: float = 3e-4
    eta: float = 1.0
    pictures: int = 64
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.number, "eta", interval="[0, inf)")
        self._check(checks.count, "pictures", "batch_size")


@resumable
@takes(ESDSettings)
def erase(
    pipe: Pipeline,
    target: str,
    settings: ESDSettings | Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    resume: str | Path | None = None,
    **changes: Any,
) -> WeightDelta:
    """ESD-x: keys and values learn to predict the opposite of the guidance towards the target's caption.

    The regression target is f(x_t, t, ∅) − η (f(x_t, t, c) − f(x_t, t, ∅)) by the untouched model (arXiv 2303.07345,
    Eq. 7), on noised pictures of the target drawn beforehand (a reading: the paper's are half-denoised by the model in
    training). settings, changes: see `ESDSettings`; dtype, chunk: see `KVGradient`; progress, callback, resume: see
    `RunOptions`. Raises ConeslabError if the target is no text to the model.
    """
    require_editable(pipe)
    settings = ESDSettings.chosen(settings, changes)
    require_passes(dtype, chunk, callback)
    target = checks.text("target", target)
    require_read(pipe, target)
    if tokenize(pipe, [target, ""]).unique(dim=0).shape[0] == 1:
        raise ConeslabError(f"target is {target!r}: name the concept to erase, for example 'a cat'")
    latents = generated_latents(pipe, [target] * settings.pictures, **settings.sampler, progress=progress)
    text = encode_prompts(pipe, [target, ""]).detach()
    data = [CaptionedLatents(latents, text[0], settings.batch_size)]
    gradient, model = KVGradient(pipe, data, dtype=dtype, chunk=chunk), model_fingerprint(pipe)
    before, batch_at = gradient.theta(), numbered_batches(pipe, data, settings.seed)
    theta = before.clone().requires_grad_()

    def point(number: int) -> Point:
        batch = batch_at(number)
        with_target, without = (gradient.outputs(before, own[None], batch) for own in text)
        aim = without - settings.eta * (with_target - without)
        return Point(replace(batch, regression_target=aim), theta=theta)

    history = tune_kv(
        gradient,
        {"theta": theta},
        point,
        settings,
        title=f"erasing {target}",
        identity={"model": model},
        progress=progress,
        callback=callback,
        resume=resume,
    )
    record = {**settings.record(), "target": target}
    return WeightDelta(gradient.deltas(theta), model, subject=target, settings=record, history=history)
