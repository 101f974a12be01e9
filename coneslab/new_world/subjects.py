"""Personal subjects of the sticker world: far ones in the held-out art set, near ones among what the model knows.

A far subject is drawn in a style that the model has never seen. A near one is a drawing that was left out of one
learned style, in a hue and marking of its own: its class, its style and its other drawings were learned, as with "my
dog" and Stable Diffusion.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..errors import WorldError
from ..world.subjects import Subject, evaluation_prompts
from .captions import Described, plain_caption
from .catalogue import DATA
from .pictures import Record, Sticker, compose

KINDS = ("near", "far")
SUBJECTS: dict[str, tuple[str, ...]] = {kind: tuple(DATA["subjects"][kind]) for kind in KINDS}
COMBINATIONS: dict[str, dict[int, tuple[tuple[str, ...], ...]]] = {
    kind: {int(n): tuple(tuple(names) for names in groups) for n, groups in DATA["combinations"][kind].items()}
    for kind in KINDS
}
REFERENCE_SCENES = ("grass", "room", "white", "snow", "sunset")
HELD_OUT_STYLE = "twemoji"


@dataclass(frozen=True)
class Truth:
    """What a subject is: its kind ("near" or "far") and the one sticker that its pictures show."""

    name: str
    kind: str
    sticker: Sticker
    token: str

    @property
    def class_word(self) -> str:
        """ "cat"."""
        return self.sticker.name.partition("/")[0]


def truth(name: str) -> Truth:
    """What is known about a subject. Raises WorldError for an unknown name.

    >>> truth("tom").sticker.name, truth("tom").kind
    ('cat/whole', 'near')
    """
    for kind in KINDS:
        if isinstance(name, str) and name in DATA["subjects"][kind]:
            entry = DATA["subjects"][kind][name]
            style = entry.get("style", HELD_OUT_STYLE)
            sticker = Sticker(entry["drawing"], style, None, entry.get("marking") or None, None, entry.get("hue", 0.0))
            return Truth(name, kind, sticker, entry["token"])
    raise WorldError(
        f"{name!r} is not a subject of the sticker world: choose a near one ({', '.join(SUBJECTS['near'])}) "
        f"or a far one ({', '.join(SUBJECTS['far'])})"
    )


def subject(name: str) -> Subject:
    """Return one of the personal subjects that ship with the sticker world, e.g. `subject("tom")`.

    Its five reference pictures show it in five scenes; its ten prompts ask for seven other scenes and for company.
    Raises WorldError for an unknown name.
    """
    known = truth(name)
    seed = zlib.crc32(name.encode())
    pairs = [compose([known.sticker], scene, seed=seed + i) for i, scene in enumerate(REFERENCE_SCENES)]
    prompts = evaluation_prompts(known.class_word, known.token)
    images = tuple(Image.fromarray(image) for image, _ in pairs)
    records: Any = tuple(record for _, record in pairs)  # until this world is the only one
    return Subject(name, known.class_word, known.token, images, prompts, records)


def wanted(names: tuple[str, ...], scene: str, *, seed: int) -> tuple[Image.Image, Record]:
    """A real picture of one to four subjects in a scene, captioned with their class words."""
    known = [truth(name) for name in names]
    caption = plain_caption([Described(one.class_word) for one in known], scene)
    image, record = compose([one.sticker for one in known], scene, seed=seed, caption=caption)
    return Image.fromarray(image), record
