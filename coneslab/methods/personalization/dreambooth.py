"""DreamBooth: tune the whole U-Net, and preserve the class (Ruiz et al. 2023, arXiv 2208.12242)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...callback import Callback
from ...diffusion.checks import require_editable
from ...diffusion.pipelines import Pipeline
from ...edits.weights import WeightDelta, model_fingerprint
from ...finetuning.checkpoints import resumable
from ...finetuning.kv_gradient import require_passes
from ...finetuning.loop import TuningSettings, require_training_dtype, tune_unet
from ...finetuning.samples import ConceptSettings, ConceptSubject, joint_latents, names_of, numbered_batches, several
from ...settings import takes


@dataclass(frozen=True, kw_only=True)
class DreamBoothSettings(TuningSettings, ConceptSettings):
    """Settings of `dreambooth`: those of `TuningSettings` and `ConceptSettings`, with other defaults."""

    method: ClassVar[str] = "DreamBooth"

    learning_rate: float = 1e-4
    batch_size: int = 8
    prior_batch_size: int = 8


@resumable
@takes(DreamBoothSettings)
def dreambooth(
    pipe: Pipeline,
    subjects: ConceptSubject | Iterable[ConceptSubject],
    settings: DreamBoothSettings | Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    resume: str | Path | None = None,
    **changes: Any,
) -> WeightDelta:
    """Tune the whole U-Net on the subjects, with prior preservation (Ruiz et al. 2023, Eq. 2).

    The text encoder stays as it is. Trains a copy of the U-Net in float32, with passes in `dtype`: float32 or bfloat16,
    by default bfloat16 where that is faster. settings, changes: see `DreamBoothSettings`; chunk: see `tune_unet`;
    progress, callback, resume: see `RunOptions`.

    >>> pipe, cat = coneslab.load("tiny"), coneslab.subject("cat")
    >>> tuned = coneslab.dreambooth(pipe, cat, steps=1, batch_size=2, prior_batch_size=0)
    >>> tuned
    WeightDelta('cat': ... weights in ... layers, model ...)
    >>> tuned.deltas.keys() == dict(pipe.unet.named_parameters()).keys()
    True
    """
    require_editable(pipe)
    require_passes(dtype, chunk, callback)
    require_training_dtype(dtype)
    settings = DreamBoothSettings.chosen(settings, changes)
    taught = several(subjects)
    data = joint_latents(pipe, taught, settings)
    batch_at = numbered_batches(pipe, data, settings.seed)
    names, model = names_of(taught), model_fingerprint(pipe)
    deltas, history = tune_unet(
        pipe,
        data,
        lambda number, unet: batch_at(number),
        settings,
        title=f"DreamBooth of {names}",
        identity={"model": model},
        dtype=dtype,
        chunk=chunk,
        progress=progress,
        callback=callback,
        resume=resume,
    )
    return WeightDelta(deltas, model, subject=names, settings=settings.record(), history=history)
