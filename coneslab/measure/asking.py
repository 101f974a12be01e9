"""Questions about pictures of the sticker world: prompts with known ground truth, and a judge's answers.

Every prompt is composed here ("a cat and a car on the beach"), so what its picture should show is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from .. import checks
from ..errors import ArgumentError
from ..pictures import Images, as_pictures
from ..world import CLASSES, COLOURS, SCENES, TRAIN_STYLES, Described, classes_of, plain_caption
from .judge import Judge, require_judge


@dataclass(frozen=True)
class Question:
    """One picture to draw and judge: its objects and scene, and the style and colour if they are asked for."""

    objects: tuple[str, ...]
    scene: str
    style: str | None = None
    colour: str | None = None

    @property
    def prompt(self) -> str:
        """The caption in the world's own grammar: "a flat red cat on the beach", "a cat, a dog and a car ..."."""
        return plain_caption([Described(name, self.style, colour=self.colour) for name in self.objects], self.scene)


def named(objects: Sequence[str], scene: str | None = None) -> str:
    """ "a cat and a car", "a cat and a car on the beach": classes and nothing else."""
    return plain_caption([Described(name) for name in objects], scene)


def questions(
    objects: int = 1,
    *,
    seeds: int = 8,
    limit: int | None = None,
    style: bool = False,
    colour: bool = False,
    seed: int = 0,
) -> list[Question]:
    """Every class in turn, alone or in one random group of `objects`, each `seeds` times in different scenes.

    limit: at most this many classes or groups, in a random but fixed order. style, colour: name one as well; no colour
    is named for professions, whose hats have their own.
    """
    objects, seeds = checks.count("objects", objects, most=4), checks.count("seeds", seeds)
    limit, seed = None if limit is None else checks.count("limit", limit), checks.seed("seed", seed)
    checks.flag("style", style)
    checks.flag("colour", colour)
    rng = np.random.default_rng([seed, objects])
    names = [str(name) for name in rng.permutation(list(CLASSES))]
    if colour:
        names = [name for name in names if CLASSES[name].share_blue is None]
    groups = [tuple(names[start : start + objects]) for start in range(0, len(names) - objects + 1, objects)]
    scenes, colours = list(SCENES), list(COLOURS)
    return [
        Question(
            group,
            scenes[(5 * index + repeat) % len(scenes)],
            in_turn(group, TRAIN_STYLES, index + repeat) if style else None,
            colours[(index + 3 * repeat) % len(colours)] if colour else None,
        )
        for index, group in enumerate(groups[:limit])
        for repeat in range(seeds)
    ]


def in_turn(names: Sequence[str], styles: Sequence[str], number: int) -> str:
    """One of the styles that have all the named classes, taking turns by `number`."""
    having = [style for style in styles if set(classes_of(style)).issuperset(names)]
    return having[number % len(having)]


# --- asking the judge -----------------------------------------------------------------------------------


def _one_each(images: Images, what: str, values: Iterable[Any]) -> tuple[list[Image.Image], list[Any]]:
    """Pictures, and as many of what is asked about them. Raises ArgumentError if the numbers differ."""
    pictures, found = as_pictures(images), checks.items(what, values)
    if len(pictures) != len(found):
        raise ArgumentError(f"got {len(pictures)} pictures and {len(found)} {what}, expected one for each")
    return pictures, found


def cosines(judge: Judge, images: Images, options: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Cosines of each picture with its own list of texts, one array per picture."""
    require_judge(judge)
    pictures, options = _one_each(images, "lists of options", options)
    options = [checks.texts("options", own) for own in options]
    features = judge.image_features(pictures)
    texts = judge.text_features([text for own in options for text in own])
    parts = texts.split([len(own) for own in options])
    return [(part @ feature).numpy() for part, feature in zip(parts, features, strict=True)]


def nearest(judge: Judge, images: Images, options: Sequence[Sequence[str]]) -> np.ndarray:
    """Index of the option nearest to each picture, (n,); options: one list of texts per picture."""
    return np.array([int(own.argmax()) for own in cosines(judge, images, options)])


def right_class(judge: Judge, images: Images, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Whether the class nearest to each picture is the one named, (n,) bool; and the nearest classes.

    A class is the mean of its phrasings, one per scene.
    """
    classes = list(CLASSES)
    pictures, names = _one_each(images, "names", names)
    labels = [[named([name], scene) for scene in SCENES] for name in classes]
    found = [classes[index] for index in judge.classify(pictures, labels)]
    return np.array(found) == np.array(names), found


def right_scene(judge: Judge, images: Images, scenes: Sequence[str]) -> np.ndarray:
    """Whether the scene nearest to each picture is the one named, (n,) bool.

    A scene is the mean of its phrasings, one per class.
    """
    pictures, scenes = _one_each(images, "scenes", scenes)
    labels = [[named([name], scene) for name in CLASSES] for scene in SCENES]
    found = judge.classify(pictures, labels)
    return np.array([list(SCENES)[index] for index in found]) == np.array(scenes)


def finds_objects(judge: Judge, images: Images, objects: Sequence[Sequence[str]], *, level: float = 0.05) -> np.ndarray:
    """Whether the judge finds every named object in each picture, (n,) bool.

    The rule is a permutation test. In the caption, a named object is swapped for each class that is not named; it is
    found if p = (1 + swapped captions at least as near to the picture) / (1 + swapped captions) is at most `level`
    (Phipson and Smyth 2010). So an absent object passes in about that share of pictures, for any judge, with no
    threshold to tune. Requiring that no swap be nearer (level 0) would reject four out of five pictures that do show
    all four. `judge_accuracy` reports both kinds of error on real pictures.
    """
    level, options = checks.number("level", level, checks.SHARE, kind="share"), []
    objects = [checks.texts("objects of a picture", asked) for asked in checks.items("lists of objects", objects)]
    for asked in objects:
        others = [name for name in CLASSES if name not in asked]
        swapped = [(*asked[:i], other, *asked[i + 1 :]) for i in range(len(asked)) for other in others]
        options.append([named(asked), *map(named, swapped)])
    found = []
    for asked, (true, *swaps) in zip(objects, cosines(judge, images, options), strict=True):
        nearer = (np.reshape(swaps, (len(asked), -1)) >= true).sum(1)  # (objects,)
        found.append((1 + nearer <= level * (1 + len(swaps) // len(asked))).all())
    return np.array(found)


def right_style(
    judge: Judge, images: Images, asked: Sequence[Question], styles: Sequence[str] = TRAIN_STYLES
) -> np.ndarray:
    """Whether the style nearest to each picture, of `styles`, is the one asked for, (n,) bool."""
    options = [[replace(one, style=style).prompt for style in styles] for one in asked]
    return nearest(judge, images, options) == [styles.index(str(one.style)) for one in asked]


def right_colour(judge: Judge, images: Images, asked: Sequence[Question]) -> np.ndarray:
    """Whether the colour nearest to each picture, of all colours, is the one asked for, (n,) bool."""
    options = [[replace(one, colour=colour).prompt for colour in COLOURS] for one in asked]
    return nearest(judge, images, options) == [COLOURS.index(str(one.colour)) for one in asked]
