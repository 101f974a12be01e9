"""Unlearning: ablation on what the probes use, so that the table shows the price of being gone.

Other methods teach the model what to predict when it reads the target's words; noised pictures of the target are still
finished as such. Here the whole U-Net learns what to predict on noised pictures of the *target*, whatever it reads: the
target's caption, nothing, or words at random, as a search for prompts or a learned word would bring them (adversarial
training in the spirit of AdvUnlearn, Zhang et al. 2024, arXiv 2405.15234, with random instead of sought words).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import checks
from ...callback import Callback
from ...diffusion.checks import require_editable
from ...diffusion.encoding import encode_images, encode_prompts, require_read
from ...diffusion.kvspace import unet_of
from ...diffusion.loss import add_noise
from ...diffusion.pipelines import Pipeline
from ...diffusion.precision import fast_dtype, frozen_copy
from ...edits.weights import WeightDelta, model_fingerprint
from ...finetuning.checkpoints import resumable
from ...finetuning.kv_gradient import require_passes
from ...finetuning.loop import TuningSettings, require_training_dtype, tune_unet
from ...finetuning.samples import CaptionedLatents, NoisyBatch, SamplerSettings, generated_latents, numbered_batches
from ...pictures import Images, as_pictures
from ...seeds import derived
from ...settings import takes
from .prompt_attack import words_of
from .prompts import Prompts, captioned, paired


@dataclass(frozen=True, kw_only=True)
class UnlearningSettings(TuningSettings, SamplerSettings):
    """Settings of `unlearn`: those of `TuningSettings` and `SamplerSettings`, and

    eta: η, how far beyond the anchor's prediction, away from the target's; pictures: of all targets, and of what is to
    be preserved, drawn beforehand; batch_size: samples per step of targets; preserve_batch_size, preserve_weight: of
    everything else; words: how many random captions, of `length` words each, stand beside the target's and the empty
    one.
    """

    method: ClassVar[str] = "unlearning"

    steps: int = 100
    learning_rate: float = 3e-4
    eta: float = 3.0
    pictures: int = 48
    batch_size: int = 12
    preserve_batch_size: int = 12
    preserve_weight: float = 1.0
    words: int = 2
    length: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.number, "eta", "preserve_weight", interval="[0, inf)")
        self._check(checks.count, "pictures", "batch_size", "preserve_batch_size")
        self._check(checks.count, "length", most=8)
        self._check(checks.count, "words", least=0, most=100)


@resumable
@takes(UnlearningSettings)
def unlearn(
    pipe: Pipeline,
    target: Prompts,
    anchor: Prompts,
    settings: UnlearningSettings | Mapping[str, Any] | None = None,
    *,
    images: Images | None = None,
    preserve: str | Iterable[str] = (),
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    resume: str | Path | None = None,
    **changes: Any,
) -> WeightDelta:
    """Make the whole U-Net finish noised pictures of the target as its anchor, whatever it reads (ours).

    On noised pictures x_t of the target, under its caption, the empty one and random words alike, the regression target
    is f(x_t, t, anchor) + η (f(x_t, t, anchor) − f(x_t, t, target)) by the untouched model. On pictures of the anchors
    and of `preserve`, under their own captions and the empty one, it is what the untouched model predicts.
    images: pictures of the target to use instead of drawn ones, for every target. settings, changes: see
    `UnlearningSettings`; dtype, chunk: see `tune_unet`; progress, callback, resume: see `RunOptions`.
    Raises ConeslabError if the model cannot tell target and anchor apart, or settings make no sense.
    """
    require_editable(pipe)
    settings = UnlearningSettings.chosen(settings, changes)
    require_passes(dtype, chunk, callback)
    require_training_dtype(dtype)
    targets, anchors = paired(target, anchor)
    captions, others = captioned(pipe, targets, anchors)
    kept = list(dict.fromkeys([*others, *checks.texts("preserve", preserve, least=0)]))
    require_read(pipe, *kept)
    shown = None if images is None else as_pictures(images, name="pictures of the target")
    each = {"targets": -(-settings.pictures // len(captions)), "kept": -(-settings.pictures // len(kept))}
    asked = [one for one in captions for _ in range(each["targets"])] if shown is None else []
    drawn = generated_latents(
        pipe, [*asked, *(one for one in kept for _ in range(each["kept"]))], **settings.sampler, progress=progress
    )
    latents = drawn[: len(asked)] if shown is None else encode_images(pipe, shown).detach()
    parts = latents.split(each["targets"]) if shown is None else (latents,) * len(captions)
    data, aims = _data(pipe, settings, captions, others, parts, kept, drawn[len(asked) :].split(each["kept"]))
    unet, counts = unet_of(pipe), [part.batch_size for part in data]
    untouched = frozen_copy(unet, dtype or fast_dtype(unet))
    towards = torch.cat([plus.expand(count, -1, -1) for (plus, _), count in zip(aims, counts, strict=True)])
    away = [minus.expand(count, -1, -1) for (_, minus), count in zip(aims, counts, strict=True) if minus is not None]
    off, rows = torch.cat(away), slice(0, sum(map(len, away)))  # the targets come first
    numbered = numbered_batches(pipe, data, settings.seed)

    def batch_at(number: int, unet: Any) -> NoisyBatch:
        batch = numbered(number)
        noisy = add_noise(pipe.scheduler, batch.latents, batch.noise, batch.timesteps)
        with torch.no_grad():
            aim = untouched(noisy, batch.timesteps, encoder_hidden_states=towards).sample.to(batch.latents)
            shown = untouched(noisy[rows], batch.timesteps[rows], encoder_hidden_states=off).sample.to(aim)
        aim[rows] += settings.eta * (aim[rows] - shown)
        return replace(batch, regression_target=aim)

    named, model = ", ".join(targets), model_fingerprint(pipe)
    deltas, history = tune_unet(
        pipe,
        data,
        batch_at,
        settings,
        title=f"unlearning {named}",
        identity={"model": model, "kept": kept},
        dtype=dtype,
        chunk=chunk,
        progress=progress,
        callback=callback,
        resume=resume,
    )
    record = {**settings.record(), "target": named, "anchor": ", ".join(anchors), "preserve": kept}
    return WeightDelta(deltas, model, subject=named, settings=record, history=history)


def _data(
    pipe: Pipeline,
    settings: UnlearningSettings,
    captions: list[str],
    anchors: list[str],
    latents: Iterable[Tensor],
    kept: list[str],
    kept_latents: Iterable[Tensor],
) -> tuple[list[CaptionedLatents], list[tuple[Tensor, Tensor | None]]]:
    """Captioned latents, and of each the texts whose predictions make its regression target: towards, and away from.

    The weights of targets sum to 1, those of what is preserved to `preserve_weight`.
    """
    generator = torch.Generator().manual_seed(derived(settings.seed, "words at random"))
    words = list(words_of(pipe).values())
    picks = torch.randint(len(words), (settings.words, settings.length), generator=generator).tolist()
    random = [" ".join(words[pick] for pick in row) for row in picks]
    data, aims = [], []

    @cache  # the readings of one target are those of the next
    def text(prompt: str) -> Tensor:
        return encode_prompts(pipe, [prompt]).detach()

    Way = tuple[str, Tensor, str, str | None]
    spread: list[Way] = [
        (reading, part, towards, own)
        for own, towards, part in zip(captions, anchors, latents, strict=True)
        for reading in (own, "", *random)
    ]
    rest: list[Way] = [
        (reading, part, reading, None) for own, part in zip(kept, kept_latents, strict=True) for reading in (own, "")
    ]
    groups = ((spread, settings.batch_size, 1.0), (rest, settings.preserve_batch_size, settings.preserve_weight))
    for members, total, weight in groups:
        sizes = [max(1, total // len(members) + (n < total % len(members))) for n in range(len(members))]
        for (reading, part, towards, off), size in zip(members, sizes, strict=True):
            data.append(CaptionedLatents(part, text(reading)[0], size, weight * size / sum(sizes)))
            aims.append((text(towards), None if off is None else text(off)))
    return data, aims
