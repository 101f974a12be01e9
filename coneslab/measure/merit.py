"""How good attention maps are, as the world knows the true masks: overlap and pointing, by layer, timestep and word.

A map is measured against the mask of the object that its word names. *IoU*: the map's highest places, as many as the
mask has, over the mask; so no threshold has to be chosen. *Pointing*: whether the highest place lies in the mask (the
pointing game of Zhang et al. 2016, Top-down Neural Attention by Excitation Backprop). Beside both stand what chance
would give, and what the same map gets against another picture's object: objects are rarely at the edge, and a map that
always points at the middle is better than chance and knows nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..diffusion.checks import require_pipeline
from ..diffusion.encoding import encode_images, encode_prompts
from ..diffusion.loss import add_noise
from ..diffusion.pipelines import Pipeline
from ..diffusion.sampling import start_noise
from ..errors import ArgumentError, ConeslabError
from .attention import AttentionMaps
from .recording import record_attention

MEASURES = ("IoU", "pointing")


def map_iou(values: Any, mask: Any) -> float:
    """Overlap of a map's highest places, as many as a mask has, with the mask: intersection over union, in [0, 1].

    values and mask: (height, width), of one shape; places of equal value count in reading order.

    >>> map_iou([[0.9, 0.2], [0.5, 0.1]], [[True, True], [False, False]])  # one of the two highest, of three in all
    0.3333333333333333
    """
    values, mask = _of_one_shape(values, mask)
    highest = np.zeros(mask.size, bool)
    highest[np.argsort(-values, axis=None, kind="stable")[: mask.sum()]] = True
    shared = int((highest & mask.ravel()).sum())
    return shared / (2 * int(mask.sum()) - shared)


def points_at(values: Any, mask: Any) -> bool:
    """Whether the highest place of a map (height, width) lies in a mask of the same shape."""
    values, mask = _of_one_shape(values, mask)
    return bool(mask.flat[values.argmax()])


def chance_iou(mask: Any) -> float:
    """What `map_iou` gives on average for a map whose values lie at random places.

    The number of shared places is hypergeometric: k of n are drawn, and k of n are in the mask.

    >>> round(chance_iou([[True, False], [False, False]]), 3)  # one of four places: a quarter of the time it is it
    0.25
    """
    _, mask = _of_one_shape(np.zeros(np.shape(mask)), mask)
    k, n = int(mask.sum()), mask.size
    shared = np.arange(max(0, 2 * k - n), k + 1)
    logs = _log_choose(k, shared) + _log_choose(n - k, k - shared) - _log_choose(n, np.array(k))
    return float((np.exp(logs) * shared / (2 * k - shared)).sum())


def _log_choose(n: int, k: np.ndarray) -> np.ndarray:
    factorials = torch.lgamma(torch.arange(n + 2, dtype=torch.float64)).numpy()  # log of (i - 1)! at i
    return factorials[n + 1] - factorials[k + 1] - factorials[n - k + 1]


def _of_one_shape(values: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        found = np.asarray(values.detach().cpu().float() if isinstance(values, Tensor) else values, float)
        inside = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask, float)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"got {checks.shown(values)} and the mask {checks.shown(mask)}: give numbers, (height, width)"
        ) from error
    if found.ndim != 2 or found.shape != inside.shape or not (np.isfinite(found) & np.isfinite(inside)).all():
        raise ArgumentError(
            f"values have shape {found.shape} and the mask {inside.shape}: give finite numbers and a mask of one "
            "shape, (height, width)"
        )
    if not inside.any():
        raise ArgumentError("the mask is empty: there is nothing that the map could find")
    return found, inside.astype(bool)


@torch.no_grad()
def attention_merit(
    pipe: Pipeline,
    pictures: Any,
    *,
    timesteps: Iterable[int] = (900, 700, 500, 300, 100),
    seed: int = 0,
    batch_size: int = 16,
) -> pandas.DataFrame:
    """Measure cross-attention against the masks of the world's pictures, noised to some timesteps, with their captions.

    pictures: from the picture world, such as `world.sample(32, seed=0)`: images and records whose objects have the word
    that the caption calls them by, and their mask. Objects that go unnamed, or are hidden, are left out; those that
    share a word share a mask.
    Returns rows of layer (or "all", the mean of the maps), timestep, word (or "all", every object), measure
    (`MEASURES`), value, chance, elsewhere (the map against the object after it), objects. `show.merit_map` draws it.
    Raises ArgumentError for timesteps that the schedule does not have; ConeslabError if no object is named.

    >>> from coneslab import world
    >>> table = attention_merit(coneslab.load("tiny"), world.sample(4, seed=0), timesteps=[500])
    >>> whole = table[(table.layer == "all") & (table.word == "all")].set_index("measure")
    >>> list(whole.index)
    ['IoU', 'pointing']
    """
    require_pipeline(pipe)
    checks.having("pictures", pictures, "pictures of the world, such as world.sample(8, seed=0)", "images", "records")
    most, batch_size = len(pipe.scheduler.alphas_cumprod) - 1, checks.count("batch_size", batch_size)
    given = checks.items("timesteps", timesteps)
    times = sorted({checks.count("one of timesteps", one, least=0, most=most) for one in given}, reverse=True)
    seed = checks.seed("seed", seed)
    found: list[dict[str, Any]] = []
    for first in range(0, len(pictures.records), batch_size):
        part = slice(first, first + batch_size)
        records = pictures.records[part]
        maps = _recorded(pipe, pictures.images[part], [one.caption for one in records], times, seed + first)
        for row, record in enumerate(records):
            for word, mask in _named(record).items():
                if _is_in(maps, word, row):
                    found.append({"word": word, "mask": mask, "maps": _scaled(maps, word, row, mask.shape)})
    if not found:
        raise ConeslabError("no object of these pictures is named by its caption and seen: give other pictures")
    return _table(found, times)


def _recorded(pipe: Pipeline, images: Any, captions: list[str], times: list[int], seed: int) -> AttentionMaps:
    latents = encode_images(pipe, images).to(pipe.unet.device, pipe.unet.dtype)
    noise = start_noise(pipe, [seed + i for i in range(len(latents))])
    with record_attention(pipe, dtype=torch.float32, guided=False) as maps:
        text = encode_prompts(pipe, captions)
        for time in times:
            timesteps = torch.full((len(latents),), time, device=latents.device)
            noisy = add_noise(pipe.scheduler, latents, noise, timesteps)
            pipe.unet(noisy, timesteps, encoder_hidden_states=text.to(noisy.dtype))
    return maps


def _named(record: Any) -> dict[str, np.ndarray]:
    """The words by which a caption calls the objects that can be seen, with their masks."""
    masks: dict[str, np.ndarray] = {}
    for thing in record.objects:
        if thing.word and thing.mask.any():
            masks[thing.word] = masks.get(thing.word, False) | thing.mask
    return masks


def _is_in(maps: AttentionMaps, word: str, picture: int) -> bool:
    """Whether the caption has a word, as far as the text encoder reads it."""
    try:
        return bool(maps.indices(word, picture))
    except ConeslabError:
        return False


def _scaled(maps: AttentionMaps, word: str, picture: int, size: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Layer -> (timesteps, height, width), scaled bilinearly to a mask's size; "all": their mean."""
    layers = {
        label: F.interpolate(values[:, None], size=size, mode="bilinear")[:, 0]
        for label, values in maps.per_layer(word, picture=picture).items()
    }
    layers["all"] = torch.stack(list(layers.values())).mean(0)
    return {label: values.numpy() for label, values in layers.items()}


def _table(found: list[dict[str, Any]], times: list[int]) -> pandas.DataFrame:
    rows = []
    for at, one in enumerate(found):
        mask, other = one["mask"], found[(at + 1) % len(found)]["mask"]
        chance = {"IoU": chance_iou(mask), "pointing": float(mask.mean())}
        for layer, values in one["maps"].items():
            for timestep, value in zip(times, values, strict=True):
                for name, measure in zip(MEASURES, (map_iou, points_at), strict=True):
                    elsewhere = float(measure(value, other)) if len(found) > 1 else np.nan
                    rows.append(
                        (layer, timestep, one["word"], name, float(measure(value, mask)), chance[name], elsewhere)
                    )
    columns = ["layer", "timestep", "word", "measure", "value", "chance", "elsewhere"]
    single = pandas.DataFrame(rows, columns=columns)
    every = pandas.concat([single, single.assign(word="all")])
    grouped = every.groupby(columns[:4], sort=False)[columns[4:]]
    return grouped.mean().assign(objects=grouped.size()).reset_index()
