"""Ablating concepts: make the model treat a target as something else (Kumari et al. 2023, arXiv 2303.13516, ICCV 2023).

A target ("a cat") is drawn as its anchor ("a dog", or whatever else stands in its place) afterwards. Pictures are
drawn once from the anchor by the untouched model, noises and targets are the same for every kind of parameter, and
each function returns an edit. Other ways to the same end are in `ablation/neurons.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from ...diffusion.encoding import encode_images, encode_prompts
from ...diffusion.loss import add_noise
from ...diffusion.loss import target as regression_target
from ...diffusion.pipelines import Pipeline
from ...diffusion.precision import mixed_precision
from ...edits.base import Edit
from ...edits.tokens import LearnedText, TokenEdit, start_vector, vocabulary_fingerprint
from ...edits.weights import WeightDelta, model_fingerprint
from ...errors import ConeslabError
from ...finetuning.kv_gradient import KVGradient
from ...finetuning.loop import TuningCallback, figures, tune, tune_unet
from ...finetuning.samples import Draw, Pairs, drawn_latents, rounds
from .prompts import Prompts, paired

Objective = Literal["model", "noise"]
Parameters = Literal["cross_attention_kv", "attention", "embedding", "all"]


@dataclass(frozen=True)
class AblationPairs:
    """What an ablation is trained on: one entry for every target in every template.

    captions, anchors: prompts with the target, and with its anchor in its place; latents: (pictures, c, h, w) of
    each anchor prompt.
    """

    captions: tuple[str, ...]
    anchors: tuple[str, ...]
    latents: tuple[Tensor, ...]

    def batches(self, batch: int) -> list[int]:
        """How many samples of each entry make a batch; at least one each."""
        count = len(self.captions)
        return [max(1, batch // count + (number < batch % count)) for number in range(count)]


def ablation_pairs(
    pipe: Pipeline,
    target: Prompts,
    anchor: Prompts,
    *,
    templates: Sequence[str] = ("{}",),
    pictures: int = 64,
    images: Sequence[Image.Image] | None = None,
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    progress: bool = False,
) -> AblationPairs:
    """Put targets and anchors into templates, and draw pictures of the anchors (concept ablation, Sec. 3.2).

    pictures: drawn in all; images: pictures of the anchor instead, used for every entry. Several targets have an
    anchor each, or share one. Raises ConeslabError if a target is its own anchor, numbers differ or nothing is given.
    """
    targets, anchors = paired(target, anchor)
    same = [one for one, other in zip(targets, anchors, strict=True) if one.split() == other.split()]
    if same or not all(text.strip() for text in (*targets, *anchors)):
        raise ConeslabError(f"target and anchor are the same or empty ({', '.join(map(repr, same))}): name two things")
    if not templates or not all("{}" in template for template in templates):
        raise ConeslabError(f"the templates are {list(templates)}: give at least one, each with {{}} for the concept")
    if (images is not None and not images) or pictures < 1:
        raise ConeslabError(f"got {pictures} pictures to draw and {images!r} given: at least one is needed")
    captions = tuple(template.format(one) for one in targets for template in templates)
    named = tuple(template.format(one) for one in anchors for template in templates)
    if images is not None:
        latents = encode_images(pipe, list(images)).detach()
        return AblationPairs(captions, named, (latents,) * len(captions))
    each = max(1, -(-pictures // len(named)))
    prompts = [caption for caption in named for _ in range(each)]
    options: dict[str, Any] = {"steps": sampler_steps, "guidance_scale": guidance_scale, "progress": progress}
    drawn = drawn_latents(pipe, prompts, seed=seed, **options)
    return AblationPairs(captions, named, drawn.split(each))


def ablate(
    pipe: Pipeline,
    target: Prompts,
    anchor: Prompts,
    *,
    method: Objective = "model",
    parameters: Parameters = "cross_attention_kv",
    teacher: Literal["frozen", "current"] = "frozen",
    templates: Sequence[str] = ("{}",),
    pictures: int = 64,
    images: Sequence[Image.Image] | None = None,
    steps: int = 100,
    learning_rate: float | None = None,
    batch: int = 16,
    preserve_batch: int = 8,
    preserve_weight: float = 1.0,
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    resume: Any | None = None,
    progress: bool = True,
    callback: TuningCallback | None = None,
) -> Edit:
    """Ablate a concept, or several at once, onto an anchor (concept ablation, Sec. 3.2, Eq. 3 to 6).

    method: "model" minimises ||f_θ(x_t, t, c*) − f(x_t, t, c)||², the anchor's own prediction being the target, by
    the untouched model (teacher "frozen") or by the one in training, without a gradient ("current"); "noise"
    minimises the denoising loss of the anchor's pictures under the target's caption. Both add `preserve_weight` times
    the denoising loss of the same pictures under the anchor's caption. Any prediction type.
    parameters: keys and values of cross-attention; all attention; the token embeddings of the words that the target
    has and the anchor lacks; the whole U-Net, which memorised pictures need.
    templates, pictures, images: see `ablation_pairs`. learning_rate: default 1e-3 for keys and values, 1e-2 for
    embeddings, 1e-4 for the others. Returns a `WeightDelta`, or a `TokenEdit` for embeddings.
    Raises ConeslabError for settings that make no sense, or a target without a word of its own.
    """
    for name, given, options in (
        ("method", method, get_args(Objective)), ("parameters", parameters, get_args(Parameters)),
        ("teacher", teacher, ("frozen", "current")),
    ):  # fmt: skip
        if given not in options:
            raise ConeslabError(f"{name} is {given!r}: choose one of {', '.join(options)}")
    shown = ablation_pairs(
        pipe, target, anchor, templates=templates, pictures=pictures, images=images, seed=seed,
        sampler_steps=sampler_steps, guidance_scale=guidance_scale, progress=progress,
    )  # fmt: skip
    pairs = _pairs(pipe, shown, batch, preserve_batch, preserve_weight)
    aim = _Aim(pipe, pairs[: len(shown.captions)], shown.anchors, method, dtype, chunk)
    rate = learning_rate or {"cross_attention_kv": 1e-3, "embedding": 1e-2}.get(parameters, 1e-4)
    named = target if isinstance(target, str) else ", ".join(target)
    train = {"cross_attention_kv": _train_kv, "embedding": _train_embedding}.get(parameters, _train_unet)
    facts = [method, parameters, teacher, shown.captions, shown.anchors, batch, preserve_batch, preserve_weight, seed]
    run: dict[str, Any] = {
        "steps": steps, "learning_rate": rate, "title": f"ablating {named}", "progress": progress,
        "callback": callback, "resume": resume, "identity": f"ablation {facts} {model_fingerprint(pipe)}",
    }  # fmt: skip
    settings = {
        "method": f"concept ablation, {method}-based", "parameters": parameters, "target": named,
        "anchor": anchor if isinstance(anchor, str) else ", ".join(anchor), "steps": steps, "learning_rate": rate,
        "seed": seed,
    }  # fmt: skip
    return train(_Plan(
        pipe, shown, pairs, aim, rounds(pipe, pairs, seed), teacher == "current", parameters, dtype, chunk, named,
        settings, run,
    ))  # fmt: skip


def _pairs(
    pipe: Pipeline, shown: AblationPairs, batch: int, preserve_batch: int, preserve_weight: float
) -> list[Pairs]:
    """The target's pairs, then the anchor's; each group's weights sum to 1 and to `preserve_weight`."""
    pairs = []
    for captions, total, weight in ((shown.captions, batch, 1.0), (shown.anchors, preserve_batch, preserve_weight)):
        if not total or not weight:
            continue
        texts, counts = encode_prompts(pipe, list(captions)).detach(), shown.batches(total)
        pairs += [
            Pairs(latents, text, count, weight * count / sum(counts))
            for latents, text, count in zip(shown.latents, texts, counts, strict=True)
        ]
    return pairs


class _Aim:
    """What the network is to predict for a draw: the anchor's prediction on target pairs, y on the others."""

    def __init__(
        self, pipe: Pipeline, pairs: Sequence[Pairs], anchors: Sequence[str], method: Objective,
        dtype: torch.dtype | None, chunk: int | None,
    ) -> None:  # fmt: skip
        self.scheduler, self.samples = pipe.scheduler, sum(pair.batch for pair in pairs)
        self.counts = [pair.batch for pair in pairs]
        self.teacher = KVGradient(pipe, pairs, dtype=dtype, chunk=chunk) if method == "model" else None
        self.theta = self.teacher.theta() if self.teacher is not None else None
        self.text = encode_prompts(pipe, list(anchors)).detach()

    def __call__(self, draw: Draw, *, student: Callable[[Draw, Tensor], Tensor] | None = None) -> Draw:
        """The draw with `wanted` filled in. student(draw, texts): predicts in the untouched model's place."""
        if self.teacher is None or self.theta is None:
            return draw
        part = slice(0, self.samples)
        own = replace(draw, latents=draw.latents[part], noise=draw.noise[part], timesteps=draw.timesteps[part])
        if student is None:
            predicted = self.teacher.outputs(self.theta, self.text, own)
        else:
            with torch.no_grad():
                predicted = student(own, self.text)
        wanted = regression_target(self.scheduler, draw.latents, draw.noise, draw.timesteps).clone()
        wanted[part] = predicted.to(wanted)
        return replace(draw, wanted=wanted)


@dataclass(frozen=True)
class _Plan:
    """All that training needs. current: the teacher is the network in training; run: options of `tune`."""

    pipe: Pipeline
    shown: AblationPairs
    pairs: list[Pairs]
    aim: _Aim
    at: Callable[[int], Draw]
    current: bool
    parameters: Parameters
    dtype: torch.dtype | None
    chunk: int | None
    subject: str
    settings: dict[str, Any]
    run: dict[str, Any]

    def delta(self, deltas: dict[str, Tensor], history: dict[str, list[float]]) -> WeightDelta:
        about: dict[str, Any] = {"subject": self.subject, "settings": self.settings, "history": history}
        return WeightDelta(deltas, model_fingerprint(self.pipe), **about)


def _train_kv(how: _Plan) -> WeightDelta:
    gradient = KVGradient(how.pipe, how.pairs, dtype=how.dtype, chunk=how.chunk)
    theta = gradient.theta()

    def student(draw: Draw, anchors: Tensor) -> Tensor:
        assert how.aim.teacher is not None  # the noise-based loss asks for none
        return how.aim.teacher.outputs(theta, anchors, draw)

    def step(number: int) -> dict[str, float]:
        losses, theta.grad = gradient(theta, how.aim(how.at(number), student=student if how.current else None))
        return figures(how.pairs, losses)

    history = tune({"theta": theta}, step, **how.run)
    return how.delta(gradient.deltas(theta), history)


def _train_embedding(how: _Plan) -> TokenEdit:
    if how.current:
        raise ConeslabError("with parameters='embedding' the anchor's prediction never changes: use teacher='frozen'")
    kept = {word for caption in how.shown.anchors for word in caption.split()}
    words = list(dict.fromkeys(word for caption in how.shown.captions for word in caption.split() if word not in kept))
    if not words:
        raise ConeslabError(f"{how.subject!r} has no word that its anchor lacks: there is no embedding to change")
    long = [word for word in words if len(how.pipe.tokenizer(word, add_special_tokens=False).input_ids) != 1]
    if long:
        raise ConeslabError(
            f"{', '.join(long)} is not in the vocabulary as one token: ablate keys and values instead "
            "(parameters='cross_attention_kv')"
        )
    targets = len(how.shown.captions)
    pairs = how.pairs[:targets]  # the anchor's captions do not hold the words: nothing to preserve there
    text = LearnedText(how.pipe, how.shown.captions, words)
    vectors = torch.stack([start_vector(how.pipe, word) for word in words]).requires_grad_()
    gradient = KVGradient(how.pipe, pairs, dtype=how.dtype, chunk=how.chunk)
    theta, samples = gradient.theta(), sum(pair.batch for pair in pairs)

    def step(number: int) -> dict[str, float]:
        draw = how.aim(how.at(number))
        own = {name: getattr(draw, name)[:samples] for name in ("latents", "noise", "timesteps")}
        draw = Draw(**own, wanted=None if draw.wanted is None else draw.wanted[:samples])
        embedded = text(vectors)
        losses, slope = gradient.text_gradient(theta, embedded.detach(), draw)
        (vectors.grad,) = torch.autograd.grad(embedded, vectors, slope.to(embedded))
        return figures(pairs, losses)

    history = tune({"vectors": vectors}, step, **how.run)
    model = vocabulary_fingerprint(how.pipe)
    return TokenEdit(tuple(words), vectors, model, initial=tuple(words), settings=how.settings, history=history)


def _train_unet(how: _Plan) -> WeightDelta:
    def draw_at(number: int, unet: Any) -> Draw:
        def student(draw: Draw, anchors: Tensor) -> Tensor:
            own = anchors.repeat_interleave(torch.tensor(how.aim.counts, device=anchors.device), 0)
            noisy = add_noise(how.pipe.scheduler, draw.latents, draw.noise, draw.timesteps)
            with mixed_precision(unet.device):
                return unet(noisy.float(), draw.timesteps, encoder_hidden_states=own.float()).sample.float()

        return how.aim(how.at(number), student=student if how.current else None)

    everything = how.parameters == "all"
    return how.delta(*tune_unet(
        how.pipe, how.pairs, draw_at, only=lambda name: everything or ".attn1." in name or ".attn2." in name, **how.run
    ))  # fmt: skip
