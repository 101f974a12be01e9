"""How well an edit implants a concept: the loss of Cones (arXiv 2303.05125, Sec. 3.1), as a number for any edit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .. import checks
from ..callback import Callback
from ..diffusion.checks import require_finite, require_pipeline
from ..diffusion.encoding import encode_prompts
from ..diffusion.loss import denoising_loss
from ..diffusion.pipelines import Pipeline
from ..edits.base import Edit, applied, require_dose, require_edit
from ..errors import ConeslabError
from ..finetuning.samples import ConceptSubject, concept_latents, sample_batches
from ..pictures import Images
from ..settings import ByValue


@dataclass(frozen=True, eq=False, repr=False)
class ConceptLoss(ByValue):
    """L_con on held-out noise: its means, and the loss of each sample, in the same order for every condition.

    subject_values, prior_values: (samples,) float64; the latter is empty if no prior was asked for.
    """

    subject_values: np.ndarray
    prior_values: np.ndarray

    @property
    def subject(self) -> float:
        return float(self.subject_values.mean())

    @property
    def prior(self) -> float:
        return float(self.prior_values.mean()) if len(self.prior_values) else float("nan")

    def __repr__(self) -> str:
        prior = f", prior={self.prior:.4f}" if len(self.prior_values) else ""
        return f"ConceptLoss(subject={self.subject:.4f}{prior}, {len(self.subject_values)} samples)"


@torch.no_grad()
def concept_loss(
    pipe: Pipeline,
    subject: ConceptSubject,
    *,
    edit: Edit | None = None,
    dose: float = 1.0,
    samples: int = 160,
    prior: Images | None = None,
    prior_samples: int = 0,
    seed: int = 1_000_000,
    batch_size: int = 32,
    callback: Callback | None = None,
) -> ConceptLoss:
    """Measure the denoising loss on a subject, and on its prior, under noises and timesteps fixed by `seed`.

    Two calls with the same settings see the same samples, so conditions can be compared in pairs: the difference of two
    edits is far less noisy than either. The default seed is far from those of searches, so the noise is held out. edit:
    applied while measuring (one that is already applied stays). prior: pictures for `prior_samples`; by default the
    pipeline draws them before the edit is applied. batch_size: samples at a time. callback: see `coneslab.callback`,
    once per batch. Raises what the edit raises, and ConeslabError for pictures of the prior without samples of it.
    """
    require_pipeline(pipe)
    require_finite(pipe)
    samples, batch_size = checks.count("samples", samples), checks.count("batch_size", batch_size)
    prior_samples = checks.count("prior_samples", prior_samples, least=0)
    require_edit(edit)
    require_dose(dose)
    checks.function("callback", callback)
    if prior is not None and not prior_samples:
        raise ConeslabError("got pictures of the prior and prior_samples=0: say how many samples to take")
    data = concept_latents(pipe, subject, batch_size=samples, prior_batch_size=prior_samples, prior=prior)
    batch = next(sample_batches(pipe, data, seed=seed))
    values = []
    with applied(edit, pipe, dose):
        text = encode_prompts(pipe, [subject.prompt, subject.prior_prompt])  # an edit may change it
        counts = torch.tensor([part.batch_size for part in data])
        each = text[torch.arange(len(data)).repeat_interleave(counts).to(text.device)]
        steps = -(-len(each) // batch_size)
        for step in range(steps):
            rows = slice(step * batch_size, (step + 1) * batch_size)
            own = batch.part(rows)
            loss = denoising_loss(
                pipe, own.latents, each[rows], noise=own.noise, timesteps=own.timesteps, reduction="none"
            )
            values.append(loss.double().cpu())
            if callback is not None:
                callback({"step": step, "steps": steps, "loss": float(loss.mean())})
    flat = torch.cat(values).numpy()
    return ConceptLoss(flat[:samples], flat[samples:])
