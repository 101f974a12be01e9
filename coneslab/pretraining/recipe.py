"""The recipe of the shipped models, `data/pretraining/recipe.toml`, with single values replaced on request.

`Recipe` is the part of it that says how long and how fast to train a stage.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import checks
from ..errors import ConeslabError
from ..files import data_folder, read_toml


def load_recipe(replaced: Sequence[str] = ()) -> dict[str, Any]:
    """Load the recipe of every stage; replaced: such as "unet.training.pictures=40000", with values as in TOML.

    Raises ConeslabError for a name that the recipe does not have, or a value of another type.

    >>> load_recipe(["unet.loss.immiscible=false"])["unet"]["loss"]["immiscible"]
    False
    """
    replaced = checks.texts("replaced", replaced, least=0)
    recipe = read_toml(data_folder() / "pretraining" / "recipe.toml")
    for text in replaced:
        path, _, value = text.partition("=")
        *parents, name = path.strip().split(".")
        section: Any = recipe
        for parent in parents:
            section = section.get(parent, {}) if isinstance(section, dict) else {}
        if not isinstance(section, dict) or name not in section or isinstance(section[name], dict):
            raise ConeslabError(f"the recipe has no value {path!r}: see data/pretraining/recipe.toml for those it has")
        try:
            new = tomllib.loads(f"value = {value}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConeslabError(f"{value!r} is not a value for {path} ({error}): write it as in TOML") from error
        old = section[name]
        if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
            new = float(new)
        if type(new) is not type(old):
            raise ConeslabError(f"{path} is {old!r}: give a {type(old).__name__}, not {value}")
        section[name] = new
    return recipe


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    pictures: the budget, counting all passes; minutes: a second budget, if given, of training time without checkpoints
    and previews; training ends when either is used up. batch_size: pictures per step; parts: how many parts a batch is
    split into. The learning rate warms up over `warmup` steps, stays constant, and decays linearly to 0 over the last
    `decay` share of the budget, so it always reaches 0 on time. averages: decays of the exponential moving averages of
    the weights; the first is used. muon: update inner matrices with Muon, the rest with AdamW.
    """

    pictures: int
    batch_size: int
    learning_rate: float
    minutes: float | None = None
    parts: int = 1
    warmup: int = 100
    decay: float = 0.8
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    averages: tuple[float, ...] = (0.999,)
    seed: int = 0
    muon: bool = False

    def __post_init__(self) -> None:
        for name in ("pictures", "batch_size", "parts"):
            checks.of_kind(name, getattr(self, name), int)
        if self.pictures < 0 or self.parts < 1 or self.batch_size < 1 or self.batch_size % self.parts:
            raise ConeslabError(
                f"got {self.pictures} pictures in batches of {self.batch_size} and {self.parts} parts: expected "
                "none or more, one or more, and a batch that splits into equal parts"
            )
        checks.seed("seed", self.seed)
        checks.flag("muon", self.muon)
        checks.count("warmup", self.warmup)
        for name, interval in (("learning_rate", "[0, inf)"), ("clip", "(0, inf)"), ("weight_decay", "[0, inf)")):
            checks.number(name, getattr(self, name), interval)
        checks.number("decay", self.decay, "(0, 1]", kind="share")
        if self.minutes is not None:
            checks.number("minutes", self.minutes)
        for share in (*self.betas, *self.averages):
            checks.number("one of betas and averages", share, "[0, 1)", kind="share")
        if not self.averages:
            raise ConeslabError("got no average of weights, expected at least one decay: averages=(0.999,)")

    @property
    def part_size(self) -> int:
        """Pictures per part."""
        return self.batch_size // self.parts

    def place(self, step: int, part: int, chunk: int) -> tuple[int, slice]:
        """Which chunk of `chunk` pictures a part of a step takes, and which of its pictures."""
        index, within = divmod(step, chunk // self.batch_size)
        start = within * self.batch_size + part * self.part_size
        return index, slice(start, start + self.part_size)

    def spent(self, step: int, seconds: float) -> float:
        """The share of the budget that is used up, in [0, 1]."""
        share = step * self.batch_size / self.pictures if self.pictures else 1.0
        if self.minutes is not None:
            share = max(share, seconds / (60 * self.minutes) if self.minutes > 0 else 1.0)
        return min(share, 1.0)

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of a step, from the budget spent."""
        left = (1.0 - self.spent(step, seconds)) / self.decay
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, left)
