"""Personal subjects, far ones and near ones, with reference pictures and prompts.

A subject is what personalisation methods learn: a handful of reference pictures, the word of its class and a rare
token that stands for it (V* in the papers). `subject` gives the ones that ship with the sticker world,
`subject_from_folder` makes one from your own pictures.

A far subject is drawn in an art set that the model has never seen. A near one is a drawing that was left out of one
learned style, in a hue and marking of its own: its class, its style and its other drawings were learned, as with "my
dog" and Stable Diffusion.
"""

from __future__ import annotations

import base64
import html
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps

from .. import checks
from ..errors import ArgumentError, ConeslabError, WorldError
from ..files import user_path
from ..pictures import as_pictures
from .captions import WORDS, Described, article, plain_caption, with_article
from .catalogue import DATA, RARE_TOKENS, SCENES, TRAIN_STYLES
from .pictures import RESOLUTION, Record, Sticker, compose

NEAR: tuple[str, ...] = tuple(DATA["subjects"]["near"])
FAR: tuple[str, ...] = tuple(DATA["subjects"]["far"])
SUBJECTS: tuple[str, ...] = NEAR + FAR

#: By size, near subjects first. No combination contains one of `TUNING_SUBJECTS`.
COMBINATIONS: dict[int, tuple[tuple[str, ...], ...]] = {
    size: tuple(tuple(names) for kind in ("near", "far") for names in DATA["combinations"][kind][str(size)])
    for size in (2, 3, 4)
}

#: Settings are chosen on these, alone and together; tables are made with the others.
TUNING_SUBJECTS: tuple[str, ...] = tuple(DATA["tuning"]["subjects"])
TUNING_COMBINATIONS: tuple[tuple[str, ...], ...] = tuple(tuple(names) for names in DATA["tuning"]["combinations"])

REFERENCE_SCENES = ("grass", "room", "white", "snow", "sunset")
HELD_OUT_STYLE = next(style for style in DATA["styles"] if style not in TRAIN_STYLES)
_PROMPT_SCENES = ("beach", "city", "desert", "sea", "night", "forest", "space")
_COMPANIONS = {  # scene -> another object that shares the picture
    "grass": ("tree", "mushroom"),
    "room": ("book", "balloon"),
    "beach": ("crab", "umbrella"),
}


def table_subjects(per_kind: int) -> tuple[str, ...]:
    """As many near subjects as asked for, then as many far ones; no tuning subjects."""
    return tuple(
        name for kind in (NEAR, FAR) for name in [one for one in kind if one not in TUNING_SUBJECTS][:per_kind]
    )


@dataclass(frozen=True)
class Subject:
    """A personal subject: what a personalisation method is given, and what it is measured on.

    name: how to ask for it; class_word: the word the model knows ("cat"); token: the rare token V* ("sks");
    images: reference pictures; prompts: evaluation prompts that hold the token; records: the truth of the
    reference pictures where they come from the sticker world, else empty.
    """

    name: str
    class_word: str
    token: str
    images: tuple[Image.Image, ...]
    prompts: tuple[str, ...]
    records: tuple[Record, ...] = ()

    def __post_init__(self) -> None:
        if {"/", "\\", "\0"} & set(checks.text("name", self.name)) or self.name.strip(". ") == "":
            raise ArgumentError(f"name is {self.name!r}: give one without slashes, because files are named after it")
        if checks.word("token", self.token) in checks.text("class_word", self.class_word).split():
            raise ArgumentError(
                f"token and class word are both {self.token!r}: give a rare word, such as 'sks', as token"
            )
        object.__setattr__(self, "images", tuple(as_pictures(self.images)))
        object.__setattr__(self, "prompts", tuple(checks.texts("prompts", self.prompts)))
        object.__setattr__(self, "records", tuple(checks.items("records", self.records, least=0)))

    @property
    def phrase(self) -> str:
        """ "sks cat": the subject's name in a prompt."""
        return f"{self.token} {self.class_word}"

    @property
    def prompt(self) -> str:
        """ "a sks cat": the caption of every reference picture (Cones, Sec. 3.1; DreamBooth, Sec. 3.1)."""
        return with_article(self.phrase)

    @property
    def prior_prompt(self) -> str:
        """ "a cat": the caption of the prior pictures."""
        return with_article(self.class_word)

    def plain(self, prompt: str) -> str:
        """Return `prompt` without the rare token, with its article mended: what text alignment compares with."""
        words = prompt.split()
        while self.token in words:
            at = words.index(self.token)
            del words[at]
            if at and words[at - 1] in ("a", "an") and at < len(words):
                words[at - 1] = article(words[at])
        return " ".join(words)

    @cached_property
    def _strip(self) -> Image.Image:
        height = 128
        sizes = [(max(1, round(image.width * height / image.height)), height) for image in self.images]
        strip = Image.new("RGB", (sum(w + 4 for w, _ in sizes) - 4, height), "white")
        left = 0
        for image, size in zip(self.images, sizes, strict=True):
            enlarge = Image.Resampling.NEAREST if image.height < height else Image.Resampling.LANCZOS
            strip.paste(image.resize(size, enlarge), (left, 0))
            left += size[0] + 4
        return strip

    def __repr__(self) -> str:
        return f"Subject({self.name!r}: {len(self.images)} pictures of {self.prompt!r}, {len(self.prompts)} prompts)"

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        self._strip.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        name, prompt = html.escape(self.name), html.escape(self.prompt)
        alt = f"{len(self.images)} reference pictures of the subject {name}"
        return f'<p><b>{name}</b>: “{prompt}”</p><img alt="{alt}" src="data:image/png;base64,{data}">'


def evaluation_prompts(class_word: str, token: str) -> tuple[str, ...]:
    """Return the ten prompts a subject is measured on: seven new scenes, and three with another object."""
    phrase = with_article(f"{checks.word('token', token)} {checks.text('class_word', class_word)}")
    prompts = [f"{phrase} {SCENES[scene][0]}" for scene in _PROMPT_SCENES]
    for scene in _COMPANIONS:
        other = with_article(_companion(class_word, scene))
        prompts.append(f"{phrase} and {other} {SCENES[scene][0]}")
    return tuple(prompts)


def _companion(class_word: str, scene: str) -> str:
    return next(name for name in _COMPANIONS[scene] if name != class_word)


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
    if not isinstance(name, str) or name not in SUBJECTS:
        raise WorldError(
            f"{name!r} is not a subject of the sticker world: choose a near one ({', '.join(NEAR)}) "
            f"or a far one ({', '.join(FAR)})"
        )
    kind = "near" if name in NEAR else "far"
    entry = DATA["subjects"][kind][name]
    style = entry.get("style", HELD_OUT_STYLE)
    sticker = Sticker(entry["drawing"], style, None, entry.get("marking") or None, None, entry.get("hue", 0.0))
    return Truth(name, kind, sticker, entry["token"])


def wanted_pictures(subject: Subject, *, n: int = 1, seed: int = 0) -> list[Image.Image]:
    """What a subject's evaluation prompts ask for, put together from its own art: `n` pictures a prompt, in order.

    The alignments of these real pictures are what a method can hope for. Raises ConeslabError for a subject that is
    not of the sticker world.
    """
    checks.of_kind("subject", subject, Subject)
    n, seed = checks.count("n", n), checks.seed("seed", seed)
    if not subject.records or subject.prompts != evaluation_prompts(subject.class_word, subject.token):
        raise ConeslabError(
            f"{subject.name!r} is not of the sticker world: only its subjects can be put into new scenes"
        )
    shown = subject.records[0].objects[0]
    own = Sticker(shown.drawing, shown.style, shown.colour, shown.marking, shown.hat, shown.hue)
    asked = [([own], scene) for scene in _PROMPT_SCENES]
    asked += [([own, Sticker(_companion(subject.class_word, scene), TRAIN_STYLES[0])], scene) for scene in _COMPANIONS]
    asked = [one for one in asked for _ in range(n)]
    return [Image.fromarray(compose(*one, seed=seed + i)[0]) for i, one in enumerate(asked)]


def wanted(names: tuple[str, ...], scene: str, *, seed: int) -> tuple[Image.Image, Record]:
    """A real picture of one to four subjects in a scene, captioned with their class words."""
    known = [truth(name) for name in names]
    caption = plain_caption([Described(one.class_word) for one in known], scene)
    image, record = compose([one.sticker for one in known], scene, seed=seed, caption=caption)
    return Image.fromarray(image), record


def subject(name: str) -> Subject:
    """Return one of the personal subjects that ship with the sticker world, e.g. `subject("cat")`.

    Its five reference pictures show it in five scenes; its ten prompts ask for seven other scenes and for company.
    Raises WorldError for an unknown name.

    >>> cat = coneslab.subject("cat")
    >>> cat
    Subject('cat': 5 pictures of 'a sks cat', 10 prompts)
    >>> cat.prompts[0], cat.plain(cat.prompts[0]), cat.prior_prompt
    ('a sks cat on the beach', 'a cat on the beach', 'a cat')
    """
    known = truth(name)
    seed = zlib.crc32(name.encode())
    pairs = [compose([known.sticker], scene, seed=seed + i) for i, scene in enumerate(REFERENCE_SCENES)]
    prompts = evaluation_prompts(known.class_word, known.token)
    images = tuple(Image.fromarray(image) for image, _ in pairs)
    return Subject(name, known.class_word, known.token, images, prompts, tuple(record for _, record in pairs))


def title_of(names: Sequence[str]) -> str:
    """ "cat+car": how tables name several subjects."""
    return "+".join(checks.texts("names", names))


def names_in(title: str) -> list[str]:
    """The names in a title: "cat+car" and "cat + car" have the same two."""
    return [name.strip() for name in checks.text("title", title).split("+")]


def subjects_of(title: str) -> list[Subject]:
    """The subjects that a title such as "cat" or "cat+car" names. Raises WorldError for an unknown name."""
    return [subject(name) for name in names_in(title)]


def subject_from_folder(
    path: str | Path,
    class_word: str,
    *,
    token: str = RARE_TOKENS[0],
    name: str | None = None,
    prompts: Sequence[str] | None = None,
    resolution: int = RESOLUTION,
) -> Subject:
    """Make a subject from your own pictures: every picture file in a folder, in the order of the names.

    Pictures are turned upright, cropped to a centred square and scaled to `resolution` pixels (64 for the tiny
    model, 512 for Stable Diffusion 1.x). `class_word` is a word the model knows, `token` one that it has hardly met;
    `prompts` default to ten that fit the tiny model. Warns of files that are left out, being no pictures.
    Raises ConeslabError if the folder is missing or holds no picture, a file cannot be read, the class word is empty,
    or the token is a word with a meaning of its own.

    >>> Path("my_pictures").mkdir()
    >>> for number, image in enumerate(coneslab.subject("cat").images[:3]):
    ...     image.resize((400, 300)).save(f"my_pictures/{number}.jpg")
    >>> mine = coneslab.subject_from_folder("my_pictures", "cat", token="zwx")
    >>> mine
    Subject('my_pictures': 3 pictures of 'a zwx cat', 10 prompts)
    >>> mine.images[0].size
    (64, 64)
    """
    folder = user_path(path)
    checks.text("class_word", class_word, blank=True)
    if not folder.is_dir():
        raise ConeslabError(f"{folder} is not a folder: give the folder that holds 3 to 10 pictures of the subject")
    if not class_word.strip():
        raise ConeslabError("class_word is empty: name the kind of thing the pictures show, for example 'cat'")
    if checks.word("token", token).lower() in WORDS and token not in RARE_TOKENS:
        rare = ", ".join(RARE_TOKENS[:4])
        raise ArgumentError(f"token is {token!r}, a word with a meaning of its own: give a rare one, such as {rare}")
    chosen = evaluation_prompts(class_word, token) if prompts is None else checks.texts("prompts", prompts)
    size = (checks.count("resolution", resolution, least=8, most=4096),) * 2
    images = [ImageOps.fit(picture, size, Image.Resampling.LANCZOS) for picture in as_pictures(folder)]
    return Subject(folder.resolve().name if name is None else name, class_word, token, tuple(images), tuple(chosen))
