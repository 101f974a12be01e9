"""The recipe of the shipped models as data: `data/pretraining/recipe.toml`, with single values replaced on request."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from ..errors import ConeslabError
from ..files import data_folder


def load_recipe(replaced: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe of every stage; `replaced` holds texts such as "unet.training.pictures=40000", values as in TOML.

    Raises ConeslabError for a name that the recipe does not have, or a value of another type.

    >>> load_recipe(["unet.loss.immiscible=false"])["unet"]["loss"]["immiscible"]
    False
    """
    recipe = tomllib.loads((data_folder() / "pretraining" / "recipe.toml").read_text(encoding="utf-8"))
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
        except tomllib.TOMLDecodeError as error:
            raise ConeslabError(f"{value!r} is no value for {path} ({error}): write it as in TOML") from error
        old = section[name]
        if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
            new = float(new)
        if type(new) is not type(old):
            raise ConeslabError(f"{path} is {old!r}: give a {type(old).__name__}, not {value}")
        section[name] = new
    return recipe
