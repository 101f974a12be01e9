"""Names that a package offers and imports on first use: torch, diffusers and pandas take seconds to import."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package that offers names of its modules.

    homes: module, relative to the package -> its names. Type checkers see none of this: give them the imports under
    `if TYPE_CHECKING`. Raises ValueError for a name with two homes.
    """
    module_of = {name: module for module, names in homes.items() for name in names}
    if len(module_of) < sum(map(len, homes.values())):
        raise ValueError(f"{package} has a name from two of its modules: leave one out")

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{module_of[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return get, names, sorted(module_of)
