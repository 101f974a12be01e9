"""Ablating concepts: make the model treat a target as something else (Kumari et al. 2023, arXiv 2303.13516, ICCV 2023).

Afterwards a target ("a cat") is drawn as its anchor ("a dog", or whatever else stands in its place). The untouched
model draws pictures of the anchor once; noises and regression targets are the same for every kind of parameter, and
each function returns an edit. Other ways to the same end are in the files beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ... import checks
from ...callback import Callback
from ...diffusion.encoding import encode_images, encode_prompts, require_read
from ...diffusion.loss import add_noise
from ...diffusion.loss import target as regression_target
from ...diffusion.pipelines import Pipeline
from ...diffusion.precision import mixed_precision
from ...edits.base import Edit
from ...edits.tokens import LearnedText, TokenEdit, start_vector, vocabulary_fingerprint
from ...edits.weights import WeightDelta, model_fingerprint
from ...errors import ConeslabError
from ...finetuning.kv_gradient import KVGradient, require_passes
from ...finetuning.loop import Point, TuningSettings, tune_kv, tune_unet
from ...finetuning.samples import CaptionedLatents, NoisyBatch, SamplerSettings, generated_latents, numbered_batches
from ...pictures import Images, as_pictures
from ...settings import takes
from .prompts import Prompts, paired

Objective = Literal["model", "noise"]
Teacher = Literal["frozen", "current"]
Parameters = Literal["cross_attention_kv", "attention", "embedding", "all"]


@dataclass(frozen=True, kw_only=True)
class AblationSettings(TuningSettings, SamplerSettings):
    """Settings of `ablate`: those of `TuningSettings` and `SamplerSettings`, and

    objective: "model" minimises ||f_θ(x_t, t, c*) − f(x_t, t, c)||², whose target is the anchor's own prediction, by
    the untouched model (teacher "frozen") or, without a gradient, by the one in training ("current"); "noise" minimises
    the denoising loss of the anchor's pictures under the target's caption.
    parameters: keys and values of cross-attention; all attention; the token embeddings of the words that the target
    has and the anchor lacks; the whole U-Net, which memorised pictures need.
    learning_rate: None means 1e-3 for keys and values, 1e-2 for embeddings, 1e-4 for the others.
    templates: captions with {} for target and anchor; pictures: of the anchor, drawn in all. batch_size,
    preserve_batch_size: samples per step with the target's captions, and with the anchor's, whose denoising loss has
    the weight `preserve_weight`.
    """

    method: ClassVar[str] = "concept ablation"

    objective: Objective = "model"
    parameters: Parameters = "cross_attention_kv"
    teacher: Teacher = "frozen"
    steps: int = 100
    learning_rate: float | None = None
    templates: Sequence[str] = ("{}",)
    pictures: int = 64
    batch_size: int = 16
    preserve_batch_size: int = 8
    preserve_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, options in (("objective", Objective), ("parameters", Parameters), ("teacher", Teacher)):
            self._check(checks.choice, name, among=get_args(options))
        self._check(checks.templates, "templates")
        self._check(checks.count, "pictures", "batch_size")
        self._check(checks.count, "preserve_batch_size", least=0)
        self._check(checks.number, "preserve_weight", interval="[0, inf)")

    @property
    def rate(self) -> float:
        usual = {"cross_attention_kv": 1e-3, "embedding": 1e-2}.get(self.parameters, 1e-4)
        return usual if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class AblationData:
    """What an ablation is trained on: one entry for every target in every template.

    captions, anchors: prompts with the target, and with its anchor in its place; latents: (pictures, c, h, w) of
    each anchor prompt.
    """

    captions: tuple[str, ...]
    anchors: tuple[str, ...]
    latents: tuple[Tensor, ...]

    def batch_sizes(self, total: int) -> list[int]:
        """How many samples of each entry make a batch; at least one each."""
        count = len(self.captions)
        return [max(1, total // count + (number < total % count)) for number in range(count)]


def ablation_data(
    pipe: Pipeline,
    target: Prompts,
    anchor: Prompts,
    settings: AblationSettings | Mapping[str, Any] | None = None,
    *,
    images: Images | None = None,
    progress: bool = False,
    **changes: Any,
) -> AblationData:
    """Put targets and anchors into templates, and draw pictures of the anchors (concept ablation, Sec. 3.2).

    images: pictures of the anchor to use instead, for every entry. Several targets have an anchor each, or share one.
    settings, changes: see `AblationSettings`.
    Raises ConeslabError if a target is its own anchor, the numbers differ, or one is empty.
    """
    settings = AblationSettings.chosen(settings, changes)
    targets, anchors = paired(target, anchor)
    same = [one for one, other in zip(targets, anchors, strict=True) if one.split() == other.split()]
    if same or not all(text.strip() for text in (*targets, *anchors)):
        raise ConeslabError(
            f"target and anchor are the same or empty ({', '.join(map(repr, same))}): name different ones"
        )
    captions = tuple(template.format(one) for one in targets for template in settings.templates)
    named = tuple(template.format(one) for one in anchors for template in settings.templates)
    require_read(pipe, *captions, *named)
    if images is not None:
        latents = encode_images(pipe, as_pictures(images, name="pictures of the anchor")).detach()
        return AblationData(captions, named, (latents,) * len(captions))
    each = max(1, -(-settings.pictures // len(named)))
    prompts = [caption for caption in named for _ in range(each)]
    drawn = generated_latents(pipe, prompts, **settings.sampler, progress=progress)
    return AblationData(captions, named, drawn.split(each))


@takes(AblationSettings)
def ablate(
    pipe: Pipeline,
    target: Prompts,
    anchor: Prompts,
    settings: AblationSettings | Mapping[str, Any] | None = None,
    *,
    images: Images | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    resume: str | Path | None = None,
    **changes: Any,
) -> Edit:
    """Ablate a concept, or several at once, onto an anchor (concept ablation, Sec. 3.2, Eq. 3 to 6).

    Works with any prediction type. settings, changes: see `AblationSettings`; images: see `ablation_data`; dtype,
    chunk: see `KVGradient`; progress, callback, resume: see `RunOptions`.
    Returns a `WeightDelta`, or a `TokenEdit` for embeddings.
    Raises ConeslabError for settings that make no sense, or for a target without a word of its own.

    >>> pipe = coneslab.load("tiny")
    >>> options = {"steps": 2, "pictures": 2, "sampler_steps": 2, "batch_size": 4, "preserve_batch_size": 4}
    >>> coneslab.ablate(pipe, "a cat", "a dog", **options)
    WeightDelta('a cat': ... weights in ... layers, model ...)
    >>> coneslab.ablate(pipe, "a cat", "a dog", parameters="embedding", **options)
    TokenEdit(cat: ... numbers each)
    """
    settings = AblationSettings.chosen(settings, changes)
    require_passes(dtype, chunk, callback)
    target, anchor = paired(target, anchor)
    shown = ablation_data(pipe, target, anchor, settings, images=images, progress=progress)
    data = _captioned(pipe, shown, settings)
    named = ", ".join(target)
    model = model_fingerprint(pipe)
    train = {"cross_attention_kv": _train_kv, "embedding": _train_embedding}.get(settings.parameters, _train_unet)
    plan = _Plan(
        pipe,
        shown,
        data,
        _Aim(pipe, data[: len(shown.captions)], shown.anchors, settings, dtype, chunk),
        numbered_batches(pipe, data, settings.seed),
        settings,
        dtype,
        chunk,
        subject=named,
        model=model,
        record={
            **settings.record(),
            "learning_rate": settings.rate,
            "target": named,
            "anchor": ", ".join(anchor),
        },
        run={
            "title": f"ablating {named}",
            "identity": {"model": model, "anchors": shown.anchors},
            "progress": progress,
            "callback": callback,
            "resume": resume,
        },
    )
    return train(plan)


def _captioned(pipe: Pipeline, shown: AblationData, settings: AblationSettings) -> list[CaptionedLatents]:
    """Latents under the target's captions, then the anchor's; each group's weights sum to 1 and `preserve_weight`."""
    data = []
    for captions, total, weight in (
        (shown.captions, settings.batch_size, 1.0),
        (shown.anchors, settings.preserve_batch_size, settings.preserve_weight),
    ):
        if not total or not weight:
            continue
        texts, counts = encode_prompts(pipe, list(captions)).detach(), shown.batch_sizes(total)
        data += [
            CaptionedLatents(latents, text, count, weight * count / sum(counts))
            for latents, text, count in zip(shown.latents, texts, counts, strict=True)
        ]
    return data


class _Aim:
    """What the network must predict for a batch: the anchor's prediction for the target's captions, else y."""

    def __init__(
        self,
        pipe: Pipeline,
        data: Sequence[CaptionedLatents],
        anchors: Sequence[str],
        settings: AblationSettings,
        dtype: torch.dtype | None,
        chunk: int | None,
    ) -> None:
        self.scheduler, self.counts = pipe.scheduler, [part.batch_size for part in data]
        by_model = settings.objective == "model"
        self.teacher = KVGradient(pipe, data, dtype=dtype, chunk=chunk) if by_model else None
        self.theta = self.teacher.theta() if self.teacher is not None else None
        self.text = encode_prompts(pipe, list(anchors)).detach()

    def __call__(
        self, batch: NoisyBatch, *, student: Callable[[NoisyBatch, Tensor], Tensor] | None = None
    ) -> NoisyBatch:
        """The batch with its `regression_target`. student(batch, texts): predicts instead of the untouched model."""
        if self.teacher is None or self.theta is None:
            return batch
        rows = slice(0, sum(self.counts))
        if student is None:
            predicted = self.teacher.outputs(self.theta, self.text, batch.part(rows))
        else:
            with torch.no_grad():
                predicted = student(batch.part(rows), self.text)
        aim = regression_target(self.scheduler, batch.latents, batch.noise, batch.timesteps).clone()
        aim[rows] = predicted.to(aim)
        return replace(batch, regression_target=aim)


@dataclass(frozen=True)
class _Plan:
    """Everything that training needs. record: what the edit stores as its settings; run: options of `tune`."""

    pipe: Pipeline
    shown: AblationData
    data: list[CaptionedLatents]
    aim: _Aim
    batch_at: Callable[[int], NoisyBatch]
    settings: AblationSettings
    dtype: torch.dtype | None
    chunk: int | None
    subject: str
    model: str
    record: dict[str, Any]
    run: dict[str, Any]

    @property
    def by_student(self) -> bool:
        return self.settings.teacher == "current"

    def delta(self, deltas: dict[str, Tensor], history: dict[str, list[float]]) -> WeightDelta:
        return WeightDelta(deltas, self.model, subject=self.subject, settings=self.record, history=history)


def _train_kv(plan: _Plan) -> WeightDelta:
    gradient = KVGradient(plan.pipe, plan.data, dtype=plan.dtype, chunk=plan.chunk)
    theta = gradient.theta().requires_grad_()

    def student(batch: NoisyBatch, anchors: Tensor) -> Tensor:
        assert plan.aim.teacher is not None  # the noise-based loss never calls this
        return plan.aim.teacher.outputs(theta, anchors, batch)

    def point(number: int) -> Point:
        batch = plan.aim(plan.batch_at(number), student=student if plan.by_student else None)
        return Point(batch, theta=theta)

    history = tune_kv(gradient, {"theta": theta}, point, plan.settings, **plan.run)
    return plan.delta(gradient.deltas(theta), history)


def _train_embedding(plan: _Plan) -> TokenEdit:
    if plan.by_student:
        raise ConeslabError("with parameters='embedding' the anchor's prediction never changes: use teacher='frozen'")
    captions, pipe = plan.shown.captions, plan.pipe
    kept = {word for caption in plan.shown.anchors for word in caption.split()}
    words = list(dict.fromkeys(word for caption in captions for word in caption.split() if word not in kept))
    if not words:
        raise ConeslabError(f"{plan.subject!r} has no word that its anchor lacks: there is no embedding to change")
    long = [word for word in words if len(pipe.tokenizer(word, add_special_tokens=False).input_ids) != 1]
    if long:
        raise ConeslabError(
            f"{', '.join(long)} is not in the vocabulary as one token: ablate keys and values instead "
            "(parameters='cross_attention_kv')"
        )
    data = plan.data[: len(captions)]  # the anchor's captions do not contain the words: nothing to preserve there
    text = LearnedText(pipe, captions, words)
    vectors = torch.stack([start_vector(pipe, word) for word in words]).requires_grad_()
    gradient = KVGradient(pipe, data, dtype=plan.dtype, chunk=plan.chunk)
    rows = slice(0, sum(part.batch_size for part in data))

    def point(number: int) -> Point:
        return Point(plan.aim(plan.batch_at(number)).part(rows), text=text(vectors))

    history = tune_kv(gradient, {"vectors": vectors}, point, plan.settings, **plan.run)
    table = vocabulary_fingerprint(pipe)
    return TokenEdit(tuple(words), vectors, table, initial=tuple(words), settings=plan.record, history=history)


def _train_unet(plan: _Plan) -> WeightDelta:
    def batch_at(number: int, unet: Any) -> NoisyBatch:
        def student(batch: NoisyBatch, anchors: Tensor) -> Tensor:
            own = anchors.repeat_interleave(torch.tensor(plan.aim.counts, device=anchors.device), 0)
            noisy = add_noise(plan.pipe.scheduler, batch.latents, batch.noise, batch.timesteps)
            with mixed_precision(unet.device):
                return unet(noisy.float(), batch.timesteps, encoder_hidden_states=own.float()).sample.float()

        return plan.aim(plan.batch_at(number), student=student if plan.by_student else None)

    def only(name: str) -> bool:
        return plan.settings.parameters == "all" or ".attn1." in name or ".attn2." in name

    return plan.delta(*tune_unet(plan.pipe, plan.data, batch_at, plan.settings, only=only, **plan.run))
