"""Which parts of a subject came through: class, drawing, hue; and hats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from torch import Tensor

from .. import checks, world
from ..pictures import Images
from ..seeds import derived
from ..settings import ByValue
from ..world import SCENES, Described
from ..world.subjects import FAR, NEAR, Truth, truth, wanted
from .asking import nearest, right_class
from .judge import Judge, require_judge

HUE_ERRORS = tuple(range(-165, 181, 15))  # degrees from a subject's own hue, at which it is compared
PROTOTYPES = 6  # real pictures whose mean embedding stands for a drawing or a hue


def right_hat(judge: Judge, images: Images, names: Sequence[str], hats: Sequence[str]) -> np.ndarray:
    """Whether the hat colour nearest to each picture of a profession is the one named, (n,) bool."""
    options = [[Described(name, hat=hat).phrase for hat in world.HATS] for name in names]
    return nearest(judge, images, options) == [world.HATS.index(hat) for hat in hats]


@cache
def _prototypes(judge: Judge, stickers: tuple[world.Sticker, ...]) -> Tensor:
    """One embedding per sticker, (k, d): the mean of real pictures of it alone, in several scenes."""
    scenes = list(SCENES)[:: max(1, len(SCENES) // PROTOTYPES)][:PROTOTYPES]
    pictures = [
        world.compose([sticker], scene, seed=1_000_003 * at + i)[0]
        for i, sticker in enumerate(stickers)
        for at, scene in enumerate(scenes)
    ]
    means = judge.image_features(np.stack(pictures)).view(len(stickers), len(scenes), -1).mean(1)
    return means / means.norm(dim=1, keepdim=True)


@dataclass(frozen=True, eq=False)
class CameThrough(ByValue):
    """Which parts of a subject's truth a judge finds in pictures: (n,) bool each, and the hue error in degrees."""

    kept_class: np.ndarray
    kept_drawing: np.ndarray
    kept_hue: np.ndarray
    hue_error: np.ndarray


def came_through(judge: Judge, images: Images, name: str, *, degrees: float = 30.0) -> CameThrough:
    """Ask which parts of a subject of the sticker world came through in pictures that should show it.

    Its class is chosen among all classes; its drawing among those of its class, in its style, hue and marking, by the
    nearest mean embedding of real pictures; its hue likewise, in steps of 15 degrees, and is kept if within `degrees`.
    """
    require_judge(judge)
    known, degrees = truth(name), checks.number("degrees", degrees, "[0, 180]")
    features = judge.image_features(images)
    kept_class, _ = right_class(judge, images, [known.class_word] * len(features))
    error = _hue_error(judge, features, known)
    return CameThrough(kept_class, _right_drawing(judge, features, known), error <= degrees, error)


def shows_subject(judge: Judge, images: Images, name: str, *, degrees: float = 30.0) -> np.ndarray:
    """Whether a judge takes each picture for a subject of the sticker world rather than for its kin, (n,) bool.

    A far subject must be nearest to its own art set, of all sets ("a sticker cat" rather than "a 3d cat"). A near one
    must be nearest to its own drawing, of those of its class, and within `degrees` of its own hue.
    """
    require_judge(judge)
    known, degrees = truth(name), checks.number("degrees", degrees, "[0, 180]")
    if known.kind == "near":
        features = judge.image_features(images)
        return _right_drawing(judge, features, known) & (_hue_error(judge, features, known) <= degrees)
    labels = [Described(known.class_word, style).phrase for style in world.STYLES]
    return judge.classify(images, labels).numpy() == world.STYLES.index(known.sticker.style)


def _right_drawing(judge: Judge, features: Tensor, known: Truth) -> np.ndarray:
    """Whether features (n, d) are nearest to the subject's drawing, of those of its class in its style, (n,) bool."""
    names = world.drawings_of(known.class_word, known.sticker.style, held_out=True)
    drawings = _prototypes(judge, tuple(replace(known.sticker, name=one) for one in names))
    return (features @ drawings.T).argmax(1).numpy() == names.index(world.full_drawing(known.sticker.name))


def _hue_error(judge: Judge, features: Tensor, known: Truth) -> np.ndarray:
    """Degrees from the subject's hue to the hue that features (n, d) are nearest to, (n,)."""
    own = float(known.sticker.hue or 0.0)
    hues = _prototypes(judge, tuple(replace(known.sticker, hue=own + turn) for turn in HUE_ERRORS))
    return np.abs(HUE_ERRORS)[(features @ hues.T).argmax(1).numpy()]


def finer_hits(judge: Judge, seeds: int, limit: int | None, seed: int) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Hats, drawings and subjects on real pictures, each with its clusters."""
    scenes, hits = list(SCENES), {}
    wearing = [
        (name, hat, style)
        for name, info in world.CLASSES.items()
        if info.share_blue is not None
        for style in world.STYLES
        if name in world.classes_of(style)
        for hat in world.HATS
    ][:limit]
    asked = [one for one in wearing for _ in range(seeds)]
    pictures = np.stack(
        [
            world.compose(
                [world.Sticker(name, style, hat=hat)], scenes[i % len(scenes)], seed=derived(seed, "hats") + i
            )[0]
            for i, (name, hat, style) in enumerate(asked)
        ]
    )
    right = right_hat(judge, pictures, [one[0] for one in asked], [one[1] for one in asked])
    hits["right hat"] = (right, [f"{name} {style}" for name, _, style in asked])
    rows: dict[str, list[tuple[np.ndarray, str]]] = {}
    for kind, names in (("near", NEAR), ("far", FAR)):
        for name in names[:limit]:
            first = derived(seed, kind, name)
            images = [wanted((name,), scenes[i % len(scenes)], seed=first + i)[0] for i in range(seeds)]
            found = came_through(judge, images, name)
            for what, values in (
                ("class", found.kept_class),
                ("drawing", found.kept_drawing),
                ("hue within 30 degrees", found.kept_hue),
            ):
                rows.setdefault(f"{kind} subject's {what}", []).append((values, name))
    for what, parts in rows.items():
        hits[what] = (np.concatenate([values for values, _ in parts]), [name for values, name in parts for _ in values])
    return hits
