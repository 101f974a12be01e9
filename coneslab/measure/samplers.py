"""How few network calls a picture needs: samplers compared by the judge at equal numbers of calls.

    coneslab compare-samplers runs/unet/model --judge runs/judge/model

The winner becomes the scheduler of the shipped pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pandas

from .. import checks
from ..blocks import Block, attribute
from ..diffusion.checks import require_pipeline
from ..diffusion.pipelines import Pipeline
from ..diffusion.sampling import require_guidance, require_steps
from ..files import require_writable, write_table
from .evaluation import evaluate_model
from .judge import Judge

#: name -> its class in diffusers, and what differs from the pipeline's own scheduler config
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),  # Song et al. 2021
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "UniPC": ("UniPCMultistepScheduler", {"solver_order": 2}),  # Zhao et al. 2023
}


@dataclass(frozen=True)
class Sampler:
    """A scheduler, its steps, and where guidance acts.

    guided: the shares of the schedule, 0 all noise and 1 clean, between which guidance is on; elsewhere one call per
    step is enough (`diffusion.guided_between`). With a guidance_scale of 1 there is no guidance anywhere.
    """

    scheduler: str
    sampler_steps: int
    guidance_scale: float = 3.0
    guided: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name, value in {
            "scheduler": checks.choice("scheduler", self.scheduler, SCHEDULERS),
            "sampler_steps": checks.count("sampler_steps", self.sampler_steps),
            "guidance_scale": require_guidance(self.guidance_scale),
            "guided": checks.interval("guidance interval", self.guided),
        }.items():
            object.__setattr__(self, name, value)


def use_scheduler(pipe: Pipeline, name: str) -> None:
    """Give a pipeline the named scheduler, with the pipeline's own noise schedule and prediction type."""
    require_pipeline(pipe)
    kind, changed = SCHEDULERS[checks.choice("scheduler", name, SCHEDULERS)]
    # without the private entries, or the defaults of one class would become those of another
    kept = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    pipe.scheduler = getattr(diffusers, kind).from_config(kept | changed)


def compare_samplers(
    pipe: Pipeline,
    judge: Judge,
    samplers: Sequence[Sampler],
    *,
    seeds: int = 2,
    limit: int | None = None,
    kid_pictures: int = 512,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> pandas.DataFrame:
    """Draw the same questions with each sampler and ask the judge: one row per sampler; `out` is written after each.

    Columns: scheduler, sampler_steps, guidance_scale, guided_from, guided_to, calls (network passes per picture),
    the shares of `evaluate_model` with the bounds of their intervals, KID, seconds per picture. The pipeline's
    scheduler is restored. Raises ConeslabError without a sampler, or for a count below 1, WriteError at once if `out`
    cannot be written.
    """
    require_pipeline(pipe)
    samplers = checks.items("samplers", samplers, Sampler)
    for sampler in samplers:
        require_steps(pipe, sampler.sampler_steps)
    checks.count("seeds", seeds)
    if limit is not None:
        checks.count("limit", limit)
    own, rows = pipe.scheduler, []
    if out is not None:
        require_writable(out)
    with Block([(attribute(pipe, "scheduler"), own)], pipe=pipe):
        for sampler in samplers:
            pipe.scheduler = own
            use_scheduler(pipe, sampler.scheduler)
            start = time.perf_counter()
            report = evaluate_model(
                pipe,
                judge,
                seeds=seeds,
                sampler_steps=sampler.sampler_steps,
                guidance_scale=sampler.guidance_scale,
                guidance_interval=sampler.guided,
                limit=limit,
                kid_pictures=kid_pictures,
                seed=seed,
                progress=progress,
                beside_real=False,
            )
            pictures = report.settings["pictures"]
            row = {
                "scheduler": sampler.scheduler,
                "sampler_steps": sampler.sampler_steps,
                "guidance_scale": sampler.guidance_scale,
                "guided_from": sampler.guided[0],
                "guided_to": sampler.guided[1],
                "calls": report.settings["calls"],
                "pictures": pictures,
            }
            for share in report.shares:
                found = share.interval
                row |= {share.name: found.estimate, f"{share.name} low": found.low, f"{share.name} high": found.high}
            row |= {"KID": report.settings.get("KID"), "seconds": (time.perf_counter() - start) / pictures}
            rows.append(row)
            if out is not None:
                write_table(out, pandas.DataFrame(rows))
    return pandas.DataFrame(rows)
