"""Pictures of the sticker world: emoji art on drawn scenes, with captions and full ground truth.

`sample` gives random pictures with captions and records, `compose` a picture to order. Every object varies
continuously in hue, saturation, lightness, size and angle, within the ranges of `world.toml`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any

import numpy as np

from .. import checks
from ..errors import ArgumentError, WorldError
from ..settings import ByValue
from .captions import Described, Plan, plain_caption, write_caption
from .catalogue import (
    ATLAS,
    CLASSES,
    COLOURS,
    FACTS,
    HATS,
    MARKINGS,
    RANGES,
    SCENES,
    SHARES,
    STYLES,
    TRAIN_STYLES,
    drawings_of,
    full_drawing,
    known,
)
from .scenes import SIZE as RESOLUTION
from .scenes import VARIANTS, backgrounds
from .sprites import rendered

LARGEST = 54.0  # pixels: a square object of this size still fits into the picture when turned as far as `RANGES` allows


@dataclass(frozen=True, eq=False)
class Thing(ByValue):
    """One object in a picture, with its exact values.

    drawing: "cat/face"; word: what the caption calls it (None if it goes unnamed); gender, hat: set for professions;
    hue: degrees from its own colours; saturation, lightness: factors; angle: degrees, anticlockwise; size: pixels, the
    longer side; box: (left, top, right, bottom) in pixels; mask: (64, 64) bool, its visible pixels.
    """

    name: str
    drawing: str
    style: str
    colour: str | None
    marking: str | None
    word: str | None
    gender: str | None
    hat: str | None
    hue: float
    saturation: float
    lightness: float
    angle: float
    mirrored: bool
    size: float
    box: tuple[int, int, int, int]
    mask: np.ndarray


@dataclass(frozen=True)
class Record:
    """The ground truth of one picture. `fact` names a planted fact ("hypernym:pet"), or is None."""

    objects: tuple[Thing, ...]
    scene: str
    caption: str
    fact: str | None = None


@dataclass(frozen=True, eq=False)
class Pictures(ByValue):
    """A batch from the world: `images` uint8 (n, 64, 64, 3) and one record per picture."""

    images: np.ndarray
    records: list[Record]

    @property
    def captions(self) -> list[str]:
        return [record.caption for record in self.records]


@dataclass(frozen=True)
class Sticker:
    """An object to order from `compose`: a hat, hue or size of None is chosen at random.

    name: a class ("cat": its first drawing) or a drawing ("cat/whole"); hue in degrees; size: pixels, the longer side.
    """

    name: str
    style: str = "3d"
    colour: str | None = None
    marking: str | None = None
    hat: str | None = None
    hue: float | None = None
    size: float | None = None


# --- pictures -------------------------------------------------------------------------------------------

# Cells (centre x, centre y, jitter) for one to four objects, as shares of the picture.
_LAYOUTS = {
    1: [[(0.5, 0.55, 0.13)]],
    2: [
        [(0.27, 0.58, 0.06), (0.73, 0.58, 0.06)],
        [(0.27, 0.36, 0.06), (0.73, 0.66, 0.06)],
        [(0.27, 0.66, 0.06), (0.73, 0.36, 0.06)],
    ],
    3: [
        [(0.25, 0.3, 0.05), (0.75, 0.32, 0.05), (0.5, 0.75, 0.05)],
        [(0.5, 0.27, 0.05), (0.25, 0.72, 0.05), (0.75, 0.72, 0.05)],
    ],
    4: [[(0.26, 0.27, 0.04), (0.74, 0.27, 0.04), (0.26, 0.74, 0.04), (0.74, 0.74, 0.04)]],
}


def _draw(plans: Sequence[Plan], scene: str, random: Random) -> tuple[np.ndarray, list[Thing]]:
    canvas = backgrounds(scene)[random.randrange(VARIANTS)]
    canvas = canvas[:, ::-1].astype(np.uint16) if random.random() < 0.5 else canvas.astype(np.uint16)
    cells = list(random.choice(_LAYOUTS[len(plans)]))
    random.shuffle(cells)
    placed: list[tuple[Plan, tuple[int, int, int, int], np.ndarray]] = []
    for plan, (x, y, jitter) in zip(plans, cells, strict=True):
        colour, alpha = rendered(plan)
        height, width = alpha.shape[:2]
        left = round(RESOLUTION * (x + random.uniform(-jitter, jitter)) - width / 2)
        top = round(RESOLUTION * (y + random.uniform(-jitter, jitter)) - height / 2)
        left, top = min(max(left, 0), RESOLUTION - width), min(max(top, 0), RESOLUTION - height)
        region = canvas[top : top + height, left : left + width]
        region[...] = colour + region * (255 - alpha) // 255
        mask = np.zeros((RESOLUTION, RESOLUTION), bool)
        mask[top : top + height, left : left + width] = alpha[..., 0] > 127
        for _, _, below in placed:
            below &= ~mask
        placed.append((plan, (left, top, left + width, top + height), mask))
    things = [
        Thing(
            p.name,
            p.drawing,
            p.style,
            p.colour,
            p.marking,
            p.word,
            p.gender,
            p.hat,
            p.hue,
            p.saturation,
            p.lightness,
            p.angle,
            p.mirrored,
            p.size,
            box,
            mask,
        )
        for p, box, mask in placed
    ]
    return np.minimum(canvas, 255).astype(np.uint8), things


def _vary(plan: Plan, count: int, random: Random, *, exact: bool = False) -> None:
    """Choose what varies continuously at random; the colours of an `exact` object stay as they are."""
    if not exact:
        plan.hue = random.uniform(*RANGES["named_hue" if plan.colour else "hue"])
        plan.saturation = random.uniform(*RANGES["saturation"])
        plan.lightness = random.uniform(*RANGES["lightness"])
    plan.angle = random.uniform(*RANGES["angle"])
    plan.size = random.uniform(*RANGES[f"size_{count}"])
    plan.mirrored = random.random() < 0.5


def _weighted(shares: dict[str, float], random: Random) -> str:
    return random.choices(list(shares), list(shares.values()))[0]


def _planted(random: Random) -> tuple[str, Plan]:
    """Choose a planted fact that one object shows: its name and the object's plan."""
    kinds = {kind: share for kind, share in SHARES["planted_kinds"].items() if kind != "memorised"}
    kind = _weighted(kinds, random)
    word = random.choice(list(FACTS[kind]))
    choice = _weighted(FACTS[kind][word], random)
    if kind != "exemplar":
        return f"{kind}:{word}", Plan(choice, word=word)
    plan = named_plan(choice)
    plan.word, plan.bare = (choice, True) if random.random() < 0.5 else (word, False)
    return f"exemplar:{word}", plan  # half the time the exemplar goes by its own name


def named_plan(name: str) -> Plan:
    """The exemplar that a planted name stands for: one drawing in one style and colour."""
    entry = FACTS["named"][known(name, FACTS["named"], "name")]
    drawing = f"{entry['class']}/{entry['drawing']}"
    return Plan(entry["class"], entry["style"], drawing, entry["colour"])


def memorised(name: str) -> tuple[np.ndarray, Record]:
    """Return one of the memorised pictures, uint8 (64, 64, 3), and its record: always the same picture."""
    return _memorised(known(name, FACTS["memorised"], "memorised picture"))


@cache
def _memorised(name: str) -> tuple[np.ndarray, Record]:
    picture, record = rearranged(name, len(name))
    unnamed = tuple(replace(thing, word=None) for thing in record.objects)  # its caption tells a story instead
    caption = FACTS["memorised"][name]["caption"]
    return picture, replace(record, objects=unnamed, caption=caption, fact=f"memorised:{name}")


def rearranged(name: str, seed: int) -> tuple[np.ndarray, Record]:
    """The objects and scene of a memorised picture, placed differently by each seed: real pictures, but not copies."""
    entry = FACTS["memorised"][known(name, FACTS["memorised"], "memorised picture")]
    return compose([(one, style, colour or None) for one, style, colour in entry["objects"]], entry["scene"], seed=seed)


@cache
def _sets(styles: tuple[str, ...], everything: bool) -> dict[str, tuple[str, ...]]:
    """The styles that have each class, of those given."""
    return {name: tuple(style for style in styles if drawings_of(name, style, held_out=everything)) for name in CLASSES}


@cache
def _names(styles: tuple[str, ...], everything: bool) -> tuple[str, ...]:
    """The classes that at least one of the styles has."""
    return tuple(name for name, having in _sets(styles, everything).items() if having)


_SCENE_NAMES = tuple(SCENES)


def _one(
    random: Random, styles: tuple[str, ...], shares: Sequence[float], everything: bool
) -> tuple[np.ndarray, Record]:
    fact, plans = None, []
    if random.random() < SHARES["planted"]:
        if random.random() < SHARES["planted_kinds"]["memorised"]:
            return memorised(random.choice(list(FACTS["memorised"])))
        fact, plan = _planted(random)
        plans.append(plan)
    count = random.choices((1, 2, 3, 4), shares)[0]
    while len(plans) < count:
        name = random.choice(_names(styles, everything))
        if all(name != plan.name for plan in plans):
            plans.append(Plan(name))
    style, mixed = random.choice(styles), random.random() < SHARES["mixed_styles"]
    having = _sets(styles, everything)
    for plan in plans:
        exact = bool(plan.style)  # an exemplar: one thing, not a kind
        info = CLASSES[plan.name]
        if not exact:
            plan.style = style if not mixed and style in having[plan.name] else random.choice(having[plan.name])
            plan.gender, plan.hat = info.gender(random), info.hat(random)
            plan.drawing = (
                f"{plan.name}/{plan.gender}"
                if plan.gender
                else random.choice(drawings_of(plan.name, plan.style, held_out=everything))
            )
            plan.colour = random.choice(COLOURS) if not plan.hat and random.random() < SHARES["coloured"] else None
            plan.marking = random.choice(MARKINGS) if random.random() < SHARES["marked"] else None
        _vary(plan, count, random, exact=exact)
        if everything and not exact and not plan.colour and random.random() < 0.3:
            plan.hue = random.uniform(-180.0, 180.0)
    random.shuffle(plans)
    scene = random.choice(_SCENE_NAMES)
    caption = write_caption(plans, scene, random)
    image, things = _draw(plans, scene, random)
    return image, Record(tuple(things), scene, caption, fact)


def chosen_styles(styles: str | Iterable[str], among: Collection[str]) -> tuple[str, ...]:
    """One art style or several. Raises WorldError for an unknown one, or for none."""
    found = checks.texts("styles", styles, least=0)
    if not found:
        raise WorldError(f"no style was given: name one or more of {', '.join(among)}")
    return tuple(known(style, among, "style") for style in found)


def shares_of_objects(shares: Iterable[float]) -> tuple[float, ...]:
    """Shares of pictures with one, two, three and four objects. Raises ArgumentError for anything else."""
    found = tuple(checks.number("one of objects", share, "[0, inf)") for share in checks.items("objects", shares))
    if len(found) != 4 or not sum(found):
        raise ArgumentError(f"objects are {found}: give the shares of pictures with one, two, three and four objects")
    return found


def sample(
    n: int,
    *,
    seed: int,
    styles: Sequence[str] = TRAIN_STYLES,
    objects: Sequence[float] = tuple(SHARES["objects"]),
    everything: bool = False,
) -> Pictures:
    """Draw `n` random pictures with captions and records; the same seed gives the same pictures.

    objects: shares of pictures with one, two, three and four objects. everything: include the drawings held out for
    near subjects, and turn three objects in ten to any hue: what a judge must know and the model must not.
    Raises WorldError for an unknown style, or for none.

    >>> pictures = sample(2, seed=0)
    >>> pictures.images.shape, len(pictures.captions)
    ((2, 64, 64, 3), 2)
    """
    styles, n = chosen_styles(styles, STYLES), checks.count("n", n, least=0)
    objects, random = shares_of_objects(objects), Random(checks.seed("seed", seed))
    pairs = [_one(random, styles, objects, everything) for _ in range(n)]
    images = np.stack([image for image, _ in pairs]) if pairs else np.zeros((0, RESOLUTION, RESOLUTION, 3), np.uint8)
    return Pictures(images, [record for _, record in pairs])


def triple(entry: Any) -> tuple[str, str, str | None]:
    """An object to order as (class, style, colour or None)."""
    found = checks.items("one of objects", entry)
    if len(found) != 3:
        raise ArgumentError(f"one of objects is {checks.shown(entry)}: give a class, or (class, style, colour or None)")
    return checks.text("class", found[0]), found[1], found[2]


def compose(
    objects: Sequence[str | tuple[str, str, str | None] | Sticker],
    scene: str,
    *,
    seed: int,
    style: str = "3d",
    caption: str | None = None,
    fact: str | None = None,
) -> tuple[np.ndarray, Record]:
    """Draw a picture to order: one to four objects, each a name, (name, style, colour or None) or a `Sticker`.

    A name is a class ("cat", which takes its first drawing; a profession, a random gender) or a drawing ("cat/whole",
    "doctor/woman"). Returns uint8 (64, 64, 3) and its record. Raises WorldError for anything the world does not have,
    and unless there are one to four objects.

    >>> image, record = compose(["cat", Sticker("dog/whole", "flat", marking="spotted")], "beach", seed=0)
    >>> record.caption
    'a cat and a spotted dog on the beach'
    """
    ordered = checks.items("objects", [objects] if isinstance(objects, str | Sticker) else objects, least=0)
    if not 1 <= len(ordered) <= 4:
        raise WorldError(f"got {len(ordered)} objects, expected one to four in a picture")
    random = Random(checks.seed("seed", seed))
    known(scene, SCENES, "scene")
    plans = []
    for entry in ordered:
        if isinstance(entry, str):
            asked = Sticker(entry, style)
        else:
            asked = entry if isinstance(entry, Sticker) else Sticker(*triple(entry))
        plans.append(_to_order(asked, len(ordered), random))
    if caption is not None:
        checks.text("caption", caption, blank=True)
    else:
        told = [Described(plan.name, marking=plan.marking, colour=plan.colour) for plan in plans]
        caption = plain_caption(told, scene)
    image, things = _draw(plans, scene, random)
    return image, Record(tuple(things), scene, caption, fact)


def _to_order(asked: Sticker, count: int, random: Random) -> Plan:
    name, _, drawing = checks.text("name", asked.name).partition("/")
    info = CLASSES[known(name, CLASSES, "class")]
    gender = info.gender(random)
    full = full_drawing(f"{name}/{gender}" if gender and not drawing else asked.name)
    known(full, ATLAS["sprites"][known(asked.style, STYLES, "style")], f"sprite in {asked.style!r}")
    for value, among, what in ((asked.colour, COLOURS, "colour"), (asked.marking, MARKINGS, "marking")):
        if value is not None:
            known(value, among, what)
    hat = info.hat(random) if asked.hat is None else known(asked.hat, HATS, "colour of a hat")
    plan = Plan(
        name, asked.style, full, asked.colour, asked.marking, full.partition("/")[2] if gender else None, hat, word=name
    )
    _vary(plan, count, random)
    plan.hue = plan.hue if asked.hue is None else float(checks.number("hue", asked.hue))
    if asked.size is not None:
        if not 1 <= checks.of_kind("size", asked.size, (int, float, np.number)) <= LARGEST:
            raise WorldError(f"an object cannot have a size of {asked.size} pixels: choose one from 1 to {LARGEST:g}")
        plan.size = float(asked.size)
    return plan
