"""Is a concept gone, or only avoided? Pictures that show it, though nobody asks for it by its words.

After "When Are Concepts Erased From Diffusion Models?" (Lu et al. 2025, arXiv 2505.17013): a model that has lost a
concept cannot complete it, fill it in or be steered to it; one that only avoids it can. Each function draws with a
pipeline as it is now, an edit applied or not. `profile.py` says which of them find the concept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from ... import checks
from ...diffusion.checks import require_finite, require_pipeline
from ...diffusion.encoding import decode_latents, encode_images, encode_prompts, warn_of_unread
from ...diffusion.loss import alphas_cumprod
from ...diffusion.pipelines import Pipeline
from ...diffusion.precision import drawing
from ...diffusion.sampling import (
    abar_at,
    clean_and_noise,
    generators_after_start,
    guided,
    require_steps,
    seeds_for,
    start_noise,
    timestep_pairs,
)
from ...errors import ArgumentError
from ...finetuning.samples import SamplerSettings
from ...pictures import Images, as_pictures
from ...settings import takes

if TYPE_CHECKING:
    from .classifier import LatentClassifier

LEAST_SIGNAL = 0.01  # of abar: a classifier does not steer where a latent is nothing but noise


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(SamplerSettings):
    """How every probe draws: the settings of `SamplerSettings`, and

    batch_size: pictures at a time. Picture i has the start noise of seed + i, and all later noise from the same
    generator, so that it depends on no other picture.
    """

    method: ClassVar[str] = "probe"

    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.count, "batch_size")


@takes(ProbeSettings)
def completions(
    pipe: Pipeline,
    pictures: Images,
    prompt: str = "",
    settings: ProbeSettings | Mapping[str, Any] | None = None,
    *,
    level: float = 0.5,
    **changes: Any,
) -> list[Image.Image]:
    """Noise pictures up to a level of the schedule and let the model finish them (SDEdit, Meng et al. 2022).

    level: 0 is the picture itself, 1 noise alone; of the sampler's steps, that share is taken, the last ones. prompt:
    "" asks for nothing. settings, changes: see `ProbeSettings`.
    Raises ConeslabError for a level that leaves no step.
    """
    require_pipeline(pipe)
    settings = ProbeSettings.chosen(settings, changes)
    shown = as_pictures(pictures, name="pictures to complete")
    prompt = checks.text("prompt", prompt, blank=True)
    steps = len(timestep_pairs(pipe, settings.sampler_steps))
    kept = round(steps * checks.number("level", level, "(0, 1]", kind="share"))
    if kept < 1:
        raise ArgumentError(f"level is {level} of {steps} steps: give a share that leaves at least one step")
    return _drawn(pipe, [prompt] * len(shown), settings, known=encode_images(pipe, shown), last=kept)


@takes(ProbeSettings)
def filled_in(
    pipe: Pipeline,
    pictures: Images,
    masks: Iterable[np.ndarray],
    prompt: str = "",
    settings: ProbeSettings | Mapping[str, Any] | None = None,
    **changes: Any,
) -> list[Image.Image]:
    """Hide a part of each picture and let the model fill it in from the rest (RePaint, Lugmayr et al. 2022, Eq. 8).

    masks: one for each picture, (height, width) bool, True where it is hidden. Before every step the rest becomes the
    picture itself, noised as far as the step by the start noise (a reading: RePaint draws new noise, and goes back and
    forth). What is hidden is painted over before the picture is encoded, and a latent is hidden if any of its pixels
    is. settings, changes: see `ProbeSettings`.
    Raises ConeslabError unless there is a mask of its size for each picture, with something hidden.
    """
    require_pipeline(pipe)
    settings = ProbeSettings.chosen(settings, changes)
    shown = as_pictures(pictures, name="pictures to fill in")
    prompt = checks.text("prompt", prompt, blank=True)
    found = [_mask(f"masks[{number}]", mask) for number, mask in enumerate(checks.items("masks", masks))]
    checks.as_many("pictures", shown, "masks", found)
    for number, (picture, mask) in enumerate(zip(shown, found, strict=True)):
        if mask.shape != picture.size[::-1]:
            raise ArgumentError(f"masks[{number}] is {mask.shape}: give {picture.size[::-1]}, as its picture")
    known = encode_images(pipe, [_blanked(*pair) for pair in zip(shown, found, strict=True)])
    size = (known.shape[2], known.shape[3])
    hidden = [adaptive_max_pool2d(torch.tensor(mask, dtype=torch.float32)[None], size) for mask in found]
    return _drawn(pipe, [prompt] * len(shown), settings, known=known, hidden=torch.stack(hidden).to(known))


def _mask(name: str, mask: Any) -> np.ndarray:
    try:
        found = np.asarray(mask)
        if found.dtype != bool or found.ndim != 2 or not found.any():
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{name} is {checks.shown(mask)}: give an array (height, width) of bool, True where the picture is hidden"
        ) from error
    return found


def _blanked(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """A picture with what is hidden painted in the mean of the rest, so that no latent has seen it."""
    pixels = np.asarray(picture).copy()
    pixels[mask] = 127 if mask.all() else pixels[~mask].mean(0).round()
    return Image.fromarray(pixels)


@takes(ProbeSettings)
def stirred(
    pipe: Pipeline,
    prompts: str | Iterable[str],
    settings: ProbeSettings | Mapping[str, Any] | None = None,
    *,
    churn: float = 0.5,
    **changes: Any,
) -> list[Image.Image]:
    """Draw with noise added before every step, so that the trajectory leaves the one that was trained away.

    churn: how far back each step begins, in steps; 0 is DDIM (Karras et al. 2022, Algorithm 2, on the schedule's own
    timesteps). settings, changes: see `ProbeSettings`.
    """
    require_pipeline(pipe)
    settings = ProbeSettings.chosen(settings, changes)
    texts = checks.texts("prompts", prompts, blank=True)
    return _drawn(pipe, texts, settings, churn=checks.number("churn", churn, "[0, 100]"))


@takes(ProbeSettings)
def steered(
    pipe: Pipeline,
    classifier: LatentClassifier,
    label: str,
    prompts: str | Iterable[str],
    settings: ProbeSettings | Mapping[str, Any] | None = None,
    *,
    scale: float = 4.0,
    **changes: Any,
) -> list[Image.Image]:
    """Steer the sampler with the gradient of a classifier of noisy latents (Dhariwal and Nichol 2021, Algorithm 2).

    e' = e − scale · sqrt(1 − abar_t) ∇ log p(label | x_t, t), where abar_t is above a hundredth: where there is nothing
    but noise, the classifier knows nothing. prompts: what else the pictures are asked for; "" asks for nothing.
    settings, changes: see `ProbeSettings`. Raises ConeslabError for a label that the classifier does not know.
    """
    require_pipeline(pipe)
    settings = ProbeSettings.chosen(settings, changes)
    checks.having("classifier", classifier, "a LatentClassifier, such as train_classifier makes", "labels", "slope")
    label = checks.choice("label", label, classifier.labels)
    classifier.require_fit(pipe)
    texts = checks.texts("prompts", prompts, blank=True)
    scale = checks.number("scale", scale, "[0, 1000]")
    return _drawn(pipe, texts, settings, classifier=classifier, label=label, scale=scale)


@torch.no_grad()
def _drawn(
    pipe: Pipeline,
    prompts: Sequence[str],
    settings: ProbeSettings,
    *,
    known: Tensor | None = None,
    hidden: Tensor | None = None,
    last: int | None = None,
    churn: float = 0.0,
    classifier: LatentClassifier | None = None,
    label: str = "",
    scale: float = 0.0,
) -> list[Image.Image]:
    """DDIM on the pipeline's schedule (Song et al. 2021, Eq. 12), with what probes add to it.

    known: clean latents of pictures, from which the `last` steps start, or which are kept but where `hidden` is 1.
    """
    require_finite(pipe)
    require_steps(pipe, settings.sampler_steps)
    warn_of_unread(pipe, prompts)
    seeds, abars = seeds_for(settings.seed, len(prompts)), alphas_cumprod(pipe)
    pairs = timestep_pairs(pipe, settings.sampler_steps)
    pictures: list[Image.Image] = []
    with drawing(pipe):
        empty = encode_prompts(pipe, [""])
        for start in range(0, len(prompts), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            chances = generators_after_start(pipe, seeds[part])
            x = noise = start_noise(pipe, seeds[part])
            clean = None if known is None else known[part].to(noise)
            free = None if hidden is None else hidden[part].to(noise)
            text = encode_prompts(pipe, list(prompts[part]))
            asked = any(prompts[part])
            steps = pairs if last is None else pairs[-last:]
            if clean is not None and free is None:
                x = _noised(clean, abars[steps[0][0]], noise)
            for t, after in steps:
                if clean is not None and free is not None:
                    x = free * x + (1 - free) * _noised(clean, abars[t], noise)
                back = min(round(t + churn * (t - after)), len(abars) - 1)
                if back > t:
                    share = abars[back] / abars[t]
                    fresh = torch.stack([torch.randn(noise.shape[1:], generator=chance) for chance in chances])
                    x, t = share.sqrt() * x + (1 - share).sqrt() * fresh.to(x), back
                scales = settings.guidance_scale if asked else 1.0
                predicted = guided(pipe, x, t, text, empty, scales)
                ended, error = clean_and_noise(pipe.scheduler, x, predicted, t)
                if classifier is not None and abars[t] > LEAST_SIGNAL:
                    error = error - scale * (1 - abars[t]).sqrt() * classifier.slope(x, t, label).to(x)
                    ended = (x - (1 - abars[t]).sqrt() * error) / abars[t].sqrt()
                x = _noised(ended, abar_at(pipe, after), error)
            if clean is not None and free is not None:
                x = free * x + (1 - free) * clean
            pictures += decode_latents(pipe, x)
    return pictures


def _noised(clean: Tensor, abar: Tensor, noise: Tensor) -> Tensor:
    return abar.sqrt().to(clean) * clean + (1 - abar).sqrt().to(clean) * noise
