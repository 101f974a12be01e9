"""What a callback gets: one dictionary, with the same keys for every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

#: Called after each step with a dictionary. "step" (from 0) and "steps" (how many in all, None if unknown) are always
#: in it, "loss" wherever one is minimised; functions that take a callback name further keys.
Callback: TypeAlias = Callable[[Mapping[str, Any]], object]
