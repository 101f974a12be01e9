"""Which activations make a picture what it is: put those of one prompt's run into another's (causal tracing).

Meng et al. (2022, Locating and Editing Factual Associations in GPT, Sec. 2.1) for language models; Basu et al. (2024,
Localizing and Editing Knowledge in Text-to-Image Generative Models) for diffusion models, site by site. Here also step
by step: what a site hands on in a band of steps while the source prompt is drawn takes the place of what it hands on
while the other is, from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import numpy as np
import pandas
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .. import checks
from ..blocks import Block, attribute
from ..diffusion.activations import patch, watch
from ..diffusion.checks import require_from_text
from ..diffusion.encoding import require_read
from ..diffusion.pipelines import Pipeline
from ..diffusion.sampling import generate, require_steps, seeds_for
from ..diffusion.steps import chosen_halves
from ..diffusion.unet_sites import chosen_sites
from ..errors import ArgumentError, ConeslabError
from .judge import Judge, require_judge

Metric = Callable[[list[Image.Image]], Iterable[float]]


def trace_activations(
    pipe: Pipeline,
    source: str,
    into: str,
    *,
    sites: str | Iterable[str] = "*cross-attention",
    bands: int = 5,
    judge: Judge | None = None,
    metric: Metric | None = None,
    half: str = "text",
    pictures: int = 4,
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    batch_size: int = 16,
    max_bytes: int = 2**30,
    progress: bool = True,
) -> pandas.DataFrame:
    """How far the activations of `source` at each site and band of steps move the picture of `into` towards its own.

    Both prompts are drawn from the noises of `seed`, `seed + 1`, ...; then `into` is drawn anew for each site and band,
    with the activations of `source` in their place. Returns a row for each: site, band (0 to bands - 1), first_step,
    last_step, effect, pictures; its `attrs` have both prompts and what the effect was measured by. `show.trace_map`
    draws it.

    The effect is 0 where nothing changes and 1 where the picture becomes that of `source`; by default in the space of
    final latents, or with a judge in that of its features: of x, patched, beside x_0, drawn from `into`, and x_1, from
    `source`, it is <x - x_0, x_1 - x_0> / |x_1 - x_0|², the mean over pictures. With a metric, a function of pictures
    that gives a number for each, it is how far their mean goes from that of `into` to that of `source`.
    sites: names or patterns, see `diffusion.sites`; half: see `diffusion.patch`; max_bytes: of kept activations.
    Raises ConeslabError if the two prompts draw the same, and what `watch` raises.

    >>> from coneslab.measure import trace_activations
    >>> pipe = coneslab.load("tiny")
    >>> options = {"bands": 2, "pictures": 1, "sampler_steps": 2, "progress": False}
    >>> table = trace_activations(pipe, "a cat", "a dog", sites=["mid", "out"], half="both", **options)
    >>> table[["site", "band", "first_step", "last_step"]].values.tolist()
    [['mid', 0, 0, 0], ['mid', 1, 1, 1], ['out', 0, 0, 0], ['out', 1, 1, 1]]
    """
    require_from_text(pipe)
    source, into = checks.text("source", source, blank=True), checks.text("into", into, blank=True)
    require_read(pipe, source, into)
    names, _ = chosen_sites(pipe, sites), chosen_halves(half)
    sampler_steps = require_steps(pipe, sampler_steps)
    bands, pictures = checks.count("bands", bands, most=sampler_steps), checks.count("pictures", pictures)
    if judge is not None and metric is not None:
        raise ArgumentError("got a judge and a metric: give one of them")
    if judge is not None:
        require_judge(judge)
    checks.function("metric", metric)
    seeds = seeds_for(checks.seed("seed", seed), pictures)

    def drawn(prompt: str) -> np.ndarray:
        """Pictures of a prompt as the effect sees them, (pictures, numbers)."""
        latents: list[Tensor] = []

        def step_end(state: Mapping[str, Any]) -> None:
            if state["step"] == state["steps"] - 1:
                latents.append(state["latents"].detach().float().flatten(1).cpu())

        images = generate(
            pipe,
            [prompt] * pictures,
            seed=seeds,
            sampler_steps=sampler_steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            dtype=pipe.unet.dtype,  # as the U-Net itself draws, which it does when it is watched
            callback=step_end,
        )
        if metric is not None:
            return _numbers_of(metric(images), pictures)
        found = torch.cat(latents) if judge is None else judge.image_features(images)
        return found.double().numpy()

    with watch(pipe, names, half=half, max_bytes=max_bytes) as seen:
        end = drawn(source)
    passes = _Passes(pipe.unet)
    with passes.kept():
        start = drawn(into)
    effect = _effect(start, end, of_means=metric is not None)
    cells = [(name, band, steps) for name in names for band, steps in enumerate(np.array_split(seen.steps, bands))]
    rows = []
    for name, band, steps in tqdm(cells, disable=not progress, desc="tracing", unit="cell"):
        changed = {seen.timesteps[step] for step in steps.tolist()}
        with passes.recalled(but=changed), patch(pipe, name, seen, steps=steps.tolist(), half=half):
            value = effect(drawn(into))
        first, last = int(steps[0]), int(steps[-1])
        rows.append((name, band, first, last, value, pictures))
    table = pandas.DataFrame(rows, columns=["site", "band", "first_step", "last_step", "effect", "pictures"])
    measured = "the metric" if metric is not None else "latents" if judge is None else "the judge's features"
    table.attrs = {"source": source, "into": into, "measured": measured}
    return table


class _Passes:
    """The passes of an untouched run through a U-Net, of which a run that is changed later on shares the first."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self._known: dict[float, list[tuple[Tensor, Any]]] = {}  # timestep -> (what came in, what went out)

    def kept(self) -> Block:
        """Keep the passes for the length of a block."""
        own = self._unet.forward

        def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            made = own(sample, timestep, encoder_hidden_states, *args, **kwargs)
            self._known.setdefault(_number(timestep), []).append((sample, made))
            return made

        return Block([(attribute(self._unet, "forward"), forward)])

    def recalled(self, *, but: Container[float]) -> Block:
        """For the length of a block, compute no pass again from the same latents, but those at some timesteps.

        The prompt has to be that of the run that was kept.
        """
        own = self._unet.forward

        def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if (when := _number(timestep)) not in but:
                for before, made in self._known.get(when, ()):
                    if torch.equal(before, sample):
                        return made
            return own(sample, timestep, encoder_hidden_states, *args, **kwargs)

        return Block([(attribute(self._unet, "forward"), forward)])


def _number(timestep: Any) -> float:
    return float(torch.as_tensor(timestep).max())


def _numbers_of(given: Any, pictures: int) -> np.ndarray:
    try:
        found = np.asarray([float(one) for one in given], float)
    except (TypeError, ValueError) as error:
        raise ConeslabError(f"the metric returned {checks.shown(given)}: return a number for each picture") from error
    if len(found) != pictures or not np.isfinite(found).all():
        raise ConeslabError(
            f"the metric returned {len(found)} numbers for {pictures} pictures: return a finite one for each"
        )
    return found[:, None]


def _effect(start: np.ndarray, end: np.ndarray, *, of_means: bool) -> Callable[[np.ndarray], float]:
    """Where pictures (n, numbers) lie on the way from `start` to `end`: 0 and 1, the mean over pictures."""
    if of_means:
        start, end = start.mean(0, keepdims=True), end.mean(0, keepdims=True)
    way = end - start
    length = (way**2).sum(1)
    if not (length > 0).all():
        raise ConeslabError(
            "the two prompts draw the same, as far as the effect is measured: give others, or another metric"
        )

    def effect(found: np.ndarray) -> float:
        found = found.mean(0, keepdims=True) if of_means else found
        return float((((found - start) * way).sum(1) / length).mean())

    return effect
