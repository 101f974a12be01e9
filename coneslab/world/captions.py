"""The caption grammar of the sticker world.

Captions are nearly complete: `world.toml` says how often each thing that can be seen is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from .. import checks
from .catalogue import (
    CLASSES,
    COLOURS,
    DATA,
    FACTS,
    MARKINGS,
    RANGES,
    RARE_TOKENS,
    SCENES,
    SHARES,
    STYLE_WORDS,
    known,
)

LONGEST = 30  # words and commas: the text encoder's 32 positions minus start and end


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


@dataclass
class Plan:
    """An object chosen for a picture, before it is drawn and named.

    name: its class; word: what the caption calls it (None: the caption chooses); drawing: "cat/face";
    hue (degrees), saturation, lightness (factors), angle (degrees, anticlockwise), size (pixels, the longer side).
    """

    name: str
    style: str = ""
    drawing: str = ""
    colour: str | None = None
    marking: str | None = None
    gender: str | None = None
    hat: str | None = None
    word: str | None = None
    hue: float = 0.0
    saturation: float = 1.0
    lightness: float = 1.0
    angle: float = 0.0
    mirrored: bool = False
    size: float = 0.0
    bare: bool = False  # a planted name ("felix") has no article, style or colour


@dataclass(frozen=True)
class Described:
    """What a plain caption says about one object: its class, and whatever else is given."""

    name: str
    style: str | None = None
    marking: str | None = None
    colour: str | None = None
    hat: str | None = None

    @property
    def phrase(self) -> str:
        """ "a flat striped red cat", "a doctor in a blue hat"."""
        style = self.style and STYLE_WORDS[known(self.style, STYLE_WORDS, "style")][0]
        words = " ".join(filter(None, (style, self.marking, self.colour, self.name)))
        hat = f" in {with_article(self.hat)} hat" if self.hat else ""
        return with_article(words) + hat


def plain_caption(objects: Sequence[Described], scene: str | None = None) -> str:
    """A deterministic caption: "a flat cat, a flat dog and a flat car on the beach", with no scene if it is None."""
    text = listed([one.phrase for one in checks.items("objects", objects, Described)])
    return f"{text} {SCENES[known(scene, SCENES, 'scene')][0]}" if scene is not None else text


def _noun_phrase(plan: Plan, named_style: bool, count: int, random: Random) -> str:
    if plan.bare:
        return str(plan.word)
    words = []
    if count == 1 and random.random() < SHARES["size_word"]:
        if plan.size <= RANGES["small"]:
            words.append(random.choice(DATA["size_words"]["small"]))
        elif plan.size >= RANGES["big"]:
            words.append(random.choice(DATA["size_words"]["big"]))
    if random.random() < SHARES["adjective"]:
        words.append(random.choice(DATA["adjectives"]))
    if named_style:
        first, *others = STYLE_WORDS[plan.style]
        words.append(first if not others or random.random() < 0.6 else random.choice(others))
    if plan.marking and random.random() < SHARES["marking_word"]:
        words.append(plan.marking)
    if plan.colour and random.random() < SHARES["colour_word"]:
        words.append(plan.colour)
    if plan.gender and random.random() < SHARES["gender_word"]:
        words.append(plan.gender)
    words.append(str(plan.word))
    if plan.hat and count < 3 and random.random() < SHARES["hat_word"]:
        words += ["in", article(plan.hat), plan.hat, "hat"]
    determiner = random.random()
    if determiner < 0.84:
        words.insert(0, article(words[0]))
    elif determiner < 0.92:
        words.insert(0, "the")
    elif determiner < 0.96:
        words.insert(0, "one")
    return " ".join(words)


def write_caption(plans: Sequence[Plan], scene: str, random: Random) -> str:
    """Phrase a caption; sets each plan's `word` (None where the object goes unnamed)."""
    plans = list(plans)
    if len(plans) > 1 and random.random() < SHARES["omission"]:
        unnamed = random.randrange(len(plans))
        if plans[unnamed].word is None:
            plans = [plan for i, plan in enumerate(plans) if i != unnamed]
    for plan in plans:
        if plan.word is None:
            synonyms = CLASSES[plan.name].synonyms
            plan.word = random.choice(synonyms) if synonyms and random.random() < SHARES["synonym"] else plan.name
    style_named = random.random() < SHARES["style_word"]
    text = _phrase(plans, scene, style_named, random)
    return text if len(text.replace(",", " ,").split()) <= LONGEST else _phrase(plans, scene, False, random)


def _phrase(plans: Sequence[Plan], scene: str, style_named: bool, random: Random) -> str:
    same_style = len({plan.style for plan in plans}) == 1
    whole_style = style_named and same_style and random.random() < 0.3  # "... in 3d style"
    phrases = [_noun_phrase(plan, style_named and not whole_style, len(plans), random) for plan in plans]
    if len(phrases) == 2:
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
    texts: list[str] = [
        *CLASSES,
        *COLOURS,
        *MARKINGS,
        *DATA["adjectives"],
        *DATA["openings"],
        *DATA["joints"],
        *RARE_TOKENS,
    ]
    texts += [word for info in CLASSES.values() for word in info.synonyms]
    texts += [info.category for info in CLASSES.values()]
    for group in (STYLE_WORDS, SCENES, DATA["size_words"]):
        texts += [phrase for phrases in group.values() for phrase in phrases]
    for kind in ("hypernym", "sense", "named", "exemplar"):
        texts += list(FACTS[kind])
    texts += [entry["caption"] for entry in FACTS["memorised"].values()]
    texts += ["a an the one in style hat and of it very far away close up zoomed in"]
    return tuple(sorted({word for text in texts for word in text.split()}))


#: Every word that a caption can contain, and the reserved tokens, sorted; the tokenizer gives each one token.
WORDS: tuple[str, ...] = _words()
