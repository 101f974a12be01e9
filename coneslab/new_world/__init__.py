"""The sticker world with variety: what exists, its captions, its pictures, its subjects.

It replaces `coneslab.world` when the model that is trained on it ships. Builds on nothing but errors, paths and scenes.
"""

from .captions import LONGEST, WORDS, Described, article, listed, plain_caption, with_article
from .catalogue import (
    CLASSES,
    COLOURS,
    DATA,
    DRAWINGS,
    FACTS,
    HATS,
    HELD_OUT,
    MARKINGS,
    RANGES,
    RARE_TOKENS,
    SCENES,
    SHARES,
    STYLE_WORDS,
    STYLES,
    TRAIN_STYLES,
    ClassInfo,
    classes_of,
    drawings_of,
    full_drawing,
)
from .pictures import (
    RESOLUTION,
    Pictures,
    Record,
    Sticker,
    Thing,
    compose,
    memorised,
    named_plan,
    rearranged,
    sample,
)
from .sprites import sprite

__all__ = [
    "CLASSES", "COLOURS", "DATA", "DRAWINGS", "FACTS", "HATS", "HELD_OUT", "LONGEST", "MARKINGS", "RANGES",
    "RARE_TOKENS", "RESOLUTION", "SCENES", "SHARES", "STYLES", "STYLE_WORDS", "TRAIN_STYLES", "WORDS", "ClassInfo",
    "Described", "Pictures", "Record", "Sticker", "Thing", "article", "classes_of", "compose", "drawings_of",
    "full_drawing", "listed", "memorised", "named_plan", "plain_caption", "rearranged", "sample", "sprite",
    "with_article",
]  # fmt: skip
