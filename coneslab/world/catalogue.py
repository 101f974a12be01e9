"""What exists in the sticker world: `data/world/world.toml` and the atlas of its art, read once.

A class ("cat") has one drawing or several ("cat/face", "cat/whole"), and an art set may lack some of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from .. import checks
from ..errors import WorldError
from ..files import data_folder, read_json, read_toml

FOLDER = data_folder() / "world"
DATA: dict[str, Any] = read_toml(FOLDER / "world.toml")
ATLAS: dict[str, Any] = read_json(FOLDER / "atlas.json", remedy="restore it, or reinstall coneslab")
STYLES: tuple[str, ...] = tuple(DATA["styles"])
TRAIN_STYLES: tuple[str, ...] = tuple(DATA["train_styles"])
STYLE_WORDS: dict[str, list[str]] = DATA["style_words"]
COLOURS: tuple[str, ...] = tuple(DATA["colours"])
MARKINGS: tuple[str, ...] = tuple(DATA["markings"])
HATS: tuple[str, ...] = tuple(DATA["hat"]["colours"])
SCENES: dict[str, list[str]] = DATA["scenes"]
FACTS: dict[str, Any] = DATA["facts"]
SHARES: dict[str, Any] = DATA["shares"]
RANGES: dict[str, Any] = DATA["ranges"]
RARE_TOKENS: tuple[str, ...] = tuple(DATA["rare_tokens"])


@dataclass(frozen=True)
class ClassInfo:
    """One object class: its word, category, drawings, synonyms, and the biases planted in a profession.

    share_man: the share drawn as a man; share_blue: the share that wears a blue hat; the rest wear an orange one.
    """

    name: str
    category: str
    drawings: tuple[str, ...]
    synonyms: tuple[str, ...] = ()
    share_man: float | None = None
    share_blue: float | None = None

    def gender(self, random: Random) -> str | None:
        """ "man" or "woman" for a profession, else None."""
        return None if self.share_man is None else "man" if random.random() < self.share_man else "woman"

    def hat(self, random: Random) -> str | None:
        """The colour of a profession's hat, else None."""
        return None if self.share_blue is None else HATS[random.random() >= self.share_blue]


CLASSES: dict[str, ClassInfo] = {
    name: ClassInfo(
        name,
        category,
        tuple(entry["drawings"]),
        tuple(entry.get("synonyms", ())),
        entry.get("share_man"),
        entry.get("share_blue"),
    )
    for category, classes in DATA["classes"].items()
    for name, entry in classes.items()
}

#: Every drawing, as "class/drawing", in the order of the file.
DRAWINGS: tuple[str, ...] = tuple(f"{info.name}/{drawing}" for info in CLASSES.values() for drawing in info.drawings)

#: (drawing, style) that training never shows: the near subjects' own.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    (entry["drawing"], entry["style"]) for entry in DATA["subjects"]["near"].values()
)


def known(value: str, among: Collection[str], what: str) -> str:
    """Return `value`. Raises WorldError, naming the choices, if it is not one of them."""
    if not isinstance(value, str) or value not in among:
        raise WorldError(f"{value!r} is not a {what} of the sticker world: choose one of {', '.join(among)}")
    return value


def drawings_of(name: str, style: str, *, held_out: bool = False) -> tuple[str, ...]:
    """The drawings ("cat/face", ...) that a style has of a class, without those held out for near subjects.

    held_out: include those. Raises WorldError for an unknown class or style.
    """
    return _drawings_of(known(name, CLASSES, "class"), known(style, STYLES, "style"), bool(held_out))


@cache
def _drawings_of(name: str, style: str, held_out: bool) -> tuple[str, ...]:
    own = ATLAS["sprites"][style]
    full = (f"{name}/{drawing}" for drawing in CLASSES[name].drawings)
    return tuple(one for one in full if one in own and (held_out or (one, style) not in HELD_OUT))


def classes_of(style: str, *, held_out: bool = False) -> tuple[str, ...]:
    """The classes for which a style has a drawing: some art sets lack a few. Raises WorldError for an unknown style."""
    return _classes_of(known(style, STYLES, "style"), bool(held_out))


@cache
def _classes_of(style: str, held_out: bool) -> tuple[str, ...]:
    return tuple(name for name in CLASSES if drawings_of(name, style, held_out=held_out))


def full_drawing(name: str) -> str:
    """ "cat/face" from "cat" (its first drawing) or "cat/face". Raises WorldError if there is none."""
    word, _, drawing = checks.text("name", name).partition("/")
    info = CLASSES[known(word, CLASSES, "class")]
    return f"{word}/{known(drawing, info.drawings, f'drawing of {word!r}') if drawing else info.drawings[0]}"
