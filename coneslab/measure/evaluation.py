"""How well a pipeline draws the sticker world: the table that `coneslab evaluate-model` prints.

The judge is asked about every picture (`measure.asking`). Each share stands beside the same share on real pictures
of the world, composed for the same prompts: no model can be expected to get right what the judge gets wrong there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import checks
from ..diffusion.pipelines import Pipeline
from ..diffusion.sampling import generate
from ..errors import ArgumentError, ConeslabError
from ..files import user_path
from ..pictures import Images
from ..seeds import derived
from ..world import CLASSES, STYLES, TRAIN_STYLES, classes_of, compose, sample
from .asking import (
    Question,
    finds_objects,
    in_turn,
    named,
    questions,
    right_class,
    right_colour,
    right_scene,
    right_style,
)
from .judge import Judge, require_judge
from .statistics import Interval, kid, share_interval
from .subject_truth import finer_hits

#: The shares that the shipped model must reach (every class, 8 seeds, prompts with scenes, guidance as shipped).
BARS = {
    "right class": 0.99,
    "right scene": 0.99,
    "both of a pair": 0.97,
    "all three of three": 0.90,
    "all four of four": 0.75,
    "right style": 0.93,
    "right colour": 0.95,
}
JUDGE_BAR = 0.985


@dataclass(frozen=True)
class Share:
    """One row: the share of pictures that are right, its bar, and the same share on real pictures."""

    name: str
    interval: Interval
    bar: float | None = None
    real: Interval | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None if there is none."""
        return None if self.bar is None else self.interval.estimate >= self.bar


@dataclass(frozen=True)
class Report:
    """A printable table of shares; `share("right class")` finds a row, `classes` has the share of each class.

    Intervals are 95 % intervals of shares over prompts (class or group), with each prompt's seeds kept together: see
    `share_interval`.
    """

    title: str
    shares: tuple[Share, ...]
    classes: dict[str, float]
    mistaken: dict[str, str]  # what a class is most often mistaken for
    settings: dict[str, Any]

    def share(self, name: str) -> Share:
        """The row with that name. Raises ConeslabError if there is none."""
        for row in self.shares:
            if row.name == name:
                return row
        raise ConeslabError(f"no row {name!r}: this table has {', '.join(row.name for row in self.shares)}")

    def __repr__(self) -> str:
        lines = [self.title, f"{'':24}{'share':>7}  {'95 % interval':16}{'bar':>6}   {'real pictures':>13}{'n':>7}"]
        for row in self.shares:
            found, mark = row.interval, {None: " ", True: "+", False: "-"}[row.met]
            bounds = "" if np.isnan(found.low) else f"[{found.low:.3f}, {found.high:.3f}]"
            bar = "" if row.bar is None else f"{row.bar:g}"
            real = "" if row.real is None else f"{row.real.estimate:.3f}"
            lines.append(f"{row.name:24}{found.estimate:7.3f}  {bounds:16}{bar:>6} {mark} {real:>13}{found.values:>7}")
        weak = sorted((share, name) for name, share in self.classes.items() if share < 1)[:8]
        if weak:
            taken = (f"{n} {share:.2f}" + (f" ({self.mistaken[n]})" if n in self.mistaken else "") for share, n in weak)
            lines.append("weakest classes (taken for): " + ", ".join(taken))
        lines.append(", ".join(f"{key} {value}" for key, value in self.settings.items()))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and words, for JSON."""
        rows = [
            {
                "name": row.name,
                **row.interval.to_dict(),
                "bar": row.bar,
                "met": row.met,
                "real": None if row.real is None else row.real.to_dict(),
            }
            for row in self.shares
        ]
        return {
            "title": self.title,
            "shares": rows,
            "classes": self.classes,
            "mistaken": self.mistaken,
            "settings": self.settings,
        }


Draw = Callable[[Sequence[Question]], Images]


def _ask_all(judge: Judge, draw: Draw, seeds: int, limit: int | None, extras: bool, seed: int) -> dict[str, Any]:
    """Draw and judge everything: hits by row name, each with its prompts, and pairs (class asked for, class found)."""
    hits: dict[str, tuple[np.ndarray, list[str]]] = {}

    def keep(name: str, right: np.ndarray, asked: Sequence[Question]) -> None:
        hits[name] = (right, [named(one.objects) for one in asked])

    asked = questions(1, seeds=seeds, limit=limit, seed=seed)
    images = draw(asked)
    right, found = right_class(judge, images, [one.objects[0] for one in asked])
    keep("right class", right, asked)
    keep("right scene", right_scene(judge, images, [one.scene for one in asked]), asked)
    for count, name in ((2, "both of a pair"), (3, "all three of three"), (4, "all four of four")):
        groups = questions(count, seeds=seeds, limit=limit, seed=seed)
        keep(name, finds_objects(judge, draw(groups), [one.objects for one in groups]), groups)
    if extras:
        few = max(1, seeds // 4)
        styled = questions(1, seeds=few, limit=limit, style=True, seed=seed)
        keep("right style", right_style(judge, draw(styled), styled, TRAIN_STYLES), styled)
        coloured = questions(1, seeds=few, limit=limit, colour=True, seed=seed)
        keep("right colour", right_colour(judge, draw(coloured), coloured), coloured)
    pairs = list(zip([one.objects[0] for one in asked], found, strict=True))
    return {"hits": hits, "pairs": pairs}


def _by_class(pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, float], dict[str, str]]:
    shares, mistaken = {}, {}
    for name in sorted({name for name, _ in pairs}):
        found = [other for own, other in pairs if own == name]
        shares[name] = found.count(name) / len(found)
        wrong = Counter(other for other in found if other != name)
        if wrong:
            mistaken[name] = wrong.most_common(1)[0][0]
    return shares, mistaken


def _real(asked: Sequence[Question], styles: Sequence[str], seed: int) -> np.ndarray:
    """Real pictures composed for the questions, uint8 (n, 64, 64, 3); where no style is named, styles take turns."""
    return np.stack(
        [
            compose(
                [(name, one.style or in_turn([name], styles, index), one.colour) for name in one.objects],
                one.scene,
                seed=derived(seed, "real pictures") + index,
            )[0]
            for index, one in enumerate(asked)
        ]
    )


def kid_to_real(judge: Judge, images: Images, *, seed: int) -> float:
    """Kernel inception distance between pictures and as many new real ones, in the judge's features."""
    features = judge.image_features(images)
    return kid(features, judge.image_features(sample(len(features), seed=seed).images))


def _require_asking(seeds: int, limit: int | None, seed: int, batch_size: int = 1) -> tuple[int, int, int | None]:
    """Check what both evaluations take; returns seeds, batch size and limit."""
    checks.seed("seed", seed)
    limit = None if limit is None else checks.count("limit", limit)
    return checks.count("seeds", seeds), checks.count("batch_size", batch_size), limit


def evaluate_model(
    pipe: Pipeline,
    judge: Judge,
    *,
    seeds: int = 8,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    limit: int | None = None,
    extras: bool = True,
    kid_pictures: int = 0,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    beside_real: bool = True,
) -> Report:
    """Draw every class, pairs, threes and fours with `pipe`, ask `judge` about each picture, and tabulate.

    seeds: pictures per prompt, each in a different scene. limit: at most this many classes, pairs, threes and fours,
    for a quick look. extras: also art style and colour (with a quarter of the seeds). kid_pictures: also draw this many
    captions of the world, and measure their kernel inception distance to new real pictures. beside_real: also judge the
    world's own pictures for the same prompts. The bars are those of the shipped model.
    """
    require_judge(judge)
    seeds, batch_size, limit = _require_asking(seeds, limit, seed, batch_size)
    checks.flag("extras", extras)
    checks.flag("beside_real", beside_real)
    kid_pictures = checks.count("kid_pictures", kid_pictures, least=0)
    if kid_pictures == 1:
        raise ArgumentError("kid_pictures is 1: give 2 or more, of which a distance can be measured, or 0 for none")
    drawn, start = 0, time.perf_counter()
    calls: list[int] = []

    def make(prompts: Sequence[str]) -> Images:
        nonlocal drawn
        images = generate(
            pipe,
            prompts,
            seed=derived(seed, "evaluation") + drawn,
            sampler_steps=sampler_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            batch_size=batch_size,
            progress=progress,
            on_calls=calls.append,
        )
        drawn += len(prompts)
        return images

    def draw(asked: Sequence[Question]) -> Images:
        return make([one.prompt for one in asked])

    result = _ask_all(judge, draw, seeds, limit, extras, seed)
    distances = {}
    if kid_pictures:
        captions = sample(kid_pictures, seed=derived(seed, "captions")).captions
        distances["KID"] = kid_to_real(judge, make(captions), seed=derived(seed, "real"))
        real = sample(kid_pictures, seed=derived(seed, "more real")).images
        distances["KID of real pictures"] = kid_to_real(judge, real, seed=derived(seed, "real"))
    seconds = time.perf_counter() - start
    real_hits = {}
    if beside_real:
        real_hits = _ask_all(judge, lambda asked: _real(asked, TRAIN_STYLES, seed), seeds, limit, extras, seed)["hits"]
    rows = tuple(
        Share(
            name,
            _interval(right, prompts),
            BARS.get(name),
            _interval(*real_hits[name]) if name in real_hits else None,
        )
        for name, (right, prompts) in result["hits"].items()
    )
    classes, mistaken = _by_class(result["pairs"])
    settings = {
        "sampler_steps": sampler_steps,
        "guidance_scale": guidance_scale,
        "guidance_interval": list(guidance_interval),
        "seeds": seeds,
        "limit": limit,
        "seed": seed,
        "pictures": drawn,
        "calls": round(sum(calls) / drawn, 2),
        "seconds": round(seconds),
        **distances,
    }
    return Report(f"{_name(pipe)}, judged by {judge}", rows, classes, mistaken, settings)


def judge_accuracy(
    judge: Judge,
    *,
    styles: Sequence[str] | None = None,
    seeds: int = 8,
    limit: int | None = None,
    seed: int = 1,
) -> Report:
    """What the judge gets right on new real pictures, style by style: the ceiling for every other table.

    The rows "... with one missing" are errors: how often the judge finds every object of a caption although one of
    them was replaced by another class. Hats, and the class, drawing and hue of subjects, have rows too.
    """
    require_judge(judge)
    seeds, _, limit = _require_asking(seeds, limit, seed)
    named_styles = checks.texts("styles", STYLES if styles is None else styles)
    styles = [checks.choice("style", one, STYLES) for one in named_styles]
    everything = _ask_all(judge, lambda asked: _real(asked, styles, seed), seeds, limit, True, seed)
    hits = dict(everything["hits"])
    for style in styles:
        asked = [
            one for one in questions(1, seeds=seeds, limit=limit, seed=seed) if one.objects[0] in classes_of(style)
        ]
        pictures = _real(asked, [style], derived(seed, style))
        right, _ = right_class(judge, pictures, [one.objects[0] for one in asked])
        hits[f"right class, {style}"] = (right, [one.objects[0] for one in asked])
    for count, name in ((2, "pair with one missing"), (4, "four with one missing")):
        asked = questions(count, seeds=seeds, limit=limit, seed=seed)
        rng = np.random.default_rng([seed, count])
        others = [rng.choice([other for other in CLASSES if other not in one.objects]) for one in asked]
        swapped = [(*one.objects[:-1], str(other)) for one, other in zip(asked, others, strict=True)]
        right = finds_objects(judge, _real(asked, styles, seed), swapped)
        hits[name] = (right, [named(one.objects) for one in asked])
    hits |= finer_hits(judge, seeds, limit, seed)
    bars = {"right class": JUDGE_BAR} | {f"right class, {style}": JUDGE_BAR for style in styles} | {"right hat": 0.95}
    rows = tuple(Share(name, _interval(right, prompts), bars.get(name)) for name, (right, prompts) in hits.items())
    classes, mistaken = _by_class(everything["pairs"])
    judged = sum(len(right) for name, (right, _) in hits.items() if name != "right scene")
    settings = {"styles": "/".join(styles), "seeds": seeds, "limit": limit, "seed": seed, "pictures": judged}
    return Report(f"{judge} on real pictures", rows, classes, mistaken, settings)


def _interval(right: np.ndarray, prompts: Sequence[str]) -> Interval:
    return share_interval(np.asarray(right, dtype=np.float64), clusters=[prompts])


def _name(pipe: Pipeline) -> str:
    """A hub id as it is, of a folder the last part: where it lies on this machine means nothing to a reader."""
    name = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    return user_path(name).name if user_path(name).is_dir() else name
