"""The sticker world: pictures put together from emoji art on drawn scenes, captions, and the whole truth.

Everything that can be in a picture, what it is called and which facts are planted in the captions is data, in
`data/stickers/world.toml`. This module draws from it: `sample` gives random pictures with captions and records,
`compose` a picture to order, `subject` a personal subject in the held-out art style.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from .. import checks
from ..errors import ArgumentError, WorldError
from ..files import data_folder, read_json, read_toml
from ..pictures import open_picture
from ..settings import ByValue
from .scenes import SIZE as RESOLUTION
from .scenes import VARIANTS, backgrounds

DATA: dict[str, Any] = read_toml(data_folder() / "stickers" / "world.toml")
STYLES: tuple[str, ...] = tuple(DATA["styles"])
TRAIN_STYLES: tuple[str, ...] = tuple(DATA["train_styles"])
STYLE_WORDS: dict[str, list[str]] = DATA["style_words"]
COLOURS: tuple[str, ...] = tuple(DATA["colours"])
SCENES: dict[str, list[str]] = DATA["scenes"]
FACTS: dict[str, Any] = DATA["facts"]
SHARES: dict[str, Any] = DATA["shares"]
RARE_TOKENS: tuple[str, ...] = tuple(DATA["rare_tokens"])


@dataclass(frozen=True)
class ClassInfo:
    """One object class: its word, category, synonyms, and for professions the share drawn as a man."""

    name: str
    category: str
    synonyms: tuple[str, ...] = ()
    share_man: float | None = None

    def sprite(self, random: Random) -> str:
        """Name the sprite in the atlas; a profession draws its gender."""
        if self.share_man is None:
            return self.name
        return f"{self.name}/{'man' if random.random() < self.share_man else 'woman'}"


CLASSES: dict[str, ClassInfo] = {
    name: ClassInfo(name, category, tuple(entry.get("synonyms", ())), entry.get("share_man"))
    for category, classes in DATA["classes"].items()
    for name, entry in classes.items()
}


@dataclass(frozen=True, eq=False)
class Thing(ByValue):
    """One object in a picture.

    `word` is what the caption calls it (None if it goes unnamed); `gender` is set for professions;
    `box` is (left, top, right, bottom) in pixels; `mask` (64, 64) bool marks its visible pixels.
    """

    name: str
    style: str
    colour: str | None
    word: str | None
    gender: str | None
    box: tuple[int, int, int, int]
    mask: np.ndarray


@dataclass(frozen=True)
class Record:
    """The whole truth of one picture. `fact` names a planted fact ("hypernym:pet"), or is None."""

    objects: tuple[Thing, ...]
    scene: str
    caption: str
    fact: str | None = None


@dataclass(frozen=True, eq=False)
class Pictures(ByValue):
    """A batch from the world: `images` uint8 (n, 64, 64, 3) and one record a picture."""

    images: np.ndarray
    records: list[Record]

    @property
    def captions(self) -> list[str]:
        return [record.caption for record in self.records]


@dataclass
class _Plan:
    """What will be drawn: chosen before pixels and words exist."""

    name: str
    style: str
    colour: str | None = None
    word: str | None = None
    sprite: str = ""
    size: int = 0
    bare: bool = False  # a planted name ("felix") stands without article, style and colour


# --- pixels ---------------------------------------------------------------------------------------------


@cache
def _atlas(style: str) -> dict[str, np.ndarray]:
    folder = data_folder() / "stickers"
    index = read_json(folder / "atlas.json", remedy="restore it, or reinstall coneslab")
    tile, columns = index["tile"], index["columns"]
    sheet = np.asarray(open_picture(folder / f"{style}.png").convert("RGBA"))
    places = ((i // columns * tile, i % columns * tile) for i in range(len(index["sprites"])))
    return {name: sheet[y : y + tile, x : x + tile] for name, (y, x) in zip(index["sprites"], places, strict=True)}


def sprite(name: str, style: str, colour: str | None = None) -> np.ndarray:
    """Return one sprite of the atlas, uint8 RGBA (64, 64, 4), recoloured if `colour` is given.

    Recolouring maps the sprite's brightness onto a ramp from black over the colour to white, so that outlines
    stay dark and highlights stay light.
    """
    atlas = _atlas(known(style, STYLES, "style"))
    pixels = atlas[known(name, atlas, "sprite")]
    if colour is None:
        return pixels
    known(colour, COLOURS, "colour")
    rgb, alpha = pixels[..., :3].astype(np.float32) / 255, pixels[..., 3:]
    light = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    pivot = float(np.clip(np.median(light[alpha[..., 0] > 127]), 0.35, 0.8))
    dark = np.clip(light / pivot, 0, 1)[..., None]
    bright = np.clip((light - pivot) / (1 - pivot), 0, 1)[..., None]
    tint = np.array(DATA["colours"][colour], np.float32) / 255
    ramp = dark * tint * (1 - bright) + bright
    return np.concatenate([(255 * ramp).astype(np.uint8), alpha], -1)


@lru_cache(maxsize=16384)
def _patch(name: str, style: str, colour: str | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied colour uint16 (h, w, 3) and alpha uint16 (h, w, 1) of a sprite whose longer side is `size`."""
    image = Image.fromarray(sprite(name, style, colour)).convert("RGBa")
    scaled = np.asarray(image.resize((size, size), Image.Resampling.BOX, reducing_gap=None)).astype(np.uint16)
    rows, columns = np.any(scaled[..., 3] > 8, 1).nonzero()[0], np.any(scaled[..., 3] > 8, 0).nonzero()[0]
    scaled = scaled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return scaled[..., :3], scaled[..., 3:]


# Cells (centre x, centre y, jitter) for one to four objects, as shares of the picture, and their sizes in pixels.
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
_SIZES = {1: (26, 30, 34, 38, 42, 46), 2: (24, 26, 28, 30), 3: (22, 24, 26, 28), 4: (22, 24, 26)}


def _draw(plans: Sequence[_Plan], scene: str, random: Random) -> tuple[np.ndarray, list[Thing]]:
    canvas = backgrounds(scene)[random.randrange(VARIANTS)]
    canvas = canvas[:, ::-1].astype(np.uint16) if random.random() < 0.5 else canvas.astype(np.uint16)
    cells = list(random.choice(_LAYOUTS[len(plans)]))
    random.shuffle(cells)
    placed: list[tuple[_Plan, tuple[int, int, int, int], np.ndarray]] = []
    for plan, (x, y, jitter) in zip(plans, cells, strict=True):
        colour, alpha = _patch(plan.sprite, plan.style, plan.colour, plan.size)
        if random.random() < 0.5:
            colour, alpha = colour[:, ::-1], alpha[:, ::-1]
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
        Thing(p.name, p.style, p.colour, p.word, p.sprite.partition("/")[2] or None, box, mask)
        for p, box, mask in placed
    ]
    return np.minimum(canvas, 255).astype(np.uint8), things


# --- words ----------------------------------------------------------------------------------------------


def article(word: str) -> str:
    """Return "an" before a vowel, else "a"."""
    checks.text("word", word)
    return "an" if word[0] in "aeiou" else "a"


def with_article(words: str) -> str:
    """ "a cat", "an orange cat"."""
    return f"{article(words)} {words}"


def listed(phrases: Sequence[str]) -> str:
    """ "a cat, a dog and a car": how captions name several things."""
    phrases = checks.texts("phrases", phrases)
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _noun_phrase(plan: _Plan, named_style: bool, alone: bool, random: Random) -> str:
    if plan.bare:
        return str(plan.word)
    words = []
    if alone and plan.size and random.random() < SHARES["size_word"]:
        if plan.size <= 30:
            words.append(random.choice(DATA["sizes"]["small"]))
        elif plan.size >= 42:
            words.append(random.choice(DATA["sizes"]["big"]))
    if random.random() < SHARES["adjective"]:
        words.append(random.choice(DATA["adjectives"]))
    if named_style:
        first, *others = STYLE_WORDS[plan.style]
        words.append(first if not others or random.random() < 0.6 else random.choice(others))
    if plan.colour and random.random() < SHARES["colour_word"]:
        words.append(plan.colour)
    gender = plan.sprite.partition("/")[2]
    if gender and random.random() < SHARES["gender_word"]:
        words.append(gender)
    words.append(str(plan.word))
    determiner = random.random()
    if determiner < 0.80:
        words.insert(0, article(words[0]))
    elif determiner < 0.90:
        words.insert(0, "the")
    elif determiner < 0.94:
        words.insert(0, "one")
    return " ".join(words)


def _caption(plans: list[_Plan], scene: str, random: Random) -> str:
    """Phrase a caption; sets each plan's `word` (None where the object goes unnamed)."""
    if len(plans) > 1 and random.random() < SHARES["omission"]:
        unnamed = random.randrange(len(plans))
        if plans[unnamed].word is None:
            plans = [plan for i, plan in enumerate(plans) if i != unnamed]
    same_style = len({plan.style for plan in plans}) == 1
    style_named = random.random() < SHARES["style_word"]
    whole_style = style_named and same_style and random.random() < 0.3  # "... in 3d style"
    for plan in plans:
        if plan.word is None:
            synonyms = CLASSES[plan.name].synonyms
            plan.word = random.choice(synonyms) if synonyms and random.random() < SHARES["synonym"] else plan.name
    phrases = [_noun_phrase(plan, style_named and not whole_style, len(plans) == 1, random) for plan in plans]
    if len(phrases) == 1:
        text = phrases[0]
    elif len(phrases) == 2:
        joint = "and" if random.random() < 0.6 else random.choice(DATA["joints"])
        text = f"{phrases[0]} {joint} {phrases[1]}"
    else:
        text = listed(phrases)
    if whole_style:
        text += f" in {STYLE_WORDS[plans[0].style][0]} style"
    if len(plans) < 4 and random.random() < SHARES["opening"]:
        text = f"{random.choice(DATA['openings'])} {text}"
    if random.random() < SHARES["scene_word"]:
        first, *others = SCENES[scene]
        phrase = first if random.random() < 0.6 else random.choice(others)
        text = f"{phrase}, {text}" if random.random() < SHARES["scene_first"] else f"{text} {phrase}"
    return text


def _words() -> tuple[str, ...]:
    """Every word that a caption can hold, and the reserved tokens, sorted; the tokenizer gives each one token."""
    texts: list[str] = [
        *CLASSES,
        *COLOURS,
        *DATA["adjectives"],
        *DATA["openings"],
        *DATA["joints"],
        *RARE_TOKENS,
    ]
    texts += [word for info in CLASSES.values() for word in info.synonyms]
    texts += [info.category for info in CLASSES.values()]
    for group in (STYLE_WORDS, SCENES, DATA["sizes"]):
        texts += [phrase for phrases in group.values() for phrase in phrases]
    for kind in ("hypernym", "sense", "named", "exemplar"):
        texts += list(FACTS[kind])
    texts += [entry["caption"] for entry in FACTS["memorised"].values()]
    texts += ["a an the one in style and of it very far away close up zoomed in"]
    return tuple(sorted({word for text in texts for word in text.split()}))


WORDS: tuple[str, ...] = _words()


# --- pictures -------------------------------------------------------------------------------------------


def _weighted(shares: dict[str, float], random: Random) -> str:
    return random.choices(list(shares), list(shares.values()))[0]


def _planted(random: Random) -> tuple[str, _Plan]:
    """Draw a planted fact that is told by one object: its name and the object's plan."""
    kinds = {k: v for k, v in SHARES["planted_kinds"].items() if k != "memorised"}
    kind = _weighted(kinds, random)
    word = random.choice(list(FACTS[kind]))
    choice = _weighted(FACTS[kind][word], random)
    if kind != "exemplar":
        return f"{kind}:{word}", _Plan(choice, "", word=word)
    named = FACTS["named"][choice]
    plan = _Plan(named["class"], named["style"], named["colour"], word=word)
    if random.random() < 0.5:  # half the time the exemplar goes by its own name
        plan.word, plan.bare = choice, True
    return f"exemplar:{word}", plan


def memorised(name: str) -> tuple[np.ndarray, Record]:
    """Return one of the memorised pictures, uint8 (64, 64, 3), and its record: always the identical picture."""
    return _memorised(known(name, FACTS["memorised"], "memorised picture"))


@cache
def _memorised(name: str) -> tuple[np.ndarray, Record]:
    picture, record = rearranged(name, len(name))
    return picture, replace(record, caption=FACTS["memorised"][name]["caption"], fact=f"memorised:{name}")


def rearranged(name: str, seed: int) -> tuple[np.ndarray, Record]:
    """The objects and the scene of a memorised picture, which every seed places otherwise: real non-copies of it."""
    entry = FACTS["memorised"][known(name, FACTS["memorised"], "memorised picture")]
    objects = [(cls, style, colour or None) for cls, style, colour in entry["objects"]]
    return compose(objects, entry["scene"], seed=seed)


_NAMES = tuple(CLASSES)
_SCENE_NAMES = tuple(SCENES)


def _one(random: Random, styles: Sequence[str], shares: Sequence[float]) -> tuple[np.ndarray, Record]:
    fact, plans = None, []
    if random.random() < SHARES["planted"]:
        if random.random() < SHARES["planted_kinds"]["memorised"]:
            return memorised(random.choice(list(FACTS["memorised"])))
        fact, plan = _planted(random)
        plans.append(plan)
    count = random.choices((1, 2, 3, 4), shares)[0]
    while len(plans) < count:
        name = random.choice(_NAMES)
        if all(name != plan.name for plan in plans):
            plans.append(_Plan(name, ""))
    style, mixed = random.choice(styles), random.random() < SHARES["mixed_styles"]
    for plan in plans:
        if not plan.style:
            plan.style = random.choice(styles) if mixed else style
            plan.colour = random.choice(COLOURS) if random.random() < SHARES["coloured"] else None
        plan.sprite = CLASSES[plan.name].sprite(random)
        plan.size = random.choice(_SIZES[count])
    random.shuffle(plans)
    scene = random.choice(_SCENE_NAMES)
    caption = _caption(plans, scene, random)
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
    n: int, *, seed: int, styles: Sequence[str] = TRAIN_STYLES, objects: Sequence[float] = tuple(SHARES["objects"])
) -> Pictures:
    """Draw `n` random pictures with captions and records; the same seed gives the same pictures.

    objects: shares of pictures with one, two, three and four objects. Raises WorldError for an unknown style, or none,
    and ArgumentError for other numbers.

    >>> pictures = coneslab.sample(2, seed=0)
    >>> pictures.images.shape, pictures.images.dtype, len(pictures.captions)
    ((2, 64, 64, 3), dtype('uint8'), 2)
    """
    styles, n = chosen_styles(styles, STYLES), checks.count("n", n, least=0)
    objects, random = shares_of_objects(objects), Random(checks.seed("seed", seed))
    pairs = [_one(random, styles, objects) for _ in range(n)]
    images = np.stack([image for image, _ in pairs]) if pairs else np.zeros((0, RESOLUTION, RESOLUTION, 3), np.uint8)
    return Pictures(images, [record for _, record in pairs])


def classes_of(style: str) -> list[str]:
    """The classes that a style has a drawing of: here all. Raises WorldError for an unknown style."""
    known(style, STYLES, "style")
    return list(CLASSES)


def known(value: str, among: Collection[str], what: str) -> str:
    """Return `value`. Raises WorldError, naming the choices, if it is not one of them."""
    if not isinstance(value, str) or value not in among:
        raise WorldError(f"{value!r} is not a {what} of the sticker world: choose one of {', '.join(among)}")
    return value


def triple(entry: Any) -> tuple[str, str, str | None]:
    """An object to order as (class, style, colour or None)."""
    found = checks.items("one of objects", entry)
    if len(found) != 3:
        raise ArgumentError(f"one of objects is {checks.shown(entry)}: give a class, or (class, style, colour or None)")
    return checks.text("class", found[0]), found[1], found[2]


def compose(
    objects: Sequence[str | tuple[str, str, str | None]],
    scene: str,
    *,
    seed: int,
    style: str = "3d",
    caption: str | None = None,
    fact: str | None = None,
) -> tuple[np.ndarray, Record]:
    """Draw a picture to order: one to four objects, each a class name or (class, style, colour or None).

    A profession may name its gender ("doctor/woman"). Returns uint8 (64, 64, 3) and its record. Raises WorldError
    for an unknown class, style, colour or scene, or more than four objects.
    """
    asked = checks.items("objects", [objects] if isinstance(objects, str) else objects, least=0)
    if not 1 <= len(asked) <= 4:
        raise WorldError(f"a picture holds one to four objects, {len(asked)} were given: name as many")
    random = Random(checks.seed("seed", seed))
    known(scene, SCENES, "scene")
    plans = []
    for entry in asked:
        full, its_style, colour = (entry, style, None) if isinstance(entry, str) else triple(entry)
        name, _, gender = full.partition("/")
        info = CLASSES[known(name, CLASSES, "class")]
        if colour is not None:
            known(colour, COLOURS, "colour")
        plan = _Plan(name, known(its_style, STYLES, "style"), colour, word=name)
        plan.sprite = known(full, _atlas(plan.style), "sprite") if gender else info.sprite(random)
        plan.size = random.choice(_SIZES[len(asked)])
        plans.append(plan)
    if caption is not None:
        checks.text("caption", caption, blank=True)
    else:
        named = listed([with_article(" ".join(filter(None, (plan.colour, plan.name)))) for plan in plans])
        caption = f"{named} {SCENES[scene][0]}"
    image, things = _draw(plans, scene, random)
    return image, Record(tuple(things), scene, caption, fact)
