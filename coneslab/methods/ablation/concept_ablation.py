"""Ablating concepts: make the model treat a target as something else (Kumari et al. 2023, arXiv 2303.13516, ICCV 2023).

Afterwards a target ("a cat") is drawn as its anchor ("a dog", or whatever else stands in its place). The untouched
model draws pictures of the anchor once; noises and regression targets are the same for every kind of parameter, and
each function returns an edit. Other ways to the same end are in the files beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ... import checks
from ...callback import Callback
from ...diffusion.checks import require_editable, require_pipeline
from ...diffusion.encoding import encode_images, encode_prompts
from ...diffusion.loss import add_noise
from ...diffusion.loss import target as regression_target
from ...diffusion.pipelines import Pipeline
from ...diffusion.precision import mixed_precision
from ...edits.base import Edit
from ...edits.tokens import LearnedText, TokenEdit, start_vector, vocabulary_fingerprint
from ...edits.weights import WeightDelta, model_fingerprint
from ...errors import ConeslabError
from ...finetuning.checkpoints import resumable
from ...finetuning.kv_gradient import KVGradient, require_passes
from ...finetuning.loop import Point, TuningSettings, require_training_dtype, tune_kv, tune_unet
from ...finetuning.samples import CaptionedLatents, NoisyBatch, SamplerSettings, generated_latents, numbered_batches
from ...pictures import Images, as_pictures
from ...settings import ByValue, takes
from .prompts import Prompts, captioned, paired

Objective = Literal["model", "noise"]
Teacher = Literal["frozen", "current"]
Parameters = Literal["cross_attention_kv", "attention", "embedding", "all"]


@dataclass(frozen=True, kw_only=True)
class AblationSettings(TuningSettings, SamplerSettings):
    """Settings of `ablate`: those of `TuningSettings` and `SamplerSettings`, and

    objective: "model" minimises ||f_θ(x_t, t, c*) − f(x_t, t, c)||², whose target is the anchor's own prediction;
    "noise" minimises the denoising loss of the anchor's pictures under the target's caption.
    teacher: who makes the anchor's prediction, the untouched model ("frozen", a reading) or, as in the paper and its
    code, the model in training, without a gradient ("current"). On the shipped model both forget the target, and the
    frozen one leaves other concepts more as they were.
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
        if self.teacher == "current" and (self.parameters == "embedding" or self.objective == "noise"):
            why = "the anchor's prediction never changes" if self.objective == "model" else "nobody predicts anything"
            raise ConeslabError(
                f"with parameters={self.parameters!r} and objective={self.objective!r} {why}: use teacher='frozen'"
            )

    @property
    def rate(self) -> float:
        usual = {"cross_attention_kv": 1e-3, "embedding": 1e-2}.get(self.parameters, 1e-4)
        return usual if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True, eq=False)
class AblationData(ByValue):
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
    Raises ConeslabError if the model cannot tell a target from its anchor, the numbers differ, or one is empty.
    """
    require_pipeline(pipe)
    settings = AblationSettings.chosen(settings, changes)
    captions, named = captioned(pipe, target, anchor, settings.templates)
    if images is not None:
        latents = encode_images(pipe, as_pictures(images, name="pictures of the anchor")).detach()
        return AblationData(tuple(captions), tuple(named), (latents,) * len(captions))
    each = max(1, -(-settings.pictures // len(named)))
    prompts = [caption for caption in named for _ in range(each)]
    drawn = generated_latents(pipe, prompts, **settings.sampler, progress=progress)
    return AblationData(tuple(captions), tuple(named), drawn.split(each))


@resumable
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
    require_editable(pipe)
    settings = AblationSettings.chosen(settings, changes)
    require_passes(dtype, chunk, callback)
    if settings.parameters in ("attention", "all"):
        require_training_dtype(dtype)
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
        self.by_model, self.by_student = settings.objective == "model", settings.teacher == "current"
        self.text = encode_prompts(pipe, list(anchors)).detach()
        self._make_teacher = partial(KVGradient, pipe, data, dtype=dtype, chunk=chunk)

    @cached_property
    def teacher(self) -> KVGradient:
        """Predicts with any keys and values, by default those of the untouched model."""
        return self._make_teacher()

    @cached_property
    def untouched(self) -> Tensor:
        return self.teacher.theta()

    def __call__(
        self, batch: NoisyBatch, *, student: Callable[[NoisyBatch, Tensor], Tensor] | None = None
    ) -> NoisyBatch:
        """The batch with its `regression_target`.

        student(batch, texts): the prediction of the model in training, the target if the teacher is "current".
        """
        if not self.by_model:
            return batch
        rows = slice(0, sum(self.counts))
        if student is None or not self.by_student:
            predicted = self.teacher.outputs(self.untouched, self.text, batch.part(rows))
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

    def delta(self, deltas: dict[str, Tensor], history: dict[str, list[float]]) -> WeightDelta:
        return WeightDelta(deltas, self.model, subject=self.subject, settings=self.record, history=history)


def _train_kv(plan: _Plan) -> WeightDelta:
    gradient = KVGradient(plan.pipe, plan.data, dtype=plan.dtype, chunk=plan.chunk)
    theta = gradient.theta().requires_grad_()

    def student(batch: NoisyBatch, anchors: Tensor) -> Tensor:
        return plan.aim.teacher.outputs(theta, anchors, batch)

    def point(number: int) -> Point:
        return Point(plan.aim(plan.batch_at(number), student=student), theta=theta)

    history = tune_kv(gradient, {"theta": theta}, point, plan.settings, **plan.run)
    return plan.delta(gradient.deltas(theta), history)


def _train_embedding(plan: _Plan) -> TokenEdit:
    captions, pipe = plan.shown.captions, plan.pipe

    def words_of(texts: Sequence[str]) -> dict[tuple[int, ...], str]:
        """The words of texts by their token ids: to the model, "Cat" is "cat"."""
        words = list(dict.fromkeys(word for text in texts for word in text.split()))
        ids = pipe.tokenizer(words, add_special_tokens=False).input_ids
        return {tuple(tokens): word for tokens, word in zip(ids, words, strict=True)}

    kept = words_of(plan.shown.anchors)
    own = {ids: word for ids, word in words_of(captions).items() if ids not in kept}
    if not own:
        raise ConeslabError(f"{plan.subject!r} has no word that its anchor lacks: there is no embedding to change")
    words, long = list(own.values()), [word for ids, word in own.items() if len(ids) != 1]
    if long:
        raise ConeslabError(
            f"{', '.join(long)} is not in the vocabulary as one token: ablate keys and values instead, which are the "
            "parameters cross_attention_kv"
        )
    data = plan.data[: len(captions)]  # the anchor's captions do not contain the words: nothing to preserve there
    text = LearnedText(pipe, captions, words)
    vectors = torch.stack([start_vector(pipe, word) for word in words]).requires_grad_()
    gradient = KVGradient(pipe, data, dtype=plan.dtype, chunk=plan.chunk)
    rows = slice(0, sum(part.batch_size for part in data))

    def point(number: int) -> Point:
        # no caption of the anchor has a word that is trained: either teacher is the untouched model
        return Point(plan.aim(plan.batch_at(number)).part(rows), text=text(vectors))

    history = tune_kv(gradient, {"vectors": vectors}, point, plan.settings, **plan.run)
    table = vocabulary_fingerprint(pipe)
    return TokenEdit(tuple(words), vectors, table, initial=tuple(words), settings=plan.record, history=history)


def _train_unet(plan: _Plan) -> WeightDelta:
    def batch_at(number: int, unet: Any) -> NoisyBatch:
        def student(batch: NoisyBatch, anchors: Tensor) -> Tensor:
            own = anchors.repeat_interleave(torch.tensor(plan.aim.counts, device=anchors.device), 0).float()
            noisy = add_noise(plan.pipe.scheduler, batch.latents, batch.noise, batch.timesteps).float()
            parts = [part.split(plan.chunk or len(noisy)) for part in (noisy, batch.timesteps, own)]
            with mixed_precision(unet.device, plan.dtype):
                made = [unet(x, t, encoder_hidden_states=c).sample.float() for x, t, c in zip(*parts, strict=True)]
            return torch.cat(made)

        return plan.aim(plan.batch_at(number), student=student)

    def only(name: str) -> bool:
        return plan.settings.parameters == "all" or ".attn1." in name or ".attn2." in name

    options: dict[str, Any] = {"only": only, "dtype": plan.dtype, "chunk": plan.chunk, **plan.run}
    return plan.delta(*tune_unet(plan.pipe, plan.data, batch_at, plan.settings, **options))
