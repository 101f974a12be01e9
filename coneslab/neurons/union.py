"""Several concepts at once: join their masks, see how far they overlap, tune the union (Cones, Sec. 3.2 and 3.3).

`concatenate` shuts the neurons of all concepts together; nothing is trained. `finetune_together` then tunes only the
weights inside that union for a few steps on the sum of the concepts' losses, which is what makes four subjects work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..callback import Callback
from ..diffusion.checks import require_editable
from ..diffusion.encoding import encode_prompts
from ..diffusion.loss import add_noise
from ..diffusion.pipelines import Pipeline
from ..edits.base import Combined, Edit, applied, require_edit
from ..edits.timed import in_steps
from ..edits.weights import require_model
from ..errors import ArgumentError, ConeslabError, MismatchError
from ..finetuning.checkpoints import resumable
from ..finetuning.kv_gradient import KVGradient, require_passes
from ..finetuning.loop import Point, TuningSettings, tune_kv
from ..finetuning.samples import (
    ConceptSettings,
    ConceptSubject,
    concept_latents,
    joint_latents,
    numbered_batches,
    sample_batches,
    several,
)
from ..settings import takes
from ..world import listed
from .encoding import numbers
from .mask import ConceptNeurons
from .scope import where_scope


def concatenate(*found: ConceptNeurons) -> ConceptNeurons:
    """Join masks: the union of their shut neurons, or the smaller scale of each in graded masks (Cones, Sec. 3.2).

    The order does not matter, and joining a mask with itself changes nothing.
    Raises ConeslabError without a mask or for graded masks with different cuts, MismatchError for different models.

    >>> from coneslab.diffusion import KVSpace
    >>> space = KVSpace(coneslab.load("tiny"))
    >>> cat = ConceptNeurons(space.layout, [0, 1, 2], [0.0, 0.25, 0.25], space.fingerprint(), subject="cat")
    >>> dog = ConceptNeurons(space.layout, [2, 5], [0.0, 0.0], space.fingerprint(), subject="dog")
    >>> both = coneslab.concatenate(cat, dog)
    >>> both.subject, both.indices.tolist(), both.scales.tolist()
    ('cat + dog', [0, 1, 2, 5], [0.0, 0.25, 0.0, 0.0])
    >>> cat.overlap(dog)
    Overlap(1 of 4 neurons: Jaccard 0.250, 0.000 by chance)
    """
    if not found:
        raise ArgumentError("there is nothing to join: give at least one mask")
    checks.items("masks", found, ConceptNeurons)
    for other in found[1:]:
        if (other.fingerprint, other.layout) != (found[0].fingerprint, found[0].layout):
            raise MismatchError(
                f"the mask of {other.subject!r} was found on model {other.fingerprint[:8]}…, that of "
                f"{found[0].subject!r} on {found[0].fingerprint[:8]}…: join masks of one model"
            )
    if any(other.scope != found[0].scope for other in found[1:]):
        raise ConeslabError(
            "the masks act at different words, so no single mask can do what they do together: combine them instead "
            "(coneslab.edits.Combined((mask, other)))"
        )
    cuts = {mask.cut for mask in found if mask.scales.any()}
    if len(cuts) > 1:
        raise ConeslabError(f"the masks have different cuts {sorted(cuts)}: make each binary first (mask.binary())")
    indices, scales = found[0].indices, found[0].scales
    for other in found[1:]:
        indices, scales = _minimum(indices, scales, other)
    names = sorted({name for mask in found for name in mask.subject.split(" + ")})
    cut = cuts.pop() if cuts else max(mask.cut for mask in found)
    facts: dict[str, Any] = {"subject": " + ".join(names), "cut": cut, "settings": {"concatenated": names}}
    return ConceptNeurons(found[0].layout, indices, scales, found[0].fingerprint, scope=found[0].scope, **facts)


def _minimum(indices: np.ndarray, scales: np.ndarray, other: ConceptNeurons) -> tuple[np.ndarray, np.ndarray]:
    union = np.union1d(indices, other.indices)
    low = np.ones(len(union), np.float32)
    for own, values in ((indices, scales), (other.indices, other.scales)):
        at = np.searchsorted(union, own)
        low[at] = np.minimum(low[at], values)
    return union, low


def overlap_matrices(found: Sequence[ConceptNeurons]) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard index of every pair of masks, and what chance would give: two (masks, masks) arrays.

    Chance keeps the number of shut neurons of each mask in each layer: see `Overlap`.
    """
    found = checks.items("masks", found, ConceptNeurons)
    pairs = [[a.overlap(b) for b in found] for a in found]
    jaccard = np.array([[pair.jaccard for pair in row] for row in pairs])
    return jaccard, np.array([[pair.expected_jaccard for pair in row] for row in pairs])


@dataclass(frozen=True)
class Additivity:
    """How nearly a union's change to the denoiser's output is the sum of its parts' changes.

    cosine: of the two changes, 1 if they point the same way; ratio: size of the union's change over that of the sum;
    error: size of their difference over that of the union's change, 0 if shutting is additive. All are means over
    samples.
    """

    cosine: float
    ratio: float
    error: float


@torch.no_grad()
def output_changes(
    pipe: Pipeline,
    edits: Sequence[Edit],
    subjects: Sequence[ConceptSubject],
    *,
    samples: int = 32,
    seed: int = 1_000_000,
) -> list[Tensor]:
    """How each edit changes the denoiser's output, (samples, elements) float64 each.

    Measured on noised reference pictures of all subjects in turn, with the prompt that names them all. seed: of the
    noises, by default far from those of searches.
    """
    require_editable(pipe)
    edits, subjects = [require_edit(edit) for edit in checks.items("edits", edits)], several(subjects)
    samples = checks.count("samples", samples)
    data = [concept_latents(pipe, subject, prior_batch_size=0, batch_size=samples)[0] for subject in subjects]
    batch = next(sample_batches(pipe, data, seed=seed))
    rows = torch.arange(0, len(batch.latents), len(subjects))  # every part of the schedule of every subject
    timesteps = batch.timesteps[rows]
    noisy = add_noise(pipe.scheduler, batch.latents[rows], batch.noise[rows], timesteps)
    prompt = joint_prompt(subjects)

    def output(edit: Edit | None) -> Tensor:
        with applied(edit, pipe):
            text = encode_prompts(pipe, [prompt]).expand(len(rows), -1, -1)
            return pipe.unet(noisy, timesteps, encoder_hidden_states=text).sample.flatten(1).double()

    before = output(None)
    return [output(edit) - before for edit in edits]


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of a with the same row of b: (n, elements) each -> (n,)."""
    if checks.tensor("a", a, "n, elements").shape != checks.tensor("b", b, "n, elements").shape:
        raise MismatchError(f"a is {tuple(a.shape)}, b is {tuple(b.shape)}: give two of one shape")
    return torch.nn.functional.cosine_similarity(a, b, dim=1, eps=1e-12)


def additivity(
    pipe: Pipeline,
    found: Sequence[ConceptNeurons],
    subjects: Sequence[ConceptSubject],
    *,
    samples: int = 32,
    seed: int = 1_000_000,
) -> Additivity:
    """Compare the union's change to the denoiser's output with the sum of the single masks' changes.

    Raises ConeslabError unless there are two masks or more, and a subject for each.
    """
    require_editable(pipe)
    found, subjects = checks.items("masks", found, ConceptNeurons), several(subjects)
    if len(found) != len(subjects) or len(found) < 2:
        raise ConeslabError(f"got {len(found)} masks and {len(subjects)} subjects: give two or more of each, in pairs")
    apart = len({mask.scope for mask in found}) > 1
    union = Combined(tuple(found)) if apart else concatenate(*found)
    whole, *parts = output_changes(pipe, [union, *found], subjects, samples=samples, seed=seed)
    total = torch.stack(parts).sum(0)
    size, sum_size = whole.norm(dim=1).clamp_min(1e-12), total.norm(dim=1).clamp_min(1e-12)
    error = (whole - total).norm(dim=1) / size
    return Additivity(float(cosines(whole, total).mean()), float((size / sum_size).mean()), float(error.mean()))


def joint_prompt(subjects: Sequence[ConceptSubject]) -> str:
    """ "a sks cat, a zwx dog and a vqz car": the prompt that names all subjects, as captions do."""
    return listed([subject.prompt for subject in several(subjects)])


@dataclass(frozen=True, eq=False, repr=False)
class TunedNeurons(Edit):
    """Neurons that were tuned instead of shut: a mask, and a value for each neuron in it; an edit.

    neurons: which weights; values: (k,) float32, read-only, in the order of `neurons.indices`, stored as float16.
    history: name -> numbers, one per step.
    Raises ConeslabError unless there is one finite value per neuron.
    """

    neurons: ConceptNeurons
    values: np.ndarray
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.of_kind("neurons", self.neurons, ConceptNeurons)
        with np.errstate(over="ignore"):  # a number too large for float16 becomes infinity, which is refused
            values = numbers("values", self.values).astype(np.float16).astype(np.float32)
        if values.shape != self.neurons.indices.shape or not np.isfinite(values).all():
            raise ConeslabError(
                f"got values of shape {values.shape} for {len(self.neurons):,} neurons: give a finite number, within "
                "the range of float16, for each of them"
            )
        values.flags.writeable = False
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    @property
    def nbytes(self) -> int:
        """Bytes of the mask in its file and of the values in float16."""
        return len(self.neurons.binary(cut=1.0).to_bytes()) + 2 * len(self.values)

    def __repr__(self) -> str:
        return f"TunedNeurons({self.neurons.subject!r}: {len(self.values):,} weights tuned, {self.nbytes:,} bytes)"

    @property
    def acts_on(self) -> frozenset[str]:
        return self.neurons.acts_on

    @in_steps
    def applied(
        self, pipe: Pipeline, dose: float = 1.0, *, check_model: bool = True
    ) -> AbstractContextManager[Pipeline]:
        """Give the neurons their tuned values inside a `with` block; dose 0 keeps the model's own weights.

        Raises what `ConceptNeurons.applied` raises.
        """
        values = torch.tensor(self.values)

        def tuned(old: Tensor, part: slice) -> Tensor:
            return (1 - dose) * old + dose * values[part].to(old)

        return self.neurons.updated(pipe, tuned, dose=dose, check_model=check_model)

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, description = self.neurons._pack()
        tensors = {f"neurons.{name}": tensor for name, tensor in tensors.items()}
        tensors["values"] = torch.tensor(self.values).half()
        history = {name: list(values) for name, values in self.history.items()}
        return tensors, {"neurons": description, "settings": dict(self.settings), "history": history}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> TunedNeurons:
        values = tensors.pop("values").float().numpy()
        parts = {name.removeprefix("neurons."): tensor for name, tensor in tensors.items()}
        neurons = ConceptNeurons._unpack(parts, description.pop("neurons"))
        return cls(neurons, values, **description)


@dataclass(frozen=True, kw_only=True)
class TogetherSettings(TuningSettings, ConceptSettings):
    """Settings of `finetune_together`: those of `TuningSettings` and `ConceptSettings`, with other defaults."""

    method: ClassVar[str] = "collaborative fine-tuning"

    steps: int = 40
    batch_size: int = 16
    prior_batch_size: int = 8


@resumable
@takes(TogetherSettings)
def finetune_together(
    pipe: Pipeline,
    union: ConceptNeurons,
    subjects: Sequence[ConceptSubject],
    settings: TogetherSettings | Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    resume: str | Path | None = None,
    **changes: Any,
) -> TunedNeurons:
    """Collaborative fine-tuning (Cones, Sec. 3.3): tune the union's weights on the sum of the subjects' losses.

    Starts at the shut (or scaled) weights; every weight outside `union` keeps its value. A mask with a scope is tuned
    at its words, without a prior: masks at different words do not meet, so each is tuned alone. settings, changes: see
    `TogetherSettings`; dtype, chunk: see `KVGradient`; progress, callback, resume: see `RunOptions`.
    The pipeline is not changed.
    Raises ConeslabError without a subject or a step, or if the loss diverges; MismatchError for a union of another
    model.

    >>> from coneslab.diffusion import KVSpace
    >>> pipe, subjects = coneslab.load("tiny"), [coneslab.subject("cat"), coneslab.subject("dog")]
    >>> space = KVSpace(pipe)
    >>> union = ConceptNeurons(space.layout, [0, 1, 2], [0.0, 0.0, 0.0], space.fingerprint(), subject="cat + dog")
    >>> tuned = coneslab.finetune_together(pipe, union, subjects, steps=2, batch_size=4, prior_batch_size=0)
    >>> tuned
    TunedNeurons('cat + dog': 3 weights tuned, ... bytes)
    >>> before = space.gather()
    >>> with tuned.applied(pipe):
    ...     (space.gather() != before).nonzero().flatten().tolist()
    [0, 1, 2]
    """
    require_editable(pipe)
    checks.of_kind("union", union, ConceptNeurons)
    settings, subjects = TogetherSettings.chosen(settings, changes), several(subjects)
    if union.scope:
        settings = replace(settings, prior_weight=0.0, prior_batch_size=0)  # the prior's prompts have no such words
    require_passes(dtype, chunk, callback)
    require_model(union.fingerprint, pipe, "the union")
    if not len(union):
        raise ConeslabError(f"the mask of {union.subject!r} has no neurons: there is nothing to tune")
    data = joint_latents(pipe, subjects, settings)
    where = where_scope(pipe, [subject.prompt for subject in subjects], union.scope) if union.scope else None
    if where is not None and not where.any(1).all():
        raise ConeslabError(
            f"the mask acts at {' '.join(union.scope)!r} only, which not all prompts have: tune each subject's own mask"
        )
    gradient = KVGradient(pipe, data, where=where, dtype=dtype, chunk=chunk)
    theta, batch_at = gradient.theta(), numbered_batches(pipe, data, settings.seed)
    chosen = torch.tensor(union.indices, dtype=torch.long, device=theta.device)
    values = (theta[chosen] * torch.tensor(union.scales).to(theta)).requires_grad_()
    history = tune_kv(
        gradient,
        {"values": values},
        lambda number: Point(batch_at(number), theta=theta.index_copy(0, chosen, values)),
        settings,
        title=f"tuning {union.subject}",
        identity={"model": union.fingerprint, "union": union._identity()},
        progress=progress,
        callback=callback,
        resume=resume,
    )
    return TunedNeurons(union, values.detach().cpu().numpy(), settings=settings.record(), history=history)
